"""What decides a run's numbers besides the model and the questions, and what is known to suit a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from importlib import resources
from typing import Any, Literal, get_args

from tn_lens.attribution.attribute import MAX_MEMORY, EngineName, choose_engine, default_memory
from tn_lens.attribution.engines.direct import Positions
from tn_lens.attribution.quadrature import Method, quadrature_rule
from tn_lens.attribution.target import TargetName
from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.evaluation.reference import PAPER
from tn_lens.models import Model, backend_of
from tn_lens.prompts import Order
from tn_lens.selection.select import Family, check_thresholds
from tn_lens.selection.significance import Correction


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's numbers, besides the model and the questions."""

    t: float | Literal["auto"]
    """Adaptive threshold (paper 2.3, A.3); "auto" searches for it on questions that serve nothing else."""
    p: float = 0.4
    """Share threshold (paper 2.3, 3.1)."""
    alpha: float = 0.05
    """Level of the held-out test (paper 2.2)."""
    correction: Correction = "bonferroni"
    family: Family = "candidates"
    """What the correction counts as tested."""
    order: Order = "random"
    n_steps: int = 20
    """m of the paper's equation 4."""
    method: Method = "riemann_right"
    baseline: Literal["zero", "mean"] = "zero"
    positions: Positions = "last"
    target: TargetName = "probability_difference"
    separate: bool = False
    """Store Attr_t beside D, for another backward pass and twice the space."""
    engine: EngineName = "auto"
    """The shared prefix where the model can take it, else whole prompts; the scores are the same."""
    max_memory: int = MAX_MEMORY["cpu"]
    """Bytes that one pass of attribution may take above the weights (more on CUDA by default, where it is faster)."""
    n_repetitions: int = 10
    """Of the evaluation (paper 3.3)."""
    seed: int = 0
    limit: int | None = None
    """Use only so many questions, drawn with the seed."""

    def of_attribution(self) -> dict[str, Any]:
        """Arguments of `attribute` but the baseline, which takes prompts, and `separate`, which only a run's own scores need."""
        names = ("n_steps", "method", "positions", "target", "engine", "max_memory")
        return {name: getattr(self, name) for name in names}


OPTIONS: Mapping[str, tuple[str, ...]] = {
    "correction": get_args(Correction),
    "family": get_args(Family),
    "order": get_args(Order),
    "method": get_args(Method),
    "baseline": ("zero", "mean"),
    "positions": get_args(Positions),
    "target": get_args(TargetName),
    "engine": get_args(EngineName),
}
"""What the settings that are words may be."""


def resolve_settings(model: Model, **given: Any) -> Settings:
    """Fill what was not given: the model's recommended t and order (paper table 3), else t = 0.2 and "random"; the memory
    of its device.

    Raises:
        BadInput: a threshold outside (0, 1], or another value out of range, before anything is computed.
    """
    fields = {field.name: field for field in dataclass_fields(Settings)}
    if unknown := sorted(given.keys() - fields.keys()):
        raise BadInput(f"unknown setting {unknown[0]!r}: expected {', '.join(fields)}")
    known = {"t": 0.2, "max_memory": default_memory(backend_of(model).device.type), **recommended_settings(model)}
    settings = Settings(**(known | {key: value for key, value in given.items() if value is not None}))
    t = None if settings.t == "auto" else settings.t
    for name, value in (("t", t), ("p", settings.p), ("alpha", settings.alpha)):
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            also = ", or 'auto'" if name == "t" else ""
            raise BadInput(f"{name} must be a number{also}; got {value!r}")
    check_thresholds(t=t, p=settings.p, alpha=settings.alpha)
    for name in ("n_steps", "n_repetitions", "limit", "max_memory"):
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BadInput(f"{name} must be a whole number and at least 1; got {value!r}")
    for name, options in OPTIONS.items():
        if getattr(settings, name) not in options:
            raise BadInput(f"expected {name} {', '.join(map(repr, options))}; got {getattr(settings, name)!r}")
    if settings.separate and settings.target != "probability_difference":
        raise BadInput(
            f"separate stores Attr_t beside D, which only probability_difference has; got {settings.target!r}"
        )
    quadrature_rule(settings.method, settings.n_steps)
    choose_engine(model, settings.engine, settings.positions)
    generator(settings.seed)
    return settings


def recommended_settings(model: Model) -> dict[str, Any]:
    """What is known to suit a model: t for the paper's six (table 3), t and the order for the toy, else nothing."""
    name = backend_of(model).name
    if name == "toy":
        return json.loads(resources.files("tn_lens.toy").joinpath("model/tn_lens.json").read_text(encoding="utf-8"))
    return {"t": PAPER_THRESHOLDS[name]} if name in PAPER_THRESHOLDS else {}


PAPER_THRESHOLDS: Mapping[str, float] = {model: row.t for model, row in PAPER.items()}
"""The adaptive thresholds t of the paper's table 3, as fractions."""
