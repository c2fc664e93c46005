"""Models that cannot be loaded raise a one-line error with what was expected, what was found, and what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scripts.train_toy import build_tokenizer
from tests.conftest import needs_hooked, once, paper_config, random_checkpoint
from tn_lens import BadInput, build_prompts, load_model, load_questions
from tn_lens.models import Model
from tn_lens.pipeline.settings import PAPER_THRESHOLDS, recommended_settings


def refused(*arguments: object, said: str, **options: object) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        load_model(*arguments, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    refused(tmp_path, said="has no config.json")
    refused("/nowhere/at/all", said="neither a folder nor a hub id")
    refused("not a name!", said="neither a folder nor a hub id")


def test_a_lora_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, said="LoRA adapter.*merge")


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    random_checkpoint(paper_config("Qwen2.5-3B-Instruct")).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, said=r"quantised \(awq\).*unquantised")


@needs_hooked
def test_an_architecture_that_is_not_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1}
        )
    )
    build_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, said="MambaForCausalLM.*LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM, Olmo2ForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Strange"], "model_type": "strange"}))
    refused(tmp_path, said="does not support its architecture")


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, said="cannot load")


def test_a_folder_without_a_tokenizer_or_weights(tmp_path: Path) -> None:
    model = random_checkpoint(paper_config("Llama-3.1-8B-Instruct"))
    model.config.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, said="cannot load")


@needs_hooked
def test_weights_that_do_not_fit_their_config(tmp_path: Path) -> None:
    hf_model = random_checkpoint(paper_config("Llama-3.1-8B-Instruct"))
    hf_model.config.intermediate_size = 64
    refused("odd", hf_model=hf_model, said="do not fit its config")


def test_a_checkpoint_that_lacks_weights_is_never_made_up(tmp_path: Path) -> None:
    hf_model = random_checkpoint(paper_config("Llama-3.1-8B-Instruct"))
    build_tokenizer().save_pretrained(tmp_path)
    weights = dict(hf_model.state_dict())
    hf_model.save_pretrained(tmp_path, state_dict={k: v for k, v in weights.items() if "layers.1.mlp.down" not in k})
    refused(tmp_path, said=r"lacks weights that its config.json describes: 1 \(model.layers.1.mlp.down_proj.weight\)")
    hf_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, said in (
        ({"num_hidden_layers": 2}, "has weights that its config.json does not describe: 9"),
        ({"num_hidden_layers": 4}, "lacks weights that its config.json describes: 9"),
        ({"vocab_size": 300}, "has weights of another shape than its config.json describes: 2"),
        ({"num_attention_heads": 0}, "cannot"),
        ({"num_hidden_layers": "two"}, "cannot load"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        refused(tmp_path, said=said)


def test_damaged_weights_and_tokenizers(tmp_path: Path) -> None:
    random_checkpoint(paper_config("Llama-3.1-8B-Instruct")).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (whole[:1000], b"", b"nonsense" * 100):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        refused(tmp_path, said="cannot load")
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path, said="cannot load")


def test_a_folder_called_toy_is_not_the_toy(tmp_path: Path) -> None:
    random_checkpoint(paper_config("Llama-3.1-8B-Instruct")).save_pretrained(tmp_path / "toy")
    build_tokenizer().save_pretrained(tmp_path / "toy")
    assert recommended_settings(load_model(tmp_path / "toy")) == {}


def test_a_device_that_is_not_there() -> None:
    refused("toy", device="cuda:7", said="device 'cuda:7' is not available; use one of this machine's devices")
    refused("toy", device="abacus", said="device 'abacus' is not available")
    refused("toy", device="meta", said="device 'meta' is not available")


def test_a_dtype_that_is_none() -> None:
    refused("toy", dtype="int8", said="expected dtype float32")
    refused("toy", dtype="quick", said="expected dtype float32")


def test_too_little_memory(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    refused(checkpoint("Llama-3.1-8B-Instruct"), said=r"weights need 0\.0 GiB in float32, and cpu has 0\.0 GiB free")


@needs_hooked
def test_grouped_heads_in_olmo_2() -> None:
    config = paper_config("OLMo-2-1124-7B-Instruct")
    config.num_key_value_heads = 2
    refused("odd", hf_model=random_checkpoint(config), said="fewer key/value heads")


class Hub(BaseHTTPRequestHandler):
    """A hub whose models are missing or gated."""

    def do_GET(self) -> None:
        if "gated" in self.path:
            self.send_response(403 if self.headers.get("authorization") else 401)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to this model is restricted.")
        elif "revision" in self.path or "nosuchrev" in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the standard library's name

    def log_message(self, *arguments: object) -> None:
        """Print nothing to the terminal."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """URL of a local server that replaces the hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_address[1]}"
        service.shutdown()


