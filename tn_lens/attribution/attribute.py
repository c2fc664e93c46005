"""Attribute the model's preference for the right answer to its neurons (paper 2.1, 2.2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.engines.direct import Direct, Positions
from tn_lens.attribution.engines.shared_prefix import SharedPrefix, plan, unsupported
from tn_lens.attribution.methods.integrated_gradients import BatchScores, integrate
from tn_lens.attribution.quadrature import Method, quadrature_rule
from tn_lens.attribution.result import Attribution, PassSize
from tn_lens.attribution.target import (
    TARGETS,
    Target,
    TargetName,
    probability_difference,
    right_probability,
    wrong_probability,
)
from tn_lens.core.errors import BadInput
from tn_lens.inference.interventions import mean_activations
from tn_lens.models import Model, backend_of, check_model, neuron_space
from tn_lens.neurons.neuron import SITES, Site
from tn_lens.prompts import Prompt
from tn_lens.runs.progress import track

Baseline = Literal["zero", "mean"] | Mapping[Site, Float[Tensor, "layer _"]]
"""Where the path begins: at zero (the paper), at the mean activation over the prompts, or at given values."""

EngineName = Literal["auto", "shared_prefix", "direct"]
"""How the model is run; the results are the same. "auto" is the shared prefix wherever it is possible."""

BATCH_SIZE = 64
"""Whole prompts in one pass of the direct engine."""

MAX_MEMORY = {"cpu": 2 * 2**30, "cuda": 8 * 2**30}
"""Bytes that one pass of the shared-prefix engine may take above the weights, by kind of device; elsewhere as on a CPU.

