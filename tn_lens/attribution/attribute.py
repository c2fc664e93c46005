"""Attribute the model's preference for the right answer to its neurons (paper 2.1, 2.2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.baseline import Baseline, resolve_baseline, rows_of
from tn_lens.attribution.engines.direct import Direct
from tn_lens.attribution.engines.shared_prefix import SharedPrefix, plan, unsupported
from tn_lens.attribution.methods import METHODS, BatchScores, Engine, Method
from tn_lens.attribution.quadrature import MOST_STEPS, N_INNER, N_NODES
from tn_lens.attribution.result import Attribution, PassSize
from tn_lens.attribution.target import (
    Target,
    probability_difference,
    resolve_target,
    right_probability,
    wrong_probability,
)
from tn_lens.core.errors import BadInput
from tn_lens.core.options import NEURON_SITES, BaselineInput, EngineName, Positions, TargetName
from tn_lens.core.sentences import count
from tn_lens.core.settings import MAX_NODES, default_memory
from tn_lens.inference.counterparts import counterpart_activations
from tn_lens.models import Model, backend_of, check_model, neuron_space
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSpace, SiteName
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.chunks import PROMPTS_ATTRIBUTED
from tn_lens.runs.context import track

BATCH_SIZE = 64
"""Default number of rows (copies of the prompt) in one pass of the direct engine."""


@isolated
def attribute(
    model: Model,
    prompts: Sequence[Prompt] | Prompt,
    *,
    n_steps: int = 20,
    method: str = "riemann_right",
    tolerance: float | None = None,
    max_nodes: int = MAX_NODES,
    baseline: Baseline = "zero",
    baseline_input: BaselineInput = "end_of_text",
    positions: Positions = "last",
    sites: Sequence[SiteName] | Mapping[SiteName, Sequence[int]] | SiteName = NEURON_SITES,
    target: Target | TargetName = "probability_difference",
    separate: bool = False,
    engine: EngineName = "auto",
    max_memory: int | None = None,
    internal_batch_size: int | PassSize | None = None,
) -> Attribution:
    """Integrated gradients of the target for every neuron of every layer (paper eq. 3, 4, 8).

    Args:
        model: a model from `load_model`, or a HookedTransformer loaded without weight processing.
        prompts: see `build_prompts` and `build_prompt`.
        n_steps: number of interpolation steps, m in the paper; not used by `"adaptive"`.
        method: name of a registered method: a quadrature rule (see `quadrature_rule`), `"adaptive"`, which takes as many nodes
            as the tolerance asks for, `"gradient_x_activation"`, or `"attribution_patching"` from the prompt in another order.
        tolerance: largest error of the scores of a prompt and site, as a fraction of its largest score, 1e-3 by default. For a
            quadrature rule, the deviation from the sum over all its nodes, 0 by default, which evaluates all of them.
        max_nodes: number of nodes at a site and layer of a prompt from which `"adaptive"` does not refine any further.
        baseline: start of the integration path; see `mean_activations` for means over other prompts.
        baseline_input: input whose activations are the baseline `"input"`; see `tn_lens.inference.baselines`.
        positions: `"last"`, the position whose logits are read, or `"all"` together, whose scores are summed.
        sites: names of registered sites: `"mlp"` (hook_post), `"attn"` (hook_z), or the residual stream's. A mapping gives the
            layers of each site to attribute; the neurons of its other layers have the score 0.
        target: `"probability_difference"` (the paper), `"normalized_difference"`, `"log_ratio"`, or a function of the last
            logits [row, vocab] and the prompt that returns one number per row.
        separate: also attribute f_t and f_f separately (Attr_t and Attr_f), which takes one more backward pass.
        engine: `"shared_prefix"` runs each prompt once and every step as one position after it; `"direct"` runs whole
            prompts in every step, and also supports `positions="all"`. `"auto"` uses the shared prefix if it is supported.
        max_memory: bytes for one pass of the shared-prefix engine, besides the weights; see `Settings.max_memory`.
        internal_batch_size: rows in one pass (64 for the direct engine), or prompts and rows. Overrides `max_memory`.

    Returns:
        Scores on the CPU in at least float32, one row per prompt.

    Raises:
        BadInput: an argument is out of range, the model is not supported, or scores are not finite.
    """
    check_model(model)
    prompts = PromptSet.of(prompts)
    space, layers = _space_and_layers(model, sites)
    _check_arguments(prompts, space, positions, max_memory, internal_batch_size)
    attribution_method = check_method(method, n_steps, baseline, positions)
    control = error_control(method, n_steps, tolerance, max_nodes)
    is_refined = bool(control.get("tolerance"))
    targets = _targets(target, separate, is_controlled=is_refined)
    if attribution_method.uses_counterparts:
        baseline = counterpart_activations(model, prompts, sites=space.sites)
    start = resolve_baseline(model, prompts, baseline, space, positions, baseline_input)
    engine_name = choose_engine(model, engine, positions)
    planned = choose_pass_size(
        model,
        prompts,
        engine_name,
        n_places=sum(map(len, layers.values())),
        n_steps=N_INNER if is_refined else n_steps,
        is_refined=is_refined,
        max_memory=max_memory,
        internal_batch_size=internal_batch_size,
    )

    def scores_of(first: int, batch: Sequence[Prompt], n_rows: int) -> BatchScores:
        prepared = prepare(engine_name, model, batch, space.sites, positions, layers)
        begin = rows_of(start, slice(first, first + len(batch)))
        options = {"targets": targets, "baseline": begin, "n_steps": n_steps, "n_rows": n_rows, **control}
        return attribution_method.attribute(prepared, **options)

    results = _Results(model, prompts, space, len(targets))
    about = {"tolerance": control.get("tolerance") or None, "engine": engine_name, "planned": planned}
    return results.attribution(separate, pass_size=results.fill(scores_of, planned), **about)


class _Results:
    """The scores of all prompts, on the CPU, filled batch by batch."""

    def __init__(self, model: Model, prompts: PromptSet, space: NeuronSpace, n_targets: int) -> None:
        self.model, self.prompts, self.space = model, prompts, space
        dtype, shape = backend_of(model).wide_dtype, (len(prompts), space.n_layers)
        self.scores = [
            {s: torch.empty(*shape, space.width(s), dtype=dtype) for s in space.sites} for _ in range(n_targets)
        ]
        self.change = [{s: torch.empty(*shape, dtype=dtype) for s in space.sites} for _ in range(n_targets)]
        self.error: dict[SiteName, Tensor] = {}
        self.n_nodes: dict[SiteName, Tensor] = {}

    def fill(self, scores_of: Callable[[int, Sequence[Prompt], int], BatchScores], planned: PassSize) -> PassSize:
        """Attribute all prompts, batch by batch.

        Args:
            scores_of: function of the index of the first prompt of a batch, its prompts, and the number of rows in a pass.
            planned: size of a pass, which is reduced if memory runs out.

        Returns:
            The size of the last pass.
        """
        size = planned
        for first in track(range(0, len(self.prompts), planned.n_prompts), "attribution"):
            last = min(first + planned.n_prompts, len(self.prompts))
            while first < last:  # more than once if memory runs out
                batch, size = _within_memory(partial(scores_of, first), self.prompts[first:last], size)
                rows = slice(first, min(first + size.n_prompts, last))
                self.put(rows, batch)
                first = rows.stop
        return size

    def put(self, rows: slice, batch: BatchScores) -> None:
        for index, scores in enumerate(batch.scores):
            for site in self.space.sites:
                _refuse_not_finite(scores[site], site, self.model)
                self.scores[index][site][rows] = scores[site].cpu()
                self.change[index][site][rows] = batch.change[index][site].cpu()
        for of_all, of_batch in ((self.error, batch.error), (self.n_nodes, batch.n_nodes)):
            for site, values in (of_batch or {}).items():
                empty = torch.zeros(len(self.prompts), self.space.n_layers, dtype=values.dtype)
                of_all.setdefault(site, empty)[rows] = values.cpu()

    def attribution(self, separate: bool, **about: object) -> Attribution:
        """Build the result. If only Attr_t and Attr_f were attributed, D is their difference (eq. 8), by linearity."""
        right, wrong = (self.scores[-2], self.scores[-1]) if separate else (None, None)
        difference, change = self.scores[0], self.change[0]
        if right is not None and wrong is not None and len(self.scores) == 2:
            difference = {site: right[site] - wrong[site] for site in self.space.sites}
            change = {site: self.change[0][site] - self.change[1][site] for site in self.space.sites}
        return Attribution(
            prompts=self.prompts,
            space=self.space,
            difference=difference,
            change=change,
            right=right,
            wrong=wrong,
            error=self.error or None,
            n_nodes=self.n_nodes or None,
            **about,  # pyright: ignore[reportArgumentType]
        )


def prepare(
    engine: Literal["shared_prefix", "direct"],
    model: Model,
    prompts: Sequence[Prompt],
    sites: Sequence[SiteName],
    positions: Positions,
    layers: Mapping[SiteName, Container[int]] | None = None,
) -> Engine:
    """Run prompts (a single one for the direct engine) in preparation for rows that differ from them."""
    if engine == "shared_prefix":
        return SharedPrefix(model, prompts, sites, layers)
    return Direct(model, prompts[0], sites, positions, layers)


def _space_and_layers(model: Model, sites: Any) -> tuple[NeuronSpace, dict[SiteName, set[int]]]:
    """The neurons at the given sites, and the layers of each site to attribute."""
    space = space_of(model, (sites,) if isinstance(sites, str) else tuple(sites))
    every = range(space.n_layers)
    chosen = dict(sites) if isinstance(sites, Mapping) else {}
    for site, given in chosen.items():
        if not given or not all(type(layer) is int and layer in every for layer in given):
            raise BadInput(f"expected one or more layers of {site!r} from 0 to {space.n_layers - 1}, got {given!r}")
    return space, {site: set(chosen.get(site, every)) for site in space.sites}


def space_of(model: Model, sites: Sequence[SiteName]) -> NeuronSpace:
    """The model's neurons at these sites, excluding sites that the model does not have."""
    space = neuron_space(model, sites)
    return neuron_space(model, tuple(site for site in sites if space.width(site)))


