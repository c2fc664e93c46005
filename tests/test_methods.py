"""Methods with a single gradient, and the actual effect of ablating single neurons, next to plain hooks and autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tn_lens as tn
from tests.conftest import QUICK, needs_hooked
from tn_lens.inference.counterparts import counterpart_activations, counterparts
from tn_lens.models import Model, backend_of
from tn_lens.neurons import NEURON_SITES, hook_name
from tn_lens.questions.toy import binary, four_choice

MODELS = ("Llama-3.1-8B-Instruct", "OLMo-2-1124-7B-Instruct")
ENGINES = ("direct", "shared_prefix")


def prompts_of(model: Model, n: int = 3, order: Any = "both") -> tn.PromptSet:
    return tn.build_prompts(model, binary()[:n], order=order)


def run(
    model: Model, prompt: tn.Prompt, at: tuple[str, int], change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The activations of a place at the last position after a change, and f_t - f_f, with a plain hook."""
    kept: list[Tensor] = []

    def put(value: Tensor, hook: object) -> Tensor:
        kept.append(change(value[0, -1].flatten().detach()))
        value = value.clone()
        value[0, -1] = kept[0].reshape(value[0, -1].shape)
        return value

    with backend_of(model).hooks([(hook_name(*at), put)]):
        probabilities = backend_of(model).last_logits(torch.tensor([prompt.token_ids]))[0].softmax(-1)
    wrong = [i for shown, ids in enumerate(prompt.label_ids) if shown != prompt.right for i in ids]
    return kept[0], probabilities[list(prompt.label_ids[prompt.right])].sum() - probabilities[wrong].sum()


