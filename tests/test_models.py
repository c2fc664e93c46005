"""The paper's models have the same logits as in Hugging Face, and each option has an effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from tests.conftest import PAPER_MODELS, POST_NORM, needs_hooked, paper_config, random_checkpoint
from tn_lens import NeuronSet, ablate, attribute, build_prompts, load_model
from tn_lens.models import Model, assemble, build_model, check_model, last_logits, lay_out_weights, neuron_space
from tn_lens.questions.toy import binary

TOKENS = torch.randint(4, 283, (2, 40), generator=torch.Generator().manual_seed(1))


def hugging_face_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_logits_equal_hugging_face(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint(name), dtype="float32")
    torch.testing.assert_close(model(TOKENS), hugging_face_logits(checkpoint(name)), atol=1e-4, rtol=0)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("Llama-3.2-3B-Instruct", {"use_NTK_by_parts_rope": False}),
    ("Llama-3.1-8B-Instruct", {"NTK_by_parts_factor": 32.0}),
    ("Llama-3.1-8B-Instruct", {"NTK_original_ctx_len": 8192}),
    ("Llama-3.1-8B-Instruct", {"rotary_base": 10000.0}),
    ("Qwen2.5-3B-Instruct", {"rotary_base": 10000.0}),
    ("OLMo-2-1124-7B-Instruct", {"eps": 1e-2}),
    ("OLMo-2-1124-13B-Instruct", {"rotary_base": 10000.0}),
    ("Mistral-Nemo-Instruct-2407", {"rotary_base": 10000.0}),
    ("Mistral-Nemo-Instruct-2407", {"act_fn": "gelu"}),
]


@needs_hooked
@pytest.mark.parametrize(("name", "ignored"), OPTIONS)
def test_a_wrong_option_is_seen(name: str, ignored: dict[str, Any], checkpoint: Callable[[str], Path]) -> None:
    """The comparison with Hugging Face can fail: ignoring any option changes the logits."""
    from tn_lens.models.conversion import convert_config, convert_weights

    hf_model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    architecture = hf_model.config.architectures[0]
    config = convert_config(hf_model.config, architecture, name)
    for key, value in ignored.items():
        assert getattr(config, key) != value
        setattr(config, key, value)
    config.device = "cpu"
    model = assemble(config, convert_weights(hf_model, config, architecture))
    assert (model(TOKENS) - hugging_face_logits(checkpoint(name))).abs().max() > 1e-3


@needs_hooked
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("Qwen2.5-3B-Instruct", "attn.b_Q"),
        ("Qwen2.5-3B-Instruct", "attn._b_K"),
        ("Qwen2.5-3B-Instruct", "attn._b_V"),
        ("OLMo-2-1124-7B-Instruct", "attn.q_norm.w"),
        ("OLMo-2-1124-7B-Instruct", "attn.k_norm.w"),
        ("OLMo-2-1124-7B-Instruct", "ln2.w"),
        ("Llama-3.1-8B-Instruct", "ln1.w"),
        ("Llama-3.1-8B-Instruct", "ln_final.w"),
    ],
)
def test_a_lost_weight_is_seen(name: str, pattern: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint(name), dtype="float32")
    for key, parameter in model.named_parameters():
        if key.endswith(pattern):
            parameter.data = (
                torch.zeros_like(parameter) if ".b_" in key or "._b_" in key else torch.ones_like(parameter)
            )
    assert (model(TOKENS) - hugging_face_logits(checkpoint(name))).abs().max() > 1e-3


def test_a_head_size_of_its_own_is_kept(tiny: Callable[..., Model]) -> None:
    space = neuron_space(tiny("Mistral-Nemo-Instruct-2407"))
    assert (space.n_heads, space.d_head, space.width("attn")) == (4, 16, 64)
    assert tiny("Mistral-Nemo-Instruct-2407").cfg.d_model == 40


def test_a_sliding_window_equals_hugging_face() -> None:
    config = paper_config("Mistral-Nemo-Instruct-2407")
    config.sliding_window = 7
    hf_model = random_checkpoint(config)
    hf_model.config.architectures = ["MistralForCausalLM"]
    model = load_model("windowed", hf_model=hf_model)
    with torch.no_grad():
        expected = hf_model(TOKENS).logits
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=0)
    hf_model.config.sliding_window = None
    assert (load_model("unlimited", hf_model=hf_model)(TOKENS) - expected).abs().max() > 1e-3


def test_attention_biases_of_llama_equal_hugging_face() -> None:
    config = paper_config("Llama-3.1-8B-Instruct")
    config.attention_bias = True
    hf_model = random_checkpoint(config)
    with torch.no_grad():
        expected = hf_model(TOKENS).logits
    torch.testing.assert_close(load_model("biased", hf_model=hf_model)(TOKENS), expected, atol=1e-4, rtol=0)


@needs_hooked
@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LlamaConfig(mlp_bias=True, num_hidden_layers=1), "mlp_bias"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (LlamaConfig(hidden_act="tanh"), "tanh"),
    ],
)
def test_options_that_cannot_be_expressed_are_named(config: Any, named: str) -> None:
    from tn_lens.models.conversion import convert_config

    with pytest.raises(ValueError, match=named):
        convert_config(config, "LlamaForCausalLM", "a model")


@needs_hooked
def test_weights_are_shared_and_gradients_stay_off() -> None:
    hf_model = random_checkpoint(MistralConfig(**paper_config("Mistral-Nemo-Instruct-2407").to_diff_dict()))
    model = load_model("shared", hf_model=hf_model)
    own = model.blocks[0].mlp.W_in
    assert own.data_ptr() == hf_model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in hf_model.parameters()), "the user's model is left as it was"
    assert not model.training


@needs_hooked
@pytest.mark.parametrize("name", PAPER_MODELS)
def test_weights_lie_as_the_forward_reads_them(name: str, tiny: Callable[..., Model]) -> None:
    """With this layout, the transposes in HookedTransformer's forward pass copy nothing."""
    model = tiny(name)
    for block in model.blocks:
        assert block.mlp.W_in.T.is_contiguous()
        assert block.mlp.W_gate.T.is_contiguous()
        assert block.mlp.W_out.T.is_contiguous()
        assert block.attn.W_Q.permute(0, 2, 1).is_contiguous()
        assert block.attn.W_O.permute(2, 0, 1).is_contiguous()
    assert model.unembed.W_U.T.is_contiguous()


