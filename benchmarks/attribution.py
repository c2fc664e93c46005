"""What integrated gradients for every layer cost, side by side: `make bench`, or `make bench-quick` for one size.

One process, the same random weights, threads and prompt for all, float32, and equal results asserted before anything is
timed. A baseline that takes whole prompts is measured on two layers that lie symmetrically about the middle, since its cost
is linear in the depth of the layer, and scaled by the number of layers; such rows say `extrapolated`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from tn_lens import Prompt, attribute
from tn_lens.attribution.direct import Direct
from tn_lens.attribution.integrate import integrate
from tn_lens.attribution.quadrature import quadrature_rule
from tn_lens.attribution.target import probability_difference
from tn_lens.models import Model, build_model, lay_out_weights
from tn_lens.neurons import SITES, Site, hook_name

RESULTS = Path(__file__).parent / "results.json"
N_STEPS = 20
VOCABULARY = 32000
FULL = [(d, layers, tokens) for d, layers in ((512, 4), (512, 12), (512, 24)) for tokens in (32, 128, 512)] + [
    (1024, 12, 128),
    (1024, 12, 512),
]
QUICK = [(1024, 12, 128)]


def random_model(d_model: int, n_layers: int) -> Model:
    """A Llama-shaped model with random weights, in the order TransformerLens makes them."""
    return build_model(
        {
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
    )


def random_prompt(n_tokens: int) -> Prompt:
    """Random tokens and two answer labels."""
    tokens = torch.randint(10, VOCABULARY, (n_tokens,), generator=torch.Generator().manual_seed(0))
    return Prompt(token_ids=tuple(tokens.tolist()), label_ids=((4, 5), (6, 7)), right=0)


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


def hooked_function(model: Model, prompt: Prompt, site: Site, layer: int) -> Callable[[Tensor], Tensor]:
    """f_t - f_f of one layer's activation at the last position: what a user would write."""
    tokens = torch.tensor([prompt.token_ids], device=model.cfg.device)

    def function(activation: Tensor) -> Tensor:
        def put(value: Tensor, hook: object) -> Tensor:
            value = value.clone()
            value[:, -1] = activation.reshape(value[:, -1].shape)
            return value

        batch = tokens.expand(len(activation), -1)
        logits = model.run_with_hooks(batch, fwd_hooks=[(hook_name(site, layer), put)])
        return probability_difference(logits[:, -1], prompt)

    return function


def by_captum(function: Callable[[Tensor], Tensor], activation: Tensor) -> Tensor:
    """captum's IntegratedGradients, all steps in one batch (the fastest of 5, 10 and 20 rows here)."""
    return IntegratedGradients(function).attribute(activation, n_steps=N_STEPS, method="riemann_right")[0]


def by_loop(function: Callable[[Tensor], Tensor], activation: Tensor) -> Tensor:
    """The plain TransformerLens loop: one batch of interpolated prompts."""
    nodes = torch.arange(1, N_STEPS + 1, device=activation.device) / N_STEPS
    path = (nodes[:, None] * activation).requires_grad_()
    (gradients,) = torch.autograd.grad(function(path).sum(), path)
    return activation[0] * gradients.mean(0)


def per_layer(
    score: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], model: Model, prompt: Prompt, layers: list[int]
) -> tuple[dict[tuple[Site, int], Tensor], float]:
    """Scores of some layers, and the seconds for all layers that they stand for."""
    own = Direct(model, prompt, SITES, "last").own
    scores: dict[tuple[Site, int], Tensor] = {}
    seconds = 0.0
    for site in SITES:
        for layer in layers:
            function = hooked_function(model, prompt, site, layer)
            activation = own[site][0, layer]
            scores[site, layer], took = timed(lambda f=function, a=activation: score(f, a))
            seconds += took
    return scores, seconds * model.cfg.n_layers / len(layers)


def matrix_rate(model: Model, n_rows: int) -> float:
    """Floating-point operations a second of a bare product in the engine's own shapes, the best of five."""
    a = torch.randn(n_rows, model.cfg.d_model, device=model.cfg.device)
    b = torch.randn(4 * model.cfg.d_model, model.cfg.d_model, device=model.cfg.device)
    best = min(timed(lambda: [torch.nn.functional.linear(a, b) for _ in range(10)])[1] for _ in range(5))
    return 10 * 2 * n_rows * b.numel() / best


