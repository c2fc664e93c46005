"""Compare the cost of integrated gradients for every layer: `make bench`, or `make bench-quick` for one size.

All implementations run in one process with the same random weights, number of threads and prompt in float32. Their results
are asserted to be equal before the table is printed. Implementations that run whole prompts are measured on two layers that
lie symmetrically about the middle, since their cost is linear in the depth of the layer, and scaled by the number of layers;
such rows have `extrapolated` set. The quick run and long prompts use one site in each of the two layers, the others both
sites.

The TransformerBridge contains Hugging Face's Llama with the same weights.

knowledge-neurons is measured on a random GPT-2 of the usual size and on MLP neurons only, since it supports no other neurons. `slopes`
are the seconds of our engine by number of layers, steps and tokens, with the time for running the prompt listed separately.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import IntegratedGradients
from comparing import composite, from_zero, summed
from measuring import bridge_of, machine, random_model, random_prompt, timed, with_peak
from torch import Tensor

from tn_lens import Attribution, Prompt, attribute, load_model
from tn_lens.attribution.engines.direct import Direct
from tn_lens.attribution.engines.shared_prefix import SharedPrefix
from tn_lens.attribution.methods.integrated_gradients import integrate
from tn_lens.attribution.methods.method import Place
from tn_lens.attribution.quadrature import quadrature_rule
from tn_lens.attribution.target import probability_difference
from tn_lens.evaluation.text import plain_texts
from tn_lens.models import Model, build_model, lay_out_weights
from tn_lens.neurons import NEURON_SITES, SiteName, hook_name

RESULTS = Path(__file__).parent / "results.json"
N_STEPS = 20
FULL = [(d, layers, tokens) for d, layers in ((512, 4), (512, 12), (512, 24)) for tokens in (32, 128, 512)] + [
    (1024, 12, 128),
    (1024, 12, 512),
]
QUICK = [(1024, 12, 128)]


def hooked_function(model: Model, prompt: Prompt, site: SiteName, layer: int) -> Callable[[Tensor], Tensor]:
    """f_t - f_f as a function of one layer's activation at the last position, as a user would write it."""
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


def by_captum(
    function: Callable[[Tensor], Tensor],
    activation: Tensor,
    internal_batch_size: int,
    n_steps: int = N_STEPS,
    method: str = "riemann_right",
) -> Tensor:
    """Captum's `IntegratedGradients`."""
    captum = IntegratedGradients(function)
    return captum.attribute(activation, n_steps=n_steps, method=method, internal_batch_size=internal_batch_size)[0]


def by_loop(function: Callable[[Tensor], Tensor], activation: Tensor) -> Tensor:
    """A plain TransformerLens loop: one batch of interpolated prompts."""
    nodes = torch.arange(1, N_STEPS + 1, device=activation.device) / N_STEPS
    path = (nodes[:, None] * activation).requires_grad_()
    (gradients,) = torch.autograd.grad(function(path).sum(), path)
    return activation[0] * gradients.mean(0)


def per_place(
    score: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    model: Model,
    prompt: Prompt,
    places: list[tuple[SiteName, int]],
) -> tuple[dict[tuple[SiteName, int], Tensor], float]:
    """The scores of some sites and layers, and the time extrapolated to all sites and layers."""
    activations = Direct(model, prompt, NEURON_SITES, "last").own
    scores: dict[tuple[SiteName, int], Tensor] = {}
    seconds = 0.0
    for site, layer in places:
        function = hooked_function(model, prompt, site, layer)
        activation = activations[site][0, layer]  # [1, neuron]
        scores[site, layer], took = timed(lambda f=function, a=activation: score(f, a))
        seconds += took
    return scores, seconds * len(NEURON_SITES) * model.cfg.n_layers / len(places)


def matrix_rate(model: Model, n_rows: int) -> float:
    """Floating-point operations per second of a plain matrix product in the engine's shapes; the best of five runs."""
    a = torch.randn(n_rows, model.cfg.d_model, device=model.cfg.device)
    b = torch.randn(4 * model.cfg.d_model, model.cfg.d_model, device=model.cfg.device)
    best = min(timed(lambda: [torch.nn.functional.linear(a, b) for _ in range(10)])[1] for _ in range(5))
    return 10 * 2 * n_rows * b.numel() / best


