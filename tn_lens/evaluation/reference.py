"""The results that the paper reports for its six models, in percent, as means and standard deviations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tn_lens.core.stored import Stored


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
    """Adaptive threshold t as a fraction (table 3)."""
    size: str
    """Size group of section 3.3."""


@dataclass(frozen=True)
class Paper(Stored):
    """The content of paper.json."""

    models: Mapping[str, PaperRow]


PAPER = Paper.load(Path(__file__).with_name("paper.json")).models
"""Tables 1, 2 and 3, by model."""
