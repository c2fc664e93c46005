"""Attribution: integrated gradients for every neuron of every layer."""

from .attribute import attribute, post_norm_warning
from .quadrature import QuadratureRule, quadrature_rule
from .result import Attribution
from .target import probability_difference, right_probability, wrong_probability

__all__ = [
    "Attribution",
    "QuadratureRule",
    "attribute",
    "post_norm_warning",
    "probability_difference",
    "quadrature_rule",
    "right_probability",
    "wrong_probability",
]
