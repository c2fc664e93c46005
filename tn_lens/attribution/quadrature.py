"""Quadrature rules, which replace the path integral by a weighted sum (paper eq. 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput

MOST_STEPS = 10_000
"""Maximum n_steps; larger values are assumed to be typos, and would exhaust memory."""
N_NODES = 5
"""Number of nodes of a panel."""
N_INNER = 3
"""Number of nodes of a panel besides its ends."""
GRADING = 6
"""The exponent k of the graded rule, alpha = u^k."""


@dataclass(frozen=True, eq=False)
class QuadratureRule:
    """Nodes alpha in [0, 1] and their weights, in float64."""

    nodes: Float[Tensor, " step"]
    weights: Float[Tensor, " step"]

    @property
    def n_steps(self) -> int:
        """The number of gradients taken, m in the paper."""
        return len(self.nodes)

    def before_end(self) -> QuadratureRule:
        """The nodes below alpha = 1, where nothing is replaced and one row serves all places."""
        is_before = self.nodes != 1
        return QuadratureRule(self.nodes[is_before], self.weights[is_before])

    @property
    def weight_at_end(self) -> float:
        """The weight of alpha = 1; 0 if it is not a node."""
        return float(self.weights[self.nodes == 1].sum())


@dataclass(frozen=True, eq=False)
class Panel:
    """Five nodes in [0, 1] with both ends, and linear maps from the values of a function at them.

    The interpolating polynomial through the values gives its sum, and its antiderivative at the nodes, which can be compared
    with the known antiderivative f along a path.
    """

    nodes: Float[Tensor, "5"]
    weights: Float[Tensor, "5"]
    """Weights of the integral, or of the sum that the panel replaces: exact for polynomials up to degree 7."""
    coarse: Float[Tensor, "5"]
    """Weights on the ends and the middle node only: exact up to degree 2."""
    antiderivative: Float[Tensor, "5 5"]
    """Row j gives the integral of the interpolating polynomial from 0 to node j."""


def lobatto_panel(rule: QuadratureRule | None = None) -> Panel:
    """The Gauss-Lobatto panel of the integral over [0, 1], or of the weighted sum of a rule.

    The end points are nodes because they cost nothing: all paths share alpha = 1, and alpha = 0 is run for the change. The
    three inner nodes are those of the Gauss rule for the measure x (1 - x) dmu, where mu is the uniform measure or the one
    with the rule's weights at its nodes. So the panel reproduces sums of any rule, such as the paper's equation 4, of
    functions that are smooth.

    Args:
        rule: a rule with more than five nodes. None: the integral.
    """
    measure = rule or _gausslegendre(20)  # exact for all polynomials that occur here
    points, masses = measure.nodes.numpy(), measure.weights.numpy()
    nodes = np.concatenate([[0.0], _gauss_nodes(points, masses * points * (1 - points), 3), [1.0]])

    def fitted(at: list[int]) -> np.ndarray:
        """Weights at some nodes that sum polynomials of the measure exactly."""
        degree = len(at) - 1
        matrix = np.polynomial.legendre.legvander(2 * nodes[at] - 1, degree).T
        weights = np.zeros(5)
        weights[at] = np.linalg.solve(matrix, np.polynomial.legendre.legvander(2 * points - 1, degree).T @ masses)
        return weights

    coefficients = np.linalg.inv(np.polynomial.legendre.legvander(2 * nodes - 1, 4))
    integrals = np.polynomial.legendre.legint(coefficients) / 2  # [degree, node]; from [-1, 1] to [0, 1]
    at_nodes = np.polynomial.legendre.legval(2 * nodes - 1, integrals).T  # [upper end, node]
    maps = nodes, fitted([0, 1, 2, 3, 4]), fitted([0, 2, 4]), at_nodes - at_nodes[0]
    return Panel(*map(torch.from_numpy, maps))


def _gauss_nodes(
    points: Float[np.ndarray, " point"], masses: Float[np.ndarray, " point"], n: int
) -> Float[np.ndarray, " n"]:
    """The nodes of the n-point Gauss rule for a discrete measure: roots of its orthogonal polynomial (Stieltjes, Golub-Welsch)."""
    diagonal, off_diagonal = [], []
    before, current, norm_before = np.zeros_like(points), np.ones_like(points), 1.0
    for degree in range(n):
        norm = (masses * current**2).sum()
        ratio = norm / norm_before if degree else 0.0
        diagonal.append((masses * points * current**2).sum() / norm)
        off_diagonal.append(np.sqrt(ratio))
        before, current = current, (points - diagonal[-1]) * current - ratio * before
        norm_before = norm
    return np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off_diagonal[1:], 1) + np.diag(off_diagonal[1:], -1))


def quadrature_rule(method: str = "riemann_right", n_steps: int = 20) -> QuadratureRule:
    """Nodes and weights of a rule.

    Args:
        method: `"riemann_right"` is the paper's equation 4, alpha = k/m for k = 1..m. `"gausslegendre"` is exact for
            polynomials up to degree 2m - 1. `"graded"` is Gauss-Legendre in u with alpha = u^6, which concentrates the
            nodes near the baseline, where post-norm models (OLMo-2) change. `"riemann_middle"` and
            `"riemann_trapezoid"` are the midpoint and the trapezoidal rule.
        n_steps: number of nodes.

    Raises:
        BadInput: the name is unknown, or n_steps is too small or too large.
    """
    if method not in RULES:
        raise BadInput(f"unknown method {method!r}: expected {', '.join(RULES)}")
    least = 2 if method == "riemann_trapezoid" else 1
    if not least <= n_steps <= MOST_STEPS:
        raise BadInput(f"{method} needs n_steps from {least} to {MOST_STEPS:,}; got {str(n_steps)[:20]}")
    return RULES[method](n_steps)


def _riemann(m: int, first: float, n_intervals: int) -> QuadratureRule:
    """Equally weighted nodes that are one interval apart; `first` is the first node in units of an interval."""
    nodes = (torch.arange(m, dtype=torch.float64) + first) / n_intervals
    return QuadratureRule(nodes, torch.full((m,), 1 / n_intervals, dtype=torch.float64))


def _riemann_trapezoid(m: int) -> QuadratureRule:
    rule = _riemann(m, first=0.0, n_intervals=m - 1)
    # the two end points have half the weight
    rule.weights[[0, -1]] /= 2
    return rule


def _gausslegendre(m: int) -> QuadratureRule:
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(m))
    return QuadratureRule((nodes + 1) / 2, weights / 2)  # from [-1, 1] to [0, 1]


def _graded(m: int) -> QuadratureRule:
    inner = _gausslegendre(m)
    # substitution alpha = u^k: d alpha = k u^(k - 1) du
    return QuadratureRule(inner.nodes**GRADING, inner.weights * GRADING * inner.nodes ** (GRADING - 1))


RULES: Mapping[str, Callable[[int], QuadratureRule]] = {
    "riemann_right": lambda m: _riemann(m, first=1.0, n_intervals=m),
    "riemann_middle": lambda m: _riemann(m, first=0.5, n_intervals=m),
    "riemann_trapezoid": _riemann_trapezoid,
    "gausslegendre": _gausslegendre,
    "graded": _graded,
}
"""Functions from the number of steps to a rule, by name."""
