"""An evaluation as its file holds it: everything but the single answers, under the names that `Evaluation` has for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tn_lens.core.errors import BadInput
from tn_lens.evaluation.comparison import Comparison
from tn_lens.evaluation.result import LEAST_QUESTIONS, enough_questions


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredArm:
    """One condition."""

    accuracies: Float[np.ndarray, " repetition"]
    """In [0, 1]."""
    accuracy: float
    accuracy_std: float
    order_averaged_accuracy: float
    """NaN where not every order was asked."""
    auc: float
    answer_mass: float
    share_a: float
    shares: Float[np.ndarray, " choice"]
    """Share of answers that choose each letter."""

    @property
    def is_complete(self) -> bool:
        """Whether every order was asked."""
        return self.order_averaged_accuracy == self.order_averaged_accuracy


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredEvaluation:
    """What tables, figures and pages need of an evaluation."""

    name: str
    model_name: str
    n_questions: int
    n_neurons: int
    neurons_sha256: str
    n_repetitions: int
    n_orders: int
    intervention: str
    arms: Mapping[str, StoredArm]
    welch_p: float
    reduction: float
    relative_reduction: float
    probability_change: float
    probability_change_floored: float
    probability_change_median: float
    categories: pd.DataFrame
    """Every category, however small."""
    comparisons: Mapping[str, Comparison]
    """The suppressed arm beside every other."""
    said: tuple[str, ...]
    """What explains the fall."""
    warned: tuple[str, ...]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> StoredEvaluation:
        """Read what `Evaluation.record` gives; null is NaN.

        Raises:
            BadInput: a field is missing.
        """
        try:
            arms = {name: _arm(of) for name, of in record["arms"].items()}
            return cls(
                name=record["questions"],
                model_name=record["model"],
                n_questions=record["n_questions"],
                n_neurons=record["n_neurons"],
                neurons_sha256=record["neurons_sha256"],
                n_repetitions=record["n_repetitions"],
                n_orders=record["n_orders"],
                intervention=record["intervention"],
                arms=arms,
                welch_p=_number(record["welch_p"]),
                reduction=_number(record["reduction_points"]) / 100,
                relative_reduction=_number(record["relative_reduction"]),
                probability_change=_number(record["probability_change"]),
                probability_change_floored=_number(record["probability_change_floored"]),
                probability_change_median=_number(record["probability_change_median"]),
                categories=pd.DataFrame(
                    record["categories"], columns=["category", "n_questions", "share_hurt", *arms]
                ).astype({"category": str, "n_questions": int}),
                comparisons={name: _comparison(of) for name, of in record["compared"].items()},
                said=tuple(record["explained"]),
                warned=tuple(record["warnings"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(
                f"expected an evaluation as tn_lens writes it, and {error} is missing or of another kind; run the same "
                "command again to write it anew"
            ) from error

    def by_category(self, least: int = LEAST_QUESTIONS) -> pd.DataFrame:
        """As `Evaluation.by_category`."""
        return enough_questions(self.categories, least)

    def compare(self, arm: str = "suppressed", other: str = "baseline") -> Comparison:
        """The suppressed arm beside another.

        Raises:
            BadInput: the comparison was not stored.
        """
        if arm != "suppressed" or other not in self.comparisons:
            raise BadInput(f"only 'suppressed' beside {', '.join(self.comparisons)} was stored; got {arm!r}, {other!r}")
        return self.comparisons[other]

    def explain(self) -> list[str]:
        """As `Evaluation.explain`."""
        return list(self.said)

    def warnings(self) -> list[str]:
        """As `Evaluation.warnings`."""
        return list(self.warned)


def _arm(of: Mapping[str, Any]) -> StoredArm:
    return StoredArm(
        accuracies=np.array(of["accuracy"], dtype=np.float64) / 100,
        accuracy=_number(of["accuracy_mean"]) / 100,
        accuracy_std=_number(of["accuracy_std"]) / 100,
        order_averaged_accuracy=_number(of["order_averaged_accuracy"]) / 100,
        auc=_number(of["auc"]),
        answer_mass=_number(of["answer_mass"]),
        share_a=_number(of["share_a"]),
        shares=np.array(of["letter_shares"], dtype=np.float64),
    )


def _comparison(of: Mapping[str, Any]) -> Comparison:
    numbers = {name: _number(of[name]) for name in ("difference", "low", "high", "mcnemar_p", "draws_p")}
    return Comparison(arm=of["arm"], other=of["other"], n_draws=int(of["n_draws"]), **numbers)


def _number(value: float | int | None) -> float:
    return float("nan") if value is None else float(value)
