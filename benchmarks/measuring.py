"""Measurement of time and memory, and random models and prompts, for the benchmarks."""

from __future__ import annotations

import ctypes
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformer_lens import HookedTransformer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tn_lens import Prompt, load_model
from tn_lens.models import Model, build_model

VOCABULARY = 32000


def machine() -> str:
    """Name of the machine in the results."""
    cpu = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Call the function, and return its result and the seconds it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@dataclass(frozen=True)
class Peak:
    """Peak memory above that at the start, in bytes."""

    allocated: int
    """Allocated memory: of the device on CUDA, otherwise of the C library (of the process if the C library does not report it)."""
    resident: int
    """Resident memory of the process, which includes freed memory that the C library keeps for reuse."""


class _HeapCounts(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def heap() -> int:
    """Bytes allocated by the C library, or the resident memory of the process if the C library does not report them."""
    try:
        count = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return psutil.Process().memory_info().rss
    count.restype = _HeapCounts
    counts = count()
    return counts.uordblks + counts.hblkhd


def with_peak(function: Callable[[], Any]) -> tuple[Any, Peak]:
    """Call the function, and return its result and the peak memory during the call."""
    process, done = psutil.Process(), threading.Event()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    on_device = torch.cuda.memory_allocated() if on_gpu else 0
    start = highest = (heap(), process.memory_info().rss)

    def sample() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest[0], heap()), max(highest[1], process.memory_info().rss)
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        result = function()
    finally:
        done.set()
        thread.join()
    allocated = torch.cuda.max_memory_allocated() - on_device if on_gpu else highest[0] - start[0]
    return result, Peak(allocated, highest[1] - start[1])


def random_model(d_model: int, n_layers: int, **options: Any) -> HookedTransformer:
    """A model of the shape of Llama with random weights, in the memory layout that TransformerLens gives them."""
    config: dict[str, Any] = {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": d_model // 64,
        "d_head": 64,
        "d_mlp": 4 * d_model,
        "d_vocab": VOCABULARY,
        "n_ctx": 1024,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 64,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return build_model(config | options)


@torch.no_grad()
def bridge_of(model: HookedTransformer) -> Model:
    """Hugging Face's Llama with the weights of a random model, in a TransformerBridge."""
    cfg = model.cfg
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=cfg.d_vocab,
                hidden_size=cfg.d_model,
                intermediate_size=cfg.d_mlp or 0,
                num_hidden_layers=cfg.n_layers,
                num_attention_heads=cfg.n_heads,
                max_position_embeddings=cfg.n_ctx,
                rms_norm_eps=cfg.eps,
            )
        )
    llama.to_empty(device=cfg.device)
    llama.model.rotary_emb = LlamaRotaryEmbedding(llama.config).to(cfg.device)
    weights = {"model.embed_tokens": model.embed.W_E, "model.norm": model.ln_final.w, "lm_head": model.unembed.W_U.T}
    for layer, block in enumerate(model.blocks):
        prefix = f"model.layers.{layer}."
        weights |= {prefix + "input_layernorm": block.ln1.w, prefix + "post_attention_layernorm": block.ln2.w}
        for name in "QKV":
            weight = getattr(block.attn, f"W_{name}")
            # [head, d_model, d_head] -> [head * d_head, d_model]
            weights[f"{prefix}self_attn.{name.lower()}_proj"] = weight.permute(0, 2, 1).reshape(-1, cfg.d_model)
        weights[prefix + "self_attn.o_proj"] = block.attn.W_O.reshape(-1, cfg.d_model).T
        for name, weight in (("up", block.mlp.W_in), ("gate", block.mlp.W_gate), ("down", block.mlp.W_out)):
            weights[f"{prefix}mlp.{name}_proj"] = weight.T
    llama.load_state_dict({f"{name}.weight": value for name, value in weights.items()})
    return load_model("random", hf_model=llama.eval(), backend="bridge", device=str(cfg.device))


def random_prompt(n_tokens: int, seed: int = 0, n_vocab: int = VOCABULARY) -> Prompt:
    """A prompt of random tokens with two labels."""
    tokens = torch.randint(10, n_vocab, (n_tokens,), generator=torch.Generator().manual_seed(seed))
    return Prompt(token_ids=tuple(tokens.tolist()), label_ids=((4, 5), (6, 7)), right=0, question=str(seed))
