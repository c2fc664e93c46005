"""How the benchmarks take time and memory, and random models of a size."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from tn_lens import Prompt
from tn_lens.models import Model, build_model

VOCABULARY = 32000


def machine() -> str:
    """The name that rows carry."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def with_peak(function: Callable[[], Any]) -> tuple[Any, int]:
    """A result, and the bytes that the process (or the device) held above the start while it was made."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        return function(), torch.cuda.max_memory_allocated() - start
    process, done = psutil.Process(), threading.Event()
    start = process.memory_info().rss
    peak = start

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        return function(), peak - start
    finally:
        done.set()
        thread.join()


def random_model(d_model: int, n_layers: int, **options: Any) -> Model:
    """A Llama-shaped model with random weights, in the order TransformerLens makes them."""
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


def random_prompt(n_tokens: int, seed: int = 0) -> Prompt:
    """Random tokens and two answer labels."""
    tokens = torch.randint(10, VOCABULARY, (n_tokens,), generator=torch.Generator().manual_seed(seed))
    return Prompt(token_ids=tuple(tokens.tolist()), label_ids=((4, 5), (6, 7)), right=0, question=seed)
