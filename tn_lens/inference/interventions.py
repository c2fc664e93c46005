"""What is done to neurons while the model runs: zero (the paper's suppression), scale, mean, resample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.inference.forward import Layout, Where, pad_right, prompt_logits
from tn_lens.models import Hooks, Model, backend_of, neuron_space
from tn_lens.neurons.neuron import SITES, NeuronSet, NeuronSpace, Site, hook_name
from tn_lens.prompts import Prompt
from tn_lens.runs.units import PROMPTS_ASKED, Mapper, Tensors, cut_prompts, in_memory, unit_key

Mode = Literal["zero", "scale", "mean", "resample"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """Some neurons, what they are set to, and where in the prompt.

    Raises:
        BadInput: an unknown mode or place, or a factor that is missing, not finite or not used.
    """

    neurons: NeuronSet
    mode: Mode = "zero"
    """`"zero"` as in the paper; `"scale"` multiplies by `factor` (0 suppresses, 1 changes nothing, 2 amplifies); `"mean"` puts
    the mean activation over the prompts; `"resample"` what the neuron has in another prompt, drawn with the seed."""
    factor: float | int | None = None
    """Of `"scale"`."""
    positions: Where = "all"
    """Every position of the prompt, the one whose logits are read, or from the question on."""
    values: Mapping[Site, Float[Tensor, "layer _"]] | None = None
    """Of `"mean"`; by default the untouched model's means over the prompts that are asked, at the same positions."""
    seed: int = 0
    """Of `"resample"`."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise BadInput(f"expected mode {', '.join(map(repr, get_args(Mode)))}; got {self.mode!r}")
        if self.positions not in get_args(Where):
            raise BadInput(f"expected positions {', '.join(map(repr, get_args(Where)))}; got {self.positions!r}")
        if (self.mode == "scale") != (self.factor is not None):
            raise BadInput(f"a factor belongs to mode 'scale' and to no other; got {self.mode!r} with {self.factor!r}")
        if self.factor is not None and not abs(self.factor) < float("inf"):
            raise BadInput(f"factor must be a finite number; got {self.factor!r}")

    @property
    def keeps_prefix(self) -> bool:
        """Whether prompts that begin alike still do so; not where each takes its values from another one."""
        return self.mode != "resample"

    @property
    def needs_all_prompts(self) -> bool:
        """Whether what a neuron gets depends on which prompts are asked together."""
        return self.mode == "resample" or (self.mode == "mean" and self.values is None)

    def prepare(self, model: Model, prompts: Sequence[Prompt]) -> Callable[[Layout], Hooks] | None:
        """What `prompt_logits` needs to run these prompts under the intervention; None for no neurons.

        Raises:
            BadInput: the neurons do not fit the model.
        """
        space = neuron_space(model)
        space.check(self.neurons)
        if not self.neurons:
            return None
        chosen = _masks(space, self.neurons, str(backend_of(model).device))
        values = self.values
        if self.mode == "mean" and values is None:
            values = mean_activations(model, prompts, positions=self.positions)
        donors = generator(self.seed, 7).permutation(len(prompts)) if self.mode == "resample" else None

        def hooks(layout: Layout) -> Hooks:
            drawn: Mapping[str, Tensor] = {}
            if donors is not None:
                drawn = _activations(model, [prompts[donors[row]] for row in layout.rows], set(chosen), layout)
            where = layout.at(self.positions)
            made: Hooks = []
            for (site, layer), mask in chosen.items():
                new = drawn.get(hook_name(site, layer))
                if values is not None:
                    new = values[site][layer]
                made.append((hook_name(site, layer), self._hook(mask, where, new)))
            return made

        return hooks

    def _hook(self, mask: Tensor, where: Tensor | None, new: Tensor | None) -> Callable[..., Tensor]:
        def put(value: Tensor, hook: object) -> Tensor:
            flat = value.flatten(2)
            at = mask if where is None else mask & where[..., None].to(mask.device)
            if self.mode == "zero":
                return torch.where(at, 0.0, flat).reshape(value.shape)
            changed = flat * (self.factor or 0.0) if new is None else new.to(flat)
            return torch.where(at, changed, flat).reshape(value.shape)

        return put


@contextmanager
def ablate(
    model: Model, neurons: NeuronSet, *, mode: Literal["zero", "scale"] = "zero", factor: float | int | None = None
) -> Iterator[Model]:
    """Set neurons to zero, or scale them, at every position of every forward pass inside the `with` (paper 3.3).

    Zero is the same as zero rows in W_out and W_O, bit for bit. The hooks are removed on leaving, also after an exception.
    Means, other prompts' values and single positions need to know the prompts: see `Intervention` and `evaluate`.

    Raises:
        BadInput: the set does not fit the model.
    """
    intervention = Intervention(neurons=neurons, mode=mode, factor=factor)
    hooks = intervention.prepare(model, ())
    with backend_of(model).hooks(hooks(Layout.whole()) if hooks else []):
        yield model


@torch.no_grad()
def mean_activations(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    positions: Where = "last",
    absolute: bool = False,
    progress: bool = False,
    mapper: Mapper = in_memory,
) -> dict[Site, Float[Tensor, "layer _"]]:
    """Mean activation of every neuron over prompts: a baseline, or what `mode="mean"` puts.

    Args:
        model: the model, untouched.
        prompts: each counts once, whatever its length.
        positions: the last position, or the mean over all of a prompt or from its question on.
        absolute: take the mean of absolute values, as a measure of activity.
        progress: show a progress bar.
        mapper: computes the units of some hundreds of prompts, or knows them.
    """
    space = neuron_space(model)
    sites: list[Site] = [site for site in SITES if space.width(site)]
    dtype = backend_of(model).wide_dtype
    parts = cut_prompts(prompts, PROMPTS_ASKED)
    sums = mapper(
        "means",
        [unit_key("means", positions, absolute, part) for part in parts],
        lambda index: _activation_sums(model, parts[index], sites, positions, absolute=absolute),
        "mean activations" if progress else None,
    )
    total = {site: torch.zeros(space.n_layers, space.width(site), dtype=torch.float64) for site in sites}
    for part in sums:
        for site in sites:
            total[site] += part[site]
    return {site: total[site].div(max(len(prompts), 1)).to(dtype) for site in sites}


def _activation_sums(
    model: Model, prompts: Sequence[Prompt], sites: Sequence[Site], positions: Where, *, absolute: bool
) -> Tensors:
    """Per site [layer, neuron]: the sum over prompts of each one's mean over positions, in float64."""
    space = neuron_space(model)
    layers = range(space.n_layers)
    total = {hook_name(s, layer): torch.zeros(space.width(s), dtype=torch.float64) for s in sites for layer in layers}

    def hooks(layout: Layout) -> Hooks:
        place = layout.first + torch.arange(layout.n_columns, device=layout.lengths.device)
        counted = place < layout.lengths[:, None]
        at = layout.at(positions)
        counted = (counted if at is None else counted & at).double()
        weights = counted / counted.sum(1, keepdim=True)

        def add(value: Tensor, hook: Any) -> None:
            flat = value.flatten(2).double()
            flat = flat.abs() if absolute else flat
            total[hook.name] += einsum(weights.to(flat.device), flat, "row column, row column n -> n").cpu()

        return [(name, add) for name in total]

    for _ in prompt_logits(model, prompts, hooks=hooks, share_prefix=False):
        pass
    return {site: torch.stack([total[hook_name(site, layer)] for layer in layers]) for site in sites}


