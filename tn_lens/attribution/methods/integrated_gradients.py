"""Integrated gradients: paths, gradients and weighted sums, independent of the engine (paper eq. 1-4).

Equation 1 integrates the gradient of f along the straight path from the baseline n' to the activation n,

    Attr(n) = (n - n') * integral over alpha from 0 to 1 of  df(n' + alpha (n - n')) / dn,

and equation 4 replaces the integral by a sum over nodes alpha_k with weights w_k (`QuadratureRule`). `integrate`
evaluates the nodes of every site and layer in passes of many rows: `Paths` computes the points on the paths, `read_targets`
differentiates the targets with respect to the rows' final vectors, and `Sums` accumulates the weighted gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.methods.method import METHODS, BatchScores, Engine, Method, Place
from tn_lens.attribution.quadrature import RULES, QuadratureRule, quadrature_rule
from tn_lens.attribution.target import Target
from tn_lens.neurons import SiteName, hook_name
from tn_lens.questions.prompts import Prompt

T = TypeVar("T")

ROWS_UNEMBEDDED = 128
"""Maximum number of rows whose logits exist at a time: enough for an efficient product with W_U, and a bound on its memory."""

BASELINE = 0
"""Index of alpha = 0 among the nodes of a `Paths`; node k of the rule has index k + 1."""


def integrate(
    engine: Engine,
    *,
    rule: QuadratureRule,
    targets: Sequence[Target],
    baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]],
    n_rows: int,
) -> BatchScores:
    """Integrate the gradients of every target for every layer of every site, one row for each (site, layer, node).

    Each row interpolates one site of one layer, and everything downstream is recomputed, so that all layers are attributed
    in the same pass without affecting each other. Scaling every layer in the same row would overwrite the later layers
    and leave only the direct path of the earlier ones.

    Args:
        engine: an engine that has run the prompts once.
        rule: nodes and weights of the quadrature.
        targets: functions of the last logits.
        baseline: activations at which the paths begin, by site; for all prompts, or one row per prompt.
        n_rows: number of rows in one pass.
    """
    paths = Paths(engine, rule, baseline)
    reached = [_values(target, engine.logits[:, None], engine.prompts)[:, 0] for target in targets]
    sums = [Sums(paths, value_at_end) for value_at_end in reached]
    for rows in _split(paths.rows, n_rows):
        points, nudges = paths.points(rows)
        with torch.enable_grad():
            final = engine.run(points, nudges)
        leaves = [*points.values(), *nudges.values()]
        for index, (values, at_final) in enumerate(read_targets(engine, final, targets)):
            is_last = index + 1 == len(targets)
            gradients = torch.autograd.grad(final, leaves, at_final, retain_graph=not is_last)
            sums[index].add(rows, values, gradients)
    return BatchScores([each.scores for each in sums], [each.change for each in sums])


class Paths:
    """The straight-line paths of all sites and layers, and the rows on them.

    A row is a pair of a place and a node. All paths share a single row at their end (alpha = 1), which is None.
    """

    def __init__(
        self, engine: Engine, rule: QuadratureRule, baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]]
    ) -> None:
        self.engine, self.rule = engine, rule
        n_layers = next(iter(engine.own.values())).shape[1]
        self.places: list[Place] = [(site, layer) for layer in range(n_layers) for site in engine.own]
        # [1 or prompt, layer, 1, neuron]: one row that all prompts share, or one per prompt
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
            delta, begin = self.delta[site][:, layer], start[site][:, layer]
            carried = engine.carry((site, layer), torch.cat([begin.expand(-1, delta.shape[1], -1), delta]))
            # [1 or prompt, 1, position, vector] and [prompt, position, vector]
            self.start[site, layer], self.direction[site, layer] = carried[: len(begin), None], carried[len(begin) :]
        self.nodes = torch.cat([torch.zeros(1, dtype=torch.float64), rule.nodes])
        self.weight_at_end = float(rule.weights[rule.nodes == 1].sum())
        # at alpha = 1 nothing is replaced: one row serves all places
        inner = [node for node in range(len(self.nodes)) if self.nodes[node] != 1]
        self.rows: list[tuple[Place, int] | None] = [(place, node) for place in self.places for node in inner]
        if self.weight_at_end:
            self.rows.insert(0, None)

    def points(self, rows: Sequence[tuple[Place, int] | None]) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
        """The points of the given rows by place [prompt, row, position, neuron], and the nudges of the row at alpha = 1.

        Nudges are zeros that are added to the activations of that row, to differentiate with respect to them; empty if the
        row is not among the given ones.
        """
        points = {}
        for place, nodes in self.by_place(rows).items():
            alphas = self.nodes[nodes].to(self.start[place])[:, None, None]
            points[place] = (self.start[place] + alphas * self.direction[place][:, None]).requires_grad_()
        nudges = {}
        if rows[0] is None:
            for site, layer in self.places:
                nudges[site, layer] = torch.zeros_like(self.delta[site][:, None, layer]).requires_grad_()
        return points, nudges

    @staticmethod
    def by_place(rows: Sequence[tuple[Place, int] | None]) -> dict[Place, list[int]]:
        """The nodes of each place among the given rows."""
        inner = [row for row in rows if row is not None]
        return {place: [node for _, node in group] for place, group in groupby(inner, key=lambda row: row[0])}


class Sums:
    """The sums of equation 4 for one target, accumulated pass by pass.

    Args:
        paths: the paths of all places.
        reached: the target's value at the end of the paths.
    """

    def __init__(self, paths: Paths, reached: Float[Tensor, " prompt"]) -> None:
        self.paths, self.reached = paths, reached
        self.scores = {site: torch.zeros_like(delta[:, :, 0]) for site, delta in paths.delta.items()}
        self.change = {site: torch.zeros_like(delta[:, :, 0, 0]) for site, delta in paths.delta.items()}

    def add(
        self,
        rows: Sequence[tuple[Place, int] | None],
        values: Float[Tensor, "prompt row"],
        gradients: Sequence[Float[Tensor, "prompt _ position _"]],
    ) -> None:
        """Add the rows of one pass: the target's values, and its gradients, by place and then for the row at alpha = 1."""
        paths, by_place = self.paths, self.paths.by_place(rows)
        has_end = rows[0] is None
        first = int(has_end)
        for (place, nodes), gradient in zip(by_place.items(), gradients[: len(by_place)], strict=True):
            site, layer = place
            steps = [node - 1 for node in nodes if node != BASELINE]
            if len(steps) < len(nodes):  # the row at the baseline gives the change, and its gradient is not needed
                self.change[site][:, layer] = self.reached - values[:, first]
            weighted = einsum(
                paths.rule.weights[steps].to(gradient),
                gradient[:, len(nodes) - len(steps) :],
                "step, prompt step position neuron -> prompt position neuron",
            )
            # summed over positions: [prompt, neuron]
            summed = (paths.delta[site][:, layer] * paths.engine.carry_back(place, weighted)).sum(1)
            self.scores[site][:, layer] += summed
            first += len(nodes)
        for site in paths.delta if has_end else ():
            at_end = [
                g for (of_site, _), g in zip(paths.places, gradients[len(by_place) :], strict=True) if of_site == site
            ]
            # [prompt, layer, position, neuron], summed over positions
            self.scores[site] += paths.weight_at_end * (paths.delta[site] * torch.cat(at_end, dim=1)).sum(2)


