"""TruthfulQA as a choice between the best answer and the best incorrect answer (paper A.2)."""

from __future__ import annotations

import warnings
from hashlib import sha256
from pathlib import Path

from tn_lens.questions.files import download, read_csv
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
    address = str(single(source, "truthfulqa") or URL)
    path = Path(address)
    if not path.is_file():
        path = download(address, "download TruthfulQA.csv manually and pass its path as the source")
    # the previous version has 817 questions
    digest = sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        warnings.warn(
            f"this TruthfulQA.csv is not the 790-question version of January 2025 (SHA-256 {digest[:12]}..., expected "
            f"{SHA256[:12]}...); results may not be comparable with the paper's",
            stacklevel=3,  # the line that calls load_questions
        )
    questions = parse_questions(read_csv(path), {}, "truthfulqa")
    return QuestionSet(name="truthfulqa", questions=questions, formats=("letters", "statement"))
