"""Attribution methods by name; add one with `METHODS.register("name", Method(...))`."""

from tn_lens.attribution.methods import gradients as gradients
from tn_lens.attribution.methods import integrated_gradients as integrated_gradients
from tn_lens.attribution.methods.method import METHODS, BatchScores, Engine, Method, Place

__all__ = ["METHODS", "BatchScores", "Engine", "Method", "Place"]
