"""TransformerBridge and HookedTransformer give the same numbers as a plain Hugging Face model with torch hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from scripts.train_toy import build_tokenizer
from tests.conftest import LLAMA3_ROPE, SMALL, needs_hooked, paper_config, random_checkpoint
from tn_lens import (
    Attribution,
    BadInput,
    Neuron,
    NeuronSet,
    Prompt,
    ablate,
    attribute,
    load_model,
    mean_activations,
)
from tn_lens.evaluation.text import text_loss
from tn_lens.inference.answers import ask
from tn_lens.models import (
    HAS_HOOKED,
    Model,
    backend_of,
    bridge_loading,
    check_model,
    choose_backend,
    last_logits,
    neuron_space,
)
from tn_lens.models import bridge as bridge_module
from tn_lens.models.comparison import reference_logits
from tn_lens.neurons import NEURON_SITES, hook_name
from tn_lens.pipeline.provenance import weights_digest

WINDOW = 7
"""Window size of local attention, shorter than the prompts."""
HEADS: dict[str, Any] = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def family_config(name: str) -> Any:
    """A tiny configuration in which every option of the family affects the logits."""
    match name:
        case "Llama":
            return paper_config("Llama-3.1-8B-Instruct")
        case "Qwen2":
            return paper_config("Qwen2.5-3B-Instruct")
        case "OLMo-2":
            return paper_config("OLMo-2-1124-7B-Instruct")
        case "Mistral":
            return MistralConfig(**SMALL, **HEADS, intermediate_size=72, sliding_window=WINDOW)
        case "GPT-2":
            return GPT2Config(
                vocab_size=283, n_positions=128, n_embd=32, n_layer=3, n_head=4, activation_function="gelu_new"
            )
        case "Gemma-2":
            return Gemma2Config(
                **SMALL,
                **HEADS,
                intermediate_size=72,
                sliding_window=WINDOW,
                query_pre_attn_scalar=16,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=3.0,
            )
        case "Qwen3":
            return Qwen3Config(**SMALL, **HEADS, intermediate_size=72, tie_word_embeddings=False)
        case _:
            raise ValueError(name)


FAMILIES = ("Llama", "Qwen2", "Mistral", "OLMo-2", "GPT-2", "Gemma-2", "Qwen3")
CHECKPOINTS: dict[str, PreTrainedModel] = {}


def checkpoint_of(family: str) -> PreTrainedModel:
    """The family's random Hugging Face model, in float32 and with eager attention, as the oracle runs it."""
    if family not in CHECKPOINTS:
        model = random_checkpoint(family_config(family))
        model.config.architectures = [type(model).__name__]
        model.set_attn_implementation("eager")
        CHECKPOINTS[family] = model
    return CHECKPOINTS[family]


def bridged(family: str, **options: Any) -> Model:
    return load_model(family, hf_model=checkpoint_of(family), backend="bridge", **options)


def hooked(family: str) -> Model:
    """The HookedTransformer, built with `load_model`, or with TransformerLens' converters for other architectures."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gemma_weights,
        convert_gpt2_weights,
        convert_qwen3_weights,
    )

    from tn_lens.models import assemble

    hf_model, config = checkpoint_of(family), checkpoint_of(family).config
    if family not in ("GPT-2", "Gemma-2", "Qwen3"):
        return load_model(family, hf_model=hf_model)
    common: dict[str, Any] = {"n_layers": 3, "n_ctx": 128, "d_vocab": 283, "device": "cpu", "model_name": family}
    if family == "GPT-2":
        options = {
            "d_model": 32,
            "n_heads": 4,
            "d_head": 8,
            "d_mlp": 128,
            "act_fn": "gelu_new",
            "normalization_type": "LN",
        }
        lens = HookedTransformerConfig(**common, **options, eps=config.layer_norm_epsilon)
        return assemble(lens, {"unembed.b_U": torch.zeros(283)} | convert_gpt2_weights(hf_model, lens))
    options = {
        "d_model": 40,
        "n_heads": 4,
        "d_head": 16,
        "n_key_value_heads": 2,
        "d_mlp": 72,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 16,
        "rotary_adjacent_pairs": False,
        "rotary_base": config.rope_parameters["rope_theta"],
    }
    if family == "Qwen3":
        lens = HookedTransformerConfig(**common, **options, act_fn="silu", use_qk_norm=True)
        return assemble(lens, convert_qwen3_weights(hf_model, lens))
    lens = HookedTransformerConfig(
        **common,
        **options,
        act_fn="gelu_pytorch_tanh",
        use_attn_scale=True,
        attn_scale=4.0,
        use_normalization_before_and_after=True,
        attn_scores_soft_cap=5.0,
        output_logits_soft_cap=3.0,
        use_local_attn=True,
        window_size=WINDOW,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        original_architecture="Gemma2ForCausalLM",
    )
    return assemble(lens, convert_gemma_weights(hf_model, lens))


def prompts_of(*lengths: int, begin: int = 0) -> list[Prompt]:
    """Random prompts that share their first `begin` tokens."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randint(4, 283, (begin,), generator=generator).tolist()
    return [
        Prompt(
            token_ids=(*common, *torch.randint(4, 283, (n - begin,), generator=generator).tolist()),
            label_ids=((4, 8), (5, 9)),
            right=index % 2,
            question=str(index),
        )
        for index, n in enumerate(lengths)
    ]


