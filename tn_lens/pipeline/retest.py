"""The neurons of a run, or any set, on other question sets: tables 1 and 2 in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.evaluation import Evaluation, evaluate, table1, table2
from tn_lens.models import Model, backend_of, check_model, neuron_space
from tn_lens.models.loading import HUB_ID, load_model
from tn_lens.neurons.neuron import NeuronSet
from tn_lens.pipeline.run import describe_model, fixed_threads, split_questions, weights_digest
from tn_lens.pipeline.settings import Settings
from tn_lens.questions.load import OPTIONS, load_questions
from tn_lens.questions.question import QuestionSet
from tn_lens.runs.folder import RunFolder, StoredUnits
from tn_lens.runs.seals import fingerprint, read_manifest
from tn_lens.runs.units import within
from tn_lens.runs.workers import workers
from tn_lens.selection.select import split_halves
from tn_lens.selection.stored import StoredScores

Parts = Mapping[str, Sequence[int]]


def load_sets(on: Sequence[str], *, limit: int | None = None, seed: int = 0, **options: Any) -> list[QuestionSet]:
    """Question sets by `NAME`, by `NAME=PATH` for a local copy, or by the path of a file.

    Args:
        on: what to load; a set with parts gives its reporting part.
        limit: at most so many questions of each, drawn with the seed.
        seed: of that draw.
        options: of `load_questions`, for the sets that take them.

    Raises:
        BadInput: nothing to load, the same set twice, or what `load_questions` refuses.
    """
    if not on:
        raise BadInput("expected a question set; give one or several, as in --on truthfulqa triviaqa mmlu")
    if limit is not None and limit < 1:
        raise BadInput(f"limit must be a whole number and at least 1; got {limit}")
    sets: list[QuestionSet] = []
    for one in on:
        name, _, source = one.partition("=")
        given = {key: value for key, value in options.items() if key in OPTIONS.get(name, set())}
        found = load_questions(name, source=source or None, **given)
        found = found.part("report") or found
        if limit is not None and limit < len(found):
            found = found.select(sorted(generator(seed, 10).choice(len(found), limit, replace=False).tolist()))
        sets.append(found)
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise BadInput(f"each question set needs a name of its own; got {', '.join(names)}")
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
    """Evaluate a set of neurons on several question sets, and write what came out.

    Args:
        model: the model.
        neurons: the set.
        sets: the questions.
        out: a folder for one JSON file a set and for table1 and table2 as .md, .tex and .csv; None writes nothing.
        parts: per question set, parts whose accuracies are told apart.
        progress: show progress bars.
        threads: of torch, for every worker; what torch takes by default.
        options: of `evaluate`.

    Raises:
        BadInput: what `evaluate` refuses, or a folder that cannot be written.
    """
    check_model(model)
    neuron_space(model).check(neurons)
    together = workers()
    progress = progress and together.is_first
    if out is None:
        if together.n_workers > 1:
            raise BadInput("several workers share their work through a folder; give one with --out")
        return [evaluate(model, questions, neurons, progress=progress, **options) for questions in sets]
    done = []
    with fixed_threads(threads or torch.get_num_threads()), RunFolder.hold(Path(out), together) as folder:
        basis = describe_model(model)
        together.agree(basis, str(backend_of(model).device))
        mapper = StoredUnits(folder, fingerprint(basis))
        for questions in sets:
            asked = within(mapper, questions.name)
            found = evaluate(model, questions, neurons, progress=progress, mapper=asked, **options)
            done.append(found)
            record = found.record()
            if parts and questions.name in parts:
                record["parts"] = found.by_part(parts[questions.name]).round(6).to_dict("records")
            record["left_out"] = [f"row {row.row}: {row.reason}" for row in questions.dropped]
            if together.is_first:
                folder.write_json(f"{questions.name}.json", record)
        if together.is_first:
            for name, table in {"table1": table1(done[:1]), "table2": table2(done)}.items():
                for ending, text in table.files().items():
                    folder.write(f"{name}{ending}", text.encode(errors="backslashreplace"))
        together.wait()
    return done


def run_of(path: str | Path) -> tuple[dict[str, Any], NeuronSet, dict[str, Any] | None]:
    """The settings of a finished run, its neurons, and what its model was loaded from, where that was noted.

    Raises:
        BadInput: there is no run, or it has no neurons yet.
    """
    path = Path(path)
    StoredScores.load(path)  # refuses what is no run
    manifest = read_manifest(path / "manifest.json")
    if not (path / "neurons.json").is_file() or "neurons_sha256" not in manifest:
        raise BadInput(f"{path} has no neurons.json yet; finish the run with the same command")
    if RunFolder(path).digest("neurons.json") != manifest["neurons_sha256"]:
        raise BadInput(
            f"{path / 'neurons.json'} is not as the run wrote it; run the same command again, or evaluate another set with "
            "--neurons FILE"
        )
    return manifest["settings"], NeuronSet.load(path / "neurons.json"), manifest.get("model_source")


def load_noted(name: Any, **options: Any) -> Model:
    """The model that a run says it was made with, without the network: a manifest may come from anybody.

    Args:
        name: from the manifest.
        options: of `load_model`.

    Raises:
        BadInput: it is a folder, or not in the hub's cache.
    """
    if name == "toy":
        return load_model(name, **options)
    if not isinstance(name, str) or Path(name).exists() or not HUB_ID.fullmatch(name):
        raise BadInput(
            f"the run was made with the model in {str(name)!r:.200}, and folders that a manifest names are not opened; give it "
            "with --model"
        )
    online = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        return load_model(name, **options)
    except BadInput as error:
        raise BadInput(
            f"the run was made with {name!r}, which is not in the hub's cache, and a manifest does not open the network; give "
            f"it with --model {name}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = online


def check_same_model(model: Model, settings: Mapping[str, Any], path: Path) -> None:
    """Refuse another model than the one a run's neurons were found in.

    Raises:
        BadInput: name or weights differ.
    """
    name = backend_of(model).name
    if name != settings["model"]:
        raise BadInput(f"the neurons of {path} were found in {settings['model']!r}, and this model is {name!r}")
    backend = backend_of(model)
    same = str(backend.dtype).removeprefix("torch.") == settings["dtype"] and backend.kind == settings.get("backend")
    if same and weights_digest(model) != settings["weights_sha256"]:
        raise BadInput(
            f"the neurons of {path} were found in other weights than {name!r} has now; run again to find its own"
        )


def parts_of(path: Path, settings: Mapping[str, Any], questions: QuestionSet) -> Parts:
    """Where the questions of a set went in a run: half 1, half 2, dropped by the check, unseen. Empty for another set."""
    names = {field.name for field in fields(Settings)}
    if settings["questions"] != questions.name or settings["questions_sha256"] != questions.digest:
        return {}
    resolved = Settings(**{key: value for key, value in settings.items() if key in names})
    finding, _, _ = split_questions(questions, resolved)
    place = {id(question): index for index, question in enumerate(questions)}
    index = [place[id(question)] for question in finding]
    stored = StoredScores.load(path)
    halves = [[index[q] for q in half] for half in split_halves(stored.categories, resolved.seed)]
    used = {*halves[0], *halves[1]}
    return {
        "half 1 (selection)": halves[0],
        "half 2 (test)": halves[1],
        "dropped by the check": sorted(set(index) - used),
        "unseen": sorted(set(range(len(questions))) - set(index)),
    }
