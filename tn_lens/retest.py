"""The neurons of a run, or any set, on other question sets: tables 1 and 2 in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import BadInput
from .evaluation import Evaluation, evaluate, table1, table2
from .models import Model, backend_of, check_model
from .neurons import NeuronSet
from .pipeline import split_questions, weights_digest
from .questions.load import OPTIONS, load_questions
from .questions.question import QuestionSet
from .seeds import generator
from .selection import split_halves
from .settings import Settings
from .storage import RunFolder, StoredScores

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
        options: of `evaluate`.

    Raises:
        BadInput: what `evaluate` refuses, or a folder that cannot be written.
    """
    check_model(model)
    folder = None if out is None else RunFolder(Path(out))
    if folder is not None:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write {str(folder.path)!r}: {error.strerror}; give another --out") from error
    done = []
    for questions in sets:
        found = evaluate(model, questions, neurons, progress=progress, **options)
        done.append(found)
        if folder is not None:
            record = found.record()
            if parts and questions.name in parts:
                record["parts"] = found.by_part(parts[questions.name]).round(6).to_dict("records")
            record["left_out"] = [f"row {row.row}: {row.reason}" for row in questions.dropped]
            folder.write_json(f"{questions.name}.json", record)
    if folder is not None:
        for name, table in {"table1": table1(done[:1]), "table2": table2(done)}.items():
            for ending, text in table.files().items():
                folder.write(f"{name}{ending}", text.encode())
    return done


def run_of(path: str | Path) -> tuple[dict[str, Any], NeuronSet, dict[str, Any] | None]:
    """The settings of a finished run, its neurons, and what its model was loaded from, where that was noted.

    Raises:
        BadInput: there is no run, or it has no neurons yet.
    """
    path = Path(path)
    StoredScores.load(path)  # refuses what is no run
    folder = RunFolder(path)
    if not (path / "neurons.json").is_file():
        raise BadInput(f"{path} has no neurons.json yet; finish the run with the same command")
    return folder.noted("settings"), NeuronSet.load(path / "neurons.json"), folder.noted("model_source")


def check_same_model(model: Model, settings: Mapping[str, Any], path: Path) -> None:
    """Refuse another model than the one a run's neurons were found in.

    Raises:
        BadInput: name or weights differ.
    """
    name = backend_of(model).name
    if name != settings["model"]:
        raise BadInput(f"the neurons of {path} were found in {settings['model']!r}, and this model is {name!r}")
    same = str(backend_of(model).dtype).removeprefix("torch.") == settings["dtype"]
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