def _targets(target: Target | TargetName, separate: bool, *, is_controlled: bool) -> list[Target]:
    """The functions to attribute.

    With `separate`, the probability difference is omitted, since D = Attr_t - Attr_f, unless its own error is controlled.
    """
    target = resolve_target(target)
    targets: list[Target] = [right_probability, wrong_probability] if separate else []
    is_implied = separate and target is probability_difference and not is_controlled
    return targets if is_implied else [target, *targets]


def error_control(method: str, n_steps: int, tolerance: float | None, max_nodes: int) -> dict[str, Any]:
    """The arguments `tolerance` and `max_nodes` of a method; none if it does not control its error.

    Raises:
        BadInput: a number is out of range, or the method has no tolerance.
    """
    default = METHODS[method].tolerance
    if default is None:
        if tolerance:
            raise BadInput(f"the method {method!r} does not control its error; use 'adaptive', or leave out tolerance")
        return {}
    wanted = default if tolerance is None else tolerance
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 <= wanted < 1:
        raise BadInput(f"tolerance must be a number in [0, 1); got {wanted!r}")
    if default and not wanted:
        raise BadInput(f"the method {method!r} needs a tolerance above 0; got 0")
    if isinstance(max_nodes, bool) or not isinstance(max_nodes, int) or not N_NODES <= max_nodes <= MOST_STEPS:
        raise BadInput(f"max_nodes must be a whole number from {N_NODES} to {MOST_STEPS:,}; got {max_nodes!r}")
    # a rule with no more nodes than a panel has nothing to save
    return {"tolerance": float(wanted) if default or n_steps > N_NODES else 0.0, "max_nodes": max_nodes}


