"""Integrated gradients with controlled error: few nodes everywhere, and more where an estimate asks for them.

Along a path, f is known at every node as well as its gradient. The gradients of all neurons of a place sum to the derivative
of f, so a rule is right about their sum where its antiderivative equals the change of f between all of its nodes. This
completeness of parts finds narrow peaks which the completeness of the whole path misses, and costs no further pass. A rule of
lower order on the same nodes guards against errors that cancel in the sum.

Every path begins with a panel of five nodes. A piece of a path whose estimated error is too large is divided at its nodes,
and each part gets a separate panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.methods.method import BatchScores, Engine, Place
from tn_lens.attribution.methods.paths import Alphas, Ends, Paths, evaluate, reached
from tn_lens.attribution.quadrature import Panel, QuadratureRule, lobatto_panel
from tn_lens.attribution.target import Target
from tn_lens.neurons import SiteName

CAUTION = 0.25
"""Fraction of the largest deviation of the antiderivative that is taken as the error of a panel. Measured on trained models,
the deviation is at least 3.6 times the largest error of a neuron's score."""
ORDER = 1.5
"""Exponent that turns the difference of the panel's two rules into an estimate of the error of the better one."""
MARGIN = 0.9
"""Fraction of the tolerance that the pieces which are not refined may use up."""
FAR = 10
"""A piece whose error exceeds the tolerance this many times is divided into four parts instead of two."""
NARROWEST = 2.0**-18
"""Width of a piece that is not divided any more."""

OfPrompt: TypeAlias = tuple[int, Place]
"""The path of one prompt (its index) at a place."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a path, and what the panel on it says."""

    low: float
    width: float
    values: Float[Tensor, "5"]
    """The first target at the nodes."""
    slopes: Float[Tensor, "target 5 neuron"]
    """Gradients times (n - n') at the nodes, summed over positions."""
    scores: Float[Tensor, "target neuron"]
    """The integral over the piece."""
    deviation: float
    """Largest deviation of the antiderivative from the first target."""
    difference: float
    """Largest difference between the panel's two rules."""

    def error(self, scale: float) -> float:
        """Estimated largest error of a score.

        Args:
            scale: the largest score of the prompt and site.
        """
        guarded = scale * (self.difference / scale) ** ORDER if scale else 0.0
        return max(CAUTION * self.deviation, guarded)


Divisions: TypeAlias = dict[OfPrompt, list[tuple[Piece, int]]]
"""Pieces of paths, and the number of parts that each is to be divided into: 2 or 4."""


def integrate_adaptively(
    engine: Engine,
    *,
    targets: Sequence[Target],
    baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]],
    n_rows: int,
    tolerance: float,
    max_nodes: int,
) -> BatchScores:
    """Integrate the gradients of every target until the estimated error of the first one is within the tolerance.

    Args:
        engine: an engine that has run the prompts once.
        targets: functions of the last logits.
        baseline: activations at which the paths begin, by site.
        n_rows: number of rows of each prompt in one pass.
        tolerance: largest error of a score, relative to the largest score of the prompt and site.
        max_nodes: number of nodes at a place from which it is not refined any further.
    """
    paths = _RefinedPaths(engine, targets, baseline, n_rows, lobatto_panel())
    while chosen := paths.above(tolerance, max_nodes):
        paths.divide(chosen)
    return paths.batch_scores()


def sum_adaptively(
    engine: Engine,
    *,
    rule: QuadratureRule,
    targets: Sequence[Target],
    baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]],
    n_rows: int,
    tolerance: float,
) -> BatchScores:
    """The sum of equation 4 over all nodes of a rule, from five nodes where the path is smooth.

    Places whose estimated error exceeds the tolerance are summed over all nodes.

    Args:
        engine: an engine that has run the prompts once.
        rule: a rule with more than five nodes.
        targets: functions of the last logits.
        baseline: activations at which the paths begin, by site.
        n_rows: number of rows of each prompt in one pass.
        tolerance: largest deviation from the sum, relative to the largest score of the prompt and site.
    """
    paths = _RefinedPaths(engine, targets, baseline, n_rows, lobatto_panel(rule))
    # more than once, since the largest score, to which the tolerance refers, may change
    while rough := paths.above(tolerance, max_nodes=rule.n_steps):
        paths.sum_over(rule, rough)
    return paths.batch_scores()


