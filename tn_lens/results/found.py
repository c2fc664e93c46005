"""What a run found, whether it matters, and what should be read before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from tn_lens.attribution.result import worst_gap
from tn_lens.core.wording import plural
from tn_lens.evaluation import Evaluation
from tn_lens.evaluation.diagnosis import Diagnosis
from tn_lens.evaluation.tuning import Tuning
from tn_lens.figures import Figure, plot_layers
from tn_lens.inference.manipulation import ManipulationCheck
from tn_lens.neurons.neuron import Neuron, NeuronSet
from tn_lens.pipeline.settings import Settings
from tn_lens.results import Card
from tn_lens.selection.select import FEW, Selection
from tn_lens.selection.stability import Stability


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TruthNeurons:
    """What a run found, and whether it matters."""

    model_name: str
    questions_name: str
    settings: Settings
    check: ManipulationCheck
    completeness: Mapping[str, Mapping[str, list[float]]]
    """Per site: mean |gap| and mean |change| of each layer (0 gap: an exact integral)."""
    selection: Selection
    evaluation: Evaluation
    """The arms on the reporting questions of the toy, on the whole set elsewhere (as in the paper)."""
    is_held_out: bool
    """Whether the arms are evaluated on a part of the set that no neuron was looked for in."""
    unseen: Evaluation | None
    """The arms on the questions that selection and test did not use, where `evaluation` holds others too."""
    diagnosis: Diagnosis
    """Whether the neurons support truth, the model's choice, or the format."""
    stability: Stability
    """The same selection on other splits."""
    found_again: float | None
    """Share of the neurons found with one order per question that every order finds again; None for one order."""
    tuning: Tuning | None
    """The search for t, where t was "auto"."""
    notes: tuple[str, ...]
    """Warnings of the stages, in sentences."""
    cards: tuple[Card, ...] = ()
    """Of the strongest neurons, strongest first."""

    @property
    def neurons(self) -> NeuronSet:
        """The truth neurons."""
        return self.selection.neurons

    @property
    def completeness_gap(self) -> float:
        """Mean |gap| over mean |change| of the site and layer whose gap is largest: the share of its own change."""
        return worst_gap(self.completeness).share

    def plot_layers(self) -> Figure:
        """Figure 5 of this model."""
        return plot_layers({self.model_name: self.selection})

    def warnings(self) -> list[str]:
        """Everything that should be read before the result is believed."""
        said = list(self.notes)
        if self.check.is_lopsided:
            said.append(self.check.lopsided)
        if not self.neurons:
            said.append(self.selection.nothing_found())
        elif (n := len(self.selection.half_2)) < FEW:
            said.append(f"Only {n} {plural('question', n)} tested the candidates: too few to trust what was found.")
        verdicts = self.diagnosis.verdicts
        if verdicts.count("choice") > len(verdicts) / 2:
            said.append(
                f"{verdicts.count('choice')} of {len(verdicts)} neurons support what the model chose, right or wrong: they are "
                "choice neurons rather than truth neurons."
            )
        return said + self.evaluation.warnings()

    @property
    def evaluated_on(self) -> str:
        """How many questions the arms were asked, and which."""
        return f"{self.evaluation.n_questions} questions{' that no rule saw' if self.is_held_out else ''}"

    def records(self) -> list[dict[str, Any]]:
        """One record a neuron, strongest first: place, statistics, diagnosis; plain values for JSON."""
        diagnosed = self.diagnosis.records()
        return [record | diagnosed[Neuron.from_dict(record)] for record in self.selection.to_records()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """What was found and what it does, in a few sentences."""
        said = [self.check.summary(), self.selection.summary(), self.evaluation.summary()]
        return " ".join([*said, self.diagnosis.summary()])

    def to_dict(self) -> dict[str, Any]:
        """summary.json: accuracies in percent (std with ddof 1), everything else a fraction in [0, 1]."""
        space = self.selection.space
        summary = {
            "model": self.model_name,
            "questions": self.questions_name,
            "n_neurons": len(self.neurons),
            "t": self.selection.t,
            "p": self.settings.p,
            "n_layers": space.n_layers,
            "neurons_by_layer": self.neurons.by_layer(space.n_layers),
            "arms": self.evaluation.to_dict(),
            "welch_p": self.evaluation.welch_p,
        }
        if self.unseen is not None:
            summary["arms_unseen"] = self.unseen.to_dict()
        return summary

    def checks_to_dict(self) -> dict[str, Any]:
        """diagnosis.json: what was kept, what the neurons support, how stable the set is, and how t was chosen."""
        checks: dict[str, Any] = {
            "manipulation": self.check.to_dict(),
            "completeness": self.completeness,
            **self.diagnosis.to_dict(),
            "sentences": self.diagnosis.sentences(),
            "stability": {
                "n_splits": len(self.stability.seeds),
                "mean_jaccard": float(np.mean(self.stability.jaccards)),
                "n_in_every_split": len(self.stability.core),
                "summary": self.stability.summary(),
            },
            "found_again_in_both_orders": self.found_again,
        }
        if self.tuning is not None:
            checks["tuning"] = {**self.tuning.to_dict(), "summary": self.tuning.summary()}
        return checks

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.evaluation.to_frame().round(3).to_html()}"
