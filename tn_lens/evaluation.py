"""Does it matter? Accuracy with the found neurons at zero, beside random sets of the same size (paper 3.3, 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from .ablation import ablate, matched_neurons, random_neurons
from .answers import ask
from .errors import BadInput
from .models import Model, neuron_space
from .neurons import NeuronSet
from .progress import track
from .prompts import Prompt, build_prompts, by_question
from .questions.question import QuestionSet
from .seeds import generator
from .significance import welch

ArmName = Literal["baseline", "random", "random_matched", "suppressed"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)

ARM_NAMES: Mapping[str, str] = {
    "baseline": "untouched",
    "random": "random neurons at zero",
    "random_matched": "random, matched by layer",
    "suppressed": "truth neurons at zero",
}
"""What the conditions are called in tables."""

MASS_KEPT = 0.95
"""Answer mass below which a fall in accuracy may be lost instruction following."""
LETTER_SHIFT = 0.15
"""Change in the share of "A" from which a fall in accuracy may be letter bias."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """What the model answers in one condition. Draw d's neurons are at zero in repetition d; one draw serves all."""

    probabilities: Float[np.ndarray, "draw prompt choice"]
    """f of each shown choice, in [0, 1], for every order of every question."""
    evaluation: Evaluation

    def _drawn(self, per_prompt: Float[np.ndarray, "draw prompt"]) -> Float[np.ndarray, "repetition question"]:
        """The values of the orders that the repetitions drew."""
        asked = self.evaluation.asked
        draws = np.arange(len(asked)) % len(per_prompt)
        return per_prompt[draws[:, None], asked]

    @cached_property
    def right(self) -> Float[np.ndarray, "draw prompt"]:
        """1 where the right label is more probable than every wrong one, else 0."""
        p, index = self.probabilities, self.evaluation.right_label
        own = np.take_along_axis(p, index[None, :, None], axis=-1)
        others = p.copy()
        np.put_along_axis(others, np.broadcast_to(index[None, :, None], own.shape), -1.0, axis=-1)
        return (own[..., 0] > others.max(-1)).astype(np.float64)

    @property
    def p_right(self) -> Float[np.ndarray, "draw prompt"]:
        """Probability of the right label."""
        return np.take_along_axis(self.probabilities, self.evaluation.right_label[None, :, None], axis=-1)[..., 0]

    @property
    def accuracies(self) -> Float[np.ndarray, " repetition"]:
        """Accuracy of each repetition, in [0, 1]."""
        return self._drawn(self.right).mean(-1)

    @property
    def accuracy(self) -> float:
        """Mean accuracy over repetitions, in [0, 1]."""
        return float(self.accuracies.mean())

    @property
    def accuracy_std(self) -> float:
        """Standard deviation over repetitions (ddof 1), in [0, 1]; 0 for one repetition."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else 0.0

    @property
    def answer_mass(self) -> float:
        """Mean probability of all labels together."""
        return float(self._drawn(self.probabilities.sum(-1)).mean())

    @property
    def share_a(self) -> float:
        """Share of answers that choose the first label; letter bias moves it away from the share of right answers there."""
        return float(self._drawn((self.probabilities.argmax(-1) == 0).astype(np.float64)).mean())

    @cached_property
    def order_averaged(self) -> Float[np.ndarray, "draw question"]:
        """1 where the right choice wins after averaging its probability over all orders of the question, else 0.

        Whatever favours one letter favours each choice equally, and cancels.
        """
        verdicts = []
        for rows, orders in self.evaluation.orders:
            by_choice = np.zeros((len(self.probabilities), len(orders[0])))
            for row, order in zip(rows, orders, strict=True):
                by_choice[:, list(order)] += self.probabilities[:, row, : len(order)]
            answer = orders[0][self.evaluation.right_label[rows[0]]]
            others = np.delete(by_choice, answer, axis=-1).max(-1)
            verdicts.append((by_choice[:, answer] > others).astype(np.float64))
        return np.stack(verdicts, axis=-1)

    @property
    def order_averaged_accuracy(self) -> float:
        """Mean of `order_averaged`, in [0, 1]."""
        return float(self.order_averaged.mean())


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

    @property
    def n_questions(self) -> int:
        """Questions asked."""
        return self.asked.shape[1]

    @cached_property
    def arms(self) -> dict[str, Arm]:
        """The conditions by name."""
        return {name: Arm(probabilities=p, evaluation=self) for name, p in self.probabilities.items()}

    @property
    def welch_p(self) -> float:
        """One-sided Welch t-test over repetitions: suppressed below baseline (paper 3.3)."""
        return welch(self.arms["suppressed"].accuracies, self.arms["baseline"].accuracies)

    @property
    def probability_change(self) -> float:
        """Mean of (f_pre(t) - f_post(t)) / f_pre(t) over questions and repetitions (paper eq. 11), a fraction."""
        before, after = (self.arms[arm]._drawn(self.arms[arm].p_right) for arm in ("baseline", "suppressed"))
        return float(np.mean((before - after) / before))

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
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per arm: accuracies in percent (std with ddof 1), answer mass and share of "A" in [0, 1]."""
        rows = {
            name: {
                "accuracy_mean": 100 * arm.accuracy,
                "accuracy_std": 100 * arm.accuracy_std,
                "order_averaged_accuracy": 100 * arm.order_averaged_accuracy,
                "answer_mass": arm.answer_mass,
                "share_a": arm.share_a,
            }
            for name, arm in self.arms.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    def to_dict(self) -> dict[str, dict[str, float]]:
        """`to_frame` as plain numbers, rounded to six decimals."""
        return {
            str(arm): {k: round(v, 6) for k, v in row.items()} for arm, row in self.to_frame().to_dict("index").items()
        }

    def warnings(self) -> list[str]:
        """Sentences for every reason other than truth why accuracy may have moved."""
        before, after = self.arms["baseline"], self.arms["suppressed"]
        fall = 100 * (before.accuracy - after.accuracy)
        real = 100 * (before.order_averaged_accuracy - after.order_averaged_accuracy)
        said = []
        if not self.neurons:
            said.append("No neurons were suppressed, so suppressed and baseline are the same.")
        if before.answer_mass >= MASS_KEPT > after.answer_mass:
            said.append(
                f"Answer mass fell from {before.answer_mass:.2f} to {after.answer_mass:.2f}: part of the fall is lost "
                "instruction following (format neurons), not truth."
            )
        elif before.answer_mass < MASS_KEPT:
            said.append(
                f"The untouched model puts only {before.answer_mass:.2f} of its probability on the labels: it hardly follows "
                "the instruction, and its accuracies mean little."
            )
        if abs(after.share_a - before.share_a) > LETTER_SHIFT and fall >= 1:
            said.append(
                f'The share of "A" moved from {before.share_a:.2f} to {after.share_a:.2f}: letter bias explains part of the '
                f"fall of {fall:.1f} points; with the letters averaged out it is {real:.1f} points."
            )
        if after.accuracy < 0.5 - 0.05 and len(self.prompts[0].label_ids) == 2:
            said.append("Suppressed accuracy is below chance: answers are inverted, which is not the absence of truth.")
        return said

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """One sentence, and a warning for every confound."""
        before, after = self.arms["baseline"], self.arms["suppressed"]
        said = (
            f"{self.name}: accuracy {100 * before.accuracy:.1f} % untouched, {100 * after.accuracy:.1f} % with "
            f"{len(self.neurons)} neurons at zero (Welch p = {self.welch_p:.2g}); order-averaged "
            f"{100 * before.order_averaged_accuracy:.1f} -> {100 * after.order_averaged_accuracy:.1f} %."
        )
        return " ".join([said, *self.warnings()])

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().round(3).to_html()}"


