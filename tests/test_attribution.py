"""Integrated gradients: closed forms, completeness, and captum as an independent reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from tests.conftest import PAPER_MODELS, POST_NORM, PRE_NORM
from tn_lens import Prompt, PromptSet, attribute, build_prompts, mean_activations
from tn_lens.attribution.baseline import post_norm_warning
from tn_lens.attribution.engines.direct import Direct
from tn_lens.attribution.quadrature import quadrature_rule
from tn_lens.attribution.target import TARGETS, probability_difference, right_probability
from tn_lens.core.errors import BadInput
from tn_lens.models import HAS_HOOKED, Model, last_logits
from tn_lens.neurons import NEURON_SITES, SiteName, hook_name
from tn_lens.questions.toy import binary


@pytest.mark.parametrize("method", ["riemann_right", "riemann_middle", "riemann_trapezoid", "gausslegendre", "graded"])
@pytest.mark.parametrize("n_steps", [5, 20])
def test_weights_integrate_a_constant(method: str, n_steps: int) -> None:
    rule = quadrature_rule(method, n_steps)  # pyright: ignore[reportArgumentType]
    degree_of_weights = 5 if method == "graded" else 0
    assert rule.n_steps == n_steps
    assert ((rule.nodes >= 0) & (rule.nodes <= 1)).all()
    if 2 * n_steps > degree_of_weights:
        torch.testing.assert_close(rule.weights.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("method", "degree"), [("riemann_right", 0), ("riemann_middle", 1), ("riemann_trapezoid", 1), ("gausslegendre", 9)]
)
def test_rules_are_exact_to_their_degree_and_no_further(method: str, degree: int) -> None:
    rule = quadrature_rule(method, 5)  # pyright: ignore[reportArgumentType]
    for power in range(degree + 2):
        error = abs(float(rule.weights @ rule.nodes**power) - 1 / (power + 1))
        assert (error < 1e-12) == (power <= degree)


def test_riemann_right_is_the_papers_equation_4() -> None:
    rule = quadrature_rule("riemann_right", 20)
    assert rule.nodes.tolist() == [k / 20 for k in range(1, 21)]
    assert rule.weights.tolist() == [1 / 20] * 20


@pytest.mark.parametrize(
    ("method", "n_steps"),
    [("riemann_right", 0), ("riemann_trapezoid", 1), ("riemann_right", 10_001), ("graded", 10**400)],
)
def test_too_few_and_too_many_steps_are_refused(method: str, n_steps: int) -> None:
    with pytest.raises(ValueError, match=r"needs n_steps from [12] to 10,000"):
        quadrature_rule(method, n_steps)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def prompts(tiny: Callable[..., Model]) -> PromptSet:
    return build_prompts(tiny("Llama-3.1-8B-Instruct"), binary()[:3], order="random")


@pytest.mark.parametrize("name", PRE_NORM)
@pytest.mark.parametrize("engine", ["direct", "shared_prefix"])
def test_completeness_of_pre_norm_models(engine: str, name: str, tiny: Callable[..., Model]) -> None:
    model = tiny(name)
    prompts = build_prompts(model, binary()[:2], order="given")
    found = attribute(model, prompts, method="gausslegendre", n_steps=64, engine=engine)
    assert found.completeness_gap < 1e-5
    assert all(found.change[site].abs().max() > 1e-4 for site in NEURON_SITES)


@pytest.mark.parametrize("name", POST_NORM)
@pytest.mark.parametrize("engine", ["direct", "shared_prefix"])
def test_completeness_of_post_norm_models_needs_another_path(
    engine: str, name: str, tiny: Callable[..., Model]
) -> None:
    model = tiny(name)
    prompts = build_prompts(model, binary()[:2], order="given")
    assert attribute(model, prompts, n_steps=20, engine=engine).completeness_gap > 0.5, "the paper's rule misses it"
    assert attribute(model, prompts, n_steps=40, method="graded", engine=engine).completeness_gap < 0.05
    others = mean_activations(model, build_prompts(model, binary()[10:30], order="given"))
    from_mean = attribute(model, prompts, n_steps=20, method="gausslegendre", baseline=others, engine=engine)
    assert from_mean.completeness_gap < 0.05
    assert "normalizes" in (post_norm_warning(model, "riemann_right", "zero") or "")
    assert post_norm_warning(model, "graded", "zero") is None
    assert post_norm_warning(model, "riemann_right", "mean") is None


def test_pre_norm_models_are_not_warned_about(tiny: Callable[..., Model]) -> None:
    assert post_norm_warning(tiny("Llama-3.1-8B-Instruct"), "riemann_right", "zero") is None


def test_post_norm_scores_are_gradient_times_activation_times_the_harmonic_number(tiny: Callable[..., Model]) -> None:
    """f(alpha z) does not depend on alpha > 0, so the gradient grows as 1 / alpha."""
    model = tiny("OLMo-2-1124-7B-Instruct")
    prompts = build_prompts(model, binary()[:2], order="given")
    one, twenty = (attribute(model, prompts, n_steps=m).difference["mlp"][:, 1] for m in (1, 20))
    harmonic = sum(1 / k for k in range(1, 21))
    torch.testing.assert_close(twenty, harmonic * one, rtol=2e-2, atol=1e-2 * float(twenty.abs().max()))


def hooked_function(model: Model, prompt: Prompt, site: SiteName, layer: int) -> Callable[[Tensor], Tensor]:
    """f_t - f_f as a function of one layer's activation at the last position, written independently of the engine."""
    tokens = torch.tensor([prompt.token_ids])
    right, wrong = list(prompt.label_ids[prompt.right]), list(prompt.label_ids[1 - prompt.right])

    def function(activation: Tensor) -> Tensor:
        def put(value: Tensor, hook: object) -> Tensor:
            rest = value[:, :-1].expand(len(activation), *value[:, :-1].shape[1:])
            return torch.cat([rest, activation.reshape(-1, 1, *value.shape[2:])], 1)

        batch = tokens.expand(len(activation), -1)
        probabilities = model.run_with_hooks(batch, fwd_hooks=[(hook_name(site, layer), put)])[:, -1].softmax(-1)
        return probabilities[:, right].sum(-1) - probabilities[:, wrong].sum(-1)

    return function