def gradient(model: Model, prompt: tn.Prompt, at: tuple[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The activations of a place, the gradient of f_t - f_f with respect to them, and f_t - f_f."""
    activation, value = run(model, prompt, at, lambda activation: activation.requires_grad_())
    return activation.detach(), torch.autograd.grad(value, activation)[0], value.detach()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_x_activation_is_the_gradient_times_the_distance(
    name: str, engine: Any, tiny: Callable[..., Model]
) -> None:
    model = tiny(name)
    prompts = prompts_of(model, 2, "given")
    baseline = tn.mean_activations(model, prompts_of(model, 6))
    scores = tn.attribute(model, prompts, method="gradient_x_activation", baseline=baseline, n_steps=7, engine=engine)
    for row, prompt in enumerate(prompts):
        for site in NEURON_SITES:
            for layer in range(scores.space.n_layers):
                activation, slope, value = gradient(model, prompt, (site, layer))
                start = baseline[site][layer]
                torch.testing.assert_close(scores.difference[site][row, layer], slope * (activation - start))
                at_start = run(model, prompt, (site, layer), lambda _, start=start: start)[1].detach()
                torch.testing.assert_close(scores.change[site][row, layer], value - at_start)
    assert scores.completeness_gap > 0.01, "a gradient at one point does not integrate the path"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_attribution_patching_compares_the_orders_of_a_question(
    name: str, engine: Any, tiny: Callable[..., Model]
) -> None:
    model = tiny(name)
    prompts = prompts_of(model)
    options: dict[str, Any] = {"method": "attribution_patching", "engine": engine, "internal_batch_size": 5}
    scores = tn.attribute(model, prompts, **options)
    for row, prompt in enumerate(prompts):
        other = prompts[row ^ 1]  # the two orders are next to each other
        assert other.question == prompt.question
        assert other.right != prompt.right
        for site in NEURON_SITES:
            for layer in range(scores.space.n_layers):
                activation, slope, value = gradient(model, prompt, (site, layer))
                elsewhere, _ = run(model, other, (site, layer), lambda activation: activation)
                torch.testing.assert_close(scores.difference[site][row, layer], slope * (activation - elsewhere))
                patched = run(model, prompt, (site, layer), lambda _, new=elsewhere: new)[1].detach()
                torch.testing.assert_close(scores.change[site][row, layer], value - patched)


@pytest.mark.parametrize("engine", ENGINES)
def test_passes_of_several_prompts_take_their_own_baselines(engine: Any, tiny: Callable[..., Model]) -> None:
    model = tiny(MODELS[0])
    prompts = prompts_of(model)
    baseline = counterpart_activations(model, prompts)
    together = tn.attribute(model, prompts, n_steps=3, baseline=baseline, engine=engine)
    for row in range(len(prompts)):
        own = {site: values[row] for site, values in baseline.items()}
        alone = tn.attribute(model, prompts[row], n_steps=3, baseline=own, engine=engine)
        for site in NEURON_SITES:
            torch.testing.assert_close(together.difference[site][row], alone.difference[site][0])
            torch.testing.assert_close(together.change[site][row], alone.change[site][0])


def test_the_counterpart_has_another_right_label(toy: Any) -> None:
    lettered = tn.build_prompts(toy, four_choice()[:2], order="both")
    assert counterparts(lettered) == [1, 2, 3, 0, 5, 6, 7, 4]
    assert all(
        lettered[other].right != prompt.right for prompt, other in zip(lettered, counterparts(lettered), strict=True)
    )
    assert counterparts(prompts_of(toy, 2)) == [1, 0, 3, 2]


def test_the_counterpart_of_a_statement_of_smollm2_is_the_other_statement(smollm2: Model) -> None:
    questions = tuple(
        tn.Question(text=f"What is the capital of {country}?", choices=choices)
        for country, choices in (("France", ("Paris", "Rome")), ("Italy", ("Rome", "Paris")))
    )
    statements = tn.build_prompts(
        smollm2, tn.QuestionSet(name="capitals", questions=questions).with_format("statement"), order="both"
    )
    assert statements.are_statements
    assert counterparts(statements) == [1, 0, 3, 2]


def test_a_run_uses_the_orders_of_the_toy(toy: Any, few: tn.QuestionSet, few_resamples: None, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, method="attribution_patching")
    found = tn.find_truth_neurons(toy, few, settings, out=tmp_path / "run", progress=False)
    assert found.settings.method == "attribution_patching"
    assert "attribution_patching" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@needs_hooked  # compared in float64, in which the bridge does not compute norms
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("baseline", ["zero", "mean", "counterparts"])
def test_effects_equal_a_loop_that_replaces_one_neuron_at_a_time(
    name: str, baseline: Any, engine: Any, tiny: Callable[..., Model]
) -> None:
    model = tiny(name)
    prompts = prompts_of(model, 2)
    space = tn.neuron_space(model)
    neurons = [  # not in the order of the layers
        tn.Neuron("mlp", 2, None, 3),
        tn.Neuron("attn", 0, 1, 2),
        tn.Neuron("mlp", 0, None, 40),
        tn.Neuron("mlp", 0, None, 7),
        tn.Neuron("attn", 2, 0, 5),
        tn.Neuron("attn", 1, 3, 7),
    ]
    if baseline == "counterparts":
        baseline = counterpart_activations(model, prompts)
    effects = tn.ablation_effects(model, prompts, neurons, baseline=baseline, engine=engine, internal_batch_size=4)
    assert effects.shape == (len(prompts), len(neurons))
    if baseline == "mean":
        baseline = tn.mean_activations(model, prompts)
    for row, prompt in enumerate(prompts):
        for column, neuron in enumerate(neurons):
            place, flat = (neuron.site, neuron.layer), space.flat(neuron)
            new = 0.0
            if not isinstance(baseline, str):
                values = baseline[neuron.site]
                new = float((values[row] if values.ndim == 3 else values)[neuron.layer, flat])

            def replace(activation: Tensor, flat: int = flat, new: float = new) -> Tensor:
                activation = activation.clone()
                activation[flat] = new
                return activation

            unablated, ablated = (run(model, prompt, place, change)[1] for change in (lambda own: own, replace))
            torch.testing.assert_close(effects[row, column], (unablated - ablated).detach(), atol=1e-12, rtol=1e-8)
    assert effects.abs().min() > 1e-9


@needs_hooked  # compared in float64, in which the bridge does not compute norms
def test_effects_do_not_depend_on_the_size_of_a_pass(tiny: Callable[..., Model]) -> None:
    model = tiny(MODELS[0])
    prompts = prompts_of(model)
    neurons = [tn.Neuron("mlp", layer, None, index) for index in range(9) for layer in range(3)]
    whole = tn.ablation_effects(model, prompts, neurons, target="log_ratio")
    for options in ({"max_memory": 1}, {"internal_batch_size": 2}, {"engine": "direct"}):
        torch.testing.assert_close(tn.ablation_effects(model, prompts, neurons, target="log_ratio", **options), whole)
    torch.testing.assert_close(tn.ablation_effects(model, prompts[1], neurons[:1], target="log_ratio")[0], whole[1, :1])
    assert tn.ablation_effects(model, prompts, []).shape == (len(prompts), 0)


def test_scores_of_one_gradient_estimate_the_effects(toy: Any) -> None:
    """The estimate is good for small effects, and its sign agrees with that of the planted model's strong neurons."""
    prompts = prompts_of(toy, 4)
    scores = tn.attribute(toy, prompts, method="gradient_x_activation", target="log_ratio")
    neurons = [tn.Neuron("mlp", 1, None, index) for index in range(0, 60, 2)]
    effects = tn.ablation_effects(toy, prompts, neurons, target="log_ratio")
    estimates = scores.at(neurons)
    for row in range(len(prompts)):
        assert float(torch.corrcoef(torch.stack([estimates[row], effects[row]]))[0, 1]) > 0.9


def test_bad_input_is_refused_in_one_sentence(toy: Any) -> None:
    given = prompts_of(toy, 2, "given")
    with pytest.raises(tn.BadInput, match=r"needs every question in several orders .* order='both'"):
        tn.attribute(toy, given, method="attribution_patching")
    for options in ({"baseline": "mean"}, {"positions": "all"}):
        with pytest.raises(tn.BadInput, match="leave out baseline and positions"):
            tn.attribute(toy, prompts_of(toy), method="attribution_patching", **options)
    settings = tn.Settings(method="attribution_patching", order="random")
    with pytest.raises(tn.BadInput, match="another order; use order='both'"):
        tn.find_truth_neurons(toy, tn.load_questions("toy"), settings, progress=False)
    with pytest.raises(tn.BadInput, match="does not fit the model: it contains mlp 9:0"):
        tn.ablation_effects(toy, given, [tn.Neuron("mlp", 9, None, 0)])
    with pytest.raises(tn.BadInput, match="needs at least one prompt"):
        tn.ablation_effects(toy, [], [tn.Neuron("mlp", 0, None, 0)])
    wrong = {site: values[:1] for site, values in counterpart_activations(toy, prompts_of(toy)).items()}
    with pytest.raises(tn.BadInput, match="expected a baseline of shape"):
        tn.attribute(toy, given, baseline=wrong)
