"""Dose and response: what happens between suppressing the neurons and doubling them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.evaluation.evaluate import evaluate
from tn_lens.models import Model
from tn_lens.neurons.neuron import NeuronSet
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.progress import track
from tn_lens.runs.units import Mapper, in_memory, within

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def dose_response(
    model: Model,
    questions: QuestionSet,
    neurons: NeuronSet,
    *,
    factors: Sequence[float | int] = FACTORS,
    n_repetitions: int = 10,
    progress: bool = False,
    mapper: Mapper = in_memory,
    **options: Any,
) -> pd.DataFrame:
    """Scale the neurons by each factor, and as many matched random ones: does amplifying them help?

    Args:
        model: the model.
        questions: what to ask.
        neurons: the found set.
        factors: 0 suppresses, 1 leaves the model as it is, above 1 amplifies.
        n_repetitions: draws of the matched control.
        progress: show a progress bar.
        mapper: see `evaluate`.
        options: of `evaluate`: positions, seed, order, texts.

    Returns:
        One row per factor and arm ("suppressed" is the found set, "random_matched" the control): accuracy and
        order_averaged_accuracy in percent, p_right (mean probability of the right label), answer_mass and share_a.

    Raises:
        BadInput: no factor, or what `evaluate` refuses.
    """
    if not len(factors):
        raise BadInput("dose_response needs a factor; got none")
    rows: list[dict[str, Any]] = []
    for factor in track(factors, "dose and response" if progress else None):
        found = evaluate(
            model,
            questions,
            neurons,
            mode="scale",
            factor=factor,
            arms=("baseline", "random_matched", "suppressed"),
            n_repetitions=n_repetitions,
            mapper=within(mapper, f"times-{float(factor)}"),
            **options,
        )
        for name in ("suppressed", "random_matched"):
            arm = found.arms[name]
            rows.append(
                {
                    "factor": factor,
                    "arm": name,
                    "accuracy": 100 * arm.accuracy,
                    "order_averaged_accuracy": 100 * arm.order_averaged_accuracy,
                    "p_right": float(arm.p_right.mean()),
                    "answer_mass": arm.answer_mass,
                    "share_a": arm.share_a,
                }
            )
    return pd.DataFrame(rows)
