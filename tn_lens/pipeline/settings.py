"""Fill in and check the settings of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import resources
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tn_lens.attribution.attribute import check_method, choose_engine, error_control
from tn_lens.attribution.baseline import check_baseline
from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.core.settings import Settings, default_memory
from tn_lens.evaluation.controls import CONTROLS
from tn_lens.evaluation.damage import check_bound
from tn_lens.evaluation.reference import PAPER
from tn_lens.inference.interventions import intervention_called
from tn_lens.models import Model, backend_of
from tn_lens.neurons import SITES
from tn_lens.questions.formats import FORMATS
from tn_lens.selection.table import Rules, check_thresholds

PAPER_THRESHOLDS: Mapping[str, float] = {model: row.t for model, row in PAPER.items()}
"""The adaptive thresholds t of the paper's table 3, as fractions."""


def resolve_settings(model: Model, settings: Settings) -> Settings:
    """Fill in unset settings: the model's recommended t and order, otherwise t = 0.2 and "random"; max_memory and engine.

    Raises:
        BadInput: a value is out of range or unknown; raised before anything is computed.
    """
    if not isinstance(settings, Settings):
        raise BadInput(f"expected Settings, got {settings!r:.60}; pass tn.Settings(order='both', ...)")
    memory = default_memory(backend_of(model).device.type)
    known = {f.name: f.default for f in fields(Settings)}
    known |= {"adaptive_threshold": 0.2, "order": "random", "max_memory": memory, **recommended_settings(model)}
    unset = {name: value for name, value in known.items() if getattr(settings, name) is None}
    settings = replace(settings, **unset)
    _check_numbers(settings)
    for name, hint in get_type_hints(Settings).items():
        words = [word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
        value = getattr(settings, name)
        is_unset = value is None and type(None) in get_args(hint)
        if words and name != "adaptive_threshold" and not is_unset and value not in words:
            expected = f"one of {', '.join(map(repr, words))}" if len(words) > 1 else repr(words[0])
            raise BadInput(f"{name} must be {expected}; got {value!r}")
    for registry, names in (
        (SITES, settings.sites),
        (CONTROLS, settings.controls),
        (FORMATS, () if settings.format is None else (settings.format,)),
    ):
        for name in names:
            registry[name]  # raises for unknown names
    if settings.separate and settings.target != "probability_difference":
        raise BadInput(
            f"separate stores Attr_t as well as D, which requires the target probability_difference; got {settings.target!r}"
        )
    check_baseline(settings.baseline, settings.positions)
    intervention_called(settings.intervention)
    method = check_method(settings.method, settings.n_steps, settings.baseline, settings.positions)
    if method.uses_counterparts and settings.order != "both":
        raise BadInput(
            f"{settings.method} compares each prompt with the same question in another order; use order='both' "
            f"(--order both) instead of {settings.order!r}"
        )
    error_control(settings.method, settings.n_steps, settings.tolerance, settings.max_nodes)
    generator(settings.seed)
    return replace(settings, engine=choose_engine(model, settings.engine, settings.positions))


def _check_numbers(settings: Settings) -> None:
    t = None if settings.adaptive_threshold == "auto" else settings.adaptive_threshold
    numbers = {"adaptive_threshold (t)": t, "share_threshold (p)": settings.share_threshold, "alpha": settings.alpha}
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            also = ", or 'auto'" if name.startswith("adaptive") else ""
            raise BadInput(f"{name} must be a number in (0, 1]{also}; got {value!r}")
    check_thresholds(t, rules_of(settings))  # pyright: ignore[reportArgumentType]
    for name in ("n_steps", "n_repetitions", "limit", "max_memory"):
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BadInput(f"{name} must be a positive integer; got {value!r}")
    check_bound("damage_bound", settings.damage_bound)
    n = settings.convergence_sample
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise BadInput(f"convergence_sample must be a number of questions, or 0 for no check; got {n!r}")


def rules_of(settings: Settings) -> Rules:
    """The selection rules in the settings."""
    return Rules(**settings.of_selection())


def recommended_settings(model: Model) -> dict[str, Any]:
    """Recommended settings: t for the paper's six models (table 3), t and the order for the toy, none for others."""
    name = backend_of(model).name
    if name == "toy":
        content = resources.files("tn_lens.toy").joinpath("model/tn_lens.json").read_text(encoding="utf-8")
        return json.loads(content)
    return {"adaptive_threshold": PAPER_THRESHOLDS[name]} if name in PAPER_THRESHOLDS else {}
