"""Integrated gradients by a fixed quadrature rule, independent of the engine (paper eq. 1-4).

Equation 1 integrates the gradient of f along the straight path from the baseline n' to the activation n,

    Attr(n) = (n - n') * integral over alpha from 0 to 1 of  df(n' + alpha (n - n')) / dn,

and equation 4 replaces the integral by a sum over nodes alpha_k with weights w_k (`QuadratureRule`). `integrate` computes
this sum with one row for each (site, layer, node).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.methods.method import METHODS, BatchScores, Engine, Method
from tn_lens.attribution.methods.paths import Ends, Part, Paths, evaluate, reached
from tn_lens.attribution.methods.refinement import integrate_adaptively, sum_adaptively
from tn_lens.attribution.quadrature import RULES, QuadratureRule, quadrature_rule
from tn_lens.attribution.target import Target
from tn_lens.neurons import SiteName

TOLERANCE = 1e-3
"""Default tolerance of the method `"adaptive"`."""


def integrate(
    engine: Engine,
    *,
    rule: QuadratureRule,
    targets: Sequence[Target],
    baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]],
    n_rows: int,
) -> BatchScores:
    """Integrate the gradients of every target for every layer of every site with all nodes of a rule.

    Args:
        engine: an engine that has run the prompts once.
        rule: nodes and weights of the quadrature.
        targets: functions of the last logits.
        baseline: activations at which the paths begin, by site.
        n_rows: number of rows of each prompt in one pass.
    """
    paths = Paths(engine, baseline)
    # the first node, alpha = 0, gives the change; its gradient is not needed
    nodes = torch.cat([torch.zeros(1, dtype=torch.float64), rule.before_end().nodes])
    sums = [Sums(paths, rule, value_at_end) for value_at_end in reached(engine, targets)]
    alphas = dict.fromkeys(paths.places, nodes[None])
    for part in evaluate(paths, targets, alphas, n_rows, with_ends=bool(rule.weight_at_end)):
        for index, each in enumerate(sums):
            each.add(part, index)
    n_nodes = {site: torch.zeros_like(change, dtype=torch.int32) for site, change in sums[0].change.items()}
    for site, layer in paths.places:
        n_nodes[site][:, layer] = rule.n_steps
    return BatchScores([each.scores for each in sums], [each.change for each in sums], n_nodes=n_nodes)


class Sums:
    """The sums of equation 4 for one target, accumulated pass by pass.

    Args:
        paths: the paths of all places.
        rule: the quadrature rule, whose nodes below alpha = 1 follow the first node, which is the baseline.
        reached: the target's value at the end of the paths.
    """

    def __init__(self, paths: Paths, rule: QuadratureRule, reached: Float[Tensor, " prompt"]) -> None:
        self.paths, self.reached = paths, reached
        self.weights, self.weight_at_end = rule.before_end().weights, rule.weight_at_end
        self.scores, self.change = paths.zeros(), paths.zeros_by_layer()

    def add(self, part: Part | Ends, target: int) -> None:
        """Add values and gradients of the target at an index."""
        if isinstance(part, Ends):
            self._add_ends(part, target)
            return
        site, layer = part.place
        gradient, steps = part.gradients[target], slice(max(0, part.nodes.start - 1), part.nodes.stop - 1)
        if part.nodes.start == 0:
            self.change[site][:, layer] = self.reached - part.values[target][:, 0]
            gradient = gradient[:, 1:]
        weighted = einsum(
            self.weights[steps].to(gradient), gradient, "step, prompt step position neuron -> prompt position neuron"
        )
        # summed over positions: [prompt, neuron]
        summed = (self.paths.delta[site][:, layer] * self.paths.engine.carry_back(part.place, weighted)).sum(1)
        self.scores[site][:, layer] += summed

    def _add_ends(self, ends: Ends, target: int) -> None:
        for (site, layer), at_end in ends.gradients[target].items():
            # [prompt, position, neuron], summed over positions
            summed = (self.paths.delta[site][:, layer] * at_end[:, 0]).sum(1)
            self.scores[site][:, layer] += self.weight_at_end * summed


def _with_rule(
    method: str, engine: Engine, *, n_steps: int, tolerance: float, max_nodes: int, **options: object
) -> BatchScores:
    rule = quadrature_rule(method, n_steps)
    summed = partial(sum_adaptively, tolerance=tolerance) if tolerance else integrate
    return summed(engine, rule=rule, **options)  # pyright: ignore[reportArgumentType]


def _adaptive(engine: Engine, *, n_steps: int, **options: object) -> BatchScores:
    return integrate_adaptively(engine, **options)  # pyright: ignore[reportArgumentType]


for _name in RULES:
    METHODS.register(
        _name,
        Method(
            attribute=partial(_with_rule, _name),
            check=partial(quadrature_rule, _name),
            sees_edge=_name == "graded",
            tolerance=0.0,
        ),
    )
METHODS.register(
    "adaptive", Method(attribute=_adaptive, check=lambda n_steps: None, sees_edge=True, tolerance=TOLERANCE)
)
