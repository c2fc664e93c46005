"""The result of a run: the neurons that were found, the effect of ablating them, and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

from tn_lens.attribution.result import Convergence, Gaps, worst_gap
from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import say, say_each
from tn_lens.core.settings import Settings
from tn_lens.core.stored import Stored, dump_json
from tn_lens.evaluation.damage import Damage
from tn_lens.evaluation.diagnosis import Diagnosis
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.tuning import Tuning
from tn_lens.inference.manipulation import ManipulationCheck
from tn_lens.neurons import Neuron, NeuronSet
from tn_lens.results.card import Card, CardFile
from tn_lens.results.listing import COLUMNS, LISTING, Listing, digest_of
from tn_lens.runs.seals import read_manifest
from tn_lens.selection.convergence import ConvergenceCheck
from tn_lens.selection.result import FEW, Selection
from tn_lens.selection.stability import Stability


@dataclass(frozen=True, kw_only=True, eq=False)
class Provenance:
    """Where a result comes from: the manifest of its run."""

    name: str = ""
    """Name of the run folder; empty for runs in memory."""
    settings: Mapping[str, Any]
    """Everything that the numbers depend on: settings, model, data, versions, device, number of threads."""
    command: tuple[str, ...] | None = None
    """The command line that started the run; None if it was started from Python."""
    model_source: Mapping[str, Any] = field(default_factory=dict)
    """The arguments with which the model was loaded; empty if unknown."""
    questions_source: str | None = None
    """Path of the file that the questions were read from; None for built-in sets and sets made in Python."""
    backed_off: Mapping[str, int] | None = None
    """Prompts and rows in the passes that fitted into memory, if memory ran out."""

    @classmethod
    def of(cls, manifest: Mapping[str, Any], name: str = "") -> Provenance:
        """Read a manifest."""
        notes = {f.name: manifest[f.name] for f in fields(cls) if f.name in manifest and manifest[f.name] is not None}
        if "command" in notes:
            notes["command"] = tuple(notes["command"])
        return cls(name=name, **notes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rest(Stored):
    """The small parts of a result, which share the file result.json."""

    is_held_out: bool
    completeness: Gaps
    convergence: Convergence | None
    convergence_check: ConvergenceCheck | None
    stability: Stability
    found_again: float | None
    tuning: Tuning | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TruthNeurons:
    """The truth neurons that a run found, and the effect of ablating them."""

    model_name: str
    questions_name: str
    settings: Settings
    check: ManipulationCheck
    completeness: Gaps
    """For each site: mean |gap| and mean |change| of every layer; a gap of 0 is an exact integral."""
    convergence: Convergence | None = None
    """The estimated errors of the scores; None if the method does not estimate them."""
    convergence_check: ConvergenceCheck | None = None
    """The scores of a quadrature rule next to converged ones, on a sample of the questions; None for other methods."""
    selection: Selection
    evaluation: Evaluation
    """The evaluation on the reporting questions of a set that has them (the toy), otherwise on those used for finding."""
    is_held_out: bool
    """Whether the questions of the evaluation were not used to find the neurons."""
    diagnosis: Diagnosis
    """Whether the neurons support truth, the model's choice or the format, and whether they damage every text."""
    stability: Stability
    """The same selection on other splits."""
    found_again: float | None
    """Fraction of the neurons found with one order per question that are found again with every order; None for one order."""
    tuning: Tuning | None
    """The search for t, if it was "auto"."""
    notes: tuple[str, ...]
    """Warnings of the stages, as sentences."""
    cards: tuple[Card, ...] = ()
    """Cards of the strongest neurons, strongest first."""
    provenance: Provenance
    others: tuple[Evaluation, ...] = ()
    """The same neurons on other question sets (`tn-lens evaluate RUN`)."""
    strangers: tuple[str, ...] = ()
    """Question sets whose stored evaluation is one of other neurons."""

    @property
    def neurons(self) -> NeuronSet:
        """The truth neurons."""
        return self.selection.neurons

    @property
    def damage(self) -> Damage | None:
        """The loss on plain text with the found neurons ablated; None if it was not measured."""
        return self.diagnosis.damage

    @property
    def unsupported(self) -> NeuronSet | None:
        """The found neurons that are candidates of the sample by the rule's scores, but not by converged ones.

        None if there is no `convergence_check`.
        """
        check = self.convergence_check
        return None if check is None else NeuronSet(check.lost() & self.neurons)

    @property
    def unseen(self) -> Evaluation | None:
        """The evaluation on the questions that neither selection nor test used; None if there are none, or no others."""
        used = {*self.selection.half_1, *self.selection.half_2}
        rest = [question for question in self.evaluation.prompts.groups if question not in used]
        return None if self.is_held_out or not rest else self.evaluation.only(rest)

    @property
    def elsewhere(self) -> list[Evaluation]:
        """The evaluations on question sets other than the run's own."""
        return [other for other in self.others if other.name != self.evaluation.name]

    @property
    def completeness_gap(self) -> float:
        """Mean |gap| over mean |change| of the site and layer with the largest completeness error."""
        return worst_gap(self.completeness).share

    def warnings(self) -> list[str]:
        """All warnings about the result."""
        return [*self.notes, *say_each("run.warnings", self, FEW), *self.evaluation.warnings()]

    def records(self) -> list[dict[str, Any]]:
        """One record for each neuron, strongest first: place, statistics, diagnosis; plain values for JSON."""
        diagnosed = self.diagnosis.records()
        ranked = self.selection.by_strength
        return [record | diagnosed[neuron] for neuron, record in zip(ranked, self.selection.to_records(), strict=True)]

    def listing(self, digests: Mapping[str, str]) -> Listing:
        """What `tn-lens show` prints, with the digests of the files of the run."""
        records = self.records()
        return Listing(
            title=f"{self.model_name} on {self.questions_name}: {self.selection.summary()}",
            rows=tuple({"neuron": str(Neuron.from_dict(r))} | {name: r[name] for name in COLUMNS} for r in records),
            cards={str(card.neuron): card.to_text() for card in self.cards},
            digests=digests,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """The neurons that were found and the effect of ablating them, in a few sentences."""
        return say("run.summary", self)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.evaluation.to_frame().round(3).to_html()}"

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of the files that hold the result, see `load_run`."""
        names = ("model", "questions", "share_threshold", "alpha", "correction", "family", "order", "seed")
        names += ("exclude", "damage_bound") if self.settings.exclude else ()
        about = {name: self.provenance.settings[name] for name in names}
        about["adaptive_threshold"] = self.selection.adaptive_threshold
        yield "neurons.json", dump_json({**about, "neurons": self.records()})
        rest = _Rest(**{f.name: getattr(self, f.name) for f in fields(_Rest)})
        results: dict[str, Stored] = {
            "check.safetensors": self.check,
            "selection.json": self.selection,
            "evaluation.safetensors": self.evaluation,
            "diagnosis.safetensors": self.diagnosis,
            "cards.json": CardFile(cards=self.cards),
            "result.json": rest,
        }
        digests: dict[str, str] = {}
        for name, result in results.items():
            content = result.to_bytes(Path(name).suffix)
            digests[name] = digest_of(content)
            yield name, content
        yield LISTING, self.listing(digests).to_bytes(".json")
        # last, so that a folder with this file contains all the others
        yield "summary.json", dump_json(self._numbers())

    def _numbers(self) -> dict[str, Any]:
        """summary.json: accuracies in percent (std with ddof 1), everything else a fraction in [0, 1]."""
        n_layers = self.selection.space.n_layers
        numbers = {
            "model": self.model_name,
            "questions": self.questions_name,
            "n_neurons": len(self.neurons),
            "t": self.selection.adaptive_threshold,
            "p": self.settings.share_threshold,
            "n_layers": n_layers,
            "neurons_by_layer": self.neurons.by_layer(n_layers),
            **self.evaluation.to_dict(),
            "verdicts": self.diagnosis.n_by_verdict,
            **({} if self.damage is None else {"damage": self.damage.to_dict()}),
            "cases": self.diagnosis.n_by_case,
            "mean_jaccard": self.stability.mean_jaccard,
        }
        if self.unseen is not None:
            numbers["conditions_unseen"] = self.unseen.to_dict()["conditions"]
        return numbers


def load_run(path: str | Path) -> TruthNeurons:
    """Read a run folder: the object that `find_truth_neurons` returned, without the model.

    Raises:
        BadInput: there is no run, it is not finished, or one of its files is damaged or was written by another version.
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        raise BadInput(f"{path} does not contain a run; expected a folder written by `tn-lens run --out`")
    provenance = Provenance.of(read_manifest(path / "manifest.json"), path.resolve().name)
    settings = settings_of(provenance.settings)
    # written last except for the summary: without it the run is not finished
    rest = _Rest.load(path / "result.json")
    selection = Selection.load(path / "selection.json")
    # `tn-lens evaluate RUN` writes these
    others = [Evaluation.load(file) for file in sorted((path / "evaluation").glob("*.safetensors"))]
    try:
        model_name, questions_name = provenance.settings["model"], provenance.settings["questions"]
    except KeyError as error:
        raise BadInput(f"{path / 'manifest.json'} was written by another version (no {error}); run again") from error
    return TruthNeurons(
        model_name=model_name,
        questions_name=questions_name,
        settings=settings,
        check=ManipulationCheck.load(path / "check.safetensors"),
        selection=selection,
        evaluation=Evaluation.load(path / "evaluation.safetensors"),
        diagnosis=Diagnosis.load(path / "diagnosis.safetensors"),
        cards=CardFile.load(path / "cards.json").cards,
        provenance=provenance,
        others=tuple(e for e in others if e.neurons == selection.neurons),
        strangers=tuple(e.name for e in others if e.neurons != selection.neurons),
        **{f.name: getattr(rest, f.name) for f in fields(rest)},
    )


def settings_of(stored: Mapping[str, Any]) -> Settings:
    """The settings among those of a manifest.

    Raises:
        BadInput: a value is missing.
    """
    try:
        values = {f.name: stored[f.name] for f in fields(Settings)}
    except KeyError as error:
        raise BadInput(f"the manifest was written by another version ({error} is missing); run again") from error
    return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})  # pyright: ignore[reportArgumentType]
