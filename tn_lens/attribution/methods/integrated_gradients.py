"""The integral itself, written once: paths, gradients and sums, for whichever engine runs the model (paper eq. 3-4)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.quadrature import QuadratureRule
from tn_lens.attribution.target import Target
from tn_lens.neurons.neuron import Site, hook_name
from tn_lens.prompts import Prompt

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

    def carry(self, place: Place, activation: Float[Tensor, "*batch neuron"]) -> Float[Tensor, "*batch _"]:
        """Where the path of a place is walked: at its activation, or at what a linear map makes of it."""
        ...

    def carry_back(self, place: Place, gradient: Float[Tensor, "*batch _"]) -> Float[Tensor, "*batch neuron"]:
        """The gradient at the activation, from the one where the path is walked."""
        ...

    def run(
        self,
        paths: Mapping[Place, Float[Tensor, "prompt _ position _"]],
        nudges: Mapping[Place, Float[Tensor, "prompt 1 position _"]],
    ) -> Float[Tensor, "prompt row _"]:
        """What the last logits are made of, with one site of one layer replaced in each row; rows in the order of `paths`.

        Args:
            nudges: added to the activations of one more row, the first, in which nothing is replaced; no such row if empty.
        """
        ...

    def logits_of(self, final: Float[Tensor, "prompt row _"]) -> Float[Tensor, "prompt row vocab"]:
        """Logits in at least float32, of all rows or some."""
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
    zero = {site: baseline[site].to(here) for site, here in own.items()}
    delta = {site: here - zero[site][:, None] for site, here in own.items()}
    start: dict[Place, Tensor] = {}
    way: dict[Place, Tensor] = {}
    for place in places:
        site, layer = place
        begin = zero[site][layer].expand_as(own[site][:1, layer])
        carried = engine.carry(place, torch.cat([begin, delta[site][:, layer]]))
        start[place], way[place] = carried[0, 0], carried[1:]
    scores: list[dict[Site, Tensor]] = [{s: torch.zeros_like(own[s][:, :, 0]) for s in own} for _ in targets]
    change: list[dict[Site, Tensor]] = [{s: torch.zeros_like(own[s][:, :, 0, 0]) for s in own} for _ in targets]

    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), rule.nodes])  # the baseline itself, for `change`
    reached = [_values(target, engine.logits[:, None], engine.prompts)[:, 0] for target in targets]
    along = [node for node in range(len(nodes)) if nodes[node] != 1]
    at_end = float(rule.weights[rule.nodes == 1].sum())
    rows: list[tuple[Place, int] | None] = [(place, node) for place in places for node in along]
    if at_end:  # where all paths end is one and the same row
        rows.insert(0, None)
    for chunk in _chunks(rows, n_rows):
        nudges: dict[Place, Tensor] = {}
        if chunk[0] is None:
            nudges = {(s, layer): torch.zeros_like(delta[s][:, None, layer]).requires_grad_() for s, layer in places}
        inner = [row for row in chunk if row is not None]
        of_place = {place: [node for _, node in group] for place, group in groupby(inner, key=lambda row: row[0])}
        paths = {
            place: (start[place] + nodes[which].to(start[place])[:, None, None] * way[place][:, None]).requires_grad_()
            for place, which in of_place.items()
        }
        with torch.enable_grad():
            final = engine.run(paths, nudges)
        leaves = [*paths.values(), *nudges.values()]
        for index, (value, at_final) in enumerate(_read(engine, final, targets)):
            gradients = torch.autograd.grad(final, leaves, at_final, retain_graph=index + 1 < len(targets))
            first = len(chunk) - len(inner)
            for (place, which), gradient in zip(of_place.items(), gradients[: len(paths)], strict=True):
                site, layer = place
                steps = [node - 1 for node in which if node > 0]
                if len(steps) < len(which):
                    change[index][site][:, layer] = reached[index] - value[:, first]
                weighted = einsum(
                    rule.weights[steps].to(gradient),
                    gradient[:, len(which) - len(steps) :],
                    "step, prompt step position neuron -> prompt position neuron",
                )
                scores[index][site][:, layer] += (delta[site][:, layer] * engine.carry_back(place, weighted)).sum(1)
                first += len(which)
            for site in own if nudges else ():
                of_site = [g for (of, _), g in zip(nudges, gradients[len(paths) :], strict=True) if of == site]
                scores[index][site] += at_end * (delta[site] * torch.cat(of_site, dim=1)).sum(2)
    return BatchScores(scores, change)


def replacing(
    paths: Mapping[Place, Float[Tensor, "prompt _ position _"]],
    nudges: Mapping[Place, Float[Tensor, "prompt 1 position _"]],
    where: Callable[[slice], tuple[slice, slice]],
    beyond: Container[Place] = (),
) -> list[Any]:
    """Hooks that put each path into its own rows, and add the nudges to the first row.

    Args:
        where: from rows to the indices, over batch and position, at which an engine keeps them.
        beyond: places whose rows begin behind them, and need no hook.
    """

    def setting(place: Place, rows: tuple[slice, slice], new: Tensor, add: bool) -> Any:
        def put(value: Tensor, hook: object) -> Tensor:
            value = value.clone()
            here = new.to(value.dtype).reshape(value[rows].shape)
            value[rows] = value[rows] + here if add else here
            return value

        site, layer = place
        return hook_name(site, layer), put

    hooks = [setting(place, where(slice(1)), nudge, add=True) for place, nudge in nudges.items()]
    first = 1 if nudges else 0
    for place, path in paths.items():
        if place not in beyond:
            hooks.append(setting(place, where(slice(first, first + path.shape[1])), path, add=False))
        first += path.shape[1]
    return hooks


ROWS_UNEMBEDDED = 128
"""Rows whose logits exist at a time: enough to fill the product with W_U, and the only ones that cost memory by vocabulary."""


def _read(
    engine: Engine, final: Float[Tensor, "prompt row _"], targets: Sequence[Target]
) -> list[tuple[Float[Tensor, "prompt row"], Float[Tensor, "prompt row _"]]]:
    """Each target's values, and its gradient at what the logits are made of."""
    read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in targets]
    for part in final.detach().split(max(1, ROWS_UNEMBEDDED // len(final)), dim=1):
        leaf = part.requires_grad_()
        with torch.enable_grad():
            logits = engine.logits_of(leaf)
            values = [_values(target, logits, engine.prompts) for target in targets]
        for index, value in enumerate(values):
            (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=index + 1 < len(values))
            read[index].append((value.detach(), gradient))
    return [(torch.cat([v for v, _ in parts], dim=1), torch.cat([g for _, g in parts], dim=1)) for parts in read]


def _values(
    target: Target, logits: Float[Tensor, "prompt row vocab"], prompts: Sequence[Prompt]
) -> Float[Tensor, "prompt row"]:
    return torch.stack([target(of_prompt, prompt) for of_prompt, prompt in zip(logits, prompts, strict=True)])


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
