"""The definition: integrated gradients with whole prompts, one batch row per (site, layer, step).

Each row interpolates one site of one layer and leaves the rest of the network to follow, so all layers are attributed
at once without disturbing each other. Scaling every layer in the same row would overwrite the later layers and cut the
earlier ones off from all but their direct path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..models import Model, last_logits
from ..neurons import Site, hook_name
from ..prompts import Prompt
from .quadrature import QuadratureRule
from .target import Target

T = TypeVar("T")

Positions = Literal["last", "all"]
"""Which positions are interpolated: the one whose logits are read (Dai et al.), or all together, scores summed."""

Place = tuple[Site, int]
"""A site of a layer."""


@dataclass(frozen=True, eq=False)
class PromptScores:
    """Scores of one prompt: one entry per target."""

    scores: list[dict[Site, Float[Tensor, "layer _"]]]
    change: list[dict[Site, Float[Tensor, " layer"]]]


def activations(
    model: Model, prompt: Prompt, sites: Sequence[Site], positions: Positions
) -> tuple[dict[Site, Float[Tensor, "layer position _"]], Float[Tensor, "1 vocab"]]:
    """The prompt's own activations at the positions to be interpolated, and its last logits."""
    kept: dict[str, Tensor] = {}
    names = {hook_name(site, layer) for site in sites for layer in range(model.cfg.n_layers)}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = (value if positions == "all" else value[:, -1:])[0].flatten(1)

    tokens = torch.tensor([prompt.token_ids], device=model.cfg.device)
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        logits = last_logits(model, tokens)
    of_site: dict[Site, Tensor] = {
        site: torch.stack([kept[hook_name(site, layer)] for layer in range(model.cfg.n_layers)]) for site in sites
    }
    return {site: value.to(torch.promote_types(value.dtype, torch.float32)) for site, value in of_site.items()}, logits


def attribute_prompt(
    model: Model,
    prompt: Prompt,
    *,
    rule: QuadratureRule,
    targets: Sequence[Target],
    baseline: Mapping[Site, Float[Tensor, "layer _"]],
    sites: Sequence[Site],
    positions: Positions,
    batch_size: int,
) -> PromptScores:
    """Integrate the gradients of every target for one prompt (paper eq. 3-4), for every layer of every site.

    Args:
        batch_size: whole prompts in one pass.
    """
    own, logits = activations(model, prompt, sites, positions)
    places: list[Place] = [(site, layer) for site in sites for layer in range(model.cfg.n_layers)]
    start = {(site, layer): baseline[site][layer].to(own[site]) for site, layer in places}
    delta = {(site, layer): own[site][layer] - start[site, layer] for site, layer in places}
    scores: list[dict[Site, Tensor]] = [{s: torch.zeros_like(own[s][:, 0]) for s in sites} for _ in targets]
    change: list[dict[Site, Tensor]] = [{s: torch.zeros_like(own[s][:, 0, 0]) for s in sites} for _ in targets]

    for chunk in _chunks([(place, step) for place in places for step in range(rule.n_steps)], batch_size):
        steps = {place: [step for _, step in group] for place, group in groupby(chunk, key=lambda row: row[0])}
        paths = {
            place: (start[place] + rule.nodes[which].to(start[place])[:, None, None] * delta[place]).requires_grad_()
            for place, which in steps.items()
        }
        with torch.enable_grad():
            logits_along = _run(model, prompt, paths, positions)
            values = [target(logits_along, prompt).sum() for target in targets]
        for index, value in enumerate(values):
            gradients = torch.autograd.grad(value, list(paths.values()), retain_graph=index + 1 < len(values))
            for (site, layer), gradient in zip(paths, gradients, strict=True):
                weights = rule.weights[steps[site, layer]].to(gradient)
                weighted = torch.einsum("s,spn->pn", weights, gradient)
                scores[index][site][layer] += (delta[site, layer] * weighted).sum(0)

    with torch.no_grad():
        for chunk in _chunks(places, batch_size):
            ends = {place: start[place].expand_as(delta[place])[None] for place in chunk}
            logits_at_baseline = _run(model, prompt, ends, positions)
            for index, target in enumerate(targets):
                missing = target(logits, prompt) - target(logits_at_baseline, prompt)
                for (site, layer), value in zip(chunk, missing, strict=True):
                    change[index][site][layer] = value
    return PromptScores(scores, change)


def _run(
    model: Model, prompt: Prompt, paths: Mapping[Place, Float[Tensor, "_ position _"]], positions: Positions
) -> Float[Tensor, "row vocab"]:
    """Last logits of whole prompts, each with one site of one layer replaced; rows in the order of `paths`."""
    n_rows = sum(len(path) for path in paths.values())
    tokens = torch.tensor([prompt.token_ids], device=model.cfg.device).expand(n_rows, -1)
    at = slice(None) if positions == "all" else slice(-1, None)
    hooks, first = [], 0
    for (site, layer), path in paths.items():
        rows = slice(first, first + len(path))
        first += len(path)

        def replace(value: Tensor, hook: object, rows: slice = rows, path: Tensor = path) -> Tensor:
            value = value.clone()
            value[rows, at] = path.to(value.dtype).reshape(value[rows, at].shape)
            return value

        hooks.append((hook_name(site, layer), replace))
    with model.hooks(fwd_hooks=hooks):
        return last_logits(model, tokens)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
