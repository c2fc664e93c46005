"""Settings that determine the results of a run, besides the model and the questions. Does not import torch."""

# ruff: noqa: RUF009 (`_option` returns a dataclass field)
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tn_lens.core.errors import BadInput
from tn_lens.core.options import (
    NEURON_SITES,
    BaselineInput,
    BaselineName,
    Correction,
    EngineName,
    Family,
    Order,
    Positions,
    TargetName,
)

GIB = 2**30
MAX_NODES = 512
"""Default of the largest number of nodes at one site and layer of a prompt."""
DAMAGE_BOUND = 0.05
"""Default of the largest harmless rise of the loss on plain text, in nats per token: 0.05 raises the perplexity by 5 %."""
MAX_MEMORY = {"cpu": 2 * GIB, "cuda": 8 * GIB}
"""Memory limit of one pass of the shared-prefix engine in bytes, besides the weights, by device type. Device types that
are not listed use the value of the CPU. A GPU uses a quarter of its total memory if that is more.

Small passes on a GPU are bound by kernel launches; on a CPU, larger passes are not faster.
"""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"baseline": "zero", "method": "riemann_right", "n_steps": 20, "order": "random"},
    "recommended": {"baseline": "mean", "method": "adaptive", "order": "both"},
}
"""Values of some settings by the name of a preset; see `Settings.preset`."""


