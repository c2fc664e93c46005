"""Types of the method's options, shared by settings, command line and error checks. Does not import torch.

Where an option is the name of a registry entry (methods, interventions, conditions), its type lists the built-in names;
more can be registered at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

BackendName = Literal["hooked", "bridge"]
"""Model class: HookedTransformer (up to TransformerLens 3.9) or TransformerBridge (from 3.9)."""

Order = Literal["random", "both", "given"]
"""Order of the choices: one random order (the paper), every cyclic rotation, or the order given in the question."""

Method = Literal[
    "riemann_right",
    "riemann_middle",
    "riemann_trapezoid",
    "gausslegendre",
    "graded",
    "adaptive",
    "gradient_x_activation",
    "attribution_patching",
]
"""Built-in attribution methods: integrated gradients with a quadrature rule (rules that captum also has are called by captum's
names) or with as many nodes as a tolerance takes, and two methods that take a single gradient, at the activation."""

BaselineName = Literal["zero", "mean", "input"]
"""Baseline of integrated gradients: zero activation (Dai et al.), the mean activation over the prompts, or the activation on a
baseline input. The paper uses a baseline input and does not name it."""

BaselineInput = Literal["zero_embeddings", "end_of_text", "blanked"]
"""Input whose activations are the baseline "input": zero token embeddings, padding tokens, or the prompt's template without the
question and its choices; see `tn_lens.inference.baselines`."""

Positions = Literal["last", "all"]
"""Positions whose activations are interpolated: the last one, whose logits are read (Dai et al.), or all jointly."""

Where = Literal["all", "last", "question"]
"""Positions that an intervention acts on: all (the paper), the last one, whose logits are read, or all positions from the
start of the question."""

TargetName = Literal["probability_difference", "normalized_difference", "log_ratio"]
"""Function of the logits that is attributed. The paper uses the first (eq. 8)."""

EngineName = Literal["auto", "shared_prefix", "direct"]
"""How attribution runs the model. All engines give the same scores; "auto" uses the shared prefix where supported."""

Correction = Literal["bonferroni", "holm", "benjamini-hochberg", "none"]
"""Correction of p-values for multiple comparisons. The paper uses Bonferroni."""

Family = Literal["candidates", "all"]
"""Family of tests that the correction covers: the candidates that were tested, or every neuron of the model."""

Mode = Literal["zero", "scale", "mean", "resample"]
"""Built-in interventions. The paper uses "zero"."""

Condition = Literal["unablated", "random", "random_matched", "top_activation", "ablated"]
"""Built-in conditions of an evaluation: no intervention, three controls, and the intervention on the found neurons."""

MetricName = Literal["acc", "acc_norm", "mc1", "mc2"]
"""Built-in metrics of whole answers, as in lm-evaluation-harness."""

Theme = Literal["light", "dark"]
"""Background theme of a figure."""

NEURON_SITES: tuple[str, ...] = ("mlp", "attn")
"""The sites whose activations the paper calls neurons."""

SETS: Mapping[str, tuple[str, ...]] = {
    "questions": ("truthfulqa", "triviaqa", "mmlu", "common_facts"),
    "statements, also negated with neg_ before the name": (
        "animal_class",
        "cities",
        "element_symb",
        "facts",
        "inventors",
        "sp_en_trans",
    ),
    "relations": (
        "adj_antonym",
        "adj_comparative",
        "city_in_country",
        "company_hq",
        "country_capital_city",
        "country_currency",
        "country_language",
        "fruit_outside_color",
        "landmark_in_country",
        "object_superclass",
        "person_native_language",
        "product_by_company",
        "verb_past_tense",
        "word_sentiment",
    ),
    "for the embedded model": ("toy", "toy_true_false", "toy_four_choice"),
}
"""Built-in question sets by kind; more can be registered at run time."""


def list_sets() -> str:
    """The names of the built-in question sets by kind, for help and messages."""
    return "; ".join(f"{', '.join(names)} ({kind})" for kind, names in SETS.items())
