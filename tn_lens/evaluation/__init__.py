"""Evaluation: what the found neurons do to accuracy, beside every control (paper 3.3, 3.4)."""

from tn_lens.evaluation.comparison import LETTER_SHIFT, MASS_KEPT, Comparison
from tn_lens.evaluation.condition import ARM_NAMES, ARMS, PAPER_ARMS, Arm, ArmName
from tn_lens.evaluation.dose import dose_response
from tn_lens.evaluation.evaluate import evaluate
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.stored import StoredArm, StoredEvaluation
from tn_lens.evaluation.tables import Table, group_means, table1, table2
from tn_lens.evaluation.text import text_loss

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