def engine_flops(model: Model, n_tokens: int, n_rows: int) -> float:
    """The matrix products of one prompt: 2 a weight and token forward, as many backward; the first layer entered counts whole.

    The prompt is run once, the rows of each group of layers from its first layer on, forward and backward, and one row
    per site and layer at the baseline, forward only.
    """
    cfg = model.cfg
    of_layer = 4 * cfg.d_model * cfg.n_heads * cfg.d_head + 3 * cfg.d_model * (cfg.d_mlp or 0)
    of_unembedding = cfg.d_model * cfg.d_vocab
    total = 2.0 * n_tokens * cfg.n_layers * of_layer
    places = [layer for layer in range(cfg.n_layers) for _ in SITES]
    for passes, rows in ((2, [layer for layer in places for _ in range(N_STEPS)]), (1, places)):
        for first in range(0, len(rows), n_rows):
            chunk = rows[first : first + n_rows]
            total += passes * 2.0 * len(chunk) * ((cfg.n_layers - chunk[0]) * of_layer + of_unembedding)
    return total


def measure(d_model: int, n_layers: int, n_tokens: int) -> list[dict[str, Any]]:
    """Every engine at one size."""
    model, prompt = lay_out_weights(random_model(d_model, n_layers)), random_prompt(n_tokens)
    middle = n_layers // 2
    layers = [middle - 2, middle + 1] if n_layers > 4 else [0, n_layers - 1]
    print(f"d_model {d_model}, {n_layers} layers, {n_tokens} tokens", flush=True)

    def ours() -> Any:
        return attribute(model, [prompt], n_steps=N_STEPS, engine="shared_prefix")

    attribute(model, [random_prompt(4)], n_steps=1)  # whatever is set up once
    found, peak = with_peak(ours)
    seconds = min(timed(ours)[1] for _ in range(3))
    rate = max(matrix_rate(model, found.pass_size.n_rows), matrix_rate(model, 2048))
    captum_scores, captum = per_layer(by_captum, model, prompt, layers)
    loop_scores, loop = per_layer(by_loop, model, prompt, layers)
    plain_scores, plain = per_layer(by_loop, random_model(d_model, n_layers), prompt, layers)  # the same seed
    for scores in (plain_scores, captum_scores, loop_scores):
        for (site, layer), expected in scores.items():
            score = found.difference[site][0, layer].to(expected.device)
            torch.testing.assert_close(score, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)
    rows = [
        ("ours, shared prefix", seconds, False),
        ("captum 0.9, laid-out weights", captum, True),
        ("TransformerLens loop, laid-out weights", loop, True),
        ("TransformerLens loop", plain, True),
    ]
    if n_layers <= 4 or n_tokens <= 32:
        direct = Direct(model, prompt, SITES, "last")
        zero: dict[Site, Tensor] = {site: torch.zeros_like(direct.own[site][0, :, 0]) for site in SITES}
        rule = quadrature_rule("riemann_right", N_STEPS)
        _, took = timed(
            lambda: integrate(direct, rule=rule, targets=[probability_difference], baseline=zero, n_rows=64)
        )
        rows.append(("ours, direct", took, False))
    n_rows = found.pass_size.n_rows
    share = engine_flops(model, n_tokens, n_rows) / seconds / rate
    table = []
    for engine, took, extrapolated in rows:
        is_ours = engine == "ours, shared prefix"
        table.append(
            {
                "engine": engine,
                "n_layers": n_layers,
                "d_model": d_model,
                "n_tokens": n_tokens,
                "n_steps": N_STEPS,
                "sites": list(SITES),
                "seconds": round(took, 3),
                "extrapolated": extrapolated,
                "ratio_to_ours": round(took / seconds, 1),
                "peak_memory_bytes": peak if is_ours else None,
                "matrix_product_rate": round(rate) if is_ours else None,
                "share_of_matrix_product_rate": round(share, 3) if is_ours else None,
            }
        )
        print(f"  {engine:40s} {took:9.2f} s  {took / seconds:7.1f} x", flush=True)
    print(f"  {share:.0%} of {rate / 1e9:.0f} GFLOP/s, peak {peak / 2**20:.0f} MiB above the weights", flush=True)
    return table


def main() -> None:
    """Measure the sizes, and replace their rows in results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size: 12 layers, 128 tokens, d_model 1024")
    arguments = parser.parse_args()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    there = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for size in QUICK if arguments.quick else FULL:
        rows = measure(*size)
        for row in rows:
            row |= {"machine": machine, "n_threads": torch.get_num_threads()}
        kept = [
            row
            for row in there
            if (row["d_model"], row["n_layers"], row["n_tokens"], row["machine"]) != (*size, machine)
        ]
        there = sorted(kept + rows, key=lambda r: (r["machine"], r["d_model"], r["n_layers"], r["n_tokens"]))
        RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": there}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
