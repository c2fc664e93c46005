"""Interventions on the activations of neurons during the forward pass.

There is one class per mode: `Zero` (the paper's ablation), `Scale`, `Mean`, `Resample`. Interventions are independent of the
neurons, so that the same one is applied to the found neurons and to every control.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Where
from tn_lens.core.registry import Registry
from tn_lens.core.seeds import generator
from tn_lens.inference.forward import Layout, pad_right
from tn_lens.inference.means import mean_activations
from tn_lens.models import Hooks, Model, backend_of, neuron_space
from tn_lens.neurons import NeuronSet, SiteName, hook_name, usual_sites
from tn_lens.questions.prompts import Prompt

Place: TypeAlias = tuple[SiteName, int]
"""A site and a layer."""

Replacement: TypeAlias = Callable[[Place, Float[Tensor, "row column neuron"]], Tensor | float]
"""Function of a place and its activations that returns the new values, broadcastable to the activations."""

INTERVENTIONS: Registry[type[Intervention]] = Registry("intervention")
"""All interventions by name."""


@dataclass(frozen=True, kw_only=True)
class Intervention(ABC):
    """Base class of interventions. To add one, subclass it and register the class in `INTERVENTIONS`.

    Raises:
        BadInput: the positions are unknown.
    """

    positions: Where = "all"
    """Positions to act on: all (the paper), the last one, whose logits are read, or all from the start of the question."""

    label: ClassVar[str]
    """Adjective that describes the neurons, for example "zero-ablated"."""
    keeps_prefix: ClassVar[bool] = True
    """Whether prompts that begin with the same tokens still have the same activations at these tokens."""

    def __post_init__(self) -> None:
        if self.positions not in get_args(Where):
            raise BadInput(f"expected positions {', '.join(map(repr, get_args(Where)))}; got {self.positions!r}")

    @property
    def needs_prompts(self) -> bool:
        """Whether the new values depend on the prompts that are asked together."""
        return False

    @property
    def acts_on_any_text(self) -> bool:
        """Whether it can act on texts that are not prompts: at all positions, and without values from prompts."""
        return self.positions == "all" and not self.needs_prompts

    def replace(self, place: Place, activations: Float[Tensor, "row column neuron"]) -> Tensor | float:
        """New values, for interventions that depend only on the activations; others override `prepare`."""
        raise NotImplementedError

    def prepare(
        self, model: Model, prompts: Sequence[Prompt], places: Collection[Place]
    ) -> Callable[[Layout], Replacement]:
        """Prepare the intervention for some prompts.

        Args:
            model: model without interventions.
            prompts: all prompts that are asked together.
            places: sites and layers of the neurons.

        Returns:
            A function from the layout of a batch to the replacement for this batch, which is `replace` by default.
        """
        return lambda layout: self.replace

    @property
    def description(self) -> str:
        """The label and, unless it acts on all of them, the positions."""
        return (
            self.label
            + {"all": "", "last": " at the last position", "question": " from the question on"}[self.positions]
        )


@dataclass(frozen=True, kw_only=True)
class Zero(Intervention):
    """Zero-ablation, as in the paper (3.3)."""

    label = "zero-ablated"

    def replace(self, place: Place, activations: Float[Tensor, "row column neuron"]) -> Tensor | float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Scale(Intervention):
    """Multiply the activations: 0 ablates, 1 changes nothing, 2 amplifies.

    Raises:
        BadInput: the factor is not a finite number.
    """

    factor: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.factor, int | float) or not abs(self.factor) < float("inf"):
            raise BadInput(f"factor must be a finite number; got {self.factor!r}")

    @property
    def label(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"scaled by {self.factor:g}"

    def replace(self, place: Place, activations: Float[Tensor, "row column neuron"]) -> Tensor | float:
        return activations * (self.factor or 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean(Intervention):
    """Mean-ablation: replace activations with their mean."""

    values: Mapping[SiteName, Float[Tensor, "layer _"]] | None = None
    """The means by site. Default: means over the prompts that are asked, at the same positions, without intervention."""

    label = "mean-ablated"

    @property
    def needs_prompts(self) -> bool:
        return self.values is None

    def prepare(
        self, model: Model, prompts: Sequence[Prompt], places: Collection[Place]
    ) -> Callable[[Layout], Replacement]:
        values = self.values
        if values is None:
            sites = usual_sites(tuple({site for site, _ in places}))
            values = mean_activations(model, prompts, positions=self.positions, sites=sites)
        return lambda layout: lambda place, activations: values[place[0]][place[1]].to(activations)


@dataclass(frozen=True, kw_only=True)
class Resample(Intervention):
    """Resample-ablation: replace activations with those of a random permutation of the prompts, drawn with the seed.

    The prompts are aligned at the last position. A prompt can be paired with itself.
    """

    seed: int = 0

    label = "resample-ablated"
    keeps_prefix = False

    @property
    def needs_prompts(self) -> bool:
        return True

    def prepare(
        self, model: Model, prompts: Sequence[Prompt], places: Collection[Place]
    ) -> Callable[[Layout], Replacement]:
        donors = generator(self.seed, 7).permutation(len(prompts)).tolist()

        def for_batch(layout: Layout) -> Replacement:
            drawn = _activations(model, [prompts[donors[row]] for row in layout.rows], places, layout)
            return lambda place, activations: drawn[hook_name(*place)].to(activations)

        return for_batch


for _name, _class in {"zero": Zero, "scale": Scale, "mean": Mean, "resample": Resample}.items():
    INTERVENTIONS.register(_name, _class)


def intervention_called(name: str, seed: int = 0) -> Intervention:
    """Create a registered intervention without arguments, except for the seed if it has one.

    Raises:
        BadInput: the name is unknown, or the intervention needs an argument.
    """
    kind = INTERVENTIONS[name]
    try:
        arguments: Any = {"seed": seed} if "seed" in {field.name for field in fields(kind)} else {}
        return kind(**arguments)
    except TypeError as error:
        raise BadInput(
            f"the intervention {name!r} needs an argument ({error}); pass one to tn.evaluate, such as "
            f"{kind.__name__}(...), or run `tn-lens evaluate` with --mode {name}"
        ) from error


def check_acts_on_any_text(intervention: Intervention, purpose: str) -> None:
    """Check that an intervention can act on texts that are not prompts.

    Raises:
        BadInput: it takes values from prompts, or acts at some positions only. `purpose` names what needs it.
    """
    if not intervention.acts_on_any_text:
        raise BadInput(
            f"{purpose} needs an intervention at all positions that takes no values from prompts: zero, scale, or mean with "
            f"values; got {intervention.description!r}"
        )


def intervention_hooks(
    model: Model, sets: Sequence[NeuronSet], intervention: Intervention, prompts: Sequence[Prompt]
) -> Callable[[Layout], Hooks] | None:
    """The hooks of an intervention, as a function of the layout of a batch; None if there are no neurons.

    Args:
        model: model to intervene on.
        sets: sets of neurons; each row of a batch acts on one of them.
        intervention: the intervention.
        prompts: all prompts that are asked together.

    Raises:
        BadInput: the neurons do not exist in the model.
    """
    masks = _masks(model, sets)
    if not masks:
        return None
    prepared = intervention.prepare(model, prompts, masks.keys())

    # called once per batch
    def hooks(layout: Layout) -> Hooks:
        where = layout.at(intervention.positions)
        chosen = torch.zeros(1, dtype=torch.long) if layout.sets is None else layout.sets
        by_row = {place: mask[chosen.to(mask.device)] for place, mask in masks.items()}
        return _hooks(by_row, prepared(layout), lambda flat: where)

    return hooks


def _hooks(
    masks: Mapping[Place, Bool[Tensor, "row neuron"]],
    replacement: Replacement,
    where: Callable[[Tensor], Bool[Tensor, "*row column"] | None],
) -> Hooks:
    """Hooks that replace the activations of the neurons; `where` gives the columns, None for all of them.

    A single row of a mask holds for all rows.
    """

    def acting(place: Place, mask: Tensor) -> Callable[..., Tensor]:
        def put(value: Tensor, hook: object) -> Tensor:
            flat = value.flatten(2)  # [row, column, neuron]: heads side by side
            columns = where(flat)
            at = mask[:, None]
            at = at if columns is None else at & columns[..., None].to(mask.device)
            return torch.where(at, replacement(place, flat), flat).reshape(value.shape)

        return put

    return [(hook_name(*place), acting(place, mask)) for place, mask in masks.items()]


@contextmanager
def intervene(
    model: Model, neurons: NeuronSet, intervention: Intervention | None = None, *, prompts: Sequence[Prompt] = ()
) -> Iterator[Model]:
    """Apply an intervention to neurons in every forward pass inside a `with` block.

    The hooks are removed on exit, also after an exception.

    Args:
        model: model to intervene on.
        neurons: neurons to intervene on.
        intervention: intervention to apply; `Zero()` by default.
        prompts: source of the values of `Mean()` and `Resample()`. Row i of a forward pass gets the i-th drawn prompt.

    Raises:
        BadInput: the neurons do not exist in the model, the intervention needs prompts and there are none, or its
            positions are "question", which are not defined for the tokens of a forward pass.
    """
    intervention = intervention or Zero()
    if intervention.positions == "question":
        raise BadInput("intervene does not support positions='question'; use positions='all' or positions='last'")
    if intervention.needs_prompts and not prompts:
        raise BadInput(f"{type(intervention).__name__} takes its values from prompts, and got none; pass prompts=...")
    masks, backend = _masks(model, [neurons]), backend_of(model)
    replacement = intervention.prepare(model, prompts, masks.keys())(Layout.aligned(prompts, backend.device))

    def last(flat: Float[Tensor, "row column neuron"]) -> Bool[Tensor, " column"] | None:
        return torch.arange(1 - flat.shape[1], 1) == 0 if intervention.positions == "last" else None

    with backend.hooks(_hooks(masks, lambda place, flat: _fitted(replacement(place, flat), flat), last)):
        yield model


@contextmanager
def ablate(model: Model, neurons: NeuronSet) -> Iterator[Model]:
    """Zero-ablate neurons at every position of every forward pass inside a `with` block (paper 3.3).

    This is bitwise equal to setting the neurons' rows of W_out and W_O to zero. For other interventions see `intervene`.

    Raises:
        BadInput: the neurons do not exist in the model.
    """
    with intervene(model, neurons, Zero()):
        yield model


def _fitted(new: Tensor | float, flat: Float[Tensor, "row column neuron"]) -> Tensor | float:
    """Align values of prompts with the rows of a forward pass at the last position; return other values unchanged."""
    if not isinstance(new, Tensor) or new.ndim < 3 or new.shape == flat.shape:
        return new
    n_rows, n_columns = flat.shape[:2]
    # if there are more rows than prompts, the prompts are repeated
    rows = torch.arange(n_rows, device=new.device) % len(new)
    columns = (torch.arange(n_columns, device=new.device) + new.shape[1] - n_columns).clamp(min=0)
    return new[rows[:, None], columns]


def _masks(model: Model, sets: Sequence[NeuronSet]) -> dict[Place, Bool[Tensor, "set neuron"]]:
    """Boolean masks that are True at the neurons of each set, by place, for places where any set has neurons."""
    space, device = neuron_space(model), backend_of(model).device
    for neurons in sets:
        space.check(neurons)
    sites = usual_sites(tuple({site for neurons in sets for site in neurons.sites}))
    # [set, layer, neuron]
    masks = {site: torch.stack([space.mask(neurons, site) for neurons in sets]).to(device) for site in sites}
    layers = range(space.n_layers)
    return {(site, layer): mask[:, layer] for site, mask in masks.items() for layer in layers if mask[:, layer].any()}


def _activations(
    model: Model, donors: Sequence[Prompt], places: Collection[Place], layout: Layout
) -> dict[str, Float[Tensor, "row column neuron"]]:
    """Activations of the donors, aligned with the rows of a batch at the last token.

    Columns before the start of a donor get the activations of its first token.
    """
    kept: dict[str, Tensor] = {}
    ids = [donor.token_ids for donor in donors]
    backend = backend_of(model)
    tokens = pad_right(ids).to(backend.device)

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value.flatten(2)

    # the hooks of the batch itself are not registered yet
    with torch.no_grad(), backend.hooks([(hook_name(*place), keep) for place in places]):
        backend.last_logits(tokens)
    n_tokens = torch.tensor([len(row) for row in ids], device=layout.lengths.device)
    # column of the batch -> position in the donor, counted from the end; [row, column]
    column = torch.arange(layout.is_token.shape[1], device=layout.lengths.device)
    source = (column + (n_tokens - layout.lengths)[:, None]).clamp(min=0).minimum(n_tokens[:, None] - 1)
    rows = torch.arange(len(ids), device=source.device)[:, None]
    return {name: value[rows.to(value.device), source.to(value.device)] for name, value in kept.items()}
