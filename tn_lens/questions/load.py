"""Load questions by name, or from a CSV or JSON-lines file."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.questions import toy
from tn_lens.questions.files import download, read_csv, read_json_lines
from tn_lens.questions.mmlu import load_mmlu
from tn_lens.questions.question import LETTERS, Question, QuestionSet
from tn_lens.questions.triviaqa import load_triviaqa

TRUTHFULQA_URL = "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"
"""The form of January 2025: 790 questions, each with one best and one best incorrect answer (paper A.2)."""
TRUTHFULQA_SHA256 = "764be5c0c27c337baed4db641555c125428569df44a8dbf9b28796a6ce4d7616"

NAMED = ("toy", "toy_true_false", "toy_four_choice", "truthfulqa", "triviaqa", "mmlu")

OPTIONS: Mapping[str, set[str]] = {"mmlu": {"n_shots"}, "triviaqa": {"wrong_answers", "strict"}}
"""What only some sets take."""

READERS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {".csv": read_csv, ".jsonl": read_json_lines}

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "Question"),
    "right": ("right", "Best Answer", "correct", "right_answer"),
    "wrong": ("wrong", "Best Incorrect Answer", "incorrect", "wrong_answer"),
    "choices": ("choices", "options"),
    "answer": ("answer", "label"),
    "category": ("category", "Category", "subject"),
}
"""What a question needs, and the column names under which it is looked for."""


def load_questions(
    name_or_path: str | Path,
    *,
    source: str | Path | Sequence[str | Path] | None = None,
    columns: Mapping[str, str] | None = None,
    n_shots: int = 0,
    wrong_answers: str | Path | None = None,
    strict: bool = False,
) -> QuestionSet:
    """Load a question set.

    Args:
        name_or_path: `"truthfulqa"` (paper A.2), `"triviaqa"` (A.1), `"mmlu"`, `"toy"`, `"toy_true_false"`,
            `"toy_four_choice"`, or the path of a .csv or .jsonl file with the columns `question`, `right` and `wrong` (and
            `category`), or `question`, `choices` (a list) and `answer` (an index from 0, or a letter). TruthfulQA.csv is
            such a file.
        source: where to read a named set from instead of its public address: another URL or a local file for TruthfulQA,
            files for TriviaQA (see `load_triviaqa`), a folder for MMLU (see `load_mmlu`).
        columns: your file's names for `question`, `right`, `wrong`, `choices`, `answer`, `category`.
        n_shots: solved examples before each question of MMLU, 0 to 5.
        wrong_answers: a file of wrong answers for TriviaQA.
        strict: leave out TriviaQA's wrong answers that contain a right one.

    Raises:
        BadInput: there is no such set or file, a column is missing, or a row cannot be used; the row is named.
    """
    name = str(name_or_path)
    options: dict[str, Any] = {"n_shots": n_shots, "wrong_answers": wrong_answers, "strict": strict}
    given = {option for option, value in options.items() if value} - OPTIONS.get(name, set())
    if given:
        raise BadInput(f"{sorted(given)[0]} is not an option of {name!r}")
    if isinstance(source, Sequence) and not isinstance(source, str) and name != "triviaqa":
        raise BadInput(f"expected one source for {name!r}, got {len(source)}")
    match name:
        case "toy":
            return toy.binary()
        case "toy_true_false":
            return toy.true_false()
        case "toy_four_choice":
            return toy.four_choice()
        case "mmlu":
            return load_mmlu(source, n_shots=n_shots)  # pyright: ignore[reportArgumentType]
        case "triviaqa":
            return load_triviaqa(source, wrong_answers=wrong_answers, strict=strict)
        case "truthfulqa":
            path = Path(str(source)) if source is not None else None
            if path is None or not path.is_file():
                path = download(str(source or TRUTHFULQA_URL), "download TruthfulQA.csv yourself and give its path")
            _check_digest(path)
            return QuestionSet(name="truthfulqa", questions=_parse(read_csv(path), {}, "truthfulqa"))
    path = Path(name)
    if not path.is_file() and path.suffix.lower() in READERS:
        raise BadInput(f"there is no file {name!r}; give the path of a .csv or .jsonl file that exists")
    if not path.is_file():
        raise BadInput(f"no question set {name!r}: expected {', '.join(NAMED)}, or the path of a .csv or .jsonl file")
    if path.suffix.lower() not in READERS:
        raise BadInput(f"expected a .csv or .jsonl file, got {name!r}")
    rows = READERS[path.suffix.lower()](path)
    return QuestionSet(name=path.stem, questions=_parse(rows, columns or {}, name), source=name)


def _check_digest(path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != TRUTHFULQA_SHA256:
        warnings.warn(
            f"this TruthfulQA.csv is not the 790-question form of January 2025 (SHA-256 {found[:12]}..., expected "
            f"{TRUTHFULQA_SHA256[:12]}...); results may not compare with the paper's",
            stacklevel=3,
        )


def _parse(rows: list[dict[str, Any]], columns: Mapping[str, str], where: str) -> tuple[Question, ...]:
    there = list(dict.fromkeys(column for row in rows for column in row))
    found = _find_columns(there, columns, where)
    if all(value is None for row in rows for value in row.values()):
        raise BadInput(f"{where} holds no questions")
    questions = []
    for number, row in enumerate(rows, start=1):
        if absent := [column for key, column in found.items() if key != "category" and column not in row]:
            raise BadInput(f"{where}, question {number}: no {absent[0]!r}")
        values = {key: row.get(column) for key, column in found.items()}
        questions.append(_question(values, f"{where}, question {number}"))
    return tuple(questions)


def _find_columns(there: list[str], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column holds what."""
    if unknown := set(columns) - set(COLUMNS):
        raise BadInput(f"columns may name {', '.join(COLUMNS)}; got {', '.join(sorted(unknown))}")
    if absent := [column for column in columns.values() if column not in there]:
        raise BadInput(f"{where} has no column {absent[0]!r}; it has {', '.join(there)}")
    found = dict(columns)
    for key, names in COLUMNS.items():
        match = next((name for name in names if name in there), None)
        if key not in found and match is not None:
            found[key] = match
    needed = ("choices", "answer") if "choices" in found and "right" not in found else ("right", "wrong")
    for key in ("question", *needed):
        if key not in found:
            raise BadInput(
                f"{where} has no column {key!r}; it has {', '.join(there) or 'none'}. Expected question, right and wrong, "
                "or question, choices and answer: rename the columns, or name them with columns={...} of load_questions"
            )
    return {key: found[key] for key in ("question", *needed, "category") if key in found}


