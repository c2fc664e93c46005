"""Every condition on the same questions in the same orders, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tn_lens.evaluation.comparison import Comparison, compare, explain, warnings_of
from tn_lens.evaluation.condition import Arm
from tn_lens.evaluation.tables import Table, table1
from tn_lens.neurons.neuron import NeuronSet
from tn_lens.prompts import Prompt, by_question
from tn_lens.selection.significance import say_welch, welch

FLOOR = 0.01
"""Probability below which the floored form of equation 11 does not divide."""
LEAST_QUESTIONS = 15
"""Questions that a category needs in figure 4 of the paper."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation:
    """Every arm on the same questions in the same orders."""

    name: str
    """The question set."""
    prompts: tuple[Prompt, ...]
    """Every order of every question."""
    asked: Int[np.ndarray, "repetition question"]
    """Which prompt each repetition asked, shared by all arms."""
    neurons: NeuronSet
    probabilities: Mapping[str, Float[np.ndarray, "draw prompt choice"]]
    """Per arm."""
    seed: int
    model_name: str = ""
    intervention: str = "at zero"
    """What was done to the neurons, in words."""
    text_loss: Mapping[str, Float[np.ndarray, " draw"]] | None = None
    """Per arm: mean loss on plain text, in nats a token, where text was given."""

    @cached_property
    def right_label(self) -> Int[np.ndarray, " prompt"]:
        """Which shown choice is right."""
        return np.array([p.right for p in self.prompts])

    @cached_property
    def orders(self) -> list[tuple[list[int], list[tuple[int, ...]]]]:
        """Per question: the rows of its prompts, and the order of choices in each."""
        grouped, start = [], 0
        for _, group in by_question(self.prompts):
            grouped.append((list(range(start, start + len(group))), [p.order for p in group]))
            start += len(group)
        return grouped

    @cached_property
    def answers(self) -> list[int]:
        """Per question: the index of the right choice."""
        return [orders[0][self.right_label[rows[0]]] for rows, orders in self.orders]

    @property
    def n_questions(self) -> int:
        """Questions asked."""
        return self.asked.shape[1]

    @property
    def n_neurons(self) -> int:
        """Neurons that were touched."""
        return len(self.neurons)

    @property
    def n_repetitions(self) -> int:
        """Draws of orders and control neurons."""
        return len(self.asked)

    @property
    def n_orders(self) -> int:
        """Orders in which every question was asked; with one, letter bias does not cancel."""
        return min((len(rows) for rows, _ in self.orders), default=0)

    @cached_property
    def categories(self) -> list[str]:
        """The category of every question."""
        return [self.prompts[rows[0]].category for rows, _ in self.orders]

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """The conditions by name."""
        return {name: Arm(probabilities=p, evaluation=self) for name, p in self.probabilities.items()}

    @property
    def welch_p(self) -> float:
        """One-sided Welch t-test over repetitions: suppressed below baseline (paper 3.3)."""
        return welch(self.arms["suppressed"].accuracies, self.arms["baseline"].accuracies)

    @property
    def reduction(self) -> float:
        """Accuracy lost, a fraction of one (times 100: points)."""
        return self.arms["baseline"].accuracy - self.arms["suppressed"].accuracy

    @property
    def relative_reduction(self) -> float:
        """Accuracy lost, as a fraction of the untouched accuracy (paper 3.3)."""
        return self.reduction / self.arms["baseline"].accuracy if self.arms["baseline"].accuracy else float("nan")

    def _changes(self, floor: float = 0.0) -> Float[np.ndarray, "repetition question"]:
        before, after = (self.arms[arm].drawn(self.arms[arm].p_right) for arm in ("baseline", "suppressed"))
        return (before - after) / np.maximum(before, floor)

    @property
    def probability_change(self) -> float:
        """Mean of (f_pre(t) - f_post(t)) / f_pre(t) over questions and repetitions (paper eq. 11), a fraction.

        Questions that the untouched model gives hardly any probability weigh without limit: see the two beside it.
        """
        return float(np.mean(self._changes()))

    @property
    def probability_change_floored(self) -> float:
        """The same with at least 0.01 under the fraction line."""
        return float(np.mean(self._changes(FLOOR)))

    @property
    def probability_change_median(self) -> float:
        """The median instead of the mean."""
        return float(np.median(self._changes()))

    def compare(self, arm: str = "suppressed", other: str = "baseline") -> Comparison:
        """Order-averaged accuracy of one arm less that of another, with the question as the unit.

        Raises:
            BadInput: an arm was not run.
        """
        if (arm, other) not in self._compared:
            self._compared[arm, other] = compare(self, arm, other)
        return self._compared[arm, other]

    @cached_property
    def _compared(self) -> dict[tuple[str, str], Comparison]:
        """Comparisons made so far: tables, files and sentences ask for the same ones."""
        return {}

    def by_category(self, least: int = LEAST_QUESTIONS) -> pd.DataFrame:
        """Figure 4: per category the share of questions whose right answer loses probability, and the accuracies.

        Args:
            least: categories with fewer questions are left out; `attrs["hidden"]` counts them, `attrs["hidden_questions"]`
                their questions.

        Returns:
            Columns category, n_questions, share_hurt (in [0, 1]) and the accuracy of every arm (percent), sorted by share.
        """
        hurt = (self._changes() > 0).mean(0)
        right = {name: arm.drawn(arm.right).mean(0) for name, arm in self.arms.items()}
        own = np.array(self.categories)
        rows: list[dict[str, Any]] = []
        for category in sorted(set(self.categories)):
            at = own == category
            accuracies = {name: 100 * float(of[at].mean()) for name, of in right.items()}
            rows.append(
                {"category": category, "n_questions": int(at.sum()), "share_hurt": float(hurt[at].mean())} | accuracies
            )
        rows.sort(key=lambda row: -row["share_hurt"])
        frame = pd.DataFrame(rows, columns=["category", "n_questions", "share_hurt", *right])
        return enough_questions(frame, least)

    def by_part(self, parts: Mapping[str, Sequence[int]]) -> pd.DataFrame:
        """The arms on parts of the questions, as `{"half 1": selection.half_1, ...}`; empty parts are left out."""
        rows = []
        for name, questions in parts.items():
            part = self.only(questions)
            if part.prompts:
                for arm, row in part.to_frame().to_dict("index").items():
                    rows.append({"part": name, "arm": arm, "n_questions": part.n_questions, **row})
        return pd.DataFrame(rows)

    def only(self, questions: Sequence[int]) -> Evaluation:
        """The same evaluation on some of the questions (indices in the set)."""
        wanted = set(questions)
        rows = [i for i, p in enumerate(self.prompts) if p.question in wanted]
        columns = [i for i, (own, _) in enumerate(self.orders) if self.prompts[own[0]].question in wanted]
        place = np.full(len(self.prompts), -1)
        place[rows] = np.arange(len(rows))
        return type(self)(
            name=self.name,
            prompts=tuple(self.prompts[i] for i in rows),
            asked=place[self.asked[:, columns]],
            neurons=self.neurons,
            probabilities={arm: p[:, rows] for arm, p in self.probabilities.items()},
            seed=self.seed,
            model_name=self.model_name,
            intervention=self.intervention,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per arm: accuracies in percent (std with ddof 1), AUC, answer mass and share of "A" in [0, 1]."""
        rows: dict[str, dict[str, float]] = {}
        for name, arm in self.arms.items():
            rows[name] = {
                "accuracy_mean": 100 * arm.accuracy,
                "accuracy_std": 100 * arm.accuracy_std,
                "order_averaged_accuracy": 100 * arm.order_averaged_accuracy,
                "auc": arm.auc,
                "answer_mass": arm.answer_mass,
                "share_a": arm.share_a,
            }
            if self.text_loss is not None:
                rows[name]["text_loss"] = float(self.text_loss[name].mean())
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The arms of summary.json: `to_frame` without AUC and loss, as plain numbers rounded to six decimals."""
        return {
            arm: {k: v for k, v in row.items() if k not in ("auc", "text_loss")} for arm, row in self._rows().items()
        }

    def _rows(self) -> dict[str, dict[str, float]]:
        return {
            str(arm): {k: round(v, 6) for k, v in row.items()} for arm, row in self.to_frame().to_dict("index").items()
        }

    def record(self) -> dict[str, Any]:
        """Everything that a file about this evaluation should hold: plain values for JSON."""
        controls = [arm for arm in self.arms if arm not in ("baseline", "suppressed")]
        return {
            "model": self.model_name,
            "questions": self.name,
            "n_questions": self.n_questions,
            "n_neurons": self.n_neurons,
            "neurons_sha256": self.neurons.digest,
            "intervention": self.intervention,
            "seed": self.seed,
            "n_repetitions": self.n_repetitions,
            "n_orders": self.n_orders,
            "arms": {
                name: {
                    **row,
                    "accuracy": (100 * self.arms[name].accuracies).tolist(),
                    "letter_shares": self.arms[name].shares.tolist(),
                }
                for name, row in self._rows().items()
            },
            "welch_p": self.welch_p,
            "reduction_points": 100 * self.reduction,
            "relative_reduction": self.relative_reduction,
            "probability_change": self.probability_change,
            "probability_change_floored": self.probability_change_floored,
            "probability_change_median": self.probability_change_median,
            "compared": {other: self.compare("suppressed", other).to_dict() for other in ("baseline", *controls)},
            "warnings": self.warnings(),
            "explained": self.explain(),
            "categories": self.by_category(1).round(6).to_dict("records"),
        }

    def explain(self) -> list[str]:
        """What a fall is made of (content, letter bias, lost mass), and how it compares with every control: sentences."""
        return explain(self)

    def warnings(self) -> list[str]:
        """Sentences for every reason other than truth why accuracy may have moved."""
        return warnings_of(self)

    def table1(self) -> Table:
        """The paper's table 1 for this model, its own figures below where it has them."""
        return table1([self])

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """One sentence, and a warning for every confound."""
        before, after = self.arms["baseline"], self.arms["suppressed"]
        averaged = (
            f"; order-averaged {100 * before.order_averaged_accuracy:.1f} -> {100 * after.order_averaged_accuracy:.1f} %"
            if self.n_orders > 1
            else ""
        )
        said = (
            f"{self.name}: accuracy {100 * before.accuracy:.1f} % untouched, {100 * after.accuracy:.1f} % with "
            f"{len(self.neurons)} neurons {self.intervention} ({say_welch(self.welch_p)}){averaged}."
        )
        return " ".join([said, *self.warnings()])

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().round(3).to_html()}"


def enough_questions(categories: pd.DataFrame, least: int) -> pd.DataFrame:
    """The categories with at least so many questions; `attrs` counts the others and their questions."""
    n_questions = categories["n_questions"].to_numpy()
    shown = categories.loc[n_questions >= least].reset_index(drop=True)
    shown.attrs["hidden"] = int((n_questions < least).sum())
    shown.attrs["hidden_questions"] = int(n_questions[n_questions < least].sum())
    return shown