def evaluate(
    model: Model,
    questions: QuestionSet,
    neurons: NeuronSet,
    *,
    n_repetitions: int = 10,
    arms: Sequence[ArmName] = ARMS,
    seed: int = 0,
    progress: bool = False,
    drop_long: bool = False,
) -> Evaluation:
    """Ask the questions with nothing, random neurons and the found neurons at zero (paper 3.3).

    Each repetition draws an order of the choices for every question; all arms share the orders. Random arms draw new
    neurons in each repetition, never a found one: `"random"` uniformly (the paper), `"random_matched"` as many in each
    site and layer as were found there. Every order is asked once per arm, and the repetitions draw from the answers.

    Raises:
        BadInput: no repetitions, an unknown arm, or a set that does not fit the model.
    """
    if not isinstance(neurons, NeuronSet):
        raise BadInput(
            f"expected a NeuronSet (selection.neurons, or NeuronSet.load(path)), got {type(neurons).__name__}"
        )
    space = neuron_space(model)
    space.check(neurons)
    if missing := {"baseline", "suppressed"} - set(arms):
        raise BadInput(f"arms must hold 'baseline' and 'suppressed' to be compared; {sorted(missing)[0]!r} is missing")
    if n_repetitions < 1 or not questions:
        raise BadInput(f"evaluate needs a repetition and a question; got {n_repetitions} and {len(questions)}")
    if unknown := set(arms) - set(ARMS):
        raise BadInput(f"unknown arm {sorted(unknown)[0]!r}: expected {', '.join(ARMS)}")
    prompts = build_prompts(model, questions, order="both", drop_long=drop_long)
    n_orders = np.array([len(group) for _, group in by_question(prompts)])
    first = np.cumsum(n_orders) - n_orders
    coins = generator(seed, 1)
    asked = first + np.stack([coins.integers(0, n_orders) for _ in range(n_repetitions)])
    rng = generator(seed, 2)
    sets: dict[str, list[NeuronSet]] = {}
    for arm in arms:
        match arm:
            case "baseline":
                sets[arm] = [NeuronSet()]
            case "random":
                sets[arm] = [random_neurons(space, len(neurons), neurons, rng) for _ in range(n_repetitions)]
            case "random_matched":
                sets[arm] = [matched_neurons(space, neurons, rng) for _ in range(n_repetitions)]
            case "suppressed":
                sets[arm] = [neurons]
    distinct = list(dict.fromkeys(one for drawn in sets.values() for one in drawn))
    answers: dict[NeuronSet, np.ndarray] = {}
    for silenced in track(distinct, "evaluation" if progress else None):
        with ablate(model, silenced):
            answers[silenced] = ask(model, prompts).double().numpy()
    return Evaluation(
        name=questions.name,
        prompts=tuple(prompts),
        asked=asked,
        neurons=neurons,
        probabilities={arm: np.stack([answers[one] for one in drawn]) for arm, drawn in sets.items()},
        seed=seed,
    )