def _question(values: dict[str, Any], where: str) -> Question:
    text = _text(values["question"], f"{where}: the question")
    if "right" in values:
        choices = (
            _text(values["right"], f"{where}: the right answer"),
            _text(values["wrong"], f"{where}: the wrong answer"),
        )
        answer = 0
    else:
        listed = values["choices"]
        try:
            listed = json.loads(listed) if isinstance(listed, str) else listed
        except json.JSONDecodeError:
            listed = None
        if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
            raise BadInput(f"{where}: expected a list of 2 to {len(LETTERS)} choices, got {values['choices']!r:.60}")
        choices = tuple(_text(choice, f"{where}: a choice") for choice in listed)
        answer = _answer_index(values["answer"], len(choices), where)
    if len(set(choices)) < len(choices):
        raise BadInput(
            f"{where}: two choices are equal ({', '.join(f'{one!r:.60}' for one in choices)}); each must differ"
        )
    category = values.get("category")
    return Question(
        text=text,
        choices=choices,
        answer=answer,
        category="" if category is None else _whole(str(category), f"{where}: the category"),
    )


def _text(value: Any, what: str) -> str:
    if value is None or not str(value).strip():
        raise BadInput(f"{what} is empty")
    if not isinstance(value, str | int | float):
        raise BadInput(f"{what} must be text, got {str(value)[:60]}")
    return _whole(str(value).strip(), what)


def _whole(text: str, what: str) -> str:
    """The text, if a tokenizer can take it: JSON can hold halves of characters (lone surrogates), and a wrong encoding NULs."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInput(f"{what} holds half of a character, {ascii(text)[:60]}; write the whole one")
    if "\0" in text:
        raise BadInput(f"{what} holds a NUL character, {ascii(text)[:60]}; save the file as UTF-8")
    return text


def _answer_index(value: Any, n: int, where: str) -> int:
    written = str(value).strip()
    index = int(written) if written.isdecimal() else LETTERS.find(written.upper()) if len(written) == 1 else -1
    if not 0 <= index < n:
        raise BadInput(
            f"{where}: expected an answer from 0 to {n - 1} or from A to {LETTERS[n - 1]}, got {value!r:.60}"
        )
    return index