class _RefinedPaths:
    """The paths of all places, each divided into pieces; one piece at first.

    Args:
        engine: an engine that has run the prompts once.
        targets: functions of the last logits; the error is that of the first.
        baseline: activations at which the paths begin, by site.
        n_rows: number of rows of each prompt in one pass.
        panel: the panel of the first piece.
    """

    def __init__(
        self,
        engine: Engine,
        targets: Sequence[Target],
        baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]],
        n_rows: int,
        panel: Panel,
    ) -> None:
        self.paths, self.targets, self.n_rows = Paths(engine, baseline), targets, n_rows
        self.prompts = range(len(engine.prompts))
        at_end = reached(engine, targets)
        self.scores = [self.paths.zeros() for _ in targets]
        self.change = [self.paths.zeros_by_layer() for _ in targets]
        self.pieces: dict[OfPrompt, list[Piece]] = {}
        self.n_nodes: dict[OfPrompt, int] = {}
        self.noise: dict[OfPrompt, float] = {}
        """What the precision of the activations hides of the first target."""
        # the last node, alpha = 1, is shared by all paths
        inner = dict.fromkeys(self.paths.places, panel.nodes[None, :4])
        values, slopes, self.slopes_at_end = self._evaluate(inner, with_ends=True)
        for place in self.paths.places:
            site, layer = place
            ends = torch.stack(at_end, dim=1)[:, :, None]  # [prompt, target, 1]
            for target, change in enumerate(self.change):
                change[site][:, layer] = at_end[target] - values[place][:, target, 0]
            of_place = torch.cat([values[place], ends], dim=2)[:, 0]  # [prompt, 5]
            all_slopes = torch.cat([slopes[place], self.slopes_at_end[place]], dim=2)
            largest = of_place.abs().amax(1).tolist()
            for prompt, piece in enumerate(measure(panel, [(0.0, 1.0)] * len(of_place), of_place, all_slopes)):
                self.noise[prompt, place] = engine.precision * largest[prompt]
                self.n_nodes[prompt, place] = len(panel.nodes)
                self._set(prompt, place, [piece])

    def above(self, tolerance: float, max_nodes: int) -> Divisions:
        """The pieces to divide, by path: the worst ones, without which the error is within the tolerance."""
        scales, chosen = self._scales(), {}
        for of, pieces in self.pieces.items():
            scale = scales[of]
            allowed = tolerance * scale
            if _total(pieces, scale) <= allowed or self.n_nodes[of] >= max_nodes:
                continue
            ranked = sorted(pieces, key=lambda piece: piece.error(scale))
            sums_of_squares = accumulate(piece.error(scale) ** 2 for piece in ranked)
            n_kept = sum(total <= (MARGIN * allowed) ** 2 for total in sums_of_squares)
            worst = [p for p in ranked[n_kept:] if p.error(scale) > self.noise[of] and p.width > NARROWEST]
            if worst:
                chosen[of] = [(p, 4 if p.error(scale) > FAR * allowed else 2) for p in worst]
        return chosen

    def divide(self, chosen: Divisions) -> None:
        """Divide pieces at the nodes of their panels, and evaluate a panel on each part."""
        panel = lobatto_panel()
        inner = panel.nodes[1:4]
        parts: dict[Place, list[list[_Part]]] = {}
        for place in self.paths.places:
            by_prompt = [
                [part for piece, n in chosen.get((prompt, place), ()) for part in _parts(piece, n, panel)]
                for prompt in self.prompts
            ]
            if any(by_prompt):
                parts[place] = by_prompt
        alphas = {}
        for place, by_prompt in parts.items():
            # all prompts run as many rows; those of a prompt that needs fewer are not used
            nodes = torch.full((len(by_prompt), max(map(len, by_prompt)), 3), 0.5, dtype=torch.float64)
            for prompt, of_prompt in enumerate(by_prompt):
                for index, part in enumerate(of_prompt):
                    nodes[prompt, index] = part.low + part.width * inner
            alphas[place] = nodes.flatten(1)
        values, slopes, _ = self._evaluate(alphas)
        for place, by_prompt in parts.items():
            owners = [(prompt, index) for prompt, of_prompt in enumerate(by_prompt) for index in range(len(of_prompt))]
            flat = [by_prompt[prompt][index] for prompt, index in owners]
            rows, columns = (torch.tensor(each, device=values[place].device) for each in zip(*owners, strict=True))
            # [prompt, node of all parts] -> [part, 3]
            new_values = values[place][:, 0].unflatten(1, (-1, 3))[rows, columns]
            # [prompt, target, node of all parts, neuron] -> [part, target, 3, neuron]
            new_slopes = slopes[place].unflatten(2, (-1, 3)).transpose(1, 2)[rows, columns]
            known_values = torch.stack([part.values for part in flat])
            known_slopes = torch.stack([part.slopes for part in flat])
            measured = measure(
                panel,
                [(part.low, part.width) for part in flat],
                _between(known_values, new_values, 1),
                _between(known_slopes, new_slopes, 2),
            )
            for prompt, of_prompt in enumerate(by_prompt):
                new, measured = measured[: len(of_prompt)], measured[len(of_prompt) :]
                if new:
                    replaced = {id(piece) for piece, _ in chosen[prompt, place]}
                    kept = [piece for piece in self.pieces[prompt, place] if id(piece) not in replaced]
                    self.n_nodes[prompt, place] += 3 * len(new)
                    self._set(prompt, place, kept + new)

    def sum_over(self, rule: QuadratureRule, rough: Mapping[OfPrompt, object]) -> None:
        """Sum over all nodes of a rule at some places, whose error is then zero."""
        inner, rough_places = rule.before_end(), {place for _, place in rough}
        in_order = [place for place in self.paths.places if place in rough_places]
        _, slopes, _ = self._evaluate(dict.fromkeys(in_order, inner.nodes[None]))
        for prompt, place in rough:
            site, layer = place
            weights = inner.weights.to(slopes[place])
            summed = einsum(weights, slopes[place][prompt], "node, target node neuron -> target neuron")
            summed = summed + rule.weight_at_end * self.slopes_at_end[place][prompt, :, 0]
            for scores, of_target in zip(self.scores, summed, strict=True):
                scores[site][prompt, layer] = of_target
            self.pieces[prompt, place] = []
            self.n_nodes[prompt, place] += rule.n_steps

    def batch_scores(self) -> BatchScores:
        """The scores, with the estimated error of the first target's and the number of nodes."""
        scales = self._scales()
        error = self.paths.zeros_by_layer()
        n_nodes = {site: torch.zeros_like(each, dtype=torch.int32) for site, each in error.items()}
        for of, pieces in self.pieces.items():
            prompt, (site, layer) = of
            error[site][prompt, layer] = _total(pieces, scales[of]) + self.noise[of]
            n_nodes[site][prompt, layer] = self.n_nodes[of]
        return BatchScores(self.scores, self.change, error, n_nodes)

    def _set(self, prompt: int, place: Place, pieces: list[Piece]) -> None:
        """Replace the pieces of a path, and its scores."""
        site, layer = place
        self.pieces[prompt, place] = pieces
        for scores, of_target in zip(self.scores, sum(piece.scores for piece in pieces), strict=True):  # pyright: ignore
            scores[site][prompt, layer] = of_target

    def _scales(self) -> dict[OfPrompt, float]:
        """The largest score of each path's prompt and site."""
        largest = {site: scores.abs().amax((1, 2)).tolist() for site, scores in self.scores[0].items()}
        return {(prompt, place): largest[place[0]][prompt] for prompt in self.prompts for place in self.paths.places}

    def _evaluate(
        self, alphas: Alphas, *, with_ends: bool = False
    ) -> tuple[dict[Place, Tensor], dict[Place, Tensor], dict[Place, Tensor]]:
        """Values of the targets [prompt, target, node], slopes [prompt, target, node, neuron], and slopes at the ends."""
        values: dict[Place, list[Tensor]] = {}
        slopes: dict[Place, list[Tensor]] = {}
        at_ends: dict[Place, Tensor] = {}
        for part in evaluate(self.paths, self.targets, alphas, self.n_rows, with_ends=with_ends):
            if isinstance(part, Ends):
                for place in self.paths.places:
                    gradients = [by_place[place] for by_place in part.gradients]
                    at_ends[place] = self._slopes(place, gradients)
            else:
                values.setdefault(part.place, []).append(torch.stack(part.values, dim=1))
                back = [self.paths.engine.carry_back(part.place, gradient) for gradient in part.gradients]
                slopes.setdefault(part.place, []).append(self._slopes(part.place, back))
        joined = ({place: torch.cat(parts, dim=2) for place, parts in each.items()} for each in (values, slopes))
        return *joined, at_ends  # pyright: ignore[reportReturnType]

    def _slopes(
        self, place: Place, gradients: Sequence[Float[Tensor, "prompt node position neuron"]]
    ) -> Float[Tensor, "prompt target node neuron"]:
        """Gradients times (n - n'), summed over positions."""
        site, layer = place
        delta = self.paths.delta[site][:, layer, None]  # [prompt, 1 (all nodes), position, neuron]
        return torch.stack([(delta * gradient).sum(2) for gradient in gradients], dim=1)


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of a piece, of which only the ends are known."""

    low: float
    width: float
    values: Float[Tensor, "2"]
    slopes: Float[Tensor, "target 2 neuron"]


def _parts(piece: Piece, n_parts: int, panel: Panel) -> list[_Part]:
    """Divide a piece into two or four parts at the nodes of its panel."""
    cuts = range(0, 5, 4 // n_parts)
    ends = [piece.low + piece.width * node for node in panel.nodes.tolist()]
    return [_Part(ends[a], ends[b] - ends[a], piece.values[[a, b]], piece.slopes[:, [a, b]]) for a, b in pairwise(cuts)]


def measure(
    panel: Panel,
    spans: Sequence[tuple[float, float]],
    values: Float[Tensor, "piece 5"],
    slopes: Float[Tensor, "piece target 5 neuron"],
) -> list[Piece]:
    """Evaluate a panel on several pieces.

    Args:
        panel: nodes and rules.
        spans: lower end and width of each piece.
        values: the first target at the nodes.
        slopes: gradients times (n - n') at the nodes.
    """
    widths = torch.tensor([width for _, width in spans], dtype=torch.float64, device=slopes.device)
    scaled = slopes * widths.to(slopes)[:, None, None, None]
    weights, coarse = panel.weights.to(slopes), panel.coarse.to(slopes)
    scores = einsum(weights, scaled, "node, piece target node neuron -> piece target neuron")
    other = einsum(coarse, scaled[:, 0], "node, piece node neuron -> piece neuron")
    derivative = scaled[:, 0].double().sum(-1)  # [piece, node]
    wide = values.double()
    deviations = derivative @ panel.antiderivative.to(derivative).T - (wide - wide[:, :1])
    found = deviations.abs().amax(1).tolist(), (scores[:, 0] - other).abs().amax(1).tolist()
    return [Piece(low, width, *rest) for (low, width), *rest in zip(spans, values, slopes, scores, *found, strict=True)]


def _between(known: Float[Tensor, "part *_"], new: Float[Tensor, "part *_"], dim: int) -> Float[Tensor, "part *_"]:
    """The known values at the two ends of parts, and the new values at the three nodes between."""
    first, last = known.split(1, dim=dim)
    return torch.cat([first, new, last], dim=dim)


def _total(pieces: Sequence[Piece], scale: float) -> float:
    """The error of a path; the errors of its pieces are taken to be independent."""
    return math.hypot(*(piece.error(scale) for piece in pieces))