@needs_hooked
@pytest.mark.parametrize("gated", [True, False])
def test_laying_out_changes_no_bit(gated: bool) -> None:
    config = {
        "n_layers": 2,
        "d_model": 32,
        "n_ctx": 64,
        "n_heads": 4,
        "d_head": 8,
        "d_mlp": 48,
        "d_vocab": 283,
        "act_fn": "silu",
        "gated_mlp": gated,
        "n_key_value_heads": 2 if gated else None,
        "device": "cpu",
    }
    model = build_model(config)
    before = model(TOKENS)
    assert not model.unembed.W_U.T.is_contiguous()
    after = lay_out_weights(model)(TOKENS)
    assert model.unembed.W_U.T.is_contiguous()
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_every_model_runs_through_attribution_and_ablation(name: str, tiny: Callable[..., Model]) -> None:
    model = tiny(name)
    prompts = build_prompts(model, binary()[:2])
    method = "graded" if name in POST_NORM else "gausslegendre"
    found = attribute(model, prompts, n_steps=40, method=method)
    assert found.completeness_gap < 0.05
    strongest = found.space.neuron("mlp", *divmod(int(found.difference["mlp"][0].argmax()), found.space.d_mlp))
    tokens = torch.tensor([prompts[0].token_ids])
    before = last_logits(model, tokens)
    with ablate(model, NeuronSet([strongest])):
        assert (last_logits(model, tokens) - before).abs().max() > 0
    assert torch.equal(last_logits(model, tokens), before)


@needs_hooked
def test_folded_value_biases_are_noticed(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("Qwen2.5-3B-Instruct"))
    check_model(model)
    for block in model.blocks:
        block.attn.b_O.data = torch.randn_like(block.attn.b_O)
        block.attn._b_V.data = torch.zeros_like(block.attn._b_V)
    with pytest.warns(UserWarning, match="folded"):
        check_model(model)


@needs_hooked
def test_a_rotated_basis_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("Llama-3.1-8B-Instruct"))
    for head in model.blocks[0].attn.W_O.data:
        head.copy_(torch.linalg.svd(head, full_matrices=False)[2] * torch.arange(1.0, 9.0)[:, None])
    with pytest.raises(ValueError, match="refactor_factored_attn_matrices"):
        check_model(model)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a .*, got Linear"):
        check_model(torch.nn.Linear(2, 2))
