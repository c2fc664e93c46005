"""The shared-prefix engine gives the same scores as the direct one for all kinds of models and prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import PAPER_MODELS, needs_hooked
from tn_lens import Attribution, Prompt, PromptSet, Settings, attribute, mean_activations
from tn_lens.attribution.attribute import choose_pass_size
from tn_lens.attribution.engines import shared_prefix
from tn_lens.attribution.result import PassSize
from tn_lens.models import Model, backend_of, build_model
from tn_lens.pipeline.settings import resolve_settings

pytestmark = needs_hooked  # the tests build models from a configuration and compute in float64

BASE: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 32,
    "n_ctx": 400,
    "n_heads": 4,
    "d_head": 8,
    "d_mlp": 40,
    "d_vocab": 283,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
    "device": "cpu",
    "dtype": torch.float64,
    "initializer_range": 0.2,
}
STYLES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "neox": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "parallel_attn_mlp": True,
        "rotary_adjacent_pairs": False,
    },
    "gptj": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "parallel_attn_mlp": True,
        "rotary_adjacent_pairs": True,
    },
    "neo": {
        "use_local_attn": True,
        "window_size": 6,
        "attn_types": ["global", "local", "local"],
        "use_attn_scale": False,
    },
    "gemma2": {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "gated_mlp": True,
        "n_key_value_heads": 2,
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 3.0,
        "use_local_attn": True,
        "window_size": 4,
        "attn_types": ["local", "global", "local"],
    },
    "qwen3": {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "gated_mlp": True,
        "n_key_value_heads": 2,
        "use_qk_norm": True,
    },
    "attention only": {"attn_only": True, "d_mlp": None},
}


def prompts_of(lengths: list[int], seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            token_ids=tuple(torch.randint(0, 283, (n,), generator=generator).tolist()),
            label_ids=((4, 8), (5, 9)),
            right=index % 2,
            question=str(index),
        )
        for index, n in enumerate(lengths)
    ]


def fresh(style: str) -> Model:
    """A new model, for tests that change it."""
    return build_model(BASE | STYLES[style], seed=1)


styled = cache(fresh)
"""A cached model, for tests that do not change it."""


@cache
def plain_scores(style: str) -> Attribution:
    """The scores of a model without hooks."""
    return attribute(styled(style), prompts_of([9, 14]), n_steps=3)


def assert_equal(fast: Attribution, slow: Attribution, tolerance: float) -> None:
    for site in slow.difference:
        largest = float(slow.difference[site].abs().max())
        assert largest > 0
        torch.testing.assert_close(fast.difference[site], slow.difference[site], atol=tolerance * largest, rtol=0)
        torch.testing.assert_close(
            fast.change[site], slow.change[site], atol=tolerance * float(slow.change[site].abs().max()), rtol=0
        )


def both(model: Model, prompts: list[Prompt], **options: Any) -> tuple[Attribution, Attribution]:
    return (
        attribute(model, prompts, engine="shared_prefix", **options),
        attribute(model, prompts, engine="direct", **options),
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("method", ["riemann_right", "gausslegendre", "graded"])
def test_equal_to_the_direct_engine_in_every_style(style: str, method: str) -> None:
    fast, slow = both(styled(style), prompts_of([5, 17, 9, 30]), n_steps=3, method=method, separate=True)
    assert_equal(fast, slow, 1e-10)


@pytest.mark.parametrize("name", PAPER_MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_equal_to_the_direct_engine_in_the_papers_models(
    name: str, dtype: torch.dtype, tolerance: float, tiny: Callable[..., Model]
) -> None:
    fast, slow = both(tiny(name, dtype), prompts_of([12, 40, 23]), n_steps=4)
    assert_equal(fast, slow, tolerance)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=4), st.sampled_from(sorted(STYLES)), st.integers(0, 99))
def test_equal_for_any_lengths(lengths: list[int], style: str, seed: int) -> None:
    fast, slow = both(styled(style), prompts_of(lengths, seed), n_steps=2)
    assert_equal(fast, slow, 1e-9)


@pytest.mark.parametrize("style", ["gpt2", "neo"])
def test_long_prompts(style: str) -> None:
    fast, slow = both(styled(style), prompts_of([300]), n_steps=2)
    assert_equal(fast, slow, 1e-9)


@pytest.mark.parametrize("target", ["probability_difference", "normalized_difference", "log_ratio"])
@pytest.mark.parametrize("style", ["gpt2", "gemma2", "neox"])
def test_equal_for_every_target(target: str, style: str) -> None:
    fast, slow = both(styled(style), prompts_of([11, 6]), n_steps=3, target=target)
    assert_equal(fast, slow, 1e-10)


RESIDUAL = ("hook_mlp_out", "hook_attn_out", "hook_resid_pre", "hook_resid_post")


@pytest.mark.parametrize("style", ["gpt2", "gemma2", "neox"])
def test_directions_of_the_residual_stream(style: str) -> None:
    fast, slow = both(styled(style), prompts_of([11, 6]), n_steps=3, sites=RESIDUAL)
    assert set(fast.difference) == set(RESIDUAL)
    assert fast.difference["hook_resid_post"].shape == (2, 3, 32)
    assert_equal(fast, slow, 1e-10)
    torch.testing.assert_close(fast.difference["hook_resid_post"][:, 0], fast.difference["hook_resid_pre"][:, 1])


def test_out_of_memory_halves_the_rows_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = styled("gpt2"), prompts_of([12, 9])
    whole = attribute(model, prompts, n_steps=4)
    real = shared_prefix.SharedPrefix.run

    def small(self: shared_prefix.SharedPrefix, paths: Any, nudges: Any) -> Tensor:
        if sum(path.shape[1] for path in paths.values()) > 7:
            raise torch.OutOfMemoryError("on purpose")
        return real(self, paths, nudges)

    monkeypatch.setattr(shared_prefix.SharedPrefix, "run", small)
    with pytest.warns(UserWarning, match="out of memory"):
        cut = attribute(model, prompts, n_steps=4)
    assert whole.pass_size == whole.planned == (16, 30)
    assert cut.pass_size == (1, 7)
    assert cut.planned == (16, 30)
    assert_equal(cut, whole, 1e-10)

    def nothing_fits(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(shared_prefix.SharedPrefix, "run", nothing_fits)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(ValueError, match="not even one row"):
        attribute(model, prompts, n_steps=2)


def test_out_of_memory_while_the_prompts_are_run_takes_fewer_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = styled("gemma2"), prompts_of([12, 9, 20, 7, 15])
    whole = attribute(model, prompts, n_steps=3)
    real = shared_prefix.SharedPrefix.__init__

    def small(self: shared_prefix.SharedPrefix, model: Model, prompts: list[Prompt], *places: Any) -> None:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("on purpose")
        real(self, model, prompts, *places)

    monkeypatch.setattr(shared_prefix.SharedPrefix, "__init__", small)
    with pytest.warns(UserWarning, match=r"smaller passes \(prompts: 2, rows: 24\)"):
        cut = attribute(model, prompts, n_steps=3)
    assert cut.pass_size == (2, 24)
    assert_equal(cut, whole, 1e-10)


def test_other_baselines_and_targets(tiny: Callable[..., Model]) -> None:
    model, prompts = tiny("Qwen2.5-3B-Instruct"), prompts_of([9, 14])
    mean = mean_activations(model, prompts_of([11, 12, 13], seed=5))
    fast, slow = both(model, prompts, n_steps=3, baseline=mean, target=lambda logits, _: logits[:, 7].log_softmax(-1))
    assert_equal(fast, slow, 1e-10)


@pytest.mark.parametrize("budget", [1, 2_000_000, 50_000_000])
def test_the_budget_changes_chunks_and_not_scores(budget: int) -> None:
    model, prompts = styled("gemma2"), prompts_of([8, 20, 15])
    wide = attribute(model, prompts, n_steps=3)
    narrow = attribute(model, prompts, n_steps=3, max_memory=budget)
    assert_equal(narrow, wide, 1e-10)


def test_plans_grow_with_the_budget_and_nothing_else() -> None:
    model = styled("gpt2")
    plans = [shared_prefix.plan(model, 100, 6, 20, budget) for budget in (1, 10**6, 10**7, 10**8, 10**10)]
    assert plans[0] == (1, 1)
    assert plans == sorted(plans)
    assert plans[-1] == (16, 126)


@pytest.mark.parametrize(("total", "expected"), [(140 * 2**30 + 17, 35 * 2**30), (16 * 2**30, 8 * 2**30)])
def test_the_budget_of_a_gpu_does_not_depend_on_what_is_free(
    total: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise passes, and with them the last digits of scores, would differ between runs on the same GPU."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the state of the device was read")

    for name in ("mem_get_info", "memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    model, prompts, budgets = styled("gpt2"), PromptSet.of(prompts_of([9, 14])), []

    def record(*arguments: Any, **_: Any) -> PassSize:
        budgets.append(arguments[4])
        return PassSize(1, 1)

    monkeypatch.setattr(type(backend_of(model)), "device", torch.device("cuda"))
    monkeypatch.setattr("tn_lens.attribution.attribute.plan", record)
    options: dict[str, Any] = {"n_places": 6, "n_steps": 20, "max_memory": None, "internal_batch_size": None}
    choose_pass_size(model, prompts, "shared_prefix", **options)
    # the settings of a run are written to its manifest
    assert budgets == [resolve_settings(model, Settings()).max_memory] == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_plans_reckon_with_all_that_backward_keeps(style: str, dtype: torch.dtype) -> None:
    model = build_model(BASE | STYLES[style] | {"dtype": dtype})
    backend, (prompt,) = backend_of(model), prompts_of([30])
    run = shared_prefix.SharedPrefix(model, [prompt], ["attn"])

    def kept(n_rows: int) -> int:
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return value

        path = torch.zeros(1, n_rows, 1, 32, dtype=backend.wide_dtype, requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            final = run.run({("attn", 0): path}, {})
        assert final.requires_grad
        return sum(sizes.values())

    of_row = (kept(24) - kept(8)) / 16
    assert of_row < backend.bytes_per_row(30, 24) < 5 * of_row


@pytest.mark.parametrize(
    ("kind", "style", "lengths"),
    [
        ("blind to the prefix's first token", "gpt2", [20, 20]),
        ("padding is seen", "gpt2", [20, 8]),
        ("no window", "neo", [20]),
    ],
)
def test_a_broken_mask_is_seen(kind: str, style: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from tn_lens.models import hooked

    model, prompts = styled(style), prompts_of(lengths)
    fast, slow = both(model, prompts, n_steps=3)
    assert_equal(fast, slow, 1e-10)
    real = hooked.visible_prefix

    def broken(seen: Tensor, window: int | None = None) -> Tensor:
        near = real(seen, None if kind == "no window" else window).clone()
        if kind == "padding is seen":
            return torch.ones_like(near)
        if kind == "blind to the prefix's first token":
            near[:, 0] = False
        return near

    monkeypatch.setattr(hooked, "visible_prefix", broken)
    with pytest.raises(AssertionError):
        assert_equal(attribute(model, prompts, n_steps=3), slow, 1e-3)


@pytest.mark.parametrize("style", ["gptj", "gemma2"])
def test_rows_at_another_position_are_seen(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tn_lens.models.hooked_attention import SharedAttention

    model, prompts = styled(style), prompts_of([9, 14])
    slow = attribute(model, prompts, n_steps=3, engine="direct")
    real = SharedAttention.set_positions
    monkeypatch.setattr(SharedAttention, "set_positions", lambda self, position: real(self, position - 1))
    with pytest.raises(AssertionError):
        assert_equal(attribute(model, prompts, n_steps=3), slow, 1e-3)


@pytest.mark.parametrize("style", STYLES)
def test_norms_are_not_repeated(style: str) -> None:
    model, counted = fresh(style), 0

    def count(_: Tensor, hook: Any) -> None:
        nonlocal counted
        counted += 1

    model.add_hook("blocks.0.ln1.hook_normalized", count)
    attribute(model, prompts_of([9]), n_steps=2)
    assert counted == 2  # once for the prompt and once for the pass, instead of three times each


def biased(style: str) -> Model:
    """A model with nonzero biases, like trained models."""
    model = fresh(style)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.split(".")[-1].lstrip("_")[0] == "b":
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("style", STYLES)
def test_biases_count(style: str) -> None:
    fast, slow = both(biased(style), prompts_of([9, 14]), n_steps=3)
    assert_equal(fast, slow, 1e-10)


@pytest.mark.parametrize("style", ["gpt2", "gemma2"])
def test_a_forgotten_bias_or_norm_above_w_out_is_seen(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tn_lens.models.hooked import HookedSiblings

    model, prompts = biased(style), prompts_of([9])
    slow = attribute(model, prompts, n_steps=3, engine="direct")
    monkeypatch.setattr(
        HookedSiblings, "_stream_above", lambda self, layer, output: self.stream_without_mlp[layer] + output
    )
    with pytest.raises(AssertionError):
        assert_equal(attribute(model, prompts, n_steps=3), slow, 1e-6)


def steered(value: Tensor, hook: Any) -> Tensor:
    return value.clamp(max=0.2) + 0.1


def halved(value: Tensor, hook: Any) -> Tensor:
    """A hook that keeps masked entries (zero or minus infinity) masked."""
    return 0.5 * value


ATTENTION = ("hook_q", "hook_k", "hook_v", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_z")


@pytest.mark.parametrize(
    ("style", "point", "hook"),
    [
        *(
            (style, point, steered)
            for style in ("gpt2", "gemma2", "neox")
            for point in ("hook_resid_pre", "hook_mlp_out", "hook_resid_post", "mlp.hook_post")
        ),
        *(
            (style, f"attn.{point}", halved)
            for style in ("gpt2", "gemma2", "neox")
            for point in ATTENTION
            if (style, point) != ("gpt2", "hook_rot_k")  # GPT-2 has no rotary positions
        ),
    ],
)
def test_hooks_that_stay_on_the_model_count(style: str, point: str, hook: Callable[..., Tensor]) -> None:
    model, prompts = fresh(style), prompts_of([9, 14])
    model.add_hook(f"blocks.1.{point}", hook)
    fast, slow = both(model, prompts, n_steps=3)
    assert_equal(fast, slow, 1e-10)
    with pytest.raises(AssertionError):
        assert_equal(fast, plain_scores(style), 1e-6)


@pytest.mark.parametrize("style", ["gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize(
    "option", ["use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "ungroup_grouped_query_attention"]
)
def test_models_with_more_hook_points(style: str, option: str) -> None:
    model = fresh(style)
    getattr(model, f"set_{option}")(True)
    assert getattr(model.cfg, option)
    fast, slow = both(model, prompts_of([9, 14]), n_steps=3)
    assert_equal(fast, slow, 1e-10)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"positional_embedding_type": "alibi"}, "alibi positions"),
        ({"positional_embedding_type": "shortformer"}, "shortformer positions"),
        ({"use_logn_attn": True, "positional_embedding_type": "rotary", "rotary_dim": 8}, "log-n"),
    ],
)
def test_models_that_cannot_take_it_say_why_and_run_directly(option: dict[str, Any], said: str) -> None:
    model, prompts = build_model(BASE | option), prompts_of([7])
    with pytest.raises(ValueError, match=said):
        attribute(model, prompts, n_steps=2, engine="shared_prefix")
    assert_equal(attribute(model, prompts, n_steps=2), attribute(model, prompts, n_steps=2, engine="direct"), 0)


def test_all_positions_go_through_the_direct_engine() -> None:
    with pytest.raises(ValueError, match="positions='all'"):
        attribute(styled("gpt2"), prompts_of([7]), n_steps=2, engine="shared_prefix", positions="all")


def test_nothing_is_left_replaced() -> None:
    model = styled("neo")
    tokens = torch.tensor([prompts_of([15])[0].token_ids])
    before = model(tokens)
    methods = {"forward", "apply_causal_mask", "apply_rotary", "calculate_attention_scores", "calculate_z_scores"}

    def left() -> set[str]:
        return methods & {name for block in model.blocks for part in (block.attn, block.ln1) for name in vars(part)}

    attribute(model, prompts_of([15]), n_steps=2, engine="shared_prefix")
    assert not left()
    assert torch.equal(model(tokens), before)

    def stumble(value: Tensor, hook: Any) -> None:
        if torch.is_grad_enabled():  # in the rows, not in the prompt
            assert left() == methods
            raise RuntimeError("in the middle")

    with model.hooks([("blocks.1.attn.hook_z", stumble)]), pytest.raises(RuntimeError, match="in the middle"):
        attribute(model, prompts_of([15]), n_steps=2)
    assert not left()

    def explode(logits: Tensor, prompt: Prompt) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        attribute(model, prompts_of([15]), n_steps=2, target=explode)
    assert not left()
    assert torch.equal(model(tokens), before)
