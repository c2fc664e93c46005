"""The straight paths from the baseline to the activations, and the values and gradients of the targets on them.

A row is one copy of a prompt's last position in which one site of one layer is moved to a point n' + alpha (n - n') of its
path. `Paths` computes the points, and `evaluate` runs the rows in passes and differentiates the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.methods.method import Engine, Place
from tn_lens.attribution.target import Target
from tn_lens.neurons import SiteName, hook_name
from tn_lens.questions.prompts import Prompt

ROWS_UNEMBEDDED = 128
"""Maximum number of rows whose logits exist at a time: enough for an efficient product with W_U, and a bound on its memory."""

Alphas: TypeAlias = Mapping[Place, Float[Tensor, "_ node"]]
"""Nodes alpha at which each path is evaluated: one row of nodes for each prompt, or one for all prompts."""


class Paths:
    """The straight paths of the sites and layers to attribute, from the baseline to the activations of the prompts."""

    def __init__(self, engine: Engine, baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]]) -> None:
        self.engine = engine
        n_layers = next(iter(engine.own.values())).shape[1]
        every = range(n_layers)
        self.places: list[Place] = [
            (site, layer) for layer in every for site in engine.own if layer in engine.layers.get(site, every)
        ]
        # [prompt, layer, position, neuron], with one prompt if all prompts share the baseline
        start = {
            site: baseline[site].to(activation).reshape(-1, n_layers, 1, activation.shape[-1])
            for site, activation in engine.own.items()
        }
        self.delta = {site: activation - start[site] for site, activation in engine.own.items()}
        """n - n', [prompt, layer, position, neuron]."""
        self.start: dict[Place, Tensor] = {}
        self.direction: dict[Place, Tensor] = {}
        for site, layer in self.places:
            # the baselines and all prompts' differences go through the engine's linear map together
            begin = start[site][:, layer].expand(-1, self.delta[site].shape[2], -1)
            carried = engine.carry((site, layer), torch.cat([begin, self.delta[site][:, layer]]))
            # [prompt, 1 (all nodes), 1 (all positions), vector] and [prompt, position, vector]
            n = len(begin)
            self.start[site, layer], self.direction[site, layer] = carried[:n, None, :1], carried[n:]

    def points(self, place: Place, alphas: Float[Tensor, "_ node"]) -> Float[Tensor, "prompt node position _"]:
        """The points of a path at some nodes."""
        at = alphas.to(self.start[place])[:, :, None, None]
        return self.start[place] + at * self.direction[place][:, None]

    def nudges(self) -> dict[Place, Float[Tensor, "prompt 1 position _"]]:
        """Zeros that are added to the activations in a row, to differentiate with respect to them at the ends of all paths."""
        return {
            (site, layer): torch.zeros_like(self.delta[site][:, None, layer]).requires_grad_()
            for site, layer in self.places
        }

    def zeros(self) -> dict[SiteName, Float[Tensor, "prompt layer _"]]:
        """One number for every neuron of every prompt."""
        return {site: torch.zeros_like(delta[:, :, 0]) for site, delta in self.delta.items()}

    def zeros_by_layer(self) -> dict[SiteName, Float[Tensor, "prompt layer"]]:
        """One number for every site and layer of every prompt."""
        return {site: torch.zeros_like(delta[:, :, 0, 0]) for site, delta in self.delta.items()}


@dataclass(frozen=True)
class Part:
    """Values and gradients at some nodes of one path; both lists have one entry for each target."""

    place: Place
    nodes: slice
    """Which of the path's nodes."""
    values: list[Float[Tensor, "prompt node"]]
    gradients: list[Float[Tensor, "prompt node position _"]]


@dataclass(frozen=True)
class Ends:
    """The gradients at the ends of all paths, where nothing is replaced; one entry for each target."""

    gradients: list[dict[Place, Float[Tensor, "prompt 1 position _"]]]


def reached(engine: Engine, targets: Sequence[Target]) -> list[Float[Tensor, " prompt"]]:
    """The value of each target on the prompts themselves, at the ends of the paths."""
    return [_values(target, engine.logits[:, None], engine.prompts)[:, 0] for target in targets]


def evaluate(
    paths: Paths, targets: Sequence[Target], alphas: Alphas, n_rows: int, *, with_ends: bool = False
) -> Iterator[Part | Ends]:
    """Run the rows in passes of at most `n_rows`, and differentiate every target.

    Each row interpolates one site of one layer, and everything downstream is recomputed, so that all layers are attributed
    in the same pass without affecting each other. Scaling every layer in the same row would overwrite the later layers
    and leave only the direct path of the earlier ones.

    Args:
        paths: the paths.
        targets: functions of the last logits.
        alphas: nodes by place, in the order of `Paths.places`.
        n_rows: number of rows of each prompt in one pass.
        with_ends: whether one more row, in which nothing is replaced, gives the gradients at the ends of all paths.
    """
    rows: list[tuple[Place, int] | None] = [
        (place, node) for place, nodes in alphas.items() for node in range(nodes.shape[1])
    ]
    if with_ends:
        rows.insert(0, None)
    for first in range(0, len(rows), n_rows):
        part = rows[first : first + n_rows]
        slices: dict[Place, slice] = {}
        for row in part:
            if row is not None:
                place, node = row
                slices[place] = slice(slices[place].start if place in slices else node, node + 1)
        yield from _run(paths, targets, alphas, slices, has_ends=part[0] is None)


