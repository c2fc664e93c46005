"""Measure attribution at the size of real models: `python benchmarks/real_size.py [MODEL ...] [--captum] [--dtype float32]`.

Builds a Hugging Face model of the named shape with random weights, passes it to `load_model`, and attributes one prompt of the
length of a TruthfulQA prompt to every neuron of both sites; with --prompts also several prompts together, as a run does. With
--captum, two layers are measured with captum and scaled to all layers. A smaller number of steps (--captum-steps) is scaled as
well, and its scores are compared with our scores for the same number of steps. Adds a row to real_size.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attribution import N_STEPS, by_captum, ours, per_place
from measuring import machine, random_prompt, timed, with_peak
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Olmo2Config, Qwen2Config

from tn_lens import load_model
from tn_lens.neurons import NEURON_SITES, SiteName

RESULTS = Path(__file__).with_suffix(".json")
N_TOKENS = 110
"""Length of the system prompt of figure 9, a question and two answers in a chat template."""
SHAPES: dict[str, Any] = {
    "Qwen2.5-3B-Instruct": partial(
        Qwen2Config,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-3B-Instruct": partial(
        LlamaConfig,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "OLMo-2-1124-7B-Instruct": partial(
        Olmo2Config,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=100352,
    ),
    "Llama-3.1-8B-Instruct": partial(
        LlamaConfig,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Mistral-Nemo-Instruct-2407": partial(
        MistralConfig,
        hidden_size=5120,
        intermediate_size=14336,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=131072,
        sliding_window=None,
    ),
    "OLMo-2-1124-13B-Instruct": partial(
        Olmo2Config,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        vocab_size=100352,
    ),
}
"""Configurations of the paper's models, from their config.json."""


def random_weights(config: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A Hugging Face model with random weights. They are taken from one pool, since drawing all of them would take minutes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device).tie_weights()
    # the rotary frequencies are not parameters, and are not part of a checkpoint
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    pool = 0.02 * torch.randn(4_000_037, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1)
                continue
            flat, pool = parameter.view(-1), pool.roll(7919 * (index + 1))
            for first in range(0, flat.numel(), len(pool)):
                part = flat[first : first + len(pool)]
                part.copy_(pool[: len(part)])
            if "bias" in name:
                parameter.zero_()
    return model


def measure(name: str, dtype: torch.dtype, *, n_prompts: int, captum_steps: int | None) -> dict[str, Any]:
    """Measure one model, and return its row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name, hf_model=random_weights(SHAPES[name](), dtype), dtype=dtype, device=device)
    weights = sum({p.data_ptr(): p.numel() * p.itemsize for p in model.parameters()}.values())
    prompt = random_prompt(N_TOKENS)
    ours(model, random_prompt(4), n_steps=1)  # excludes one-time setup from the measurement
    if device == "cuda":
        ours(model, prompt)
    (scores, seconds), peak = with_peak(lambda: timed(lambda: ours(model, prompt)))
    assert all(scores.difference[site].abs().max() > 0 for site in NEURON_SITES)
    _, rows_per_pass = scores.pass_size
    row = {
        "model": name,
        "n_layers": model.cfg.n_layers,
        "n_neurons": scores.space.n_neurons,
        "n_tokens": N_TOKENS,
        "n_steps": N_STEPS,
        "dtype": str(dtype).removeprefix("torch."),
        "weights_bytes": weights,
        "seconds": round(seconds, 3),
        "rows_per_pass": rows_per_pass,
        "peak_memory_bytes_above_weights": peak.allocated,
        "machine": machine(),
        "n_threads": torch.get_num_threads(),
    }
    print(row, flush=True)
    if n_prompts > 1:
        prompts = [random_prompt(N_TOKENS - seed, seed) for seed in range(n_prompts)]
        (scores_of_several, together), peak = with_peak(lambda: timed(lambda: ours(model, prompts)))
        row |= {
            "n_prompts": n_prompts,
            "seconds_a_prompt_together": round(together / n_prompts, 3),
            "prompts_per_pass": scores_of_several.pass_size[0],
            "peak_memory_bytes_together": peak.allocated,
        }
    if captum_steps:
        middle = model.cfg.n_layers // 2
        places: list[tuple[SiteName, int]] = [("mlp", middle - 2), ("attn", middle + 1)]
        score = partial(by_captum, internal_batch_size=captum_steps, n_steps=captum_steps)
        if device == "cuda":
            per_place(score, model, prompt, places)  # excludes one-time setup of the GPU from the measurement
        captum_scores, captum = per_place(score, model, prompt, places)
        captum *= N_STEPS / captum_steps
        row |= {
            "captum_steps": captum_steps,
            "captum_seconds_extrapolated": round(captum, 1),
            "ratio": round(captum / seconds, 1),
        }
        if captum_steps != N_STEPS:
            scores = ours(model, prompt, n_steps=captum_steps)
        for (site, layer), expected in captum_scores.items():
            pair = torch.stack([scores.difference[site][0, layer], expected.float().cpu()])
            row[f"correlation_{site}"] = round(float(torch.corrcoef(pair)[0, 1]), 5)
    print(row, flush=True)
    return row


def main() -> None:
    """Measure the models, and replace their rows in real_size.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["Qwen2.5-3B-Instruct"], metavar="MODEL", help=", ".join(SHAPES))
    parser.add_argument("--prompts", type=int, default=1, metavar="N", help="also attribute N prompts together")
    parser.add_argument("--captum", action="store_true", help="also measure captum")
    parser.add_argument("--captum-steps", type=int, default=N_STEPS, metavar="N", help="number of steps for captum")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="bfloat16 is very slow on CPUs without AVX-512",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - SHAPES.keys():
        parser.error(f"expected models among {', '.join(SHAPES)}; got {', '.join(sorted(unknown))}")
    for name in arguments.models:
        row = measure(
            name,
            getattr(torch, arguments.dtype),
            n_prompts=arguments.prompts,
            captum_steps=arguments.captum_steps if arguments.captum else None,
        )
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        others = [r for r in stored if any(r[k] != row[k] for k in ("model", "dtype", "machine"))]
        RESULTS.write_text(json.dumps([*others, row], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
