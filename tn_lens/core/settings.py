"""What decides the numbers of a run besides the model and the questions; no torch is imported here."""

# ruff: noqa: RUF009 (`_option` makes a dataclass field)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tn_lens.core.options import (
    NEURON_SITES,
    BaselineName,
    Correction,
    EngineName,
    Family,
    Order,
    Positions,
    TargetName,
)

GIB = 2**30
MAX_MEMORY = {"cpu": 2 * GIB, "cuda": 8 * GIB}
"""Bytes that one pass of the shared-prefix engine may take above the weights, by kind of device; elsewhere as on a CPU.

More rows in a pass hide the kernel launches of a GPU; a CPU gains nothing from more.
"""


def default_memory(device: str) -> int:
    """The default of `max_memory` on a kind of device, in bytes."""
    return MAX_MEMORY.get(device, MAX_MEMORY["cpu"])


def _option(default: Any, text: str, flag: str | None = None) -> Any:
    """A field with the help text, and the flag where it is not the field's name, of its command-line option."""
    return field(default=default, metadata={"help": text, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. None means: what suits the model (paper table 3, the toy's model card), else the paper's.

    Every field is also an option of `tn-lens run`.
    """

    adaptive_threshold: float | Literal["auto"] | None = _option(
        None,
        "Adaptive threshold t, or 'auto' to tune it; the paper's value for its models, else 0.2, by default.",
        flag="--t",
    )
    """t, a fraction of the largest D of a question and site (paper 2.3, A.3); "auto" tunes it on separate questions."""
    share_threshold: float = _option(0.4, "Share threshold p.", flag="--p")
    """p, the fraction of the questions in which a candidate is salient (paper 2.3, 3.1)."""
    alpha: float = _option(0.05, "Significance level of the held-out t-test.")
    """Level of the held-out test (paper 2.2)."""
    correction: Correction = _option("bonferroni", "Correction for multiple comparisons.")
    family: Family = _option("candidates", "Tests that the correction counts.")
    order: Order | None = _option(None, "Order of the choices; random by default.")
    format: str | None = _option(None, "Prompt format, by name; the format of the question set by default.")
    n_steps: int = _option(20, "Number of interpolation steps m.")
    """m of the paper's equation 4."""
    method: str = _option("riemann_right", "Attribution method; 'graded' suits post-norm models.")
    """Name of a registered attribution method; see `tn_lens.core.options.Method` for the built-in ones."""
    baseline: BaselineName = _option("zero", "Baseline of integrated gradients.")
    positions: Positions = _option("last", "Positions to interpolate.")
    sites: Sequence[str] = _option(NEURON_SITES, "Sites to attribute.")
    """Names of registered sites."""
    target: TargetName = _option("probability_difference", "Function of the logits to attribute.")
    separate: bool = _option(False, "Store Attr_t beside D.")
    """Store Attr_t beside D, which takes another backward pass and twice the space."""
    engine: EngineName = _option("auto", "How the model is run; the scores are equal.")
    max_memory: int | None = _option(None, "GiB that one attribution pass may use above the weights; 2, on CUDA 8.")
    """Bytes that one pass of attribution may take above the weights; by default 2 GiB, on CUDA 8 GiB."""
    intervention: str = _option("zero", "Intervention on the found neurons, by name.")
    """Name of a registered intervention that needs no further argument."""
    controls: Sequence[str] = _option(("random", "random_matched"), "Controls of the evaluation.")
    """Names of registered controls."""
    n_repetitions: int = _option(10, "Repetitions of the evaluation.", flag="--repetitions")
    """Repetitions of the evaluation (paper 3.3)."""
    seed: int = _option(0, "Random seed (answer orders, half split, controls).")
    limit: int | None = _option(None, "Maximum number of questions, drawn with the seed.")

    def of_attribution(self) -> dict[str, Any]:
        """Keyword arguments of `attribute`, without `baseline` (which takes prompts) and `separate`."""
        names = ("n_steps", "method", "positions", "sites", "target", "engine", "max_memory")
        return {name: getattr(self, name) for name in names}

    def of_selection(self) -> dict[str, Any]:
        """Keyword arguments of `select_neurons`, without the threshold t and the seed."""
        return {name: getattr(self, name) for name in ("share_threshold", "alpha", "correction", "family")}

    def of_evaluation(self) -> dict[str, Any]:
        """Keyword arguments of `evaluate`, without the order of the choices."""
        conditions = ("unablated", *self.controls, "ablated")
        names = ("intervention", "n_repetitions", "seed")
        return {"conditions": conditions, **{name: getattr(self, name) for name in names}}
