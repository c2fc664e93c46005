"""The model that every stage takes, of either kind, and what a stage may ask of it. No other module knows which kind it is."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.supported_models import MODEL_ALIASES

from ..errors import BadInput
from ..neurons import NeuronSpace
from .backend import Backend, BackendName, Hooks, Prefix, Siblings
from .hooked import Hooked, assemble, build_model, freeze, lay_out_weights, load_from_transformer_lens

__all__ = [
    "Backend",
    "BackendName",
    "Hooks",
    "Model",
    "Prefix",
    "Siblings",
    "assemble",
    "backend_of",
    "build_model",
    "check_model",
    "freeze",
    "last_logits",
    "lay_out_weights",
    "load_from_transformer_lens",
    "neuron_space",
    "official_name",
]

Model: TypeAlias = HookedTransformer
"""The kind of model that every stage takes."""


def backend_of(model: object) -> Backend:
    """A model as the stages see it.

    Raises:
        BadInput: it is of no kind that is known.
    """
    if isinstance(model, HookedTransformer):
        return Hooked(model)
    raise BadInput(f"expected a HookedTransformer, got {type(model).__name__}; load the model with load_model(...)")


def official_name(source: str) -> str:
    """Resolve TransformerLens' short names ('gpt2-small'); everything else stays."""
    aliases = {alias: official for official, names in MODEL_ALIASES.items() for alias in names}
    return aliases.get(source, source)


def neuron_space(model: Model) -> NeuronSpace:
    """The sizes of a model's neuron space."""
    return backend_of(model).space


def check_model(model: object) -> None:
    """Refuse, or warn about, models in which hook_z and hook_post are not what the paper calls neurons.

    Raises:
        BadInput: mixture of experts, encoders, or `refactor_factored_attn_matrices`, which rotates the basis of z.
    """
    backend_of(model).check()


def last_logits(
    model: Model, tokens: Int[Tensor, "row column"], mask: Int[Tensor, "row column"] | None = None
) -> Float[Tensor, "row vocab"]:
    """Logits at the last position only, in at least float32; rows may be padded on the left."""
    return backend_of(model).last_logits(tokens, mask=mask)