On a GPU the host's time for a pass is what counts, so more rows in a pass make it faster; a CPU gains nothing from more.
"""


def attribute(
    model: Model,
    prompts: Sequence[Prompt] | Prompt,
    *,
    n_steps: int = 20,
    method: Method = "riemann_right",
    baseline: Baseline = "zero",
    positions: Positions = "last",
    sites: Sequence[Site] | Site = SITES,
    target: Target | TargetName = "probability_difference",
    separate: bool = False,
    engine: EngineName = "auto",
    max_memory: int | None = None,
    batch_size: int = BATCH_SIZE,
    pass_size: PassSize | None = None,
    progress: bool = False,
) -> Attribution:
    """Integrated gradients of the target for every neuron of every layer (paper eq. 3, 4, 8).

    Args:
        model: a model from `load_model`, or a HookedTransformer loaded without weight processing.
        prompts: what is asked; see `build_prompts` and `build_prompt`.
        n_steps: number of interpolation steps, m in the paper.
        method: how the steps lie; see `quadrature_rule`.
        baseline: where the path begins; see `mean_activations` for means over other prompts.
        positions: `"last"` interpolates the position whose logits are read; `"all"` interpolates every position of the
            prompt together and sums the scores over positions.
        sites: `"mlp"` (hook_post) and `"attn"` (hook_z), or directions of the residual stream (`"hook_mlp_out"`,
            `"hook_attn_out"`, `"hook_resid_pre"`, `"hook_resid_mid"`, `"hook_resid_post"`).
        target: what is attributed: `"probability_difference"` (the paper), `"normalized_difference"`, `"log_ratio"`, or
            your own function of the last logits [row, vocab] and the prompt, with one number per row.
        separate: also attribute f_t and f_f apart (Attr_t and Attr_f), for one more backward pass.
        engine: `"shared_prefix"` runs each prompt once and every step as one position behind it; `"direct"` is the
            definition, whole prompts in every step, and also does `positions="all"`. `"auto"` takes the first where it can.
        max_memory: bytes that one pass of the shared prefix may take above the weights; 2 GiB by default, 8 GiB on CUDA,
            where more of it is faster.
        batch_size: whole prompts in one pass of the direct engine; memory grows with it, time falls.
        pass_size: prompts and rows in one pass, in place of a plan by `max_memory` or `batch_size`.
        progress: show a progress bar.

    Returns:
        Scores on the CPU in at least float32, one row per prompt.

    Raises:
        BadInput: an argument out of its range, a model that is not supported, or scores that are not finite.
    """
    check_model(model)
    prompts = [prompts] if isinstance(prompts, Prompt) else prompts
    sites = (sites,) if isinstance(sites, str) else sites
    if isinstance(target, str):
        if target not in TARGETS:
            raise BadInput(
                f"unknown target {target!r}: expected {', '.join(TARGETS)}, or a function of the last logits"
            )
        target = TARGETS[target]  # pyright: ignore[reportArgumentType]
    rule, space = quadrature_rule(method, n_steps), neuron_space(model)
    wanted: list[Site] = [site for site in sites if space.width(site)]
    sites = wanted
    if not prompts or not sites or positions not in get_args(Positions) or batch_size < 1:
        raise BadInput(
            "attribute needs at least one prompt, one site the model has, positions 'last' or 'all', and a batch_size "
            f"from 1; got {len(prompts)} prompts, sites {list(sites)}, positions {positions!r}, batch_size {batch_size}"
        )
    if max_memory is not None and max_memory < 1:
        raise BadInput(f"max_memory must be at least one byte; got {max_memory}")
    if pass_size is not None and min(pass_size) < 1:
        raise BadInput(f"pass_size needs at least one prompt and one row in a pass; got {tuple(pass_size)}")
    start = resolve_baseline(model, prompts, baseline, sites, positions)
    targets: list[Target] = [right_probability, wrong_probability] if separate else []
    if not separate or target is not probability_difference:
        targets.insert(0, target)
    backend = backend_of(model)
    device = backend.device
    on_device: dict[Site, Tensor] = {site: start[site].to(device) for site in sites}
    dtype = backend.wide_dtype
    held: list[dict[Site, Tensor]] = [
        {site: torch.empty(len(prompts), space.n_layers, space.width(site), dtype=dtype) for site in sites}
        for _ in targets
    ]
    change: list[dict[Site, Tensor]] = [
        {site: torch.empty(len(prompts), space.n_layers, dtype=dtype) for site in sites} for _ in targets
    ]
    name = choose_engine(model, engine, positions)
    planned = PassSize(1, batch_size)
    if name == "shared_prefix":
        longest = max(len(prompt.token_ids) for prompt in prompts)
        planned = plan(model, longest, len(sites), n_steps, max_memory or default_memory(device.type))
    planned = size = pass_size or planned

    def integrated(batch: Sequence[Prompt], n_rows: int) -> BatchScores:
        shared = name == "shared_prefix"
        run = SharedPrefix(model, batch, sites) if shared else Direct(model, batch[0], sites, positions)
        return integrate(run, rule=rule, targets=targets, baseline=on_device, n_rows=n_rows)

    for first in track(range(0, len(prompts), planned.n_prompts), "attribution" if progress else None):
        last = min(first + planned.n_prompts, len(prompts))
        while first < last:
            found, size = _within_memory(integrated, prompts[first:last], size)
            rows = slice(first, min(first + size.n_prompts, last))
            for index in range(len(targets)):
                for site in sites:
                    scores = found.scores[index][site]
                    _refuse_not_finite(scores, site, model)
                    held[index][site][rows] = scores.cpu()
                    change[index][site][rows] = found.change[index][site].cpu()
            first = rows.stop
    right, wrong = (held[-2], held[-1]) if separate else (None, None)
    if len(targets) == 2 and right is not None and wrong is not None:  # eq. 8: integrated gradients are linear in f
        held.insert(0, {site: right[site] - wrong[site] for site in sites})
        change.insert(0, {site: change[0][site] - change[1][site] for site in sites})
    return Attribution(
        prompts=tuple(prompts),
        space=space,
        difference=held[0],
        change=change[0],
        right=right,
        wrong=wrong,
        engine=name,
        pass_size=size,
        planned=planned,
    )


def default_memory(device: str) -> int:
    """Bytes for a pass where nothing else was asked for: a constant of the kind of device."""
    return MAX_MEMORY.get(device, MAX_MEMORY["cpu"])


def _within_memory(
    integrated: Callable[[Sequence[Prompt], int], BatchScores], prompts: Sequence[Prompt], size: PassSize
) -> tuple[BatchScores, PassSize]:
    """Integrate as many of the prompts as go into a pass; where memory runs out, halve the pass, say so, and go on.

    Returns:
        The scores, and the size of a pass that fitted.
    """
    while True:
        try:
            return integrated(prompts[: size.n_prompts], size.n_rows), size
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            smaller = PassSize(min(size.n_prompts, len(prompts)), size.n_rows).smaller()
            if smaller is None:
                raise BadInput(
                    f"not even one row fits into memory ({str(error)[:150]}); take a smaller dtype or another device"
                ) from error
        size = smaller  # outside the except, whose traceback holds on to the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(back_off_warning(size), stacklevel=3)


def back_off_warning(size: PassSize) -> str:
    """What to know about scores during which memory ran out."""
    return (
        f"out of memory: going on with {size.n_rows} rows of {size.n_prompts} prompts in a pass; scores may differ in their "
        "last digits from those of a run that never ran out"
    )


def choose_engine(model: Model, engine: EngineName, positions: Positions) -> Literal["shared_prefix", "direct"]:
    """The engine that will run.

    Raises:
        BadInput: the shared prefix was asked for by name and is not possible; the reason is given.
    """
    if engine not in get_args(EngineName):
        raise BadInput(f"expected engine 'auto', 'shared_prefix' or 'direct', got {engine!r}")
    if engine == "direct":
        return "direct"
    reason = unsupported(model) or ("positions='all'" if positions == "all" else None)
    if reason is None:
        return "shared_prefix"
    if engine == "shared_prefix":
        raise BadInput(f"the shared-prefix engine cannot do {reason}; use engine='direct', which gives the same scores")
    return "direct"


def post_norm_warning(model: Model, method: Method, baseline: Baseline) -> str | None:
    """What to know about a zero baseline in a model that normalises after W_O and W_out; None where all is well."""
    if (
        not backend_of(model).is_post_norm
        or method == "graded"
        or not (isinstance(baseline, str) and baseline == "zero")
    ):
        return None
    return (
        "this model normalises after W_O and W_out, so f(alpha z) hardly depends on alpha > 0 and all of the change lies "
        f"next to the zero baseline, where {method} has no node: the ranking within a site stays meaningful, the scores' "
        "size does not, and completeness fails; method='graded' or baseline='mean' mend that"
    )


def resolve_baseline(
    model: Model, prompts: Sequence[Prompt], baseline: Baseline, sites: Sequence[Site], positions: Positions
) -> Mapping[Site, Float[Tensor, "layer _"]]:
    """Values for a named baseline; given ones are checked.

    Raises:
        BadInput: an unknown name, or values of another shape.
    """
    space = neuron_space(model)
    if isinstance(baseline, str):
        match baseline:
            case "zero":
                return {site: torch.zeros(space.n_layers, space.width(site)) for site in sites}
            case "mean":
                return mean_activations(model, prompts, positions=positions)
            case _:
                raise BadInput(f"expected baseline 'zero', 'mean' or a tensor per site, got {baseline!r}")
    for site in sites:
        expected = (space.n_layers, space.width(site))
        if site not in baseline or tuple(baseline[site].shape) != expected:
            came = tuple(baseline[site].shape) if site in baseline else "nothing"
            raise BadInput(f"expected a baseline of shape {expected} (layer, neuron) for site {site!r}, got {came}")
    return baseline


def _refuse_not_finite(scores: Float[Tensor, "prompt layer neuron"], site: Site, model: Model) -> None:
    finite = scores.isfinite().all(-1).all(0)
    if not finite.all():
        layer = int((~finite).nonzero()[0])
        raise BadInput(
            f"scores of layer {layer}, site {site!r} are not finite in {str(backend_of(model).dtype).removeprefix('torch.')}; "
            "load the model in bfloat16 or float32"
        )
