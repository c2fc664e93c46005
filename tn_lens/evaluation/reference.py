"""The results that the paper reports for its six models, in percent and plus or minus one standard deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One model of the paper."""

    baseline: tuple[float, float]
    """Accuracy on TruthfulQA: mean and standard deviation over 10 repetitions (table 1)."""
    random: tuple[float, float]
    suppressed: tuple[float, float]
    n_neurons: int
    triviaqa: tuple[float, float]
    """Accuracy unablated and ablated (table 2)."""
    mmlu: tuple[float, float]
    t: float
    """Adaptive threshold, a fraction (table 3)."""
    size: str
    """Group of section 3.3."""


PAPER: Mapping[str, PaperRow] = {
    "Qwen2.5-3B-Instruct": PaperRow(
        (65.67, 0.67), (65.91, 1.08), (58.59, 0.68), 35, (63.51, 62.90), (62.10, 62.70), 0.01, "small"
    ),
    "Llama-3.2-3B-Instruct": PaperRow(
        (55.55, 0.76), (55.47, 1.49), (49.90, 1.00), 114, (58.60, 55.16), (51.87, 44.54), 0.20, "small"
    ),
    "OLMo-2-1124-7B-Instruct": PaperRow(
        (50.76, 0.91), (51.42, 0.96), (49.38, 1.12), 655, (60.07, 59.46), (50.81, 28.13), 0.10, "medium"
    ),
    "Llama-3.1-8B-Instruct": PaperRow(
        (62.15, 0.94), (62.10, 1.15), (43.31, 0.88), 37, (70.15, 62.41), (61.29, 53.85), 0.25, "medium"
    ),
    "Mistral-Nemo-Instruct-2407": PaperRow(
        (58.06, 0.99), (58.46, 1.08), (50.04, 1.25), 181, (63.39, 52.09), (45.21, 44.73), 0.17, "large"
    ),
    "OLMo-2-1124-13B-Instruct": PaperRow(
        (61.89, 0.63), (61.85, 0.71), (49.35, 1.16), 75, (59.09, 49.88), (58.68, 55.73), 0.20, "large"
    ),
}
"""Tables 1, 2 and 3."""
