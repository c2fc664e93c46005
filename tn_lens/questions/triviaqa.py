"""TriviaQA as a choice between two answers, in the template of figure 9 (paper 3.2, A.1).

The wrong answers in the paper were written by GPT-4.1 for the verified subset, and are not published; the prompts for that
(figures 6 and 7) are available as pictures only. This module uses the public wrong answers of Li et al. (2023) instead, or
any file of wrong answers, for example one that a chat model has written.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.questions.files import READERS, Rows, load_from_hub, read_csv, read_json, read_json_lines
from tn_lens.questions.question import Dropped, Question, QuestionSet
from tn_lens.questions.registry import QUESTION_SETS, Source

HUB = "OamPatel/iti_trivia_qa_val"
"""Questions, answers and wrong answers of Li et al. (2023)."""

# with the quotation marks that TriviaQA's evaluation script removes besides ASCII punctuation
TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


@dataclass(frozen=True)
class Row:
    """One question, as a file has it."""

    number: int
    """Number of the row in its file, counted from 1."""
    question: str
    right: str
    """The right answer to show."""
    aliases: tuple[str, ...]
    """All answers that count as right."""
    wrong: str


@QUESTION_SETS.register("triviaqa")
def load_triviaqa(
    source: Source = None, *, wrong_answers: str | Path | None = None, strict: bool = False
) -> QuestionSet:
    """Load TriviaQA with one right and one wrong answer per question.

    Args:
        source: one file or several: TriviaQA's own `verified-web-dev.json` and `verified-wikipedia-dev.json`, which need
            `wrong_answers`; or a CSV, JSON-lines or Parquet file with the columns question, answer (a text, aliases joined by
            "; ", or TriviaQA's answer object) and false_answer. The dataset of Li et al. on the hub by default.
        wrong_answers: a file with the columns question and wrong (or false_answer).
        strict: also leave out wrong answers that contain a right one ("Sergeant Major Snudge" for "Snudge").

    Returns:
        Unique questions. `dropped` lists every row that was left out and why: it has no wrong answer, its wrong answer
        equals a right one (compared as in TriviaQA's own evaluation, without case, punctuation and articles), or its
        question has appeared before.

    Raises:
        BadInput: a file cannot be read, or no question is left.
    """
    if source is None:
        advice = "download it yourself and give the file as the source"
        rows = _parse(load_from_hub(HUB, None, "validation", advice), HUB)
    else:
        paths = [source] if isinstance(source, str | Path) else source
        rows = [row for path in paths for row in _read(Path(path))]
    # given wrong answers have priority over the file's own
    wrong_of = {} if wrong_answers is None else read_wrong_answers(wrong_answers)
    questions: dict[str, Question] = {}
    dropped: list[Dropped] = []
    for row in rows:
        wrong = wrong_of.get(row.question, row.wrong).strip()
        # checked before duplicates: a later row with a usable wrong answer replaces an earlier one without
        reason = _reason_to_drop(row, wrong, strict)
        if row.question in questions:
            reason = reason or "the question stands in an earlier row"
        if reason is not None:
            dropped.append(Dropped(row.number, row.question, reason))
        else:
            questions[row.question] = Question(text=row.question, choices=(row.right, wrong))
    if not questions:
        advice = " (TriviaQA's own files have none: give wrong_answers=...)" if wrong_answers is None else ""
        raise BadInput(f"no question of TriviaQA is left: no row has a usable wrong answer{advice}")
    return QuestionSet(name="triviaqa", questions=tuple(questions.values()), dropped=tuple(dropped))


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as in TriviaQA's own comparison of answers."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(TO_SPACES)).split())


def plainest(aliases: Sequence[str]) -> str:
    """The alias to show if none is marked: the one that most aliases contain; of several, the shortest, then the first."""
    forms = [normalize(alias) for alias in aliases]
    n_containing = [sum(form in other for other in forms) for form in forms]
    return aliases[min(range(len(aliases)), key=lambda i: (-n_containing[i], len(aliases[i]), i))]


def read_answers(path: Path) -> list[tuple[str, str]]:
    """Read every question of a file, once, with its right answer.

    Raises:
        BadInput: the file cannot be read.
    """
    return list({row.question: row.right for row in _read(path)}.items())


def read_wrong_answers(path: str | Path) -> dict[str, str]:
    """Read a file of wrong answers: question -> wrong answer.

    Raises:
        BadInput: the file cannot be read, or a column is missing.
    """
    path = Path(path)
    wrong_of = {}
    for row in read_csv(path) if path.suffix == ".csv" else read_json_lines(path):
        wrong = row.get("wrong", row.get("false_answer"))
        if row.get("question") is None or wrong is None:
            raise BadInput(f"{path}: every row needs 'question' and 'wrong' (or 'false_answer'); one has {sorted(row)}")
        wrong_of[str(row["question"]).strip()] = str(wrong)
    return wrong_of


def _reason_to_drop(row: Row, wrong: str, strict: bool) -> str | None:
    form, right_forms = normalize(wrong), [normalize(alias) for alias in row.aliases]
    if not form:
        return "no wrong answer"
    if form in right_forms:
        return "the wrong answer is a right one"
    is_contained = strict and any(right and right in form for right in right_forms)
    return "the wrong answer contains a right one" if is_contained else None


def _read(path: Path) -> list[Row]:
    if path.suffix not in (".json", *READERS):
        raise BadInput(f"expected a .json, .csv, .jsonl or .parquet file of TriviaQA, got {str(path)!r}")
    return _parse(_verified(path) if path.suffix == ".json" else READERS[path.suffix](path), str(path))


def _verified(path: Path) -> Rows:
    """Rows of a file in TriviaQA's own layout, without the questions that the file marks as not verified by people."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("Data"), list):
        raise BadInput(f"{path}: expected TriviaQA's layout, an object with a list 'Data'")
    return [
        {"question": row.get("Question"), "answer": row.get("Answer")}
        for row in content["Data"]
        if isinstance(row, dict) and row.get("QuestionPartOfVerifiedEval", True)
    ]


def _parse(rows: Iterable[Mapping[Any, Any]], where: str) -> list[Row]:
    parsed = []
    for number, row in enumerate(rows, start=1):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not question.strip() or answer is None:
            names = sorted(map(str, row))
            raise BadInput(f"{where}, row {number}: expected question, answer and false_answer, found {names}")
        value, aliases = _answers(answer)
        if not aliases:
            raise BadInput(f"{where}, row {number}: the answer of {question[:60]!r} is empty")
        # a file with aliases only marks none of them as the answer to show
        right, wrong = value or plainest(aliases), str(row.get("false_answer") or "")
        parsed.append(Row(number, question.strip(), right, aliases, wrong))
    return parsed


def _answers(answer: Any) -> tuple[str, tuple[str, ...]]:
    """The answer to show, if one is marked, and all answers that count as right."""
    value = ""
    if isinstance(answer, Mapping):
        # TriviaQA writes NormalizedAliases, the hub's copies normalized_aliases
        fields = {str(key).casefold().replace("_", ""): entry for key, entry in answer.items()}
        value = str(fields.get("value") or "").strip()
        texts = [value, *fields.get("aliases", []), *fields.get("normalizedaliases", [])]
    else:
        texts = answer.split(";") if isinstance(answer, str) else answer
    # a dict keeps the order and removes duplicates
    return value, tuple(dict.fromkeys(text for text in (str(alias).strip() for alias in texts) if text))
