"""Measure attribution on a GPU within ten minutes: `make bench-gpu`, or `python benchmarks/gpu.py [--shapes NAME ...] [--minutes N]`.

Runs the tests that compare a GPU with the CPU (`tests/test_cuda.py`). Then attributes prompts of about 110 tokens with the default
settings, for each of the paper's six models with random weights: one prompt, and several together, as in a run. On the first
model, the scores are compared with those of captum's `LayerIntegratedGradients` and of a loop over layers and steps, which are
timed as well.

The results are written to gpu.json after every part. No part is started after the given number of minutes. `--quick` uses two
narrow layers, and only prints the results; with `--device cpu` it checks the script on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attribution import N_STEPS, hooked_function
from captum.attr import LayerIntegratedGradients
from measuring import VOCABULARY, machine, random_prompt, timed, with_peak
from real_size import N_TOKENS, SHAPES, random_weights
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tn_lens import Prompt, attribute, load_model
from tn_lens.attribution.engines.direct import Direct
from tn_lens.attribution.methods.method import Place
from tn_lens.attribution.target import probability_difference
from tn_lens.core.settings import default_memory
from tn_lens.models import Model
from tn_lens.neurons import NEURON_SITES, hook_name

RESULTS = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
N_REPEATS, N_TOGETHER, N_TOGETHER_QUICK = 5, 8, 2
"""Timed calls with one prompt, and prompts that are attributed together, with `--quick` fewer of them."""
SECONDS_IN_FULL = 60
"""A loop over all layers that would take longer is measured on two layers and scaled."""
TESTS_FRACTION = 0.4
"""Fraction of the minutes after which the tests are stopped."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference between the scores of two implementations, relative to the largest score of the site and layer. In bfloat16,
rounding in 36 layers causes differences of up to 0.03."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
"""Matrix products in a profile of the CPU."""
NARROW: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 1000,
}
"""Sizes of the models of `--quick`."""


class Report:
    """The rows of gpu.json, and the parts that failed or were not reached."""

    def __init__(self, path: Path | None, minutes: float, device: str) -> None:
        self.path, self.minutes, self.device = path, minutes, device
        self.start = time.monotonic()
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else []
        self.failed: list[str] = []
        self.not_reached: list[str] = []

    @property
    def is_over(self) -> bool:
        """Whether the minutes are used up."""
        return time.monotonic() - self.start >= 60 * self.minutes

    def run(self, shape: str, part: str, measure: Callable[[], dict[str, Any]]) -> bool:
        """Run a part unless the minutes are used up, print and write its result, and return whether it succeeded."""
        name = f"{shape}: {part}"
        if self.is_over:
            self.not_reached.append(shape if part == "loading" else name)
            return False
        print(f"[{time.monotonic() - self.start:3.0f} s] {name}", flush=True)
        try:
            result = measure()
        except Exception as error:  # one part that fails must not cost the others their time on the GPU
            traceback.print_exc()
            result = {"failure": f"{type(error).__name__}: {str(error)[:300]}"}
        if "failure" in result:
            self.failed.append(name)
        print(f"  {result}", flush=True)
        self.keep(shape, part, result)
        return "failure" not in result

    def keep(self, shape: str, part: str, result: dict[str, Any]) -> None:
        """Put the result of a part into its row, and write all rows under a temporary name, which is then renamed."""
        if self.path is None:
            return
        key: dict[str, Any] = {"machine": machine(), "device": self.device, "shape": shape}
        row = next((row for row in self.rows if key.items() <= row.items()), None)
        if row is None or part == "loading":  # parts of an earlier run are not kept next to new ones
            self.rows = [other for other in self.rows if other is not row]
            self.rows.append(row := key)
        row[part] = result
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.rows, indent=1) + "\n")
        temporary.replace(self.path)

    def close(self) -> int:
        """Print which parts failed or were not reached, and return the exit code."""
        if self.failed:
            print(f"failed: {', '.join(self.failed)}")
        reached = f"not reached in {self.minutes:g} minutes: {', '.join(self.not_reached)}"
        print(reached if self.not_reached else f"all parts were reached in {time.monotonic() - self.start:.0f} s")
        return 1 if self.failed else 0


def run_tests(timeout: float) -> dict[str, Any]:
    """Run the tests that compare CUDA with the CPU, and return the last line that pytest prints."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py"]
    try:
        done, seconds = timed(
            lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"stopped after {timeout:.0f} s"}
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:])
    summary = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    is_passed = done.returncode == 0 and " passed" in summary  # skipped tests compare nothing
    return {"summary": summary, "seconds": round(seconds, 1)} | ({} if is_passed else {"failure": summary})


def settings(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The settings that affect the times and the rounding."""
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "max_memory_bytes": default_memory(device),
        "device_memory_bytes": total,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "allow_tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "allow_bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "torch": torch.__version__,
        "n_threads": torch.get_num_threads(),
    }


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals in microseconds, in seconds: kernels of several streams may overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total / 1e6