@pytest.mark.parametrize("name", PAPER_MODELS)
@pytest.mark.parametrize("captum_method", ["riemann_right", "gausslegendre"])
@pytest.mark.parametrize("engine", ["direct", "shared_prefix"])
def test_scores_equal_captum(engine: str, name: str, captum_method: str, tiny: Callable[..., Model]) -> None:
    model = tiny(name)
    (prompt,) = build_prompts(model, binary()[5:6], order="given")
    found = attribute(model, [prompt], n_steps=7, method=captum_method, engine=engine, internal_batch_size=10)
    own = Direct(model, prompt, NEURON_SITES, "last").own
    for site in NEURON_SITES:
        for layer in range(model.cfg.n_layers):
            judge = IntegratedGradients(hooked_function(model, prompt, site, layer))
            expected = judge.attribute(own[site][0, layer], n_steps=7, method=captum_method)
            ours = found.difference[site][0, layer]
            scale = float(expected.abs().max())
            torch.testing.assert_close(ours, expected[0], atol=1e-5 * scale, rtol=0)


def test_all_layers_in_one_row_would_be_something_else(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    """If all layers are scaled at once, later layers overwrite earlier ones: only the last layer keeps its scores."""
    model, prompt = tiny("Llama-3.1-8B-Instruct"), prompts[0]
    ours = attribute(model, [prompt]).difference["mlp"][0]
    own = Direct(model, prompt, ("mlp",), "last").own["mlp"][0]
    rule = quadrature_rule("riemann_right", 20)
    path = (rule.nodes[:, None, None] * own[:, 0]).requires_grad_()

    def put_all(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, -1] = path[:, int(hook.name.split(".")[1])]  # pyright: ignore[reportAttributeAccessIssue]
        return value

    tokens = torch.tensor([prompt.token_ids]).expand(20, -1)
    names = [(hook_name("mlp", layer), put_all) for layer in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=names):
        total = probability_difference(last_logits(model, tokens), prompt).sum()
    (gradients,) = torch.autograd.grad(total, path)
    together = own[:, 0] * torch.einsum("s,sln->ln", rule.weights, gradients)
    assert (together - ours).abs().max() > 0.3 * ours.abs().max()
    early = (together - ours)[0].abs().max() / ours[0].abs().max()
    assert early > 0.1


def test_rows_do_not_depend_on_the_batch(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    model = tiny("Qwen2.5-3B-Instruct")
    whole = attribute(model, prompts, n_steps=4, engine="direct", internal_batch_size=1000)
    for size in (1, 3, 7):
        cut = attribute(model, prompts, n_steps=4, engine="direct", internal_batch_size=size)
        for site in NEURON_SITES:
            torch.testing.assert_close(cut.difference[site], whole.difference[site], atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(cut.change[site], whole.change[site], atol=1e-12, rtol=1e-9)


def test_right_and_wrong_apart_make_the_difference(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    model = tiny("Llama-3.1-8B-Instruct")
    together = attribute(model, prompts)
    apart = attribute(model, prompts, separate=True)
    assert apart.right is not None
    assert apart.wrong is not None
    for site in NEURON_SITES:
        torch.testing.assert_close(apart.right[site] - apart.wrong[site], together.difference[site])
        torch.testing.assert_close(apart.change[site], together.change[site])
    alone = attribute(model, prompts, target=right_probability)
    torch.testing.assert_close(alone.difference["mlp"], apart.right["mlp"])


@pytest.mark.parametrize("engine", ["shared_prefix", "direct"])
@pytest.mark.parametrize("method", ["riemann_right", "gausslegendre", "adaptive", "gradient_x_activation"])
def test_some_layers_have_the_scores_that_they_have_among_all(
    engine: str, method: str, tiny: Callable[..., Model], prompts: PromptSet
) -> None:
    model = tiny("Llama-3.1-8B-Instruct")
    chosen = {"attn": [1], "mlp": [0, 1]}
    options = {"method": method, "engine": engine, "separate": True}
    every = attribute(model, prompts[:2], **options)
    some = attribute(model, prompts[:2], sites=chosen, **options)
    n_layers = every.space.n_layers
    assert n_layers > 2
    for site, layers in chosen.items():
        others = [layer for layer in range(n_layers) if layer not in layers]
        for name in ("difference", "right", "wrong"):
            expected, got = getattr(every, name)[site], getattr(some, name)[site]
            largest = float(expected.abs().max())
            # Hugging Face's attention is not in float64 throughout
            close = 2e-3 * largest if method == "adaptive" else 1e-12 if HAS_HOOKED else 1e-6 * largest
            torch.testing.assert_close(got[:, layers], expected[:, layers], rtol=1e-9, atol=close)
            assert expected[:, others].abs().max() > 0
            assert got[:, others].abs().max() == 0
        assert some.n_nodes[site][:, others].max() == 0
        assert some.n_nodes[site][:, layers].min() > 0


@pytest.mark.parametrize("layers", [[], [99], [-1], [True]])
def test_layers_that_do_not_exist_are_refused(layers: list, tiny: Callable[..., Model], prompts: PromptSet) -> None:
    with pytest.raises(BadInput, match=r"expected one or more layers of 'mlp' from 0 to \d, got "):
        attribute(tiny("Llama-3.1-8B-Instruct"), prompts[:1], sites={"mlp": layers})


def test_all_positions_are_complete_together(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    model = tiny("Llama-3.1-8B-Instruct")
    everywhere = attribute(model, prompts[:1], positions="all", method="gausslegendre", n_steps=160)
    assert everywhere.completeness_gap < 1e-5
    last = attribute(model, prompts[:1], method="gausslegendre", n_steps=64)
    assert (everywhere.difference["mlp"] - last.difference["mlp"]).abs().max() > 1e-4
    torch.testing.assert_close(  # nothing but the last position of the last MLP reaches the logits
        everywhere.difference["mlp"][0, -1], last.difference["mlp"][0, -1]
    )


def test_a_given_baseline_moves_the_start(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    model = tiny("Llama-3.1-8B-Instruct")
    mean = mean_activations(model, prompts)
    by_name = attribute(model, prompts, baseline="mean")
    by_value = attribute(model, prompts, baseline=mean)
    torch.testing.assert_close(by_name.difference["attn"], by_value.difference["attn"])
    own = Direct(model, prompts[0], NEURON_SITES, "last").own
    at_home = attribute(model, prompts[:1], baseline={site: own[site][0, :, 0] for site in NEURON_SITES})
    for site, scores in at_home.difference.items():  # zero up to the rounding of the activation
        assert scores.abs().max() <= 1e-12 * by_name.difference[site].abs().max()
    with pytest.raises(ValueError, match="shape"):
        attribute(model, prompts, baseline={"mlp": torch.zeros(1, 2), "attn": torch.zeros(1, 2)})


def test_nothing_is_left_behind(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    model = tiny("Llama-3.1-8B-Instruct")
    attribute(model, prompts[:1], n_steps=2)
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


def test_scores_that_are_not_finite_name_their_place(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    with pytest.raises(ValueError, match=r"layer 0, site 'mlp' are not finite in float64"):
        attribute(
            tiny("Llama-3.1-8B-Instruct"), prompts[:1], n_steps=2, target=lambda logits, _: logits[:, 0] * float("nan")
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_at_least(dtype: torch.dtype, tiny: Callable[..., Model], prompts: PromptSet) -> None:
    model = tiny("Llama-3.1-8B-Instruct", dtype)
    scores = attribute(model, prompts[:1], n_steps=3).difference["mlp"]
    exact = attribute(tiny("Llama-3.1-8B-Instruct"), prompts[:1], n_steps=3).difference["mlp"].float()
    assert scores.dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1] > (
        0.999 if dtype == torch.float32 else 0.9
    )


def test_the_other_targets_by_hand(toy: Model) -> None:
    prompt = Prompt(token_ids=(1,), label_ids=((0, 1), (2,)), right=0)
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = logits.softmax(-1)
    right, wrong = p[:, 0] + p[:, 1], p[:, 2]
    torch.testing.assert_close(TARGETS["probability_difference"](logits, prompt), right - wrong)
    torch.testing.assert_close(TARGETS["normalized_difference"](logits, prompt), (right - wrong) / (right + wrong))
    torch.testing.assert_close(TARGETS["log_ratio"](logits, prompt), right.log() - wrong.log())


def test_one_prompt_shows_its_strongest_neurons(toy: Model) -> None:
    prompts = build_prompts(toy, binary()[:3])
    found = attribute(toy, prompts, n_steps=3, separate=True)
    one = found[-1]
    assert list(one.prompts) == [prompts[2]]
    torch.testing.assert_close(one.difference["mlp"][0], found.difference["mlp"][2])
    assert str(one.top()["neuron"][0]) in repr(one)
    assert prompts[2].text in one._repr_html_()
    with pytest.raises(IndexError):
        found[3]


def test_top_names_the_strongest_neurons(tiny: Callable[..., Model], prompts: PromptSet) -> None:
    found = attribute(tiny("Mistral-Nemo-Instruct-2407"), prompts, n_steps=2)
    top = found.top(5, prompt=1)
    best = max(float(scores[1].max()) for scores in found.difference.values())
    assert top["D"].is_monotonic_decreasing
    assert top["D"][0] == pytest.approx(best)
    assert len(found.top(3)) == 3
    assert "neurons" in found.summary()
