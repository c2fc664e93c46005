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