def engine_flops(model: Model, n_tokens: int) -> float:
    """Floating-point operations of the matrix products for one prompt.

    There are 2 per weight and token in the forward pass, and as many in the backward pass.

    The prompt is run once; of its last layer only keys, values and scores are computed. Then m rows run forward and backward
    for every site and layer (one of them at the baseline), and one row at the common end of all paths. Rows of attention
    neurons start at their own layer, rows of MLP neurons at the next.
    """
    cfg = model.cfg
    n_attention = cfg.d_model * cfg.n_heads * cfg.d_head  # weights of one attention matrix
    n_layer = 4 * n_attention + 3 * cfg.d_model * (cfg.d_mlp or 0)
    n_unembedding = cfg.d_model * cfg.d_vocab
    n_prompt = (cfg.n_layers - 1) * n_layer + 3 * n_attention
    layers_passed = N_STEPS * cfg.n_layers**2  # as in `measure_slopes`
    n_rows = N_STEPS * len(NEURON_SITES) * cfg.n_layers + 1
    per_rows = (layers_passed + cfg.n_layers) * n_layer + n_rows * n_unembedding
    return 2.0 * (n_tokens * n_prompt + 2 * per_rows)


def ours(model: Model, prompts: Prompt | list[Prompt], n_steps: int = N_STEPS, **options: Any) -> Any:
    """The shared-prefix engine."""
    return attribute(model, prompts, n_steps=n_steps, engine="shared_prefix", **options)


def row(engine: str, model: Model, n_tokens: int, seconds: float, our_seconds: float, **more: Any) -> dict[str, Any]:
    """Print one row of results.json and return it."""
    print(f"  {engine:40s} {seconds:9.2f} s  {seconds / our_seconds:7.1f} x", flush=True)
    return {
        "engine": engine,
        "n_layers": model.cfg.n_layers,
        "d_model": model.cfg.d_model,
        "n_tokens": n_tokens,
        "n_steps": N_STEPS,
        "sites": list(NEURON_SITES),
        "seconds": round(seconds, 3),
        "extrapolated": False,
        "ratio_to_ours": round(seconds / our_seconds, 1),
        "peak_memory_bytes": None,
        "matrix_product_rate": None,
        "share_of_matrix_product_rate": None,
        "machine": machine(),
        "n_threads": torch.get_num_threads(),
    } | more


def measure_errors(model: Model, prompt: Prompt, places: list[Place], batch: int, **about: Any) -> list[dict[str, Any]]:
    """Time, nodes and true error of the method "adaptive", of our Riemann rule, and of captum with its defaults.

    The errors are those of some places, relative to the largest score of the prompt and site. The reference has 512
    Gauss-Legendre nodes in 16 panels of equal width, which resolve narrow peaks better than a single rule.

    Args:
        model: the model.
        prompt: the prompt.
        places: sites and layers whose errors are measured, and to which captum's time is scaled.
        batch: captum's `internal_batch_size`; by default it runs all 50 steps together, which is slower.
        about: further fields of the rows.
    """
    nodes, weights = composite(16, 32)
    in_order = sorted(places, key=lambda place: (place[1], place[0] != "mlp"))
    exact = {
        place: values.float() for place, values in summed(from_zero(model, prompt), in_order, nodes, weights).items()
    }
    adaptive, seconds = timed(lambda: ours(model, prompt, method="adaptive"))
    seconds = min(seconds, *(timed(lambda: ours(model, prompt, method="adaptive"))[1] for _ in range(2)))
    rule, rule_seconds = timed(lambda: ours(model, prompt))
    rule_seconds = min(rule_seconds, timed(lambda: ours(model, prompt))[1])
    theirs = partial(by_captum, internal_batch_size=batch, n_steps=50, method="gausslegendre")
    captum_scores, captum = per_place(theirs, model, prompt, places)
    scale = {site: float(scores.abs().max()) for site, scores in adaptive.difference.items()}

    def error(scores: Callable[[Place], Tensor]) -> float:
        worst = max(float((scores(p).cpu() - exact[p].cpu()).abs().max()) / scale[p[0]] for p in places)
        return float(f"{worst:.2g}")

    def of(result: Attribution) -> Callable[[Place], Tensor]:
        return lambda place: result.difference[place[0]][0, place[1]]

    n_tokens = len(prompt.token_ids)
    errors = {
        "adaptive": error(of(adaptive)),
        "riemann": error(of(rule)),
        "captum": error(lambda place: captum_scores[place]),
    }
    print(f"  errors {errors}", flush=True)
    nodes_per_place = adaptive.convergence().nodes_per_place
    common = {"places": [f"{site} {layer}" for site, layer in places], **about}
    return [
        row("ours, adaptive", model, n_tokens, seconds, seconds, error=errors["adaptive"], n_steps=None)
        | {"nodes_per_place": round(nodes_per_place, 2), **common},
        row("ours, riemann_right", model, n_tokens, rule_seconds, seconds, error=errors["riemann"]) | common,
        row("captum 0.9, defaults", model, n_tokens, captum, seconds, error=errors["captum"], n_steps=50)
        | {"extrapolated": True, "internal_batch_size": batch, **common},
    ]


