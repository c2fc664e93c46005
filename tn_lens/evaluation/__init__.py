"""Evaluation: the effect of ablating the found neurons, beside every control (paper 3.3, 3.4)."""

from tn_lens.evaluation.comparison import LETTER_SHIFT, MASS_KEPT, Comparison
from tn_lens.evaluation.condition import ConditionResult, condition_label
from tn_lens.evaluation.controls import CONTROLS, Control
from tn_lens.evaluation.diagnosis import Diagnosis, diagnose
from tn_lens.evaluation.dose import dose_response
from tn_lens.evaluation.evaluate import ALL_CONDITIONS, evaluate
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.tables import Table, group_means, table1, table2
from tn_lens.evaluation.text import text_loss
from tn_lens.evaluation.tuning import Tuning, tune_threshold

__all__ = [
    "ALL_CONDITIONS",
    "CONTROLS",
    "LETTER_SHIFT",
    "MASS_KEPT",
    "Comparison",
    "ConditionResult",
    "Control",
    "Diagnosis",
    "Evaluation",
    "Table",
    "Tuning",
    "condition_label",
    "diagnose",
    "dose_response",
    "evaluate",
    "group_means",
    "table1",
    "table2",
    "text_loss",
    "tune_threshold",
]
