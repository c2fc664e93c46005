"""The options of the method, defined once; no torch is imported here.

Settings, command line and error checks read these. The names of registries (methods, interventions, controls,
question sets) are the built-in ones; more can be registered at run time.
"""

from __future__ import annotations

from typing import Literal

BackendName = Literal["hooked", "bridge"]
"""HookedTransformer (TransformerLens up to 3.9) or TransformerBridge (from 3.9)."""

Order = Literal["random", "both", "given"]
"""How the choices are ordered: one random order (the paper), every rotation once, or as the question has them."""

Method = Literal["riemann_right", "riemann_middle", "riemann_trapezoid", "gausslegendre", "graded"]
"""Built-in attribution methods; all are integrated gradients and differ in the quadrature rule. Captum's names where
captum has the rule."""

BaselineName = Literal["zero", "mean"]
"""Where the path of integrated gradients begins: zero activation (the paper) or the mean over the prompts."""

Positions = Literal["last", "all"]
"""Positions that attribution interpolates: the one whose logits are read (Dai et al.), or all together."""

Where = Literal["all", "last", "question"]
"""Positions that an intervention acts on: all (the paper), the one whose logits are read, or from the question on."""

TargetName = Literal["probability_difference", "normalized_difference", "log_ratio"]
"""What is attributed; the paper's target is the first (eq. 8)."""

EngineName = Literal["auto", "shared_prefix", "direct"]
"""How the model is run; the scores are equal. "auto" is the shared prefix wherever it is possible."""

Correction = Literal["bonferroni", "holm", "benjamini-hochberg", "none"]
"""How p-values are corrected for multiple comparisons; the paper uses Bonferroni."""

Family = Literal["candidates", "all"]
"""What the correction counts as tested: the candidates that were tested, or every neuron of the model."""

Mode = Literal["zero", "scale", "mean", "resample"]
"""Built-in interventions; the paper's is "zero"."""

Condition = Literal["unablated", "random", "random_matched", "top_activation", "ablated"]
"""Built-in conditions of an evaluation: no intervention, three controls, and the intervention on the found neurons."""

Theme = Literal["light", "dark"]
"""The background that a figure is drawn for."""

NEURON_SITES: tuple[str, ...] = ("mlp", "attn")
"""The sites that the paper calls neurons."""
