"""Results on CUDA equal those on the CPU; run with `pytest -m gpu` on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import PAPER_MODELS
from tests.test_engines import assert_equal, prompts_of
from tests.test_generation import PROMPTS, some_neurons
from tn_lens import (
    Intervention,
    Mean,
    Resample,
    Scale,
    Settings,
    Zero,
    ablate,
    ask,
    attribute,
    build_prompts,
    evaluate,
    find_truth_neurons,
    generate,
    load_model,
    load_questions,
    measure_damage,
)
from tn_lens.attribution.attribute import choose_engine
from tn_lens.models import Model, last_logits
from tn_lens.neurons import NEURON_SITES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine"),
]


@pytest.fixture(scope="module")
def on_gpu() -> Model:
    return load_model("toy", device="cuda", dtype="float32")


@pytest.fixture(scope="module")
def on_cpu() -> Model:
    return load_model("toy", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def wide() -> tuple[Model, Model]:
    """The embedded model in float64 on the GPU and on the CPU, whose choices between tokens and neurons do not depend on rounding."""
    gpu, cpu = (load_model("toy", device=device, dtype="float64") for device in ("cuda", "cpu"))
    return gpu, cpu


@pytest.mark.parametrize("name", PAPER_MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_engines_are_equal(
    name: str, dtype: torch.dtype, tolerance: float, checkpoint: Callable[[str], Path]
) -> None:
    model = load_model(checkpoint(name), device="cuda", dtype=dtype)
    prompts = prompts_of([12, 40, 23])
    options: dict[str, Any] = {"n_steps": 4, "separate": True}
    fast = attribute(model, prompts, engine="shared_prefix", **options)
    slow = attribute(model, prompts, engine="direct", **options)
    assert_equal(fast, slow, tolerance)
    assert all(fast.difference[site].device.type == "cpu" for site in NEURON_SITES)


def test_the_numbers_are_those_of_the_cpu(on_gpu: Model, on_cpu: Model) -> None:
    tokens = torch.randint(4, 283, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        last_logits(on_gpu, tokens.cuda()).cpu(), last_logits(on_cpu, tokens), atol=1e-3, rtol=1e-3
    )
    prompts = build_prompts(on_cpu, load_questions("toy").part("find")[:4], order="both")
    assert_equal(attribute(on_gpu, prompts), attribute(on_cpu, prompts), 1e-3)


@pytest.mark.parametrize(("method", "tolerance"), [("riemann_right", 1e-10), ("adaptive", 1e-3)])
def test_scores_are_what_they_are_on_the_cpu(method: str, tolerance: float, wide: tuple[Model, Model]) -> None:
    prompts = build_prompts(wide[1], load_questions("toy").part("find")[:6], order="both")
    gpu, cpu = (attribute(model, prompts, method=method) for model in wide)
    assert_equal(gpu, cpu, tolerance)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    "intervention", [Zero(), Scale(factor=2.0), Mean(), Resample()], ids=lambda one: type(one).__name__
)
def test_answers_are_what_they_are_on_the_cpu(
    intervention: Intervention, share_prefix: bool, wide: tuple[Model, Model]
) -> None:
    prompts, neurons = build_prompts(wide[1], load_questions("toy").part("report")[:20]), some_neurons(wide[1])
    options: dict[str, Any] = {"intervention": intervention, "share_prefix": share_prefix}
    for ablated in ({}, {"neurons": neurons, **options}):
        gpu, cpu = (ask(model, prompts, **ablated) for model in wide)
        assert gpu.device.type == "cpu"
        torch.testing.assert_close(gpu, cpu, atol=1e-10, rtol=0)


def test_continuations_are_what_they_are_on_the_cpu(wide: tuple[Model, Model]) -> None:
    neurons = some_neurons(wide[1], 40)
    gpu, cpu = (generate(model, PROMPTS, neurons=neurons, max_new_tokens=20) for model in wide)
    assert (cpu["unablated"] != cpu["ablated"]).any(), "the neurons have an effect"
    assert gpu.equals(cpu)


def test_damage_is_what_it_is_on_the_cpu(wide: tuple[Model, Model]) -> None:
    prompts, neurons = build_prompts(wide[1], load_questions("toy").part("find")[:8]), some_neurons(wide[1], 2)
    gpu, cpu = (measure_damage(model, neurons, prompts) for model in wide)
    assert gpu.neurons == cpu.neurons
    assert (gpu.text_loss, gpu.answer_mass, gpu.rest_loss) == pytest.approx(
        (cpu.text_loss, cpu.answer_mass, cpu.rest_loss), abs=1e-10
    )
    assert [(row.condition, row.part, row.n_neurons) for row in gpu.rows] == [
        (row.condition, row.part, row.n_neurons) for row in cpu.rows
    ]
    torch.testing.assert_close(
        torch.tensor(gpu.to_frame()[["rise", "answer_mass"]].to_numpy()),
        torch.tensor(cpu.to_frame()[["rise", "answer_mass"]].to_numpy()),
        atol=1e-10,
        rtol=0,
    )


def test_ablation_is_what_it_is_on_the_cpu(on_gpu: Model, on_cpu: Model) -> None:
    questions = load_questions("toy").part("report")[:40]
    found = find_truth_neurons(on_cpu, load_questions("toy"), Settings(limit=60, n_steps=5, n_repetitions=2))
    for mode in ("zero", "mean", "resample"):
        cpu, gpu = (evaluate(m, questions, found.neurons, n_repetitions=2, intervention=mode) for m in (on_cpu, on_gpu))
        for name in cpu.conditions:
            torch.testing.assert_close(
                torch.tensor(gpu.probabilities[name]), torch.tensor(cpu.probabilities[name]), atol=1e-3, rtol=0
            )
    with ablate(on_gpu, found.neurons):
        pass
    assert not any(point.fwd_hooks for point in on_gpu.hook_dict.values())


def test_a_whole_run(on_gpu: Model, on_cpu: Model, tmp_path: Path) -> None:
    settings = Settings(limit=80, n_steps=5, n_repetitions=2)
    gpu = find_truth_neurons(on_gpu, load_questions("toy"), settings, out=tmp_path / "run")
    cpu = find_truth_neurons(on_cpu, load_questions("toy"), settings)
    assert gpu.neurons.jaccard(cpu.neurons) > 0.95
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights(dtype: str, on_gpu: Model) -> None:
    narrow = load_model("toy", device="cuda", dtype=dtype)
    assert choose_engine(narrow, "auto", "last") == "shared_prefix"
    prompts = build_prompts(narrow, load_questions("toy").part("find")[:20], order="both")
    ours, wide = attribute(narrow, prompts), attribute(on_gpu, prompts)
    for site in NEURON_SITES:
        assert ours.difference[site].dtype == torch.float32
        pairs = zip(ours.difference[site].flatten(1), wide.difference[site].flatten(1), strict=True)
        assert torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).median() > 0.999


def test_memory_stays_within_the_budget(on_gpu: Model) -> None:
    prompts = build_prompts(on_gpu, load_questions("toy").part("find")[:64], order="both")
    budget = 64 * 2**20
    attribute(on_gpu, prompts[:2], max_memory=budget)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    attribute(on_gpu, prompts, max_memory=budget)
    assert torch.cuda.max_memory_allocated() - start < budget
