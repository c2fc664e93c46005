"""TruthfulQA as a choice between the best answer and the best incorrect answer (paper A.2)."""

from __future__ import annotations

from tn_lens.questions.files import fetch, read_csv
from tn_lens.questions.load import parse_questions
from tn_lens.questions.question import QuestionSet
from tn_lens.questions.registry import QUESTION_SETS, Source, single

URL = "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"
"""The version of January 2025: 790 questions, each with one best and one best incorrect answer (paper A.2)."""
SHA256 = "764be5c0c27c337baed4db641555c125428569df44a8dbf9b28796a6ce4d7616"


@QUESTION_SETS.register("truthfulqa")
def load_truthfulqa(source: Source = None) -> QuestionSet:
    """Load the 790 questions of TruthfulQA.

    Args:
        source: path or URL of TruthfulQA.csv; the public URL by default.

    Raises:
        BadInput: the file cannot be downloaded, or a row is invalid.
    """
    # the previous version has 817 questions
    path = fetch(single(source, "truthfulqa") or URL, SHA256, "the 790-question version of January 2025")
    questions = parse_questions(read_csv(path), {}, "truthfulqa")
    return QuestionSet(name="truthfulqa", questions=questions, formats=("letters", "statement"))
