"""What is known of one neuron, as text, as a piece of HTML and as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from tn_lens.core.errors import BadInput
from tn_lens.evaluation.diagnosis import CASES, VERDICTS, Verdict
from tn_lens.neurons.neuron import Neuron, layer_in_words
from tn_lens.results.tokens import visible


@dataclass(frozen=True)
class Activation:
    """A neuron's activation at the last position, over some prompts."""

    mean: float
    std: float
    """Standard deviation over the prompts (ddof 1); NaN for one."""
    n: int
    """Prompts."""


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary, and what one unit of activation adds to its logit, relative to the mean of all tokens."""

    text: str
    """Readable: white space and half characters made visible."""
    id: int
    logit: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question, and the neuron's D there (the mean over its orders)."""

    question: int
    """Index in its set."""
    text: str
    right: str
    wrong: tuple[str, ...]
    category: str
    difference: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Card:
    """One neuron: where it sits, its statistics, what it supports, when it is active, and what it writes."""

    neuron: Neuron
    model_name: str
    n_layers: int
    """Of the model."""
    n_beside: int | None
    """Other found neurons of the same layer and site; None without a selection."""
    statistics: Mapping[str, Any]
    """The neuron's row of `Selection.to_frame(candidates=True)`; empty where it was no candidate."""
    diagnosis: Mapping[str, Any]
    """Its row of `Diagnosis.to_frame()`; empty where it was not diagnosed."""
    supports: tuple[Example, ...]
    """The questions with its highest D, highest first."""
    opposes: tuple[Example, ...]
    """Those with its lowest D, lowest first."""
    n_questions: int
    """Questions with scores: those that the model answers right."""
    share_positive: float
    """Share of them with D > 0, in [0, 1]."""
    activations: Mapping[str, Activation]
    """At the last position of the prompt, whose logits are the answer: over the prompts that the model answers right, those
    it answers wrong, and those whose right answer is shown at A, at B and so on. Zero ablation takes this away."""
    promotes: tuple[Token, ...]
    """The tokens whose logits one unit of activation raises most, past all later layers (see `Backend.direct_logits`)."""
    demotes: tuple[Token, ...]
    """The tokens whose logits it lowers most."""
    labels: tuple[Token, ...]
    """The answer labels, where all prompts have the same."""

    @property
    def verdict(self) -> Verdict | None:
        """Whether it supports truth or the model's choice; None where it was not diagnosed."""
        return self.diagnosis.get("verdict")

    @property
    def case(self) -> int | None:
        """Which of the paper's four cases; None where it was not diagnosed."""
        return self.diagnosis.get("case")

    @property
    def depth(self) -> float:
        """Relative depth of its layer: 0 the first, 1 the last."""
        return self.neuron.layer / max(self.n_layers - 1, 1)

    @property
    def turned(self) -> str:
        """A sentence where the activation is below zero, so that the lists of tokens change sides; empty where it is not."""
        shown = {name: of.mean for name, of in self.activations.items() if name.startswith("right answer")}
        shown = shown or {name: of.mean for name, of in self.activations.items()}
        below = [name for name, mean in shown.items() if mean < 0]
        if not below:
            return ""
        where = "" if len(below) == len(shown) else f" ({' and '.join(below)})"
        return f"Where its mean activation is below zero{where}, it lowers what it promotes here and raises what it demotes."

    @property
    def written(self) -> dict[str, tuple[Token, ...]]:
        """The lists of tokens that are not empty, by what it does to them."""
        lists = {"promotes": self.promotes, "demotes": self.demotes, "labels": self.labels}
        return {name: tokens for name, tokens in lists.items() if tokens}

    def facts(self) -> list[str]:
        """Where it sits, its statistics and its diagnosis, a line each."""
        n, of = self.neuron, self.statistics
        kind = "MLP neuron" if n.head is None else f"attention neuron of head {n.head}"
        where = f"{kind} in {layer_in_words(n.layer, self.n_layers)} (relative depth {self.depth:.2f})"
        said = [
            where
            + (
                ""
                if self.n_beside is None
                else f", beside {self.n_beside} other found {'one' if self.n_beside == 1 else 'ones'} there"
            )
        ]
        if of:
            said.append(
                f"mean D {of['mean_difference']:.4g} (95 % interval {of['ci_low']:.4g} to {of['ci_high']:.4g}), Cohen's d "
                f"{of['cohens_d']:.2f}, corrected p {of['p_adjusted']:.2g}, salient in {100 * of['share']:.0f} % of half 1"
                + ("" if of["found"] else ": a candidate that did not pass the test")
            )
        elif self.n_beside is not None:
            said.append("not found, and no candidate: it is salient in too few questions of half 1")
        said.append(
            f"D > 0 in {100 * self.share_positive:.0f} % of the {self.n_questions} questions that the model answers right"
        )
        if self.verdict is not None:
            mistaken = self.diagnosis["mean_difference_mistaken"]
            at = "" if mistaken != mistaken else f" (mean D where the model is wrong {mistaken:.4g})"
            said.append(f"{VERDICTS[self.verdict]}{at}")
            if self.diagnosis["attr_right"] == self.diagnosis["attr_right"]:
                said.append(f"case {self.case}: {CASES[self.diagnosis['case']]}")
        return said

    def summary(self) -> str:
        """Two or three sentences."""
        said = [f"{self.neuron}: {'; '.join(self.facts())}."]
        if self.activations:
            shown = ", ".join(f"{of.mean:.3g} where {name}" for name, of in self.activations.items())
            said.append(f"Mean activation {shown}.")
        if self.promotes:
            up, down = (" ".join(t.text for t in tokens[:5]) for tokens in (self.promotes, self.demotes))
            said.append(f"One unit raises {up} and lowers {down}.")
        return " ".join(said)

    def to_text(self) -> str:
        """The card for a terminal, without markup."""
        lines = [*self.facts(), "", "activation at the last position, where the answer is read"]
        width = max(map(len, self.activations), default=0)
        lines += [
            f"  {name:<{width}}  {of.mean:>8.3g} ± {of.std:<7.2g} {of.n} prompts"
            for name, of in self.activations.items()
        ]
        lines += ["", "one unit of activation adds to the logits"] if self.written else []
        for name, tokens in self.written.items():
            lines.append(f"  {name:<8}  " + ", ".join(f"{t.text} {t.logit:+.2g}" for t in tokens))
        lines += [f"  {self.turned}"] if self.turned else []
        for name, examples in (("supports most", self.supports), ("supports least", self.opposes)):
            lines += ["", f"{name} (D)"] if examples else []
            for one in examples:
                answers = f"right: {one.right}; wrong: {', '.join(one.wrong)}" if one.right else ""
                category = f"[{one.category}] " if one.category else ""
                lines.append(visible(f"  {one.difference:+.4f}  {category}{one.text}  {answers}").rstrip())
        return "\n".join(lines)

    def to_html(self) -> str:
        """The card as a piece of HTML, everything escaped; it takes its colours from the page."""
        return _template().render(card=self, visible=visible)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": str(self.neuron), **asdict(self)}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Card:
        """The inverse of `to_dict`, also after JSON."""
        nan = float("nan")

        def numbers(record: Mapping[str, Any]) -> dict[str, Any]:
            """JSON has no NaN; what may be None stays so."""
            return {key: nan if value is None and key != "head" else value for key, value in record.items()}

        fields = {key: value for key, value in entry.items() if key != "name"}
        fields["neuron"] = Neuron.from_dict(entry["neuron"])
        fields |= {key: numbers(entry[key]) for key in ("statistics", "diagnosis")}
        fields["activations"] = {name: Activation(**numbers(of)) for name, of in entry["activations"].items()}
        for key in ("promotes", "demotes", "labels"):
            fields[key] = tuple(Token(**token) for token in entry[key])
        for key in ("supports", "opposes"):
            fields[key] = tuple(Example(**{**one, "wrong": tuple(one["wrong"])}) for one in entry[key])
        return cls(**fields)


def load_cards(path: str | Path) -> tuple[Card, ...]:
    """The cards of a run folder, strongest first; no model is needed.

    Raises:
        BadInput: the run has none, or its file is damaged.
    """
    file = Path(path) / "cards.json"
    try:
        return tuple(map(Card.from_dict, json.loads(file.read_text(encoding="utf-8"))["cards"]))
    except FileNotFoundError:
        raise BadInput(f"{path} has no cards.json; finish the run with the same command") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} is damaged, or another version wrote it; run the same command again") from error


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("tn_lens.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("card.html.j2")
