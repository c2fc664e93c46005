"""Attribution: integrated gradients for every neuron of every layer, and other methods."""

from tn_lens.attribution.attribute import attribute, post_norm_warning
from tn_lens.attribution.methods import METHODS, Method
from tn_lens.attribution.quadrature import QuadratureRule, quadrature_rule
from tn_lens.attribution.result import Attribution, PassSize
from tn_lens.attribution.target import probability_difference, right_probability, wrong_probability

__all__ = [
    "METHODS",
    "Attribution",
    "Method",
    "PassSize",
    "QuadratureRule",
    "attribute",
    "post_norm_warning",
    "probability_difference",
    "quadrature_rule",
    "right_probability",
    "wrong_probability",
]
