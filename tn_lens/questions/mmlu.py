"""MMLU: 57 subjects, four choices, the prompt of the paper's figure 8.

The figure's {question} is laid out as in Hendrycks et al. (2021): the question, a line `A. choice` for every choice, and
`Answer:`. With `n_shots` the subject's heading and so many solved examples of its dev set stand before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.questions.files import load_from_hub, read_csv
from tn_lens.questions.question import LETTERS, PromptTemplate, Question, QuestionSet

HUB = "cais/mmlu"
HEADER = ["question", "A", "B", "C", "D", "answer"]
"""The columns of the original files, which have no header line."""
N_SUBJECTS = 57
MOST_SHOTS = 5
"""Rows of a subject's dev set."""

FIGURE_8 = PromptTemplate(
    system=(
        "You are a helpful assistant. You should only output 'A', 'B', 'C', or 'D' as one character index for the correct "
        "answer. Do not output any other characters or symbols."
    ),
    user="{context}{question}\n{choices}\nAnswer:",
    choice="{label}. {choice}",
    cue="",
)
"""The prompt of the paper's figure 8."""


def load_mmlu(source: str | Path | None = None, *, n_shots: int = 0) -> QuestionSet:
    """The 14,042 test questions, subject by subject.

    Args:
        source: a folder with the original files, `test/SUBJECT_test.csv` and, for examples, `dev/SUBJECT_dev.csv`; from the
            hub (`cais/mmlu`) by default.
        n_shots: solved examples before each question, 0 to 5, the first of the subject's dev set.

    Raises:
        BadInput: the folder holds no such files, or a row is not four choices and a letter.
    """
    if not isinstance(n_shots, int) or not 0 <= n_shots <= MOST_SHOTS:
        raise BadInput(f"n_shots is a number from 0 to {MOST_SHOTS} (a dev set has so many rows); got {n_shots!r}")
    test = _read(source, "test")
    dev = _read(source, "dev") if n_shots else {}
    questions: list[Question] = []
    for subject, rows in test.items():
        if len(dev.get(subject, [])) < n_shots:
            raise BadInput(
                f"MMLU's dev set has {len(dev.get(subject, []))} rows for {subject!r}, and n_shots = {n_shots}"
            )
        context = _context(subject, dev[subject][:n_shots]) if n_shots else ""
        questions += [
            Question(text=text, choices=tuple(choices), answer=answer, category=subject, context=context)
            for text, choices, answer in rows
        ]
    name = f"mmlu_{n_shots}_shots" if n_shots else "mmlu"
    return QuestionSet(name=name, questions=tuple(questions), template=FIGURE_8, fixed_order=True)


Row = tuple[str, list[str], int]


def _read(source: str | Path | None, split: str) -> dict[str, list[Row]]:
    """Subject -> question, choices, index of the right one; subjects in alphabetical order."""
    found: dict[str, list[Row]] = {}
    if source is None:
        instead = "download MMLU's data.tar yourself and give its folder as the source"
        for number, row in enumerate(load_from_hub(HUB, "all", split, instead), start=1):
            letter = LETTERS[row["answer"]]
            found.setdefault(row["subject"], []).append(
                _row(row["question"], row["choices"], letter, f"{HUB}, {number}")
            )
        return dict(sorted(found.items()))
    folder = Path(source) / split
    files = sorted(folder.glob(f"*_{split}.csv"))
    if not files:
        raise BadInput(
            f"expected files like {folder / f'anatomy_{split}.csv'}, found none; give the folder with test/ and dev/"
        )
    for path in files:
        rows: list[dict[str, Any]] = read_csv(path, HEADER)
        subject = path.stem.removesuffix(f"_{split}")
        found[subject] = [
            _row(row["question"], [row[letter] for letter in HEADER[1:5]], row["answer"], f"{path}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]
    return found


def _row(text: Any, choices: Sequence[Any], letter: Any, where: str) -> Row:
    answer = LETTERS[:4].find(str(letter).strip()) if str(letter).strip() else -1
    if not str(text or "").strip() or len(choices) != 4 or not all(str(c or "").strip() for c in choices) or answer < 0:
        raise BadInput(
            f"{where}: expected a question, four choices and a letter from A to D, got {letter!r} for a letter"
        )
    return str(text).strip(), [str(choice).strip() for choice in choices], answer


def _context(subject: str, examples: Sequence[Row]) -> str:
    """The heading and the solved examples, in the layout of the question itself."""
    solved = []
    for text, choices, answer in examples:
        lines = [FIGURE_8.choice.format(label=LETTERS[i], choice=choice) for i, choice in enumerate(choices)]
        solved.append("\n".join([text, *lines, f"Answer: {LETTERS[answer]}"]))
    heading = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    return "\n\n".join([heading, *solved]) + "\n\n"