ABSENT, GATED = "org/absent", "org/gated"
HUB_CASES: list[tuple[str, dict[str, str], str]] = [
    (ABSENT, {}, "not found on the hub"),
    (GATED, {}, "accept its licence on the hub and set HF_TOKEN"),
    (GATED, {"HF_TOKEN": "hf_wrong"}, "accept its licence on the hub and set HF_TOKEN"),
    (ABSENT, {"HF_HUB_OFFLINE": "1"}, "offline mode is on|cannot be reached"),
    (ABSENT, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
]
COMMAND = """
import json, os, sys, time
time.sleep = lambda seconds: None  # the hub's client waits between its attempts
from tn_lens import cli
def run(name, out):
    sys.argv = ["tn-lens", "run", "--model", name, "--questions", "toy", "--out", out]
    cli.main()
cases = json.loads(sys.argv[1])
if len(cases) > 1:  # each in a fork, so that torch is imported once
    import tn_lens.models.loading, tn_lens.pipeline.run
    from huggingface_hub import constants
for name, environment, folder in cases[:-1]:
    process = os.fork()
    if not process:
        with open(f"{folder}/errors", "w") as errors:
            os.dup2(errors.fileno(), 2)
            os.environ.update(environment)
            constants.HF_HUB_OFFLINE = environment.get("HF_HUB_OFFLINE") == "1"
            try:
                run(name, f"{folder}/run")
            except SystemExit as stop:
                os._exit(stop.code)
            os._exit(0)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
name, environment, folder = cases[-1]
run(name, f"{folder}/run")
"""


def answers_of_the_hub(
    cases: list[tuple[str, dict[str, str], str]], hub: str, home: Path
) -> list[tuple[str, int, str, Path]]:
    """Expected message, exit code, errors and run folder of each case, in a process with the environment of the last case."""
    folders = [home / str(number) for number in range(len(cases))]
    for folder in folders:
        folder.mkdir()
    given = [(name, environment, str(folder)) for (name, environment, _), folder in zip(cases, folders, strict=True)]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", **cases[-1][1]}
    command = [sys.executable, "-c", COMMAND, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=200, check=False)
    codes = [*map(int, done.stdout.split()), done.returncode]
    errors = [*((folder / "errors").read_text() for folder in folders[:-1]), done.stderr]
    return [
        (said, code, error, folder / "run")
        for (_, _, said), code, error, folder in zip(cases, codes, errors, folders, strict=True)
    ]


@once
@pytest.mark.parametrize("cases", [HUB_CASES[1:4] + HUB_CASES[:1], HUB_CASES[4:]], ids=["reached", "not reached"])
def test_the_hub_says_no(cases: list[tuple[str, dict[str, str], str]], hub: str, tmp_path: Path) -> None:
    """Run in a separate process, since the hub's address is read at import."""
    for said, code, error, out in answers_of_the_hub(cases, hub, tmp_path):
        assert code == 2, error
        assert re.search(said, error), error
        assert "Traceback" not in error
        assert len(error.strip().splitlines()) == 1, error
        assert not out.exists()


@needs_hooked
def test_a_model_that_transformer_lens_knows_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 is loaded with TransformerLens' own loader, without weight processing, and its weights are laid out."""
    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(GPT2Config(n_ctx=1024, n_layer=2, n_embd=64, n_head=4, vocab_size=1000)).eval()
    hf_model.config.architectures = ["GPT2LMHeadModel"]
    monkeypatch.setattr(
        "transformer_lens.HookedTransformer.set_tokenizer", lambda model, *_, **__: setattr(model, "tokenizer", None)
    )
    monkeypatch.setattr(
        "transformer_lens.loading_from_pretrained.AutoConfig.from_pretrained", lambda *_, **__: hf_model.config
    )
    model = load_model("gpt2", hf_model=hf_model, tokenizer=build_tokenizer())
    tokens = torch.randint(0, 1000, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, atol=1e-4, rtol=0)
    assert model.unembed.W_U.T.is_contiguous()
    assert any(block.attn.b_V.any() for block in model.blocks) == hf_model.transformer.h[0].attn.c_attn.bias.any()


def test_the_real_small_checkpoint(shared: Path) -> None:
    """Its tokenizer merges a colon with the space before "A", but not before "a", so labels are on a separate line."""
    model = load_model(shared / "models" / "tinystories-656k")
    (prompt, *_) = build_prompts(model, load_questions(shared / "data" / "TruthfulQA.csv")[:2])
    vocabulary = model.tokenizer.get_vocab()
    assert prompt.label_ids[0] == (vocabulary["A"], vocabulary["a"])
    assert prompt.text.endswith("Answer:\n")
    assert prompt.token_ids[0] == model.tokenizer.bos_token_id
    assert prompt.token_ids.count(model.tokenizer.bos_token_id) == 1


def test_recommended_settings(toy: Model, tiny: Callable[..., Model]) -> None:
    assert recommended_settings(toy)["order"] == "both"
    assert {
        name: recommended_settings(tiny(name))["adaptive_threshold"] for name in PAPER_THRESHOLDS
    } == PAPER_THRESHOLDS
    assert PAPER_THRESHOLDS["Qwen2.5-3B-Instruct"] == 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_models_in_16_bits_on_an_old_cpu_are_warned_about(
    dtype: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    for feature in features:
        monkeypatch.setattr(torch.cpu, feature, lambda: False, raising=False)
    folder = checkpoint("Llama-3.2-3B-Instruct")
    load_model(folder, dtype=dtype)  # a small model is fast enough
    monkeypatch.setattr("tn_lens.models.loading.LARGE", 1000)
    load_model(folder, dtype="float32")
    with pytest.warns(
        UserWarning, match=f"no instructions for matrix products in {dtype}.* load it with dtype='float32'"
    ):
        load_model(folder, dtype=dtype)
    for feature in features:
        monkeypatch.setattr(torch.cpu, feature, lambda: True, raising=False)
    load_model(folder, dtype=dtype)