def trace_of(profiler: profile) -> list[dict[str, Any]]:
    """The events of a profile. `profiler.events()` takes seven times as long, and there are tens of thousands of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def utilisation(model: Model, prompts: list[Prompt], seconds: float) -> dict[str, Any]:
    """The fraction of the time during which a kernel runs, and the kernel launches per prompt; on the CPU, matrix products.

    The profiler delays the launches of kernels, but not the kernels. On CUDA, the time of the kernels is therefore divided by
    the seconds of a call without the profiler.
    """
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        _, profiled = timed(lambda: attribute(model, prompts))
    if not on_gpu:
        products = sum(row.self_cpu_time_total for row in profiler.key_averages() if row.key in PRODUCTS) / 1e6
        return {"matrix_product_fraction": round(products / profiled, 3), "profiled_seconds": round(profiled, 3)}
    events = trace_of(profiler)
    kernels = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    return {
        "kernel_fraction": round(busy_seconds(kernels) / seconds, 3),
        "kernel_launches_per_prompt": round(len(kernels) / len(prompts)),
        "copies_per_prompt": round(len(copies) / len(prompts)),
        "profiled_seconds": round(profiled, 3),
    } | ({} if kernels else {"failure": "the profiler recorded no kernel"})


def by_single_steps(model: Model, prompt: Prompt, activation: Tensor, place: Place) -> Tensor:
    """Integrated gradients of one site and layer, one step at a time, as in scripts of edge attribution patching (EAP-IG)."""
    function = hooked_function(model, prompt, *place)
    total = torch.zeros_like(activation)  # [1, neuron]
    for step in range(1, N_STEPS + 1):
        point = (step / N_STEPS * activation).requires_grad_()
        (gradient,) = torch.autograd.grad(function(point).sum(), point)
        total += gradient
    return (activation * total / N_STEPS)[0]


def by_layer_ig(model: Model, prompt: Prompt, other: Prompt, place: Place) -> Tensor:
    """Captum's `LayerIntegratedGradients` of one site and layer, from a prompt with another last token."""

    def function(tokens: Tensor) -> Tensor:
        return probability_difference(model(tokens)[:, -1], prompt)

    tokens, baseline = (torch.tensor([p.token_ids], device=model.cfg.device) for p in (prompt, other))
    captum = LayerIntegratedGradients(function, model.hook_dict[hook_name(*place)])
    scores: Any = captum.attribute(tokens, baseline, n_steps=N_STEPS, method="riemann_right")
    return scores[0, -1].flatten()  # [position, neuron] or [position, head, d_head] -> [neuron]


