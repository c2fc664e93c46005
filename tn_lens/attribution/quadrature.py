"""Rules that replace the path integral by a weighted sum (paper eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput

Method = Literal["riemann_right", "riemann_middle", "riemann_trapezoid", "gauss_legendre", "graded"]
"""How to choose the nodes; the names are captum's where captum has the rule."""

MOST_STEPS = 10_000
"""More are a slip of the keyboard, and would run out of memory or numbers."""
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


def quadrature_rule(method: Method = "riemann_right", n_steps: int = 20) -> QuadratureRule:
    """The rule of a name.

    Args:
        method: `"riemann_right"` is the paper's equation 4, alpha = k/m for k = 1..m. `"gauss_legendre"` is exact for
            polynomials up to degree 2m - 1. `"graded"` is Gauss-Legendre in u with alpha = u^6, which crowds the nodes
            near the baseline, where post-norm models (OLMo-2) change. `"riemann_middle"` and `"riemann_trapezoid"`
            are captum's.
        n_steps: number of nodes.

    Raises:
        BadInput: an unknown name, or too few or too many steps.
    """
    least = 2 if method == "riemann_trapezoid" else 1
    if not least <= n_steps <= MOST_STEPS:
        raise BadInput(f"{method} needs n_steps from {least} to {MOST_STEPS:,}; got {str(n_steps)[:20]}")
    steps = torch.arange(1, n_steps + 1, dtype=torch.float64)
    equal = torch.full((n_steps,), 1 / n_steps, dtype=torch.float64)
    match method:
        case "riemann_right":
            return QuadratureRule(steps / n_steps, equal)
        case "riemann_middle":
            return QuadratureRule((steps - 0.5) / n_steps, equal)
        case "riemann_trapezoid":
            weights = torch.full((n_steps,), 1 / (n_steps - 1), dtype=torch.float64)
            weights[[0, -1]] /= 2
            return QuadratureRule((steps - 1) / (n_steps - 1), weights)
        case "gauss_legendre":
            return _gauss_legendre(n_steps)
        case "graded":
            inner = _gauss_legendre(n_steps)
            return QuadratureRule(inner.nodes**GRADING, inner.weights * GRADING * inner.nodes ** (GRADING - 1))
        case _:
            raise BadInput(f"unknown method {method!r}: expected {', '.join(get_args(Method))}")


def _gauss_legendre(n_steps: int) -> QuadratureRule:
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(n_steps))
    return QuadratureRule((nodes + 1) / 2, weights / 2)
