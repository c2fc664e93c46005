"""A neuron card: a summary of one neuron, as text or HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tn_lens.attribution.result import Unconverged
from tn_lens.core.sentences import environment, say, say_each
from tn_lens.core.stored import Stored
from tn_lens.core.tokens import visible
from tn_lens.evaluation.diagnosis import CASES, VERDICTS, Verdict
from tn_lens.neurons import Neuron


@dataclass(frozen=True)
class Activation:
    """A neuron's activation at the last position, over some prompts."""

    mean: float
    std: float
    """Standard deviation over the prompts (ddof 1); NaN for a single prompt."""
    n: int
    """Number of prompts."""


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary, and the change of its logit for one unit of activation, relative to the mean of all tokens."""

    text: str
    """Readable: white space and parts of characters are made visible."""
    id: int
    logit: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question, and the neuron's D there (the mean over its orders)."""

    question: str
    """Id of the question."""
    text: str
    right: str
    wrong: tuple[str, ...]
    category: str
    difference: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Card(Stored):
    """One neuron: its place, statistics, the questions that it supports, its activation, and its direct logit attribution."""

    neuron: Neuron
    model_name: str
    n_layers: int
    """Layers of the model."""
    n_beside: int | None
    """Other found neurons of the same layer and site; None without a selection."""
    statistics: Mapping[str, Any]
    """The neuron's row of `Selection.to_frame(candidates=True)`; empty if it was not a candidate."""
    diagnosis: Mapping[str, Any]
    """Its row of `Diagnosis.to_frame()`; empty if it was not diagnosed."""
    supports: tuple[Example, ...]
    """The questions with its highest D, highest first."""
    opposes: tuple[Example, ...]
    """The questions with its lowest D, lowest first."""
    n_questions: int
    """Number of questions with scores, which the model answers correctly."""
    share_positive: float
    """Fraction of these with D > 0, in [0, 1]."""
    activations: Mapping[str, Activation]
    """At the last position of the prompt, whose logits are the answer; zero-ablation removes it. By group of prompts: those
    that the model answers correctly, those that it answers incorrectly, and those whose right answer is shown at A, at B and
    so on."""
    promotes: tuple[Token, ...]
    """The tokens with the highest direct logit attribution, without later layers (see `Backend.direct_logits`)."""
    demotes: tuple[Token, ...]
    """The tokens with the lowest."""
    labels: tuple[Token, ...]
    """The answer labels, if they are the same in all prompts."""
    unconverged: Unconverged | None = None
    """The error of its site and layer, if it exceeds the tolerance on some prompts."""

    def __post_init__(self) -> None:
        for name in ("statistics", "diagnosis"):
            # JSON has no NaN, so files contain None instead
            values = {key: float("nan") if value is None else value for key, value in getattr(self, name).items()}
            object.__setattr__(self, name, values)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict of the diagnosis; None if the neuron was not diagnosed."""
        return self.diagnosis.get("verdict")

    @property
    def case(self) -> int | None:
        """The paper's case, 1 to 4; None if it was not diagnosed."""
        return self.diagnosis.get("case")

    @property
    def depth(self) -> float:
        """Relative depth of its layer: 0 the first, 1 the last."""
        return self.neuron.layer / max(self.n_layers - 1, 1)

    @property
    def turned(self) -> str:
        """A note if its mean activation is negative, which swaps promoted and demoted tokens; otherwise empty."""
        means = {name: activation.mean for name, activation in self.activations.items()}
        # an activation that depends on the letter can change its sign between these groups
        means = {name: mean for name, mean in means.items() if name.startswith("right answer")} or means
        below = [name for name, mean in means.items() if mean < 0]
        return say("card.turned", below, len(below) == len(means))

    @property
    def written(self) -> dict[str, tuple[Token, ...]]:
        """The lists of tokens that are not empty, by name."""
        lists = {"promotes": self.promotes, "demotes": self.demotes, "labels": self.labels}
        return {name: tokens for name, tokens in lists.items() if tokens}

    def facts(self) -> list[str]:
        """Its place, its statistics and its diagnosis, one line each."""
        return say_each("card.facts", self, VERDICTS, CASES)

    def summary(self) -> str:
        """Summary in a few sentences."""
        return say("card.summary", self, self.facts())

    def to_text(self) -> str:
        """The card for a terminal, without markup."""
        text = environment("templates").get_template("card.txt.j2").render(card=self, visible=visible)
        return "\n".join(line.rstrip() for line in text.split("\n"))

    def to_html(self) -> str:
        """The card as an HTML fragment with all text escaped; it inherits the colours of the page."""
        template = environment("templates", is_html=True).get_template("card.html.j2")
        return template.render(card=self, visible=visible)

    def _repr_html_(self) -> str:
        return self.to_html()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CardFile(Stored):
    """The cards of a run, strongest neuron first."""

    cards: tuple[Card, ...]


def load_cards(path: str | Path) -> tuple[Card, ...]:
    """The cards of a run folder, strongest neuron first; no model is needed.

    Raises:
        BadInput: the run has no cards, or their file is damaged.
    """
    return CardFile.load(Path(path) / "cards.json").cards