# The oracle is independent of tn_lens and TransformerLens.


def output_projection(model: PreTrainedModel, site: str, layer: int) -> torch.nn.Module:
    """The linear layer whose input is the neurons of a site."""
    inner: Any = model
    if hasattr(inner, "transformer"):
        block = inner.transformer.h[layer]
        return block.attn.c_proj if site == "attn" else block.mlp.c_proj
    block = inner.model.layers[layer]
    return block.self_attn.o_proj if site == "attn" else block.mlp.down_proj


@contextmanager
def reading(module: torch.nn.Module, read: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, given: (read(given[0]), *given[1:]))
    try:
        yield
    finally:
        handle.remove()


def oracle(model: PreTrainedModel, prompt: Prompt, site: str, layer: int, n_steps: int) -> Tensor:
    """Scores by equations 3, 4 and 8, computed one step at a time."""
    module, tokens = output_projection(model, site, layer), torch.tensor([prompt.token_ids])
    held: list[Tensor] = []
    with torch.no_grad(), reading(module, lambda value: held.append(value[0, -1].clone()) or value):
        model(tokens)
    own, total = held[0], torch.zeros_like(held[0])
    right, wrong = prompt.label_ids[prompt.right], prompt.label_ids[1 - prompt.right]
    for step in range(1, n_steps + 1):
        leaf = (own * step / n_steps).requires_grad_()

        def put(value: Tensor, leaf: Tensor = leaf) -> Tensor:
            return torch.cat([value[:, :-1], leaf.expand(1, 1, -1)], dim=1)

        with reading(module, put):
            found = model(tokens).logits[0, -1].softmax(-1)
        (gradient,) = torch.autograd.grad(found[list(right)].sum() - found[list(wrong)].sum(), leaf)
        total += gradient / n_steps
    return own * total


KINDS = [pytest.param(hooked, marks=needs_hooked, id="hooked"), pytest.param(bridged, id="bridge")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", KINDS)
def test_scores_equal_those_of_plain_hugging_face(family: str, make: Callable[[str], Model]) -> None:
    model, prompts = make(family), prompts_of(12, 21)
    check_model(model)
    found = attribute(model, prompts, n_steps=3)
    assert found.engine == "shared_prefix"
    for site in NEURON_SITES:
        expected = torch.stack(
            [
                torch.stack([oracle(checkpoint_of(family), prompt, site, layer, 3) for layer in range(3)])
                for prompt in prompts
            ]
        )
        largest = float(expected.abs().max())
        torch.testing.assert_close(found.difference[site], expected.detach(), atol=1e-5 * largest, rtol=0)


def test_the_oracle_can_fail() -> None:
    """The scores of different prompts differ."""
    one, two = prompts_of(12, 12)
    expected = oracle(checkpoint_of("Llama"), one, "mlp", 1, 3)
    found = attribute(bridged("Llama"), two, n_steps=3).difference["mlp"][0, 1]
    assert (found - expected).abs().max() > 0.1 * expected.abs().max()


@needs_hooked
@pytest.mark.parametrize("family", FAMILIES)
def test_hook_points_hold_the_same_numbers(family: str) -> None:
    """Compatibility mode is not needed, since hook points with different names have aliases."""
    tokens = torch.tensor([prompts_of(17)[0].token_ids])
    names = [hook_name(site, layer) for site in NEURON_SITES for layer in range(3)]
    names += [
        f"blocks.{layer}.{point}" for layer in range(3) for point in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
    ]
    kept: list[dict[str, Tensor]] = []
    for model in (hooked(family), bridged(family)):
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any, found: dict[str, Tensor] = found) -> None:
            found[hook.name] = value

        with backend_of(model).hooks([(name, keep) for name in names]):
            last_logits(model, tokens)
        kept.append(found)
    for name in names:
        torch.testing.assert_close(kept[0][name], kept[1][name], atol=2e-5 * float(kept[0][name].abs().max()), rtol=0)