class Shape:
    """A model of the shape of one of the paper's models with random weights, and what is measured on it."""

    model: Any = None

    def __init__(self, name: str, dtype: torch.dtype, device: str, *, quick: bool) -> None:
        self.name, self.dtype, self.device, self.quick = name, dtype, device, quick
        self.n_vocab = NARROW["vocab_size"] if quick else VOCABULARY
        self.seconds = float("nan")

    def prompt(self, n_tokens: int, seed: int = 0) -> Prompt:
        """A prompt of random tokens."""
        return random_prompt(n_tokens, seed, self.n_vocab)

    def loading(self) -> dict[str, Any]:
        """Build the model on its device."""
        gc.collect()  # the model before this one
        if self.device == "cuda":
            torch.cuda.empty_cache()
        config = SHAPES[self.name](**NARROW if self.quick else {})

        def load() -> Model:
            weights = random_weights(config, self.dtype, self.device)
            return load_model(self.name, hf_model=weights, dtype=self.dtype, device=self.device)

        self.model, seconds = timed(load)
        attribute(self.model, self.prompt(4), n_steps=1)  # excludes one-time setup from the measurements
        return {
            "seconds": round(seconds, 1),
            "n_layers": self.model.cfg.n_layers,
            "weights_bytes": sum({p.data_ptr(): p.numel() * p.itemsize for p in self.model.parameters()}.values()),
            **settings(self.dtype, self.device),
        }

    def one_prompt(self) -> dict[str, Any]:
        """Attribute one prompt."""
        result = self.measure([self.prompt(N_TOKENS)], N_REPEATS)
        self.seconds = result["seconds_per_prompt"]
        return result

    def several_prompts(self) -> dict[str, Any]:
        """Attribute several prompts together."""
        n_prompts = N_TOGETHER_QUICK if self.quick else N_TOGETHER
        return self.measure([self.prompt(N_TOKENS - seed, seed) for seed in range(n_prompts)], 2)

    def measure(self, prompts: list[Prompt], n_repeats: int) -> dict[str, Any]:
        """Attribute prompts several times: once for the peak memory, then for the median time, then with the profiler."""
        scores, peak = with_peak(lambda: attribute(self.model, prompts))
        assert all(scores.difference[site].abs().max() > 0 for site in NEURON_SITES)
        seconds = median(timed(lambda: attribute(self.model, prompts))[1] for _ in range(n_repeats))
        on_gpu = self.device == "cuda"
        return {
            "n_prompts": len(prompts),
            "n_neurons": scores.space.n_neurons,
            "seconds_per_prompt": round(seconds / len(prompts), 4),
            "prompts_per_pass": scores.pass_size.n_prompts,
            "rows_per_pass": scores.pass_size.n_rows,
            "peak_memory_bytes_above_weights": peak.allocated,
            **({"peak_memory_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {}),
            **utilisation(self.model, prompts, seconds),
        }

    def comparison(self) -> dict[str, Any]:
        """Compare scores and times with captum and with a loop over layers and steps, all of which run whole prompts."""
        model, prompt = self.model, self.prompt(N_TOKENS)
        # causal attention: the activations differ at the last position only
        other = Prompt(token_ids=(*prompt.token_ids[:-1], 9), label_ids=prompt.label_ids, right=0, question="other")
        own, other_own = (Direct(model, p, NEURON_SITES, "last").own for p in (prompt, other))
        # [1, layer, 1, neuron] -> [1, layer, neuron]
        from_other = attribute(model, prompt, baseline={site: value[:, :, 0] for site, value in other_own.items()})
        loops = {
            "captum": (lambda place: by_layer_ig(model, prompt, other, place), from_other),
            "single_steps": (
                lambda place: by_single_steps(model, prompt, own[place[0]][0, place[1]], place),
                attribute(model, prompt),
            ),
        }
        results: dict[str, Any] = {"our_seconds": self.seconds, "tolerance": TOLERANCE[self.dtype]}
        for name, (score, ours) in loops.items():
            results[name] = self.over_layers(score, ours.difference)
        worst = max(results[name]["error"] for name in loops)
        is_equal = worst <= TOLERANCE[self.dtype]  # false for NaN
        return results | ({} if is_equal else {"failure": f"the scores differ by {worst:g} of the largest"})

    def over_layers(self, score: Callable[[Place], Tensor], ours: Any) -> dict[str, Any]:
        """Score all sites and layers if that takes less than a minute, otherwise two that lie symmetrically about the middle."""
        n_layers = self.model.cfg.n_layers
        every: list[Place] = [(site, layer) for layer in range(n_layers) for site in NEURON_SITES]
        low, high = (n_layers // 2 - 2, n_layers // 2 + 1) if n_layers > 4 else (0, n_layers - 1)
        sample: list[Place] = [("mlp", low), ("attn", high)]
        score(sample[0])  # excludes one-time setup from the measurement
        scores, seconds = timed(lambda: {place: score(place) for place in sample})
        seconds *= len(every) / len(sample)
        if is_in_full := seconds <= SECONDS_IN_FULL:
            scores, seconds = timed(lambda: {place: score(place) for place in every})
        errors = []
        for (site, layer), expected in scores.items():
            expected = expected.float().cpu()
            errors.append(float((ours[site][0, layer] - expected).abs().max() / expected.abs().max()))
        return {
            "seconds": round(seconds, 2),
            "extrapolated": not is_in_full,
            "ratio": round(seconds / self.seconds, 1),
            "error": float(f"{max(errors, key=lambda error: (error != error, error)):.2g}"),  # NaN comes first
        }


def main() -> int:
    """Run all parts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="two narrow layers; the results are printed and not stored"
    )
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=10, help="no part is started later")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA; use --device cpu")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA is not initialized yet
    report = Report(None if arguments.quick else RESULTS, arguments.minutes, device)
    print(machine(), settings(dtype, device), flush=True)
    if device == "cuda":
        report.run("embedded model", "tests", lambda: run_tests(60 * arguments.minutes * TESTS_FRACTION))
    else:
        print("The tests that compare CUDA with the CPU are skipped on the CPU.", flush=True)
    for index, name in enumerate(arguments.shapes):
        shape = Shape(name, dtype, device, quick=arguments.quick)
        if not report.run(name, "loading", shape.loading):
            continue
        report.run(name, "one prompt", shape.one_prompt)
        if index == 0:
            report.run(name, "comparison", shape.comparison)
        report.run(name, "several prompts", shape.several_prompts)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