def check_method(method: str, n_steps: int, baseline: Baseline, positions: Positions) -> Method:
    """The method of this name.

    Raises:
        BadInput: the name is unknown, or the method cannot be used with these options.
    """
    found = METHODS[method]
    found.check(n_steps)
    is_zero = isinstance(baseline, str) and baseline == "zero"
    if found.uses_counterparts and not (is_zero and positions == "last"):
        raise BadInput(
            f"{method} takes its baseline from the last position of each question in another order; leave out baseline and "
            "positions, or use gradient_x_activation for another baseline"
        )
    return found


def attribution_chunks(model: Model, prompts: PromptSet, n_places: int | None = None) -> tuple[PromptSet, ...]:
    """Split prompts into the chunks in which a run attributes them, at all or at some sites and layers."""
    backend = backend_of(model)
    n_places = n_places or len(NEURON_SITES) * backend.space.n_layers
    # a forward and a backward pass, four operations per weight, of 20 rows per site and layer through half of the layers
    passes = 4 * 20 * n_places / 2
    return prompts.chunks(backend.chunk_size(PROMPTS_ATTRIBUTED, passes))


def choose_pass_size(
    model: Model,
    prompts: PromptSet,
    engine: Literal["shared_prefix", "direct"],
    *,
    n_places: int,
    n_steps: int,
    is_refined: bool = False,
    max_memory: int | None,
    internal_batch_size: int | PassSize | None,
) -> PassSize:
    """Numbers of prompts and rows in one pass: the given ones, or those that the memory limit of the engine allows."""
    if engine == "direct" or isinstance(internal_batch_size, int):  # the direct engine runs one prompt at a time
        given = internal_batch_size.n_rows if isinstance(internal_batch_size, PassSize) else internal_batch_size
        return PassSize(1, given or BATCH_SIZE)
    if internal_batch_size is not None:
        return internal_batch_size
    # planned for the longest prompt, so that all passes of a call have the same size
    longest = max(len(prompt.token_ids) for prompt in prompts)
    memory = max_memory or default_memory(backend_of(model).device.type)
    return plan(model, longest, n_places, n_steps, memory, is_refined=is_refined)


