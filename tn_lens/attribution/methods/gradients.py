"""Methods that take one gradient, at the activation itself, and multiply it by the distance from a baseline.

`gradient_x_activation` is the first-order estimate of what setting a neuron to the baseline changes. `attribution_patching`
is the same estimate with the activations of a counterpart as the baseline: the prompt with the same question in an order in
which another label is right (Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Syed et
al. 2023, https://arxiv.org/abs/2310.10348).
"""

from __future__ import annotations

from typing import Any

from tn_lens.attribution.methods.integrated_gradients import integrate
from tn_lens.attribution.methods.method import METHODS, BatchScores, Engine, Method
from tn_lens.attribution.quadrature import quadrature_rule


def gradient_times_difference(engine: Engine, *, n_steps: int, **options: Any) -> BatchScores:
    """The gradient at the activation times (activation - baseline), the Riemann sum with one step; `n_steps` is ignored."""
    return integrate(engine, rule=quadrature_rule("riemann_right", 1), **options)


def _accept(n_steps: int) -> None:
    """Accept any number of steps, since the methods use none."""


METHODS.register("gradient_x_activation", Method(attribute=gradient_times_difference, check=_accept))
METHODS.register(
    "attribution_patching", Method(attribute=gradient_times_difference, check=_accept, uses_counterparts=True)
)
