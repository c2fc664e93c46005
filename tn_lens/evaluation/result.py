"""The result of an evaluation: all conditions on the same questions in the same orders, and statistics on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import say, say_each
from tn_lens.core.stored import Stored
from tn_lens.evaluation.comparison import FOLLOWED, LETTER_SHIFT, MASS_KEPT, Comparison, compare
from tn_lens.evaluation.condition import ConditionResult
from tn_lens.evaluation.tables import Table, table1, table2
from tn_lens.neurons import NeuronSet
from tn_lens.questions.prompts import PromptSet
from tn_lens.selection.significance import LEVEL, welch

FLOOR = 0.01
"""Smallest denominator in the floored form of equation 11."""
BELOW_CHANCE = 0.05
"""Answers count as inverted if accuracy is below chance by more than this."""
LEAST_QUESTIONS = 15
"""Minimum number of questions of a category in figure 4 of the paper."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation(Stored):
    """The answers under every condition to the same questions in the same orders."""

    name: str
    """Name of the question set."""
    prompts: PromptSet
    """Every order of every question."""
    asked: Int[np.ndarray, "repetition question"]
    """Which prompt each repetition asked, shared by all conditions."""
    neurons: NeuronSet
    """The found neurons."""
    probabilities: Mapping[str, Float[np.ndarray, "draw prompt choice"]]
    """Answer probability f of each shown choice under each condition, in [0, 1]."""
    seed: int
    model_name: str = ""
    intervention: str = "zero-ablated"
    """What was done to the neurons, see `Intervention.description`."""
    text_loss: Mapping[str, Float[np.ndarray, " draw"]] | None = None
    """Mean loss on plain text under each condition, in nats per token, if texts were given."""
    metrics: Mapping[str, Mapping[str, Float[np.ndarray, "draw question"]]] = field(default_factory=dict)
    """Metrics of whole answers (`tn_lens.evaluation.metrics`) by name, for every question under each condition, in [0, 1]."""
    parts: Mapping[str, tuple[str, ...]] | None = None
    """Named parts of the questions (ids) whose accuracies are reported separately, for example the halves of a run."""
    left_out: tuple[str, ...] = ()
    """Rows of the question set that were dropped when it was loaded, with reasons."""

    @cached_property
    def conditions(self) -> dict[str, ConditionResult]:
        """The conditions by name."""
        return {
            name: ConditionResult(probabilities=probabilities, prompts=self.prompts, asked=self.asked)
            for name, probabilities in self.probabilities.items()
        }

    @property
    def controls(self) -> list[str]:
        """Names of the conditions that are controls."""
        return [name for name in self.probabilities if name not in ("unablated", "ablated")]

    @property
    def n_questions(self) -> int:
        """Number of questions."""
        return self.asked.shape[1]

    @property
    def n_neurons(self) -> int:
        """Number of found neurons."""
        return len(self.neurons)

    @property
    def n_repetitions(self) -> int:
        """Number of draws of orders and control neurons."""
        return len(self.asked)

    @property
    def n_orders(self) -> int:
        """Number of orders in which every question was asked; with a single order, letter bias does not cancel."""
        return self.prompts.n_orders

    @property
    def categories(self) -> list[str]:
        """The category of every question."""
        return list(self.prompts.categories.values())

    @property
    def welch_p(self) -> float:
        """p-value of the one-sided Welch t-test over repetitions that ablation lowers accuracy (paper 3.3)."""
        return welch(self.conditions["ablated"].accuracies, self.conditions["unablated"].accuracies)

    @property
    def is_lower(self) -> bool:
        """Whether ablation lowers accuracy significantly: by the Welch test, or, if no two repetitions differ, by the 95 %
        bootstrap interval over questions."""
        return bool(self.welch_p < LEVEL if np.isfinite(self.welch_p) else self.compare().high < 0)

    @property
    def reduction(self) -> float:
        """Decrease in accuracy, as a fraction (times 100: percentage points)."""
        return self.conditions["unablated"].accuracy - self.conditions["ablated"].accuracy

    @property
    def relative_reduction(self) -> float:
        """Decrease in accuracy relative to the unablated accuracy (paper 3.3)."""
        accuracy = self.conditions["unablated"].accuracy
        return self.reduction / accuracy if accuracy else float("nan")

    def _changes(self, floor: float = 0.0) -> Float[np.ndarray, "repetition question"]:
        pair = (self.conditions["unablated"], self.conditions["ablated"])
        before, after = (result.drawn(result.p_right) for result in pair)  # [repetition, question]
        return (before - after) / np.maximum(before, floor)

    @property
    def probability_change(self) -> float:
        """Mean of (f_pre(t) - f_post(t)) / f_pre(t) over questions and repetitions (paper eq. 11), a fraction.

        Questions whose right answer is improbable before ablation have unbounded weight; see `probability_change_floored`
        and `probability_change_median`.
        """
        return float(np.mean(self._changes()))

    @property
    def probability_change_floored(self) -> float:
        """`probability_change` with a denominator of at least 0.01."""
        return float(np.mean(self._changes(FLOOR)))

    @property
    def probability_change_median(self) -> float:
        """`probability_change` with the median instead of the mean."""
        return float(np.median(self._changes()))

    def compare(self, condition: str = "ablated", other: str = "unablated") -> Comparison:
        """Accuracy under one condition minus that under another, with the question as the unit; see `Comparison`.

        Raises:
            BadInput: a condition was not run.
        """
        if unknown := {condition, other} - set(self.probabilities):
            raise BadInput(f"condition {sorted(unknown)[0]!r} was not run; expected {', '.join(self.probabilities)}")
        if (condition, other) not in self._compared:
            self._compared[condition, other] = compare(self.conditions, condition, other, self.seed)
        return self._compared[condition, other]

    @cached_property
    def _compared(self) -> dict[tuple[str, str], Comparison]:
        """Cache of comparisons, which tables and sentences share."""
        return {}

    def fall(self) -> dict[str, float]:
        """The parts of the decrease in accuracy, in percentage points.

        Returns:
            total: decrease in plain accuracy; content: decrease in order-averaged accuracy, in which letter bias cancels;
            letter: the remainder; mass: the additional decrease if prompts whose labels have less than half of the
            probability count as wrong.
        """
        pair = (self.conditions["unablated"], self.conditions["ablated"])
        followed = [float(result.drawn(result.right * (result.mass >= FOLLOWED)).mean()) for result in pair]
        plain, averaged = ([getattr(r, name) for r in pair] for name in ("accuracy", "order_averaged_accuracy"))
        total, content, strict = (100 * (before - after) for before, after in (plain, averaged, followed))
        return {"total": total, "content": content, "letter": total - content, "mass": strict - total}

    def by_category(self, least: int = LEAST_QUESTIONS) -> pd.DataFrame:
        """Figure 4: per category the fraction of questions whose right answer loses probability, and the accuracies.

        Args:
            least: categories with fewer questions are left out; `attrs["hidden"]` counts them, `attrs["hidden_questions"]`
                their questions.

        Returns:
            Columns category, n_questions, share_hurt (in [0, 1]) and the accuracy under every condition (percent), sorted
            by share_hurt.
        """
        hurt = (self._changes() > 0).mean(0)  # [question]
        right = {name: result.drawn(result.right).mean(0) for name, result in self.conditions.items()}
        categories = np.array(self.categories)
        rows = []
        for category in sorted(set(self.categories)):
            at = categories == category
            row = {"category": category, "n_questions": int(at.sum()), "share_hurt": float(hurt[at].mean())}
            rows.append(row | {name: 100 * float(values[at].mean()) for name, values in right.items()})
        # stable, so that equal categories stay in alphabetical order
        frame: Any = pd.DataFrame(rows).sort_values("share_hurt", ascending=False, kind="stable")
        is_large = frame["n_questions"] >= least
        shown = frame[is_large].reset_index(drop=True)
        hidden = frame["n_questions"][~is_large]
        shown.attrs |= {"hidden": len(hidden), "hidden_questions": int(hidden.sum())}
        return shown

    def by_part(self, parts: Mapping[str, Collection[str]] | None = None) -> pd.DataFrame:
        """The rows of `to_frame` for parts of the questions, such as `{"half 1": selection.half_1, ...}`; empty parts are omitted."""
        rows = []
        for name, questions in (parts or self.parts or {}).items():
            part = self.only(questions)
            if part.prompts:
                for condition, row in part.to_frame().to_dict("index").items():
                    rows.append({"part": name, "condition": condition, "n_questions": part.n_questions, **row})
        return pd.DataFrame(rows)

    def only(self, questions: Collection[str]) -> Evaluation:
        """The evaluation restricted to the questions with these ids."""
        wanted = set(questions)
        rows = [row for row, prompt in enumerate(self.prompts) if prompt.question in wanted]
        columns = [column for column, question in enumerate(self.prompts.groups) if question in wanted]
        place = np.full(len(self.prompts), -1)  # old row -> new row
        place[rows] = np.arange(len(rows))
        return replace(
            self,
            prompts=self.prompts.only(wanted),
            asked=place[self.asked[:, columns]],
            probabilities={name: p[:, rows] for name, p in self.probabilities.items()},
            text_loss=None,
            metrics={m: {name: v[:, columns] for name, v in by_name.items()} for m, by_name in self.metrics.items()},
            parts=None,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per condition: accuracies and metrics in percent (std with ddof 1), AUC, answer mass and fraction of "A"."""
        rows: dict[str, dict[str, float]] = {}
        for name, result in self.conditions.items():
            rows[name] = {
                "accuracy_mean": 100 * result.accuracy,
                "accuracy_std": 100 * result.accuracy_std,
                "order_averaged_accuracy": 100 * result.order_averaged_accuracy,
                "auc": result.auc,
                "answer_mass": result.answer_mass,
                "share_a": result.share_a,
            }
            if self.text_loss is not None:
                rows[name]["text_loss"] = float(self.text_loss[name].mean())
            rows[name] |= {metric: 100 * float(values[name].mean()) for metric, values in self.metrics.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition")

    def to_dict(self) -> dict[str, Any]:
        """The numbers for summary.json: conditions as in `to_frame`, rounded to six decimals, and measures of the effect."""
        rows = self.to_frame().to_dict("index")
        conditions = {
            str(name): {key: round(value, 6) for key, value in row.items()}
            | {"accuracies": (100 * self.conditions[str(name)].accuracies).round(6).tolist()}
            for name, row in rows.items()
        }
        return {
            "conditions": conditions,
            "welch_p": self.welch_p,
            "reduction_points": 100 * self.reduction,
            "probability_change": self.probability_change,
            "probability_change_floored": self.probability_change_floored,
            "probability_change_median": self.probability_change_median,
        }

    def table1(self, *others: Evaluation) -> Table:
        """Table 1 of the paper, with the paper's numbers for its six models; all evaluations are on the same question set."""
        return table1([self, *others])

    def table2(self, *others: Evaluation) -> Table:
        """Table 2 of the paper, with the paper's numbers for its six models; one row per model and question set."""
        return table2([self, *others])

    @property
    def follows_instruction(self) -> bool:
        """Whether the unablated model puts most of its probability on the labels; not expected of completions."""
        return not self.prompts.labels or not self.conditions["unablated"].answer_mass < FOLLOWED

    @property
    def loses_instruction(self) -> bool:
        """Whether ablation lowers the answer mass by so much that the model may no longer follow the instruction."""
        before, after = (self.conditions[name].answer_mass for name in ("unablated", "ablated"))
        return after < (MASS_KEPT if self.prompts.labels else FOLLOWED) * before

    @property
    def shifts_letters(self) -> bool:
        """Whether ablation changes the fraction of "A" enough for letter bias to matter."""
        before, after = (self.conditions[name].share_a for name in ("unablated", "ablated"))
        return abs(after - before) > LETTER_SHIFT

    @property
    def is_inverted(self) -> bool:
        """Whether the ablated accuracy on questions with two choices is clearly below chance."""
        return len(self.prompts[0].label_ids) == 2 and self.conditions["ablated"].accuracy < 0.5 - BELOW_CHANCE

    def explain(self) -> list[str]:
        """Sentences on the parts of the decrease (content, letter bias, answer mass), every comparison, and the loss on plain text."""
        return say_each("evaluation.explain", self)

    def warnings(self) -> list[str]:
        """Reasons not to interpret the change in accuracy as a loss of truth, one sentence each."""
        return say_each("evaluation.warnings", self)

    def summary(self) -> str:
        """Summary in one sentence, followed by the warnings."""
        return say("evaluation.summary", self)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().round(3).to_html()}"
