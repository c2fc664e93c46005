"""Load questions by name, or from a user's own CSV or JSON-lines file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.core.options import SETS, list_sets
from tn_lens.questions.files import READERS, Rows, check_names, is_missing, parse_json
from tn_lens.questions.formats import LETTERS, STATEMENT, VERDICTS
from tn_lens.questions.question import Question, QuestionSet
from tn_lens.questions.registry import QUESTION_SETS, Source, options_of
from tn_lens.questions.repeats import without_repeats

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "Question"),
    "right": ("right", "Best Answer", "correct", "right_answer"),
    "wrong": ("wrong", "Best Incorrect Answer", "incorrect", "wrong_answer"),
    "statement": ("statement",),
    "choices": ("choices", "options"),
    "answer": ("answer", "label"),
    "category": ("category", "Category", "subject"),
    "id": ("id", "question_id"),
    "correct_answers": ("correct_answers", "Correct Answers"),
    "incorrect_answers": ("incorrect_answers", "Incorrect Answers"),
}
"""The fields of a question, and the column names that are recognized for each."""
OPTIONAL = ("category", "id", "correct_answers", "incorrect_answers")
"""Fields that a file, or a single row, may lack."""


def load_questions(
    name_or_path: str | Path, *, source: Source = None, columns: Mapping[str, str] | None = None, **options: Any
) -> QuestionSet:
    """Load a question set.

    Args:
        name_or_path: name of a registered set, or path of a .csv or .jsonl file. The built-in sets are `"truthfulqa"`
            (paper A.2), `"triviaqa"` (A.1), `"mmlu"`, `"common_facts"` (embedded), statements such as `"cities"` (see
            `load_statements`), relations such as `"country_language"` (see `load_relation`), and `"toy"`,
            `"toy_true_false"` and `"toy_four_choice"`; `tn-lens run --help` lists all names. A file has
            the columns `question`, `right` and `wrong`, or `question`, `choices` (a list) and `answer` (an index from
            0, a letter, or the text of a choice), or `statement` and `label` (1 for a true one, 0 for a false one), and
            optionally `category`, `id`, `correct_answers` and `incorrect_answers` (lists, or texts separated by
            semicolons, for the metrics MC1 and MC2). TruthfulQA.csv is such a file. Rows that repeat the question and the
            choices of an earlier row are left out, and listed in `dropped`.
        source: source of a registered set, instead of its public location: another URL or a local file for TruthfulQA,
            statements and relations, one or more files for TriviaQA (see `load_triviaqa`), a folder for MMLU (see
            `load_mmlu`).
        columns: for a file, its column names for `question`, `right`, `wrong`, `statement`, `choices`, `answer`,
            `category`, `id`, `correct_answers`, `incorrect_answers`.
        options: options of the registered set: `n_shots` (MMLU; solved examples before each question, 0 to 5),
            `wrong_answers` (TriviaQA; a file with wrong answers), `strict` (TriviaQA; leave out wrong answers that
            contain a right one), `paired` (statements; whether two statements about a subject become one question),
            `template` and `seed` (relations; the index of the template, and the seed of the wrong answers).

    Raises:
        BadInput: the set, file, option or column does not exist, or a row is invalid. The message names the row.
    """
    name = str(name_or_path)
    # checked like the options of the set, since some sets read no file
    options |= {"source": source, "columns": columns}
    accepted = options_of(name)
    for option, value in options.items():
        if value and option not in accepted:  # None, 0, False and empty values change nothing
            names = ", ".join(sorted(accepted)) or "no options"
            raise BadInput(f"{option} is not an option of {name!r}, which accepts {names}")
    if name in QUESTION_SETS:
        return QUESTION_SETS[name](**{option: value for option, value in options.items() if option in accepted})
    path = Path(name)
    is_table = path.suffix.lower() in (".csv", ".jsonl")
    if not path.is_file() and is_table:
        raise BadInput(f"the file {name!r} does not exist; give the path of an existing .csv or .jsonl file")
    if not path.is_file():
        built_in = {each for names in SETS.values() for name in names for each in (name, f"neg_{name}")}
        added = ", ".join(each for each in QUESTION_SETS if each not in built_in)
        names = list_sets() + (f"; {added} (registered)" if added else "")
        raise BadInput(f"unknown question set {name!r}: expected the path to a .csv or .jsonl file, or one of {names}")
    if not is_table:
        raise BadInput(f"expected a .csv or .jsonl file, got {name!r}")
    questions = parse_questions(READERS[path.suffix.lower()](path), columns or {}, name)
    is_statements = all(question.is_statement for question in questions)
    asked_as: dict[str, Any] = {"template": STATEMENT, "formats": ("statement",)} if is_statements else {}
    return without_repeats(QuestionSet(name=path.stem, questions=questions, source=name, **asked_as))


def parse_questions(rows: Rows, columns: Mapping[str, str], where: str) -> tuple[Question, ...]:
    """Turn the rows of a table into questions.

    Args:
        rows: the rows, by column name.
        columns: column names by field of a question, for names that are not in `COLUMNS`.
        where: name of the table in error messages.

    Raises:
        BadInput: a column is missing, or a row is invalid. The message names the row.
    """
    # JSON objects may have different keys: the columns are those of all rows, in order of appearance
    column_of = _find_columns(list(dict.fromkeys(column for row in rows for column in row)), columns, where)
    if all(is_missing(value) for row in rows for value in row.values()):
        raise BadInput(f"{where} contains no questions; add at least one row")
    questions = []
    for number, row in enumerate(rows, start=1):
        for field, column in column_of.items():
            if field not in OPTIONAL and column not in row:
                raise BadInput(f"{where}, question {number}: {column!r} is missing; add it")
        values = {field: row.get(column) for field, column in column_of.items()}
        questions.append(_question(values, f"{where}, question {number}"))
    return tuple(questions)


def _find_columns(available: list[str], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """Column names by field of a question, for the fields that are used."""
    if unknown := set(columns) - set(COLUMNS):
        raise BadInput(f"columns accepts the fields {', '.join(COLUMNS)}; got {', '.join(sorted(unknown))}")
    if absent := [column for column in columns.values() if column not in available]:
        raise BadInput(f"{where} has no column {absent[0]!r}; it has {', '.join(available)}")
    for names in COLUMNS.values():
        # "question" and "Question" would be read as the same field
        check_names((name.casefold() for name in available if name in names and name not in columns.values()), where)
    # reversed, so that the first name has priority
    recognized = {field: name for field, names in COLUMNS.items() for name in reversed(names) if name in available}
    column_of = recognized | dict(columns)
    # right and wrong have priority over choices and answer
    has_list = "choices" in column_of and "right" not in column_of
    needed = ("question", *(("choices", "answer") if has_list else ("right", "wrong")))
    if "statement" in column_of and "question" not in column_of:
        needed = ("statement", "answer")
    for field in needed:
        if field not in column_of:
            raise BadInput(
                f"{where} has no column {field!r}; it has {', '.join(available) or 'none'}. Expected question, right and "
                "wrong, or question, choices and answer, or statement and label: rename the columns, or name them with "
                "columns={...} of load_questions"
            )
    return {field: column_of[field] for field in (*needed, *OPTIONAL) if field in column_of}


def _question(values: dict[str, Any], where: str) -> Question:
    field = "question" if "question" in values else "statement"
    text = _text(values[field], f"{where}: the {field}")
    # with the columns right and wrong, the right answer is the first choice
    answer = 0
    if field == "statement":
        choices, answer = VERDICTS, 0 if _is_true(values["answer"], where) else 1
    elif "right" in values:
        choices = tuple(_text(values[side], f"{where}: the {side} answer") for side in ("right", "wrong"))
    else:
        listed = values["choices"]
        wanted = f'a list of 2 to {len(LETTERS)} choices, such as ["Yes", "No"]'
        if isinstance(listed, str):  # in CSV files, the list is written as JSON
            listed = parse_json(listed, f"{where}: the choices", wanted)
        if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
            raise BadInput(f"{where}: expected {wanted}, got {values['choices']!r:.60}")
        choices = tuple(_text(choice, f"{where}: a choice") for choice in listed)
        answer = _answer_index(values["answer"], choices, where)
    if len({" ".join(choice.split()) for choice in choices}) < len(choices):
        shown = ", ".join(f"{choice!r:.60}" for choice in choices)
        raise BadInput(f"{where}: two choices are equal ({shown}); all choices must differ")
    category, own_id = ("" if is_missing(values.get(field)) else str(values[field]) for field in ("category", "id"))
    return Question(
        text=text,
        choices=choices,
        answer=answer,
        category=_check_characters(category, f"{where}: the category"),
        id=_check_characters(own_id.strip(), f"{where}: the id"),
        correct=_answers(values.get("correct_answers"), f"{where}: a correct answer"),
        incorrect=_answers(values.get("incorrect_answers"), f"{where}: an incorrect answer"),
    )


def _answers(value: Any, what: str) -> tuple[str, ...]:
    """The different answers of a list, or of a text in which semicolons separate them."""
    listed = value if isinstance(value, list) else [] if is_missing(value) else str(value).split(";")
    return tuple(
        dict.fromkeys(_text(answer, what) for answer in listed if not is_missing(answer) and str(answer).strip())
    )


def _is_true(value: Any, where: str) -> bool:
    """Whether a statement is labelled as true."""
    written = "" if is_missing(value) else str(value).strip().casefold()
    if written not in ("0", "1", "0.0", "1.0", "true", "false"):
        raise BadInput(f"{where}: expected the label 1 or true, or 0 or false, got {value!r:.60}")
    return written.startswith(("1", "t"))


def _text(value: Any, what: str) -> str:
    if is_missing(value) or not str(value).strip():
        raise BadInput(f"{what} is empty; fill it in, or remove the row")
    if not isinstance(value, str | int | float):  # JSON files may give numbers as answers
        raise BadInput(
            f"{what} must be text, got {str(value)[:60]}; write it in quotation marks, without lists and objects"
        )
    return _check_characters(str(value).strip(), what)


def _check_characters(text: str, what: str) -> str:
    """Return the text if it has no lone surrogates (possible in JSON) and no NUL characters (from other encodings)."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInput(f"{what} contains a lone surrogate (half of a character), {ascii(text)[:60]}; replace it")
    if "\0" in text:
        raise BadInput(f"{what} contains a NUL character, {ascii(text)[:60]}; save the file as UTF-8")
    return text


def _answer_index(value: Any, choices: Sequence[str], where: str) -> int:
    """The index of the right choice, which is given by its index, its letter or its text."""
    written = "" if is_missing(value) else str(value).strip()
    is_number = re.fullmatch(r"\d{1,9}(\.0+)?", written)  # a column with missing values has indices like "1.0"
    letter = LETTERS.find(written.upper()) if len(written) == 1 else -1
    index = int(written.partition(".")[0]) if is_number else letter
    meant = {index} if 0 <= index < len(choices) else set()
    if isinstance(value, str | bool):
        meant |= {place for place, choice in enumerate(choices) if choice == written}
    if len(meant) != 1:
        last = len(choices) - 1
        advice = ""
        if meant:
            advice = (
                f", which is also the text of another choice; give the {'letter' if is_number else 'index'} instead"
            )
        raise BadInput(
            f"{where}: expected an answer from 0 to {last} or from A to {LETTERS[last]}, or the text of one choice, got "
            f"{value!r:.60}{advice}"
        )
    return meant.pop()