def read_targets(
    engine: Engine, final: Float[Tensor, "prompt row _"], targets: Sequence[Target]
) -> list[tuple[Float[Tensor, "prompt row"], Float[Tensor, "prompt row _"]]]:
    """Each target's values, and its gradient with respect to the rows' final vectors."""
    read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in targets]
    # [prompt, row, vector], in parts of at most ROWS_UNEMBEDDED rows over all prompts
    for part in final.detach().split(max(1, ROWS_UNEMBEDDED // len(final)), dim=1):
        leaf = part.requires_grad_()
        with torch.enable_grad():
            logits = engine.logits_of(leaf)  # [prompt, row, vocab], of these rows only
            values = [_values(target, logits, engine.prompts) for target in targets]
        for index, value in enumerate(values):
            (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=index + 1 < len(values))
            read[index].append((value.detach(), gradient))
    return [(torch.cat([v for v, _ in parts], dim=1), torch.cat([g for _, g in parts], dim=1)) for parts in read]


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


def _split(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _with_rule(method: str, engine: Engine, *, n_steps: int, **options: Any) -> BatchScores:
    return integrate(engine, rule=quadrature_rule(method, n_steps), **options)


for _name in RULES:
    METHODS.register(
        _name,
        Method(
            attribute=partial(_with_rule, _name),
            check=partial(quadrature_rule, _name),
            sees_edge=_name == "graded",
        ),
    )
