"""The integral itself, written once: paths, gradients and sums, for whichever engine runs the model (paper eq. 3-4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..neurons import Site, hook_name
from ..prompts import Prompt
from .quadrature import QuadratureRule
from .target import Target

T = TypeVar("T")

Place = tuple[Site, int]
"""A site of a layer."""


@runtime_checkable
class Engine(Protocol):
    """Some prompts, run once, and ready to be run again with activations replaced."""

    prompts: list[Prompt]
    own: dict[Site, Float[Tensor, "prompt layer position _"]]
    """The activations that are interpolated, in at least float32."""
    logits: Float[Tensor, "prompt vocab"]
    """Last logits of the untouched prompts."""

    def run(self, paths: Mapping[Place, Float[Tensor, "prompt _ position _"]]) -> Float[Tensor, "prompt row vocab"]:
        """Last logits with one site of one layer replaced in each row; rows in the order of `paths`."""
        ...


@dataclass(frozen=True, eq=False)
class BatchScores:
    """Scores of some prompts: one entry per target."""

    scores: list[dict[Site, Float[Tensor, "prompt layer _"]]]
    change: list[dict[Site, Float[Tensor, "prompt layer"]]]


def integrate(
    engine: Engine,
    *,
    rule: QuadratureRule,
    targets: Sequence[Target],
    baseline: Mapping[Site, Float[Tensor, "layer _"]],
    n_rows: int,
) -> BatchScores:
    """Integrate the gradients of every target, for every layer of every site, one row per (site, layer, step).

    Each row interpolates one site of one layer and leaves the rest of the network to follow, so all layers are attributed
    at once without disturbing each other. Scaling every layer in the same row would overwrite the later layers and cut
    the earlier ones off from all but their direct path.

    Args:
        n_rows: rows in one pass.
    """
    own = engine.own
    n_layers = next(iter(own.values())).shape[1]
    places: list[Place] = [(site, layer) for layer in range(n_layers) for site in own]
    start = {(site, layer): baseline[site][layer].to(own[site]) for site, layer in places}
    delta = {(site, layer): own[site][:, layer] - start[site, layer] for site, layer in places}
    scores: list[dict[Site, Tensor]] = [{s: torch.zeros_like(own[s][:, :, 0]) for s in own} for _ in targets]
    change: list[dict[Site, Tensor]] = [{s: torch.zeros_like(own[s][:, :, 0, 0]) for s in own} for _ in targets]

    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), rule.nodes])  # the baseline itself, for `change`
    reached = [_values(target, engine.logits[:, None], engine.prompts)[:, 0] for target in targets]
    for chunk in _chunks([(place, node) for place in places for node in range(len(nodes))], n_rows):
        of_place = {place: [node for _, node in group] for place, group in groupby(chunk, key=lambda row: row[0])}
        paths = {
            place: (
                start[place] + nodes[which].to(start[place])[:, None, None] * delta[place][:, None]
            ).requires_grad_()
            for place, which in of_place.items()
        }
        with torch.enable_grad():
            logits = engine.run(paths)
            values = [_values(target, logits, engine.prompts) for target in targets]
        for index, value in enumerate(values):
            gradients = torch.autograd.grad(value.sum(), list(paths.values()), retain_graph=index + 1 < len(values))
            first = 0
            for (place, which), gradient in zip(of_place.items(), gradients, strict=True):
                site, layer = place
                steps = [node - 1 for node in which if node > 0]
                if len(steps) < len(which):
                    change[index][site][:, layer] = reached[index] - value[:, first].detach()
                weighted = einsum(
                    rule.weights[steps].to(gradient),
                    gradient[:, len(which) - len(steps) :],
                    "step, prompt step position neuron -> prompt position neuron",
                )
                scores[index][site][:, layer] += (delta[place] * weighted).sum(1)
                first += len(which)
    return BatchScores(scores, change)


def replacing(
    paths: Mapping[Place, Float[Tensor, "prompt _ position _"]], where: Callable[[slice], tuple[slice, slice]]
) -> list[Any]:
    """Hooks that put each path into its own rows.

    Args:
        where: from rows to the indices, over batch and position, at which an engine keeps them.
    """
    hooks: list[Any] = []
    first = 0
    for (site, layer), path in paths.items():
        rows = where(slice(first, first + path.shape[1]))
        first += path.shape[1]

        def replace(value: Tensor, hook: object, rows: tuple[slice, slice] = rows, path: Tensor = path) -> Tensor:
            value = value.clone()
            value[rows] = path.to(value.dtype).reshape(value[rows].shape)
            return value

        hooks.append((hook_name(site, layer), replace))
    return hooks


def _values(
    target: Target, logits: Float[Tensor, "prompt row vocab"], prompts: Sequence[Prompt]
) -> Float[Tensor, "prompt row"]:
    return torch.stack([target(of_prompt, prompt) for of_prompt, prompt in zip(logits, prompts, strict=True)])


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