def _masks(space: NeuronSpace, neurons: NeuronSet, device: str) -> dict[tuple[Site, int], Tensor]:
    """Site and layer -> True where a neuron of the set sits, for layers that hold any."""
    masks = {site: space.mask(neurons, site).to(device) for site in SITES}
    return {
        (site, layer): masks[site][layer]
        for site in SITES
        for layer in range(space.n_layers)
        if masks[site][layer].any()
    }


def _activations(
    model: Model, donors: Sequence[Prompt], places: set[tuple[Site, int]], layout: Layout
) -> dict[str, Tensor]:
    """Activations of other prompts, aligned with the rows of a batch at their ends; before its beginning, a donor's first."""
    kept: dict[str, Tensor] = {}
    ids = [donor.token_ids for donor in donors]
    backend = backend_of(model)
    tokens = pad_right(ids).to(backend.device)

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value.flatten(2)

    # the hooks of the batch itself are not in place yet
    with backend.hooks([(hook_name(*place), keep) for place in places]):
        backend.last_logits(tokens)
    own = torch.tensor([len(one) for one in ids], device=layout.lengths.device)
    column = layout.first + torch.arange(layout.n_columns, device=layout.lengths.device)
    source = (column + (own - layout.lengths)[:, None]).clamp(min=0).minimum(own[:, None] - 1)
    rows = torch.arange(len(ids), device=source.device)[:, None]
    return {name: value[rows.to(value.device), source.to(value.device)] for name, value in kept.items()}