@needs_hooked
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_neuron_adds_to_the_logits_is_the_same(family: str) -> None:
    neurons = [Neuron("mlp", 0, None, 5), Neuron("attn", 1, 2, 3), Neuron("mlp", 2, None, 1)]
    one, two = (backend_of(model).direct_logits(neurons) for model in (hooked(family), bridged(family)))
    torch.testing.assert_close(one, two, atol=1e-5 * float(two.abs().max()), rtol=0)


def assert_equal(fast: Attribution, slow: Attribution, tolerance: float = 1e-5) -> None:
    for site in slow.difference:
        largest = float(slow.difference[site].abs().max())
        torch.testing.assert_close(fast.difference[site], slow.difference[site], atol=tolerance * largest, rtol=0)
        most = float(slow.change[site].abs().max())
        torch.testing.assert_close(fast.change[site], slow.change[site], atol=tolerance * most, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engines_agree(family: str) -> None:
    """One batch has prompts of different lengths, some of them longer than the window of local attention."""
    model, prompts = bridged(family), prompts_of(5, 40, 23, 1, 12)
    fast, slow = (attribute(model, prompts, n_steps=3, engine=engine) for engine in ("shared_prefix", "direct"))
    assert_equal(fast, slow)
    narrow = attribute(model, prompts[:2], n_steps=2, max_memory=1)
    assert narrow.pass_size == (1, 1)
    assert_equal(narrow, attribute(model, prompts[:2], n_steps=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_join_at_their_layer_and_not_below(family: str) -> None:
    model, (prompt,) = bridged(family), prompts_of(12)
    backend_of(model).check()
    assert backend_of(model).unshareable is None
    passed: list[int] = []

    def count(_: object, given: object, output: Any) -> None:
        if torch.is_grad_enabled():
            passed.append((output[0] if isinstance(output, tuple) else output).shape[1])

    handles = [block.register_forward_hook(count) for block in model.blocks]
    attribute(model, prompt, n_steps=4)
    for handle in handles:
        handle.remove()
    assert passed == [1 + 8, 1 + 16, 1 + 24]  # one row for the common end of all paths, and 4 steps * 2 sites per layer


@pytest.mark.parametrize("point", ["hook_resid_pre", "mlp.hook_post"])
def test_hooks_that_stay_on_the_model_count(point: str) -> None:
    model, prompts = bridged("Llama"), prompts_of(9, 14)
    plain = attribute(model, prompts, n_steps=3)
    steer = (f"blocks.1.{point}", lambda value, hook: value.clamp(max=0.2) + 0.1)
    with backend_of(model).hooks([steer]):
        fast, slow = (attribute(model, prompts, n_steps=3, engine=engine) for engine in ("shared_prefix", "direct"))
    assert_equal(fast, slow)
    with pytest.raises(AssertionError):
        assert_equal(fast, plain)


@pytest.mark.parametrize(
    "kind", ["padding is seen", "the window is forgotten", "siblings see each other", "one place more"]
)
def test_a_broken_mask_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = bridged("Gemma-2"), prompts_of(20, 11)
    slow = attribute(model, prompts, n_steps=3, engine="direct")
    assert_equal(attribute(model, prompts, n_steps=3), slow)
    real, run = bridge_module.sibling_mask, bridge_module.BridgeSiblings.run

    def altered(seen: Tensor, n_rows: int, window: int | None) -> Tensor:
        match kind:
            case "padding is seen":
                return real(torch.ones_like(seen), n_rows, window)
            case "the window is forgotten":
                return real(seen, n_rows, None)
            case "siblings see each other":
                return real(seen, n_rows, window) | (torch.arange(seen.shape[1] + n_rows) >= seen.shape[1])
        return real(seen, n_rows, window)

    def moved(self: Any, *arguments: Any) -> Tensor:
        self.position = self.position + (kind == "one place more")
        return run(self, *arguments)

    monkeypatch.setattr(bridge_module, "sibling_mask", altered)
    monkeypatch.setattr(bridge_module.BridgeSiblings, "run", moved)
    with pytest.raises(AssertionError):
        assert_equal(attribute(model, prompts, n_steps=3, engine="shared_prefix"), slow, 1e-3)


@pytest.mark.parametrize("site", ["hook_mlp_out", "hook_resid_pre"])
def test_directions_of_the_residual_stream(site: Any) -> None:
    model, prompts = bridged("Qwen3"), prompts_of(12, 9)
    fast, slow = (attribute(model, prompts, n_steps=2, sites=site, engine=e) for e in ("shared_prefix", "direct"))
    assert_equal(fast, slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike_run_their_beginning_once(family: str) -> None:
    model, prompts = bridged(family), prompts_of(*range(20, 40), begin=15)
    silenced = NeuronSet([Neuron("mlp", 1, None, 3), Neuron("attn", 2, 1, 2)])
    whole, once = (ask(model, prompts, neurons=silenced, share_prefix=s) for s in (False, True))
    torch.testing.assert_close(once, whole, atol=1e-6, rtol=1e-4)
    for row in (0, 7):
        tokens = torch.tensor([prompts[row].token_ids])
        with ablate(model, silenced):
            expected = last_logits(model, tokens)[0].softmax(-1)
        torch.testing.assert_close(whole[row, 0], expected[[4, 8]].sum(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_equals_zeroed_weights(family: str) -> None:
    tokens = torch.tensor([prompts_of(19)[0].token_ids])
    model = bridged(family)
    neurons = [Neuron("mlp", 0, None, 5), Neuron("mlp", 2, None, 1), Neuron("attn", 1, 2, 3)]
    with ablate(model, NeuronSet(neurons)):
        found = last_logits(model, tokens)
    before = last_logits(model, tokens)
    edited = random_checkpoint(family_config(family))
    d_head = neuron_space(model).d_head
    with torch.no_grad():
        for n in neurons:
            weight: Any = output_projection(edited, n.site, n.layer).weight
            column = n.index if n.head is None else n.head * d_head + n.index
            (weight[column] if family == "GPT-2" else weight[:, column]).zero_()
        expected = edited(tokens).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (before - expected).abs().max() > 1e-3


def test_means_and_the_loss_on_text_are_those_of_hugging_face() -> None:
    model, prompts = bridged("Qwen2", tokenizer=build_tokenizer()), prompts_of(9, 14)
    held: list[Tensor] = []
    module = output_projection(checkpoint_of("Qwen2"), "mlp", 1)
    with torch.no_grad(), reading(module, lambda value: held.append(value[0, -1]) or value):
        for prompt in prompts:
            checkpoint_of("Qwen2")(torch.tensor([prompt.token_ids]))
    torch.testing.assert_close(mean_activations(model, prompts)["mlp"][1], torch.stack(held).mean(0), atol=1e-5, rtol=0)
    text = "what is the colour of Balum ?"
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    logits = checkpoint_of("Qwen2")(ids[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()
    assert text_loss(model, [text]) == pytest.approx(expected, rel=1e-5)


def test_the_users_model_stays_as_it_was_and_its_weights_are_shared() -> None:
    hf_model = random_checkpoint(family_config("Llama"))
    modules = {name: type(module) for name, module in hf_model.named_modules()}
    model = load_model("mine", hf_model=hf_model, backend="bridge")
    assert {name: type(module) for name, module in hf_model.named_modules()} == modules
    assert all(p.requires_grad for p in hf_model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    own = {p.data_ptr() for p in hf_model.parameters()}
    assert {p.data_ptr() for p in model.parameters()} >= own
    assert not model.training
    assert backend_of(model).name == "mine"
    assert weights_digest(model) == weights_digest(load_model("mine", hf_model=hf_model, backend="bridge"))
    hf_model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    assert weights_digest(model) != weights_digest(bridged("Llama"))


def test_no_hook_is_left_and_unknown_ones_are_named() -> None:
    model = bridged("GPT-2")
    tokens = torch.tensor([prompts_of(9)[0].token_ids])
    before = last_logits(model, tokens)
    attribute(model, prompts_of(9), n_steps=2)
    with pytest.raises(RuntimeError, match="on purpose"), ablate(model, NeuronSet([Neuron("mlp", 0, None, 0)])):
        raise RuntimeError("on purpose")
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(last_logits(model, tokens), before)
    with (
        pytest.raises(BadInput, match=r"no hook point 'blocks\.9"),
        backend_of(model).hooks([("blocks.9.hook_z", print)]),
    ):
        pass


def test_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model, prompts = bridged("Llama", dtype=dtype), prompts_of(9, 14)
        fast, slow = (attribute(model, prompts, n_steps=2, engine=engine) for engine in ("shared_prefix", "direct"))
        assert fast.difference["mlp"].dtype == torch.promote_types(dtype, torch.float32)
        assert_equal(fast, slow, 1e-6 if dtype == torch.float64 else 0.1)


def wrapped(config: Any) -> Model:
    hf_model = random_checkpoint(config)
    hf_model.config.architectures = [type(hf_model).__name__]
    return load_model("some", hf_model=hf_model, backend="bridge")


def test_a_mixture_of_experts_is_refused() -> None:
    experts = MixtralConfig(**SMALL, **HEADS, intermediate_size=72, num_local_experts=4)
    with pytest.raises(BadInput, match=r"hook_post is not the input of W_out.*mixture of experts"):
        check_model(wrapped(experts))


def test_processed_weights_are_refused() -> None:
    model = bridged("Qwen2")
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    check_model(model)
    processed = bridged("Qwen2")
    processed.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(BadInput, match="were processed"):
        check_model(processed)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BloomConfig(vocab_size=283, hidden_size=32, n_layer=2, n_head=4), "alibi positions"),
        (
            GPTNeoConfig(
                vocab_size=283,
                max_position_embeddings=128,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=6,
            ),
            "local attention whose window is not part of the mask",
        ),
        (
            family_config("Llama").__class__(
                **{**SMALL, **HEADS},
                intermediate_size=72,
                rope_parameters={**LLAMA3_ROPE, "rope_type": "dynamic", "factor": 2.0},
            ),
            "rope scaling that depends on the prompt's length",
        ),
    ],
)
def test_models_that_cannot_share_a_prefix_say_why_and_run_directly(config: Any, said: str) -> None:
    model, prompts = wrapped(config), prompts_of(11)
    with pytest.raises(BadInput, match=said):
        attribute(model, prompts, n_steps=2, engine="shared_prefix")
    assert attribute(model, prompts, n_steps=2).engine == "direct"


def test_a_model_that_ignores_masks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bridge_module.sibling_mask
    monkeypatch.setattr(bridge_module, "sibling_mask", lambda seen, n, w: torch.ones_like(real(seen, n, w)))
    with pytest.raises(BadInput, match="attention that does not accept a separate mask for every row"):
        attribute(bridged("Llama"), prompts_of(11), n_steps=2, engine="shared_prefix")


def test_a_bridge_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(hf_model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        tokens, logits = reference_logits(hf_model)
        return tokens, 1.1 * logits

    monkeypatch.setattr(bridge_loading, "reference_logits", altered)
    with pytest.raises(BadInput, match=r"expected the logits of .*LlamaForCausalLM, but they differ by 0\.09"):
        bridged("Llama")


def test_backends_have_names() -> None:
    assert choose_backend(None) == ("hooked" if HAS_HOOKED else "bridge")
    assert backend_of(bridged("Llama")).kind == "bridge"
    with pytest.raises(BadInput, match="expected backend 'hooked' or 'bridge'; got 'other'"):
        choose_backend("other")
    if not HAS_HOOKED:
        with pytest.raises(BadInput, match="has no HookedTransformer; use backend='bridge'"):
            load_model("toy", backend="hooked")
