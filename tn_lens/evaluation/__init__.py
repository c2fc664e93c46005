"""Evaluation: what the found neurons do to accuracy, beside every control (paper 3.3, 3.4)."""

from .arm import ARM_NAMES, ARMS, PAPER_ARMS, Arm, ArmName
from .dose import dose_response
from .evaluate import evaluate
from .reading import LETTER_SHIFT, MASS_KEPT, Comparison
from .result import Evaluation
from .stored import StoredArm, StoredEvaluation
from .tables import Table, group_means, table1, table2
from .text import text_loss

__all__ = [
    "ARMS",
    "ARM_NAMES",
    "LETTER_SHIFT",
    "MASS_KEPT",
    "PAPER_ARMS",
    "Arm",
    "ArmName",
    "Comparison",
    "Evaluation",
    "StoredArm",
    "StoredEvaluation",
    "Table",
    "dose_response",
    "evaluate",
    "group_means",
    "table1",
    "table2",
    "text_loss",
]
