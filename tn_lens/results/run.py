"""A finished run as its folder holds it: all that pages about it need, without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tn_lens.attribution.result import worst_gap
from tn_lens.core.errors import BadInput
from tn_lens.evaluation import StoredEvaluation
from tn_lens.neurons.neuron import NeuronSet
from tn_lens.runs.seals import read_manifest
from tn_lens.selection.select import SETTINGS, Selection


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a run folder holds."""

    name: str
    """Of the folder."""
    settings: Mapping[str, Any]
    """The manifest's: everything that the numbers depend on."""
    source: Mapping[str, Any]
    """What the model was loaded from; empty where that was not noted."""
    questions_source: str | None
    """The file that the questions were read from, as its path was given; None for sets by name and those made in Python."""
    backed_off: Mapping[str, Any] | None
    """The size of a pass that fitted, where memory ran out."""
    selection: Selection
    records: Sequence[Mapping[str, Any]]
    """The found neurons with their statistics and diagnosis, strongest first."""
    evaluation: StoredEvaluation
    unseen: Mapping[str, Mapping[str, float]] | None
    """Per arm the numbers on the questions that the check dropped, where the run reported on all of them (percent)."""
    others: tuple[StoredEvaluation, ...]
    """The same neurons on other question sets (`tn-lens evaluate RUN`)."""
    strangers: tuple[str, ...]
    """Question sets whose stored evaluation is about other neurons."""
    checks: Mapping[str, Any]
    """diagnosis.json: manipulation check, completeness, verdicts, cases, stability, tuning."""
    warnings: tuple[str, ...]
    """What should be read before the result is believed."""

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return str(self.settings["model"])

    @property
    def questions_name(self) -> str:
        """What the question set is called."""
        return str(self.settings["questions"])

    @property
    def neurons(self) -> NeuronSet:
        """The truth neurons."""
        return self.selection.neurons

    @property
    def completeness_gap(self) -> float:
        """Mean |gap| over mean |change| of the site and layer whose gap is largest: the share of its own change."""
        return worst_gap(self.checks["completeness"]).share


def load_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        BadInput: there is no run, it is not finished, or a file of it is damaged or of another version.
    """
    path = Path(path)
    if not (path / "manifest.json").is_file():
        raise BadInput(f"{path} holds no run; expected a folder that `tn-lens run --out` wrote")
    manifest = read_manifest(path / "manifest.json")
    try:
        selection = Selection.from_dict(_read(path / "selection.json"))
        evaluation = _read(path / "evaluation.json")
        digest = selection.neurons.digest
        stored = {one.name: one for one in map(StoredEvaluation.from_dict, _evaluations(path))}
        return Run(
            name=path.resolve().name,
            settings=manifest["settings"],
            source=manifest.get("model_source") or {},
            questions_source=manifest.get("questions_source"),
            backed_off=manifest.get("backed_off"),
            selection=selection,
            records=_read(path / "neurons.json")["neurons"],
            evaluation=StoredEvaluation.from_dict(evaluation),
            unseen=_read(path / "summary.json").get("arms_unseen"),
            others=tuple(one for one in stored.values() if one.neurons_sha256 == digest),
            strangers=tuple(name for name, one in stored.items() if one.neurons_sha256 != digest),
            checks=_read(path / "diagnosis.json"),
            warnings=tuple(evaluation["warnings"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} was written by another version ({error} is missing or of another kind); run the same command again"
        ) from error


def selection_settings(path: str | Path) -> dict[str, Any]:
    """Thresholds, correction and seed of a run; of one that is not finished, those that it was started with."""
    path = Path(path)
    settings = read_manifest(path / "manifest.json")["settings"]
    found = {name: settings[name] for name in SETTINGS}
    if found["t"] == "auto":
        found["t"] = _read(path / "summary.json")["t"]
    return found


def _evaluations(path: Path) -> list[Any]:
    """What `tn-lens evaluate` wrote, by the name of the file."""
    return [_read(file) for file in sorted((path / "evaluation").glob("*.json"))]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{file.parent} has no {file.name} yet; finish the run with the same command") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read or is damaged; run the same command again to write it anew") from error
