"""Dose response: accuracy while the neurons' activations are scaled, from zero-ablation to doubling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Where
from tn_lens.evaluation.evaluate import evaluate
from tn_lens.inference.interventions import Scale
from tn_lens.models import Model
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.context import in_stage, track

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


@isolated
def dose_response(
    model: Model,
    questions: QuestionSet,
    neurons: NeuronSet,
    *,
    factors: Sequence[float | int] = FACTORS,
    positions: Where = "all",
    **options: Any,
) -> pd.DataFrame:
    """Scale the found neurons, and equally many matched random neurons, by each factor.

    Args:
        model: the model.
        questions: the questions to ask.
        neurons: the found set.
        factors: factors on the activations; 0 ablates, 1 leaves the model unchanged, and values above 1 amplify.
        positions: positions at which the activations are scaled.
        options: n_repetitions, seed, order and control_orders of `evaluate`.

    Returns:
        One row per factor and condition ("ablated" is the found set, "random_matched" the control): accuracy and
        order_averaged_accuracy in percent, p_right (mean probability of the right label), answer_mass and share_a.

    Raises:
        BadInput: there is no factor; see also `evaluate`.
    """
    if not len(factors):
        raise BadInput("dose_response needs at least one factor; got none")
    rows: list[dict[str, Any]] = []
    for factor in track(factors, "dose response"):
        evaluation = in_stage(
            f"times-{float(factor)}",
            evaluate,
            model,
            questions,
            neurons,
            intervention=Scale(factor=factor, positions=positions),
            conditions=("unablated", "random_matched", "ablated"),
            **options,
        )
        for name in ("ablated", "random_matched"):
            result = evaluation.conditions[name]
            rows.append(
                {
                    "factor": factor,
                    "condition": name,
                    "accuracy": 100 * result.accuracy,
                    "order_averaged_accuracy": 100 * result.order_averaged_accuracy,
                    "p_right": float(result.p_right.mean()),
                    "answer_mass": result.answer_mass,
                    "share_a": result.share_a,
                }
            )
    return pd.DataFrame(rows)
