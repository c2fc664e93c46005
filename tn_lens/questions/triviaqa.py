"""TriviaQA as a choice between two answers, in the template of figure 9 (paper 3.2, A.1).

The paper had the wrong answers of the verified subset written by GPT-4.1, and did not publish them; its figures 6 and 7, the
prompts for that, are pictures whose text is not available. What stands in for them: the public wrong answers of Li et al.
(2023), or any written with `write_wrong_answers`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.questions.files import load_from_hub, read_csv, read_json, read_json_lines
from tn_lens.questions.question import Dropped, Question, QuestionSet

HUB = "OamPatel/iti_trivia_qa_val"
"""Questions, answers and wrong answers of Li et al. (2023)."""

NO_WRONG = "no wrong answer"
EQUAL = "the wrong answer is a right one"
CONTAINED = "the wrong answer contains a right one"
AGAIN = "the question stands in an earlier row"


@dataclass(frozen=True)
class Row:
    """One question as the files have it."""

    number: int
    question: str
    value: str
    """The answer to show; empty where a file has only aliases."""
    aliases: tuple[str, ...]
    wrong: str


def load_triviaqa(
    source: str | Path | Sequence[str | Path] | None = None,
    *,
    wrong_answers: str | Path | None = None,
    strict: bool = False,
) -> QuestionSet:
    """TriviaQA with one right and one wrong answer a question.

    Args:
        source: a file, or several: TriviaQA's own `verified-web-dev.json` and `verified-wikipedia-dev.json`, which need
            `wrong_answers`; or a CSV, JSON-lines or Parquet file with the columns question, answer (a text, aliases joined by
            "; ", or TriviaQA's answer object) and false_answer. Li et al.'s set from the hub by default.
        wrong_answers: a file with the columns question and wrong (or false_answer), as `write_wrong_answers` writes it.
        strict: also leave out wrong answers that contain a right one ("Sergeant Major Snudge" for "Snudge").

    Returns:
        Unique questions; `dropped` names every row left out and why: no wrong answer, one that equals a right one
        (compared as TriviaQA's own evaluation does: without case, punctuation and articles), a question seen before.

    Raises:
        BadInput: a file cannot be read, or no question is left.
    """
    if source is None:
        instead = "download it yourself and give the file as the source"
        rows = list(_rows(load_from_hub(HUB, None, "validation", instead), HUB))
    else:
        paths = [source] if isinstance(source, str | Path) else list(source)
        rows = [row for path in paths for row in _read(Path(path))]
    given = {} if wrong_answers is None else read_wrong_answers(wrong_answers)
    questions: dict[str, Question] = {}
    dropped: list[Dropped] = []
    for row in rows:
        wrong = given.get(row.question, row.wrong).strip()
        reason = _why_not(row, wrong, strict) or (AGAIN if row.question in questions else None)
        if reason is not None:
            dropped.append(Dropped(row.number, row.question, reason))
            continue
        right = row.value or plainest(row.aliases)
        questions[row.question] = Question(text=row.question, choices=(right, wrong))
    if not questions:
        needed = " (TriviaQA's own files have none: give wrong_answers=...)" if wrong_answers is None else ""
        raise BadInput(f"no question of TriviaQA is left: no row has a usable wrong answer{needed}")
    return QuestionSet(name="triviaqa", questions=tuple(questions.values()), dropped=tuple(dropped))


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces: TriviaQA's own comparison of answers."""
    text = text.lower().replace("_", " ")
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def plainest(aliases: Sequence[str]) -> str:
    """The alias to show where none is marked: the one that most others contain, the shortest of those, the first of those."""
    forms = [normalize(alias) for alias in aliases]
    contained = [sum(form in other for other in forms) for form in forms]
    best = min(range(len(aliases)), key=lambda i: (-contained[i], len(aliases[i]), i))
    return aliases[best]


def read_answers(path: Path) -> list[tuple[str, str]]:
    """Question and right answer of every row of a file, each question once.

    Raises:
        BadInput: the file cannot be read.
    """
    found = {row.question: row.value or plainest(row.aliases) for row in _read(path)}
    return list(found.items())


def read_wrong_answers(path: str | Path) -> dict[str, str]:
    """Question -> wrong answer.

    Raises:
        BadInput: there is no such file, or it lacks the columns.
    """
    path = Path(path)
    rows = read_csv(path) if path.suffix == ".csv" else read_json_lines(path)
    found = {}
    for row in rows:
        wrong = row.get("wrong", row.get("false_answer"))
        if row.get("question") is None or wrong is None:
            raise BadInput(f"{path}: every row needs 'question' and 'wrong' (or 'false_answer'); one has {sorted(row)}")
        found[str(row["question"]).strip()] = str(wrong)
    return found


def _why_not(row: Row, wrong: str, strict: bool) -> str | None:
    form, rights = normalize(wrong), [normalize(alias) for alias in row.aliases]
    if not form:
        return NO_WRONG
    if form in rights:
        return EQUAL
    return CONTAINED if strict and any(right and right in form for right in rights) else None


def _read(path: Path) -> list[Row]:
    match path.suffix:
        case ".json":
            return list(_rows(_official(read_json(path), path), str(path)))
        case ".csv":
            return list(_rows(read_csv(path), str(path)))
        case ".jsonl":
            return list(_rows(read_json_lines(path), str(path)))
        case ".parquet":
            import pandas as pd

            try:
                rows = pd.read_parquet(path).to_dict("records")
            except (OSError, ValueError) as error:
                raise BadInput(f"{path} cannot be read as Parquet: {error}") from error
            return list(_rows(rows, str(path)))
        case _:
            raise BadInput(f"expected a .json, .csv, .jsonl or .parquet file of TriviaQA, got {str(path)!r}")


def _official(held: Any, path: Path) -> list[dict[str, Any]]:
    """TriviaQA's own layout, only questions whose answer people verified."""
    if not isinstance(held, dict) or not isinstance(held.get("Data"), list):
        raise BadInput(f"{path}: expected TriviaQA's layout, an object with a list 'Data'")
    rows = [row for row in held["Data"] if isinstance(row, dict)]
    kept = [row for row in rows if row.get("QuestionPartOfVerifiedEval", True)]
    return [{"question": row.get("Question"), "answer": row.get("Answer"), "false_answer": ""} for row in kept]


def _rows(rows: Iterable[Mapping[Any, Any]], where: str) -> Iterable[Row]:
    for number, row in enumerate(rows, start=1):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not question.strip() or answer is None:
            raise BadInput(
                f"{where}, row {number}: expected question, answer and false_answer, found {sorted(map(str, row))}"
            )
        value, aliases = _answers(answer)
        if not aliases:
            raise BadInput(f"{where}, row {number}: the answer of {question[:60]!r} is empty")
        yield Row(number, question.strip(), value, aliases, str(row.get("false_answer") or ""))


def _answers(answer: Any) -> tuple[str, tuple[str, ...]]:
    """The answer to show, if it is marked, and all that count as right."""
    if isinstance(answer, Mapping):
        held = {str(key).casefold().replace("_", ""): value for key, value in answer.items()}
        value = str(held.get("value") or "").strip()
        others = [str(alias).strip() for key in ("aliases", "normalizedaliases") for alias in list(held.get(key, []))]
        return value, tuple(dict.fromkeys(alias for alias in (value, *others) if alias))
    listed = str(answer).split(";") if isinstance(answer, str) else [str(one) for one in answer]
    return "", tuple(dict.fromkeys(alias.strip() for alias in listed if alias.strip()))
