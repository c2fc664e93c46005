"""Evaluation of the neurons of a run, or of any set, on other question sets: tables 1 and 2 in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.core.stored import dump_json
from tn_lens.evaluation.evaluate import evaluate
from tn_lens.evaluation.result import Evaluation
from tn_lens.models import Model, backend_of, check_model, neuron_space
from tn_lens.models.loading import HUB_ID, load_model
from tn_lens.neurons import NeuronSet
from tn_lens.pipeline.parts import split_questions
from tn_lens.pipeline.provenance import describe_model, fixed_threads, weights_digest
from tn_lens.questions.load import load_questions
from tn_lens.questions.question import QuestionSet
from tn_lens.questions.registry import name_and_source, options_of
from tn_lens.questions.repeats import without_repeats
from tn_lens.results.found import Provenance, settings_of
from tn_lens.runs.context import Run, in_stage
from tn_lens.runs.folder import RunFolder
from tn_lens.runs.seals import fingerprint, read_manifest
from tn_lens.runs.workers import workers
from tn_lens.selection.stored import StoredScores
from tn_lens.selection.table import split_halves

Parts = Mapping[str, Sequence[str]]
"""Name of a part -> ids of its questions."""


def load_sets(
    on: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    asked_as: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[QuestionSet]:
    """Question sets by `NAME`, by `NAME=PATH` for a local copy, or by the path of a file.

    Args:
        on: names or paths of the sets; of a set with parts, the reporting part is used.
        limit: maximum number of questions of each set, drawn with the seed.
        seed: seed for that draw.
        asked_as: arguments of `QuestionSet.with_format`, by default the format of each set.
        options: options of `load_questions`, for the sets that have them.

    Raises:
        BadInput: nothing is given, or a set is given twice; see also `load_questions`.
    """
    if not on:
        raise BadInput("expected a question set; give one or more, as in --on truthfulqa triviaqa mmlu")
    if limit is not None and limit < 1:
        raise BadInput(f"limit must be a positive integer; got {limit}")
    sets: list[QuestionSet] = []
    for given in on:
        name, source = name_and_source(given)
        known = {key: value for key, value in options.items() if key in options_of(name)}
        questions = load_questions(name, source=source, **known)
        questions = questions.part("report") or questions
        # MMLU's examples are not taken from its questions
        shots = {"n_shots": 0} if "n_shots" in known else {}
        questions = questions.with_format(**{**(asked_as or {}), **shots})
        sets.append(questions.sample(limit, generator(seed, 10)))
    names = [questions.name for questions in sets]
    if len(set(names)) < len(names):
        raise BadInput(f"question sets must have different names; got {', '.join(names)}")
    return sets


def retest(
    model: Model,
    neurons: NeuronSet,
    sets: Sequence[QuestionSet],
    *,
    out: str | Path | None = None,
    parts: Mapping[str, Parts] | None = None,
    progress: bool = True,
    threads: int | None = None,
    **options: Any,
) -> list[Evaluation]:
    """Evaluate a set of neurons on several question sets, and write the results.

    Args:
        model: the model.
        neurons: the set of neurons.
        sets: the question sets.
        out: folder for one file per set, summary.json, and table1 and table2 as .md, .tex and .csv; None writes nothing.
        parts: for each question set by name, parts whose accuracies are reported separately.
        progress: show progress bars.
        threads: number of torch threads of every worker; torch's own by default.
        options: keyword arguments of `evaluate`.

    Raises:
        BadInput: the folder cannot be written; see also `evaluate`.
    """
    check_model(model)
    neuron_space(model).check(neurons)
    together = workers()
    if out is None and together.n_workers > 1:
        raise BadInput("several workers share their work through a folder; give one with --out")
    with Run(progress=progress and together.is_first) as run:
        if out is None:
            return [in_stage(questions.name, evaluate, model, questions, neurons, **options) for questions in sets]
        with fixed_threads(threads or torch.get_num_threads()), RunFolder.hold(Path(out), together) as folder:
            basis = describe_model(model)
            together.agree(basis, str(backend_of(model).device))
            run.folder, run.basis = folder, fingerprint(basis)
            evaluations = []
            for questions in sets:
                evaluation = in_stage(questions.name, evaluate, model, questions, neurons, **options)
                evaluations.append(replace(evaluation, parts=(parts or {}).get(questions.name)))
            if together.is_first:
                _write(folder, evaluations)
            together.wait()
    return evaluations


def _write(folder: RunFolder, evaluations: Sequence[Evaluation]) -> None:
    """One file per set, which `load_run` reads, the numbers for scripts, and the tables."""
    for evaluation in evaluations:
        folder.write(f"{evaluation.name}.safetensors", evaluation.to_bytes(".safetensors"))
    folder.write("summary.json", dump_json({evaluation.name: evaluation.to_dict() for evaluation in evaluations}))
    first, *others = evaluations
    for name, table in {"table1": first.table1(), "table2": first.table2(*others)}.items():
        for ending, text in table.files().items():
            folder.write(f"{name}{ending}", text.encode(errors="backslashreplace"))


def run_of(path: str | Path) -> tuple[Provenance, NeuronSet]:
    """The provenance of a finished run, and its neurons.

    Raises:
        BadInput: there is no run, it has no neurons yet, or they were altered.
    """
    path = Path(path)
    StoredScores.load(path)  # raises if it is not a run
    manifest = read_manifest(path / "manifest.json")
    if not (path / "neurons.json").is_file() or "neurons_sha256" not in manifest:
        raise BadInput(f"{path} has no neurons.json yet; finish the run with the same command")
    if RunFolder(path).digest("neurons.json") != manifest["neurons_sha256"]:
        raise BadInput(
            f"{path / 'neurons.json'} was changed after the run; run the same command again, or evaluate another set with "
            "--neurons FILE"
        )
    return Provenance.of(manifest, path.resolve().name), NeuronSet.load(path / "neurons.json")


def load_noted(name: Any, **options: Any) -> Model:
    """Load the model that a manifest names, without network access, since manifests are not trusted.

    Args:
        name: name of the model in the manifest.
        options: keyword arguments of `load_model`.

    Raises:
        BadInput: the name is that of a folder, or the model is not in the hub's cache.
    """
    if name == "toy":
        return load_model(name, **options)
    if not isinstance(name, str) or Path(name).exists() or not HUB_ID.fullmatch(name):
        raise BadInput(
            f"the run was made with the model in {str(name)!r:.200}, and folders that a manifest names are not opened; give the "
            "model with --model"
        )
    online = constants.HF_HUB_OFFLINE
    # the hub library reads this at every call
    constants.HF_HUB_OFFLINE = True
    try:
        return load_model(name, **options)
    except BadInput as error:
        raise BadInput(
            f"the run was made with {name!r}, which is not in the hub's cache, and models that a manifest names are not "
            f"downloaded; give the model with --model {name}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = online


def check_same_model(model: Model, settings: Mapping[str, Any], path: Path) -> None:
    """Check that the model is the one in which a run's neurons were found.

    Raises:
        BadInput: the name or the weights differ.
    """
    backend = backend_of(model)
    if backend.name != settings["model"]:
        raise BadInput(f"the neurons of {path} were found in {settings['model']!r}, but this model is {backend.name!r}")
    # in another dtype, or by another backend, the same weights have another digest
    same = str(backend.dtype).removeprefix("torch.") == settings["dtype"] and backend.kind == settings.get("backend")
    if same and weights_digest(model) != settings["weights_sha256"]:
        raise BadInput(
            f"the neurons of {path} were found with other weights of {backend.name!r}; run again to find those of this model"
        )


def parts_of(path: Path, stored: Mapping[str, Any], questions: QuestionSet) -> dict[str, tuple[str, ...]]:
    """The use of a set's questions in a run: half 1, half 2, dropped by the check, unseen. Empty for any other set."""
    if stored["questions"] != questions.name or stored["questions_sha256"] != questions.digest:
        return {}
    settings = settings_of(stored)
    questions = without_repeats(questions)
    finding = [question.id for question in split_questions(questions, settings).finding]
    scores = StoredScores.load(path)
    half_1, half_2 = split_halves(scores.categories, settings.seed, scores.equal)
    used = {*half_1, *half_2}
    return {
        "half 1 (selection)": half_1,
        "half 2 (test)": half_2,
        "dropped by the check": tuple(question for question in finding if question not in used),
        "unseen": tuple(question.id for question in questions if question.id not in set(finding)),
    }
