"""Baselines: where the paths of integrated gradients begin (paper eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.methods import METHODS
from tn_lens.core.errors import BadInput
from tn_lens.core.options import BaselineInput, BaselineName, Positions
from tn_lens.inference.baselines import input_activations
from tn_lens.inference.means import mean_activations
from tn_lens.models import Model, backend_of
from tn_lens.neurons import NeuronSpace, SiteName
from tn_lens.questions.prompts import PromptSet

Baseline: TypeAlias = BaselineName | Mapping[SiteName, Float[Tensor, "*prompt layer _"]]
"""Start of the integration path: zero activation, the mean over the prompts, the activation on a baseline input, or given values
by site, for all prompts [layer, neuron] or for each [prompt, layer, neuron]."""


def resolve_baseline(
    model: Model,
    prompts: PromptSet,
    baseline: Baseline,
    space: NeuronSpace,
    positions: Positions,
    baseline_input: BaselineInput = "end_of_text",
) -> Mapping[SiteName, Float[Tensor, "*prompt layer _"]]:
    """The values of a named baseline, or given values after validation.

    Values that all prompts share are on the model's device; those of single prompts stay where they are.

    Raises:
        BadInput: the name is unknown, or the values have the wrong shape.
    """
    check_baseline(baseline, positions)
    shapes = {site: (space.n_layers, space.width(site)) for site in space.sites}
    if isinstance(baseline, str):
        match baseline:
            case "zero":
                values = {site: torch.zeros(shape) for site, shape in shapes.items()}
            case "mean":
                values = mean_activations(model, prompts, positions=positions, sites=space.sites)
            case "input":
                values = input_activations(model, prompts, baseline_input, sites=space.sites)
            case _:
                raise BadInput(f"expected baseline 'zero', 'mean', 'input' or a tensor per site, got {baseline!r}")
    else:
        values = baseline
    for site, expected in shapes.items():
        given = tuple(values[site].shape) if site in values else "nothing"
        if given not in (expected, (len(prompts), *expected)):
            raise BadInput(
                f"expected a baseline of shape {expected} (layer, neuron) for site {site!r}, or {(len(prompts), *expected)} with "
                f"one row per prompt, got {given}"
            )
    device = backend_of(model).device
    return {site: values[site].to(device) if values[site].ndim == 2 else values[site] for site in space.sites}


def check_baseline(baseline: Baseline, positions: Positions) -> None:
    """Check that a baseline is defined at the attributed positions.

    Raises:
        BadInput: the activation on a baseline input was requested at all positions.
    """
    if isinstance(baseline, str) and baseline == "input" and positions == "all":
        raise BadInput(
            "the baseline 'input' is an activation at the last position, but positions is 'all'; use positions='last', or the "
            "baseline 'zero' or 'mean'"
        )


def rows_of(
    baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]], rows: slice
) -> Mapping[SiteName, Float[Tensor, "*row layer _"]]:
    """The baseline of some of the prompts, or of all if they share it."""
    return {site: values if values.ndim == 2 else values[rows] for site, values in baseline.items()}


def post_norm_warning(
    model: Model, method: str, baseline: Baseline, baseline_input: BaselineInput = "end_of_text"
) -> str | None:
    """The warning about a zero baseline in a model that normalizes after W_O and W_out; None if it does not apply."""
    # these models have no biases, so zero embeddings give zero activations
    zeros = ("zero",) if baseline_input != "zero_embeddings" else ("zero", "input")
    is_zero = isinstance(baseline, str) and baseline in zeros
    used = METHODS[method]
    if not backend_of(model).is_post_norm or not is_zero or used.sees_edge or used.uses_counterparts:
        return None
    return (
        "this model normalizes after W_O and W_out, so f(alpha z) hardly depends on alpha except close to the zero baseline, "
        f"where {method} has no nodes: the ranking within a site is meaningful, but the magnitude of the scores is not, and "
        "completeness does not hold; use method='graded' or baseline='mean'"
    )