def _check_arguments(
    prompts: PromptSet,
    space: NeuronSpace,
    positions: str,
    max_memory: int | None,
    internal_batch_size: int | PassSize | None,
) -> None:
    if not prompts or not space.sites or positions not in get_args(Positions):
        raise BadInput(
            "attribute needs at least one prompt, one site that the model has, and positions 'last' or 'all'; "
            f"got {count(len(prompts), 'prompt')}, sites {list(space.sites)}, positions {positions!r}"
        )
    if max_memory is not None and max_memory < 1:
        raise BadInput(f"max_memory must be at least one byte; got {max_memory}")
    sizes = internal_batch_size if isinstance(internal_batch_size, PassSize) else (internal_batch_size,)
    if any(size is not None and size < 1 for size in sizes):
        raise BadInput(f"internal_batch_size must be at least 1; got {internal_batch_size}")


def _within_memory(
    scores_of: Callable[[Sequence[Prompt], int], BatchScores], prompts: Sequence[Prompt], size: PassSize
) -> tuple[BatchScores, PassSize]:
    """Attribute as many of the prompts as fit into a pass; if memory runs out, halve the pass, warn, and try again.

    Returns:
        The scores, and the pass size that fitted into memory.
    """
    while True:
        try:
            return scores_of(prompts[: size.n_prompts], size.n_rows), size
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            smaller = PassSize(min(size.n_prompts, len(prompts)), size.n_rows).smaller()
            if smaller is None:
                raise BadInput(
                    f"not even one row fits into memory ({str(error)[:150]}); use a smaller dtype or another device"
                ) from error
        size = smaller  # outside the except block, whose traceback keeps the tensors alive
        # cached blocks of the failed pass would count against the next one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(back_off_warning(size), stacklevel=3)


def back_off_warning(size: PassSize) -> str:
    """The warning that memory ran out during attribution."""
    return (
        f"out of memory: continuing with smaller passes (prompts: {size.n_prompts}, rows: {size.n_rows}); scores may differ "
        "in their last digits from those of a run with enough memory"
    )


def choose_engine(model: Model, engine: EngineName, positions: Positions) -> Literal["shared_prefix", "direct"]:
    """The engine to use; resolves `"auto"`.

    Raises:
        BadInput: the engine is unknown, or `"shared_prefix"` was requested and is not supported; the message gives the reason.
    """
    if engine not in get_args(EngineName):
        raise BadInput(f"expected engine 'auto', 'shared_prefix' or 'direct', got {engine!r}")
    if engine == "direct":
        return "direct"
    reason = unsupported(model) or ("positions='all'" if positions == "all" else None)
    if reason is None:
        return "shared_prefix"
    if engine == "shared_prefix":
        raise BadInput(
            f"the shared-prefix engine does not support {reason}; use engine='direct', which gives the same scores"
        )
    return "direct"


def _refuse_not_finite(scores: Float[Tensor, "prompt layer neuron"], site: SiteName, model: Model) -> None:
    finite = scores.isfinite().all(-1).all(0)  # [layer]
    if not finite.all():
        layer = int((~finite).nonzero()[0])
        raise BadInput(
            f"scores of layer {layer}, site {site!r} are not finite in {str(backend_of(model).dtype).removeprefix('torch.')}; "
            "load the model in bfloat16 or float32"
        )
