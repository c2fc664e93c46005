"""The caller's grad mode, inference mode, autocast, default dtype and training mode change no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import tn_lens as tn
from tests.conftest import PAPER_MODELS
from tn_lens.models import Model


@contextmanager
def grad_disabled() -> Iterator[None]:
    """As at the top of many notebooks: not a context, but a switch."""
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "set_grad_enabled": grad_disabled,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default_dtype": default_dtype,
}
NEURONS = tn.NeuronSet([tn.Neuron("mlp", 1, None, 33), tn.Neuron("attn", 0, 1, 3)])


def numbers(model: Model) -> list[torch.Tensor]:
    """Probabilities, scores by either engine, and probabilities with neurons ablated."""
    questions = tn.load_questions("toy").part("find")[:3]
    prompts = tn.build_prompts(model, questions, order="both")
    check = tn.manipulation_check(model, prompts)
    scores = [tn.attribute(model, prompts, n_steps=3, engine=engine) for engine in ("shared_prefix", "direct")]
    mean = tn.attribute(model, prompts, n_steps=3, baseline="mean")
    ablated = tn.ask(model, prompts, neurons=NEURONS)
    resampled = tn.ask(model, prompts, neurons=NEURONS, intervention=tn.Mean())
    scored = [score for each in (*scores, mean) for score in each.difference.values()]
    return [check.probabilities, ablated, resampled, *scored]


@pytest.mark.parametrize("mode", MODES)
def test_the_modes_of_the_caller_change_nothing(mode: str, toy: Model) -> None:
    expected = numbers(toy)
    with MODES[mode]():
        found = numbers(toy)
        inside = numbers(tn.load_model("toy"))
    for a, b, c in zip(expected, found, inside, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.dtype == b.dtype == c.dtype
    # and the caller's modes are as they were
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_the_modes_are_restored_inside() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), default_dtype():
        tn.load_model("toy")
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_run(mode: str, toy: Model, few: tn.QuestionSet, whole: Any, few_resamples: None) -> None:
    from tests.conftest import QUICK

    with MODES[mode]():
        found = tn.find_truth_neurons(toy, few, QUICK)
    expected = tn.load_run(whole)
    assert found.neurons == expected.neurons
    assert found.evaluation.summary() == expected.evaluation.summary()


@pytest.mark.parametrize("name", PAPER_MODELS[:1])
def test_a_model_in_training_mode_is_run_in_evaluation_mode(name: str, tiny: Callable[..., Model]) -> None:
    model = tiny(name)
    dropout = torch.nn.Dropout(0.5)
    point = model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_module("dropout", dropout)
    handle = point.register_forward_hook(lambda module, arguments, output: dropout(output))
    expected = numbers(model)
    model.train()
    try:
        found = numbers(model)
        assert dropout.training
        assert model.training
        assert all(map(torch.equal, expected, found))
        assert not torch.equal(model(torch.arange(5)[None]), model(torch.arange(5)[None])), (
            "dropout acts on the caller's calls"
        )
    finally:
        model.eval()
        handle.remove()
        del point.dropout