def _run(
    paths: Paths, targets: Sequence[Target], alphas: Alphas, slices: Mapping[Place, slice], *, has_ends: bool
) -> Iterator[Part | Ends]:
    """One pass."""
    engine = paths.engine
    points = {place: paths.points(place, alphas[place][:, nodes]).requires_grad_() for place, nodes in slices.items()}
    nudges = paths.nudges() if has_ends else {}
    with torch.enable_grad():
        final = engine.run(points, nudges)
    leaves = [*points.values(), *nudges.values()]
    values, gradients = [], []
    for index, (value, at_final) in enumerate(read_targets(engine, final, targets)):
        is_last = index + 1 == len(targets)
        values.append(value)
        gradients.append(torch.autograd.grad(final, leaves, at_final, retain_graph=not is_last))
    first = int(has_ends)
    for index, (place, nodes) in enumerate(slices.items()):
        rows = slice(first, first + nodes.stop - nodes.start)
        yield Part(place, nodes, [value[:, rows] for value in values], [each[index] for each in gradients])
        first = rows.stop
    if has_ends:
        yield Ends([dict(zip(nudges, each[len(slices) :], strict=True)) for each in gradients])


def read_targets(
    engine: Engine, final: Float[Tensor, "prompt row _"], targets: Sequence[Target]
) -> list[tuple[Float[Tensor, "prompt row"], Float[Tensor, "prompt row _"]]]:
    """Each target's values, and its gradient with respect to the rows' final vectors."""
    read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in targets]
    for part in _parts(final.detach()):
        leaf = part.requires_grad_()
        with torch.enable_grad():
            logits = engine.logits_of(leaf)  # [prompt, row, vocab], of these rows only
            values = [_values(target, logits, engine.prompts) for target in targets]
        for index, value in enumerate(values):
            (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=index + 1 < len(values))
            read[index].append((value.detach(), gradient))
    return [(torch.cat([v for v, _ in parts], dim=1), torch.cat([g for _, g in parts], dim=1)) for parts in read]


def values_of(engine: Engine, final: Float[Tensor, "prompt row _"], target: Target) -> Float[Tensor, "prompt row"]:
    """A target's values, without gradients."""
    return torch.cat([_values(target, engine.logits_of(part), engine.prompts) for part in _parts(final)], dim=1)


def _parts(final: Float[Tensor, "prompt row _"]) -> Sequence[Float[Tensor, "prompt _ _"]]:
    """The rows in parts of at most ROWS_UNEMBEDDED rows over all prompts."""
    return final.split(max(1, ROWS_UNEMBEDDED // len(final)), dim=1)


def replacing(
    paths: Mapping[Place, Float[Tensor, "prompt _ position _"]],
    nudges: Mapping[Place, Float[Tensor, "prompt 1 position _"]],
    where: Callable[[slice], tuple[slice, slice]],
    above: Container[Place] = (),
) -> list[Any]:
    """Hooks that write each path into its rows, and add the nudges to the first row.

    Args:
        paths: activations by place.
        nudges: added to the first row; empty if there is no such row.
        where: maps rows to the batch and position indices at which the engine stores them.
        above: places whose rows begin above their layer and need no hook.
    """

    hooks = [(hook_name(*p), partial(_put, rows=where(slice(1)), new=new, add=True)) for p, new in nudges.items()]
    first = 1 if nudges else 0
    for place, path in paths.items():
        if place not in above:
            rows = where(slice(first, first + path.shape[1]))
            hooks.append((hook_name(*place), partial(_put, rows=rows, new=path, add=False)))
        first += path.shape[1]
    return hooks


def _put(value: Tensor, hook: object, *, rows: tuple[slice, slice], new: Tensor, add: bool) -> Tensor:
    value = value.clone()
    # restore the head dimension if the hook point has one
    new = new.to(value.dtype).reshape(value[rows].shape)
    value[rows] = value[rows] + new if add else new
    return value


def _values(
    target: Target, logits: Float[Tensor, "prompt row vocab"], prompts: Sequence[Prompt]
) -> Float[Tensor, "prompt row"]:
    return torch.stack([target(rows, prompt) for rows, prompt in zip(logits, prompts, strict=True)])
