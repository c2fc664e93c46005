"""MMLU: 57 subjects, four choices, the prompt of the paper's figure 8.

The figure's {question} has the layout of Hendrycks et al. (2021): the question, a line `A. choice` for every choice, and
`Answer:`. With `n_shots`, the subject's heading and solved examples from its dev set precede it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import count
from tn_lens.questions.files import load_from_hub, read_csv
from tn_lens.questions.formats import FORMATS, LETTERS, PromptTemplate
from tn_lens.questions.question import Question, QuestionSet
from tn_lens.questions.registry import QUESTION_SETS, Source, single

HUB = "cais/mmlu"
HEADER = ["question", "A", "B", "C", "D", "answer"]
"""The columns of the original files, which have no header line."""
MOST_SHOTS = 5
"""The number of rows in a subject's dev set."""

FIGURE_8 = PromptTemplate(
    system=(
        "You are a helpful assistant. You should only output 'A', 'B', 'C', or 'D' as one character index for the correct "
        "answer. Do not output any other characters or symbols."
    ),
    user="{context}{question}\n{choices}\nAnswer:",
    choice="{label}. {choice}",
    cue="",
)
"""The prompt in figure 8 of the paper."""
FORMATS.register("figure_8", FIGURE_8)


@QUESTION_SETS.register("mmlu")
def load_mmlu(source: Source = None, *, n_shots: int = 0) -> QuestionSet:
    """Load the 14,042 test questions, subject by subject.

    Args:
        source: a folder with the original files, `test/SUBJECT_test.csv` and, for examples, `dev/SUBJECT_dev.csv`; the
            dataset `cais/mmlu` on the hub by default.
        n_shots: number of solved examples before each question, 0 to 5; the first ones of the subject's dev set.

    Raises:
        BadInput: the folder does not have these files, or a row is not a question with four choices and a letter.
    """
    if not isinstance(n_shots, int) or not 0 <= n_shots <= MOST_SHOTS:
        raise BadInput(f"n_shots must be an integer from 0 to {MOST_SHOTS} (the size of a dev set); got {n_shots!r}")
    folder = single(source, "mmlu")
    dev = _read(folder, "dev") if n_shots else {}
    questions: list[Question] = []
    for subject, rows in _read(folder, "test").items():
        # the same examples for every question of a subject, as in Hendrycks et al. (2021)
        examples = dev.get(subject, [])[:n_shots]
        if len(examples) < n_shots:
            n_rows = count(len(examples), "row")
            raise BadInput(f"MMLU's dev set has {n_rows} for {subject!r}, but n_shots = {n_shots}; use fewer examples")
        context = _context(subject, examples) if n_shots else ""
        questions += [replace(question, context=context) for question in rows]
    name = f"mmlu_{n_shots}_shots" if n_shots else "mmlu"
    return QuestionSet(
        name=name, questions=tuple(questions), template=FIGURE_8, fixed_order=True, formats=("letters", "statement")
    )


def _read(source: str | Path | None, split: str) -> dict[str, list[Question]]:
    """Questions by subject, in the alphabetical order of the subjects."""
    rows_of: dict[str, list[Question]] = {}
    if source is None:
        advice = "download and unpack MMLU's data.tar manually, and pass its folder as the source"
        for number, row in enumerate(load_from_hub(HUB, "all", split, advice), start=1):
            # the hub gives the index of the right choice, the original files give its letter
            letter, subject = LETTERS[row["answer"]], row["subject"]
            question = _question(row["question"], row["choices"], letter, subject, f"{HUB}, {number}")
            rows_of.setdefault(subject, []).append(question)
        return dict(sorted(rows_of.items()))
    folder = Path(source) / split
    for path in sorted(folder.glob(f"*_{split}.csv")):
        subject = path.stem.removesuffix(f"_{split}")
        rows_of[subject] = [
            _question(row["question"], itemgetter(*"ABCD")(row), row["answer"], subject, f"{path}, row {number}")
            for number, row in enumerate(read_csv(path, HEADER), start=1)
        ]
    if not rows_of:
        raise BadInput(
            f"expected files like {folder / f'anatomy_{split}.csv'}, found none; pass the folder with test/ and dev/"
        )
    return rows_of


def _question(text: Any, choices: Sequence[Any], letter: Any, subject: str, where: str) -> Question:
    text, *stripped = (str(value or "").strip() for value in (text, *choices))
    label = str(letter).strip()  # compared as a whole: "AB" is not a label
    if not text or len(stripped) != 4 or not all(stripped) or label not in ("A", "B", "C", "D"):
        raise BadInput(
            f"{where}: expected a question, four choices and a letter from A to D, got {[text, *stripped]!r:.80} and {letter!r}"
        )
    return Question(text=text, choices=tuple(stripped), answer=LETTERS.index(label), category=subject)


def _context(subject: str, examples: Sequence[Question]) -> str:
    """The subject's heading and the solved examples, in the same layout as the question."""
    solved = []
    for question in examples:
        lines = [FIGURE_8.choice.format(label=LETTERS[i], choice=choice) for i, choice in enumerate(question.choices)]
        solved.append("\n".join([question.text, *lines, f"Answer: {LETTERS[question.answer]}"]))
    # the wording and the blank lines of Hendrycks et al. (2021)
    heading = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    return "\n\n".join([heading, *solved]) + "\n\n"
