"""The actual effect of ablating single neurons, which attribution scores estimate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.attribution.attribute import choose_engine, choose_pass_size, prepare, space_of
from tn_lens.attribution.baseline import Baseline, resolve_baseline, rows_of
from tn_lens.attribution.methods import Engine, Place
from tn_lens.attribution.methods.paths import reached, values_of
from tn_lens.attribution.result import PassSize
from tn_lens.attribution.target import Target, resolve_target
from tn_lens.core.errors import BadInput
from tn_lens.core.options import EngineName, TargetName
from tn_lens.models import Model, backend_of, check_model
from tn_lens.models.isolation import isolated
from tn_lens.neurons import Neuron, NeuronSet, NeuronSpace, SiteName
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.context import track


@isolated
@torch.no_grad()
def ablation_effects(
    model: Model,
    prompts: Sequence[Prompt] | Prompt,
    neurons: Iterable[Neuron],
    *,
    target: Target | TargetName = "probability_difference",
    baseline: Baseline = "zero",
    engine: EngineName = "auto",
    max_memory: int | None = None,
    internal_batch_size: int | PassSize | None = None,
) -> Float[Tensor, "prompt neuron"]:
    """The change of the target when a single neuron is ablated at the last position, for each neuron on its own.

    The effect is target(unablated) - target(ablated), so a neuron that supports the right answer has a positive effect, as it
    has a positive score. It is the definition of which `gradient_x_activation` is the first-order estimate.

    Args:
        model: a model from `load_model`, or a HookedTransformer loaded without weight processing.
        prompts: see `build_prompts` and `build_prompt`.
        neurons: the neurons to ablate, one at a time.
        target: see `attribute`.
        baseline: activations that replace those of the neurons; see `attribute`.
        engine: see `attribute`.
        max_memory: see `attribute`.
        internal_batch_size: see `attribute`; each neuron is one row.

    Returns:
        Effects in the unit of the target, on the CPU, one column for each neuron in the given order.

    Raises:
        BadInput: an argument is out of range, or the model has no such neuron.
    """
    check_model(model)
    prompts, neurons, compute = PromptSet.of(prompts), tuple(neurons), resolve_target(target)
    if not prompts:
        raise BadInput("ablation_effects needs at least one prompt; got none")
    if not neurons:
        return torch.zeros(len(prompts), 0, dtype=backend_of(model).wide_dtype)
    space = space_of(model, tuple(dict.fromkeys(neuron.site for neuron in neurons)))
    space.check(NeuronSet(neurons))
    start = resolve_baseline(model, prompts, baseline, space, "last")
    engine_name = choose_engine(model, engine, "last")
    # planned as if the neurons were the steps of attribution, divided evenly among the sites and layers
    size = choose_pass_size(
        model,
        prompts,
        engine_name,
        n_places=space.n_layers * len(space.sites),
        n_steps=len(neurons) // (space.n_layers * len(space.sites)),
        max_memory=max_memory,
        internal_batch_size=internal_batch_size,
    )
    effects = []
    for first in track(range(0, len(prompts), size.n_prompts), "ablation effects"):
        rows = slice(first, first + size.n_prompts)
        batch = prompts[rows]
        prepared = prepare(engine_name, model, batch, space.sites, "last")
        effects.append(_effects(prepared, space, neurons, compute, rows_of(start, rows), size.n_rows).cpu())
    return torch.cat(effects)


def _effects(
    engine: Engine,
    space: NeuronSpace,
    neurons: Sequence[Neuron],
    target: Target,
    baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]],
    n_rows: int,
) -> Float[Tensor, "prompt neuron"]:
    """The effects on the prompts that an engine has run, in passes of at most `n_rows` neurons."""
    sites = list(engine.own)
    # engines expect rows by layer, and within a layer in the order of their sites
    columns = sorted(range(len(neurons)), key=lambda i: (neurons[i].layer, sites.index(neurons[i].site)))
    parts = []
    for first in range(0, len(columns), n_rows):
        chosen = [neurons[column] for column in columns[first : first + n_rows]]
        paths = {
            place: _ablated(engine, place, [space.flat(neuron) for neuron in group], baseline)
            for place, group in groupby(chosen, key=lambda neuron: (neuron.site, neuron.layer))
        }
        parts.append(values_of(engine, engine.run(paths, {}), target))
    (unablated,) = reached(engine, [target])
    effects = unablated[:, None] - torch.cat(parts, dim=1)
    # back to the order of the neurons
    return effects[:, torch.tensor(columns).argsort().to(effects.device)]


def _ablated(
    engine: Engine, place: Place, flats: list[int], baseline: Mapping[SiteName, Float[Tensor, "*prompt layer _"]]
) -> Float[Tensor, "prompt row position _"]:
    """One row for each neuron of a place: the activations of the prompt with this neuron at the baseline."""
    site, layer = place
    activation = engine.own[site][:, layer, None].repeat(1, len(flats), 1, 1)
    values = baseline[site].to(activation)[..., layer, flats]  # [row], or [prompt, row]
    # the indexed entries have the shape [row, prompt, position]
    activation[:, range(len(flats)), :, flats] = values.reshape(-1, len(flats)).T[..., None]
    return engine.carry(place, activation)