def default_memory(device: str) -> int:
    """The default of `max_memory` for a device type, in bytes. It does not depend on the memory that is free."""
    least = MAX_MEMORY.get(device, MAX_MEMORY["cpu"])
    if device != "cuda":
        return least
    import torch  # takes seconds, and is not needed for --help

    # a run on a GPU may be read on a machine without one
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return max(least, total // 4 // GIB * GIB)


def _option(default: Any, text: str, flag: str | None = None) -> Any:
    """A dataclass field with the help text of its command-line option, and the flag if it differs from the field's name."""
    return field(default=default, metadata={"help": text, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run.

    If `adaptive_threshold` or `order` is None, the value recommended for the model is used (paper table 3, the toy's model
    card), and t = 0.2 and a random order if there is none.

    Every field is also an option of `tn-lens run`.
    """

    adaptive_threshold: float | Literal["auto"] | None = _option(
        None,
        "Adaptive threshold t, or 'auto' to tune it. Default: the paper's value for its models, 0.2 for others.",
        flag="--t",
    )
    """Threshold t, as a fraction of the largest D of each question and site (paper 2.3, A.3). "auto" tunes it on separate
    questions."""
    share_threshold: float = _option(0.4, "Share threshold p.", flag="--p")
    """Threshold p on the fraction of questions in which a candidate is salient (paper 2.3, 3.1)."""
    alpha: float = _option(0.05, "Significance level of the held-out t-test.")
    """Significance level of the held-out test (paper 2.2)."""
    correction: Correction = _option("bonferroni", "Correction for multiple comparisons.")
    family: Family = _option("candidates", "Family of tests that the correction covers.")
    order: Order | None = _option(None, "Order of the choices. Default: random; both for the toy model.")
    format: str | None = _option(
        None,
        "Prompt format: letters, completion, statement, or the name of another. Default: that of the question set.",
    )
    n_shots: int = _option(0, "Number of solved examples before each question, taken from the question set.")
    """Number of questions that are shown with their answers before every question, and are not asked themselves."""
    symbols: Sequence[str] = _option((), "Symbols of the choices instead of A, B, ...")
    prefill: str = _option("", "Beginning of the answer, which the model continues.")
    template_kwargs: Mapping[str, Any] | None = _option(
        None, "Variables of the chat template, NAME=VALUE or one JSON object. Default: enable_thinking=false."
    )
    """Variables of the chat template, in addition to `enable_thinking=False`."""
    n_steps: int = _option(20, "Number of interpolation steps m.")
    """Number of interpolation steps m (paper eq. 4)."""
    method: str = _option("riemann_right", "Attribution method; use 'graded' for post-norm models.")
    """Name of a registered attribution method; see `tn_lens.core.options.Method` for the built-in ones."""
    tolerance: float | None = _option(
        None,
        "Error of the scores, relative to the largest. Default: 0.001 for 'adaptive', 0 (all nodes) for the others.",
    )
    """Largest error of a prompt's scores at a site, as a fraction of its largest score; see `attribute`."""
    max_nodes: int = _option(MAX_NODES, "Number of nodes from which 'adaptive' does not refine a layer.")
    """Number of nodes at a site and layer of a prompt from which "adaptive" does not refine any further."""
    convergence_sample: int = _option(
        8, "Number of questions on which the scores of a quadrature rule are compared with converged ones; 0 for none."
    )
    """Number of questions on which the scores of a quadrature rule are compared with converged ones; see `convergence_check`."""
    baseline: BaselineName = _option("zero", "Baseline of integrated gradients.")
    baseline_input: BaselineInput = _option("end_of_text", "Input whose activations are the baseline 'input'.")
    positions: Positions = _option("last", "Positions to interpolate.")
    sites: Sequence[str] = _option(NEURON_SITES, "Sites to attribute.")
    """Names of registered sites."""
    target: TargetName = _option("probability_difference", "Function of the logits to attribute.")
    separate: bool = _option(False, "Also store Attr_t, in addition to D.")
    """Whether to store Attr_t in addition to D, which takes a second backward pass and twice the disk space."""
    engine: EngineName = _option("auto", "How attribution runs the model; all engines give the same scores.")
    max_memory: int | None = _option(
        None,
        "Memory limit of a pass in GiB, besides the weights. Default: 2; on CUDA a quarter of the GPU's memory, at least 8.",
    )
    """Memory limit of one attribution pass in bytes, besides the weights. Default: 2 GiB; on CUDA a quarter of the GPU's
    memory, at least 8 GiB."""
    intervention: str = _option("zero", "Intervention on the found neurons, by name.")
    """Name of a registered intervention without required arguments."""
    controls: Sequence[str] = _option(("random", "random_matched"), "Controls of the evaluation.")
    """Names of registered controls."""
    damage_bound: float = _option(DAMAGE_BOUND, "Largest harmless rise of the loss on plain text, in nats per token.")
    """Largest harmless rise of the loss on plain text, in nats per token; see `measure_damage`."""
    exclude: Literal["damage"] | None = _option(None, "Neurons to leave out: 'damage' for damage neurons.")
    """"damage" leaves out damage neurons before the evaluation. A finished run can be continued with another value."""
    n_repetitions: int = _option(10, "Repetitions of the evaluation.", flag="--repetitions")
    """Repetitions of the evaluation (paper 3.3)."""
    seed: int = _option(0, "Random seed (answer orders, half split, controls).")
    limit: int | None = _option(None, "Maximum number of questions, sampled with the seed.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Settings:
        """The settings of a preset, with changes.

        A preset consists of values only, so its name is not stored.

        Args:
            name: `"paper"` (zero activation as the baseline, the paper's Riemann sum with 20 steps, one random order) or
                `"recommended"`.
            changes: settings whose values differ from the preset's.

        Raises:
            BadInput: there is no preset of this name.
        """
        if name not in tuple(PRESETS):
            raise BadInput(f"unknown preset {name!r}; expected {' or '.join(map(repr, PRESETS))}")
        return cls(**{**PRESETS[name], **changes})

    def of_attribution(self) -> dict[str, Any]:
        """Keyword arguments of `attribute`, without `baseline` (whose mean is computed from prompts) and `separate`."""
        names = ("n_steps", "method", "tolerance", "max_nodes", "baseline_input", "positions", "sites", "target")
        return {name: getattr(self, name) for name in (*names, "engine", "max_memory")}

    def of_format(self) -> dict[str, Any]:
        """Arguments of `QuestionSet.with_format`."""
        names = ("n_shots", "symbols", "prefill", "template_kwargs")
        return {"name": self.format, **{name: getattr(self, name) for name in names}}

    def of_selection(self) -> dict[str, Any]:
        """Keyword arguments of `select_neurons`, without the threshold t and the seed."""
        return {name: getattr(self, name) for name in ("share_threshold", "alpha", "correction", "family")}

    def of_evaluation(self) -> dict[str, Any]:
        """Keyword arguments of `evaluate`, without the order of the choices."""
        conditions = ("unablated", *self.controls, "ablated")
        names = ("intervention", "n_repetitions", "seed")
        return {"conditions": conditions, **{name: getattr(self, name) for name in names}}