def text_prompt(model: Model, n_tokens: int) -> Prompt:
    """The beginning of a plain text, whose most probable next token is the right answer, and the second one the wrong answer."""
    tokenizer: Any = model.tokenizer
    tokens = tuple(tokenizer(" ".join(map(str, plain_texts(model))))["input_ids"][:n_tokens])
    first, second = model(torch.tensor([tokens]))[0, -1].topk(2).indices.tolist()
    return Prompt(token_ids=tokens, label_ids=((first,), (second,)), right=0)


def measure_trained(name: str) -> list[dict[str, Any]]:
    """Times and errors on a trained model, with prompts of 110 and 12 tokens."""
    model = load_model(name)
    last = model.cfg.n_layers - 1
    places: list[Place] = [("mlp", 0), ("attn", 1), ("attn", last - 1), ("mlp", last)]
    table = []
    for n_tokens in (110, 12):
        print(f"{Path(name).name}, {n_tokens} tokens", flush=True)
        prompt = text_prompt(model, n_tokens)
        ours(model, prompt, n_steps=1)
        table += measure_errors(model, prompt, places, batch=N_STEPS, architecture=Path(name).name, kind="errors")
    return table


def measure(d_model: int, n_layers: int, n_tokens: int, *, quick: bool) -> list[dict[str, Any]]:
    """Measure every implementation at one size."""
    model, prompt = lay_out_weights(random_model(d_model, n_layers)), random_prompt(n_tokens)
    low, high = (n_layers // 2 - 2, n_layers // 2 + 1) if n_layers > 4 else (0, n_layers - 1)
    places: list[tuple[SiteName, int]] = [("mlp", low), ("attn", high)]
    if not quick and n_tokens < 512:
        places.extend([("attn", low), ("mlp", high)])
    print(f"d_model {d_model}, {n_layers} layers, {n_tokens} tokens", flush=True)

    ours(model, random_prompt(4), n_steps=1)  # excludes one-time setup from the measurement
    attribution, peak = with_peak(lambda: ours(model, prompt))
    _, n_rows = attribution.pass_size
    tries = [timed(lambda: ours(model, prompt))[1] for _ in range(2)]
    rate = max(matrix_rate(model, n_rows), matrix_rate(model, 2048))
    bridge = bridge_of(model)
    ours(bridge, random_prompt(4), n_steps=1)
    bridge_attribution, bridge_peak = with_peak(lambda: ours(bridge, prompt))
    bridge_seconds = sum(timed(lambda: ours(bridge, prompt))[1] for _ in range(2)) / 2
    bridge_scores = {place: bridge_attribution.difference[place[0]][0, place[1]] for place in places}
    del bridge, bridge_attribution
    sizes = [N_STEPS] if quick else [5, N_STEPS]
    by_size = {
        size: per_place(partial(by_captum, internal_batch_size=size), model, prompt, places[:1]) for size in sizes
    }
    best = min(by_size, key=lambda size: by_size[size][1])
    captum_scores, captum = per_place(partial(by_captum, internal_batch_size=best), model, prompt, places)
    loop_scores, loop = per_place(by_loop, model, prompt, places)
    plain_scores, plain = per_place(by_loop, random_model(d_model, n_layers), prompt, places)  # with the same seed
    tries += [
        timed(lambda: ours(model, prompt))[1] for _ in range(2)
    ]  # measured again at the end, since the speed of a machine drifts
    rate = max(rate, matrix_rate(model, 2048))
    seconds = sum(tries) / len(tries)
    for scores in (bridge_scores, plain_scores, captum_scores, loop_scores):
        for (site, layer), expected in scores.items():
            score = attribution.difference[site][0, layer].to(expected.device)
            torch.testing.assert_close(score, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)
    share = engine_flops(model, n_tokens) / seconds / rate
    table = [
        row(
            "ours, shared prefix",
            model,
            n_tokens,
            seconds,
            seconds,
            peak_memory_bytes=peak.allocated,
            matrix_product_rate=round(rate),
            share_of_matrix_product_rate=round(share, 3),
        ),
        row(
            "ours, shared prefix (bridge)",
            model,
            n_tokens,
            bridge_seconds,
            seconds,
            peak_memory_bytes=bridge_peak.allocated,
        ),
        row(
            "captum 0.9, laid-out weights",
            model,
            n_tokens,
            captum,
            seconds,
            extrapolated=True,
            internal_batch_size=best,
        ),
        row("TransformerLens loop, laid-out weights", model, n_tokens, loop, seconds, extrapolated=True),
        row("TransformerLens loop", model, n_tokens, plain, seconds, extrapolated=True),
    ]
    if n_layers <= 4 or n_tokens <= 32:
        direct = Direct(model, prompt, NEURON_SITES, "last")
        zero = {site: torch.zeros_like(activation[0, :, 0]) for site, activation in direct.own.items()}
        rule = quadrature_rule("riemann_right", N_STEPS)
        _, took = timed(
            lambda: integrate(direct, rule=rule, targets=[probability_difference], baseline=zero, n_rows=64)
        )
        table.append(row("ours, direct", model, n_tokens, took, seconds))
    table += measure_errors(model, prompt, places, best, kind="errors")
    print(
        f"  {share:.0%} of {rate / 1e9:.0f} GFLOP/s, peak {peak.allocated / 2**20:.0f} MiB above the weights",
        flush=True,
    )
    return table


def measure_knowledge_neurons(n_tokens: int = 128) -> list[dict[str, Any]]:
    """Measure knowledge-neurons 0.0.2 on a random GPT-2: MLP neurons only, two layers, scaled to all layers."""
    from knowledge_neurons import KnowledgeNeurons  # pyright: ignore[reportMissingImports]
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    prompt = random_prompt(n_tokens)
    encoded = {
        "input_ids": torch.tensor([prompt.token_ids]),
        "attention_mask": torch.ones(1, n_tokens, dtype=torch.long),
    }

    class Encoder:
        def encode(self, target: str) -> list[int]:
            return [4]

    theirs = KnowledgeNeurons(GPT2LMHeadModel(GPT2Config()).eval(), Encoder(), model_type="gpt")  # pyright: ignore[reportArgumentType]
    on_device: Any = {name: tensor.to(theirs.device) for name, tensor in encoded.items()}

    def score(layer: int) -> Tensor:
        return theirs.get_scores_for_layer("", "", layer, batch_size=N_STEPS, steps=N_STEPS, encoded_input=on_device)

    model = lay_out_weights(
        build_model(
            {
                "n_layers": 12,
                "d_model": 768,
                "n_heads": 12,
                "d_head": 64,
                "d_mlp": 3072,
                "d_vocab": 50257,
                "n_ctx": 1024,
                "act_fn": "gelu_new",
                "normalization_type": "LN",
                "device": str(theirs.device),
            }
        )
    )
    print(f"GPT-2, 12 layers, {n_tokens} tokens, MLP neurons", flush=True)
    ours(model, random_prompt(4), n_steps=1)
    score(6)
    seconds = min(timed(lambda: ours(model, prompt, sites=("mlp",)))[1] for _ in range(3))
    took = sum(timed(partial(score, layer))[1] for layer in (4, 7)) * 12 / 2
    common: dict[str, Any] = {"sites": ["mlp"], "architecture": "gpt2"}
    return [
        row("ours, shared prefix", model, n_tokens, seconds, seconds, **common),
        row("knowledge-neurons 0.0.2", model, n_tokens, took, seconds, extrapolated=True, **common),
    ]


def measure_slopes(d_model: int = 512) -> list[dict[str, Any]]:
    """Measure our engine by number of layers, steps and tokens; the time for running the prompt is listed separately.

    Rows of attention neurons in layer l pass L - l layers, those of MLP neurons one layer less, and L / 2 on average. The rows
    of a prompt therefore pass 2 L m L / 2 layers in total, and the seconds divided by this number should be the same in every
    line.
    """
    table = []
    print(
        "slopes: layers, steps, tokens; seconds in total and for the prompt; microseconds per row and layer", flush=True
    )
    cases = [(layers, N_STEPS, 128) for layers in (4, 8, 12, 24)]
    cases += [(12, steps, 128) for steps in (10, 40, 80)] + [(12, N_STEPS, tokens) for tokens in (32, 256, 512)]
    for n_layers, n_steps, n_tokens in cases:
        model, prompt = lay_out_weights(random_model(d_model, n_layers)), random_prompt(n_tokens)
        ours(model, random_prompt(4), n_steps=1)
        seconds = min(timed(lambda m=model, p=prompt, n=n_steps: ours(m, p, n_steps=n))[1] for _ in range(5))
        prefill = min(timed(lambda m=model, p=prompt: SharedPrefix(m, [p], NEURON_SITES))[1] for _ in range(5))
        per_row = (seconds - prefill) / (n_steps * n_layers**2)
        print(
            f"  {n_layers:3d} {n_steps:3d} {n_tokens:4d}  {seconds:6.2f} {prefill:6.2f}  {1e6 * per_row:6.0f}",
            flush=True,
        )
        table.append(
            {
                "n_layers": n_layers,
                "d_model": d_model,
                "n_tokens": n_tokens,
                "n_steps": n_steps,
                "seconds": round(seconds, 3),
                "prefill_seconds": round(prefill, 3),
                "microseconds_per_row_and_layer": round(1e6 * per_row, 1),
                "machine": machine(),
                "n_threads": torch.get_num_threads(),
            }
        )
    return table


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key that identifies a row; a new row replaces the old row with the same key."""
    return row["machine"], row.get("architecture", ""), row["d_model"], row["n_layers"], row["n_tokens"]


def main() -> None:
    """Measure the sizes and replace their rows in results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="measure times and errors on a trained model, for example smollm2, and nothing else"
    )
    parser.add_argument("--quick", action="store_true", help="measure one size: 12 layers, 128 tokens, d_model 1024")
    parser.add_argument(
        "--size",
        type=int,
        nargs=3,
        action="append",
        metavar=("D_MODEL", "LAYERS", "TOKENS"),
        help="another size; can be given several times",
    )
    arguments = parser.parse_args()
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results: dict[str, Any] = {"rows": [], "slopes": []} | stored | {"torch": torch.__version__}

    def keep(rows: list[dict[str, Any]]) -> None:
        measured = {key(row) for row in rows}
        results["rows"] = sorted([row for row in results["rows"] if key(row) not in measured] + rows, key=key)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    if arguments.model:
        keep(measure_trained(arguments.model))
        return
    is_full = not (arguments.quick or arguments.size)
    sizes = FULL if is_full else map(tuple, arguments.size) if arguments.size else QUICK
    for size in sizes:
        keep(measure(*size, quick=arguments.quick))
    if is_full:
        keep(measure_knowledge_neurons())
        slopes = measure_slopes()
        results["slopes"] = [row for row in results["slopes"] if row["machine"] != machine()] + slopes
        keep([])


if __name__ == "__main__":
    sys.exit(main())
