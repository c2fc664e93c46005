"""Integrated gradients with controlled error: closed forms, and equal scores in engines, backends and pass sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import PAPER_MODELS, POST_NORM, needs_hooked
from tests.test_engines import STYLES, prompts_of, styled
from tn_lens import Attribution, BadInput, Prompt, attribute
from tn_lens.attribution.methods import refinement
from tn_lens.attribution.methods.integrated_gradients import integrate
from tn_lens.attribution.methods.method import BatchScores, Place
from tn_lens.attribution.methods.refinement import integrate_adaptively, sum_adaptively
from tn_lens.attribution.quadrature import lobatto_panel, quadrature_rule
from tn_lens.models import Model

ROUNDING = 1e-14
"""Rounding error of a score, relative to the largest one."""
WIDTH = 1e-3


def rise(x: Tensor, at: float, width: float) -> Tensor:
    """A step whose derivative is a Gaussian peak."""
    return torch.erf((x - at) / width)


FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    # of one layer's two neurons [..., 2], which go from 0 to (1, 2)
    "polynomial": lambda n: n[..., 0] ** 2 * n[..., 1] - n[..., 1],
    "narrow peak": lambda n: 0.2 * rise(n[..., 0], 0.11, 0.004) + 0.1 * n[..., 0] * n[..., 1],
    "peaks of opposite sign": lambda n: n[..., 0] * (rise(n[..., 1] / 2, 0.3, 0.01) - rise(n[..., 0], 0.6, 0.01)),
    "step": lambda n: torch.tanh((n[..., 0] - 0.2) / WIDTH) + n[..., 1] ** 2,
    "edge": lambda n: n[..., 0] / (n[..., 0] + WIDTH) + 0.3 * n[..., 1],  # as after a norm
}
CALM: Callable[[Tensor], Tensor] = lambda n: 0.1 * n.sum(-1)  # noqa: E731


class Functions:
    """An engine whose layers are functions of two neurons each: f = the sum over layers at the point of the row."""

    precision = torch.finfo(torch.float64).eps
    layers: dict = {}  # noqa: RUF012 (all of them)

    def __init__(self, *layers: Callable[[Tensor], Tensor]) -> None:
        self.functions = layers
        self.prompts = prompts_of([3])
        end = torch.tensor([1.0, 2.0], dtype=torch.float64)
        self.own = {"mlp": end.expand(1, len(layers), 1, 2).clone()}
        self.logits = self._at(self.own["mlp"][:, :, 0]).sum(1, keepdim=True)  # [1, 1]
        self.n_rows = 0

    def _at(self, points: Tensor) -> Tensor:
        return torch.stack([layer(points[:, index]) for index, layer in enumerate(self.functions)], dim=1)

    def carry(self, place: Place, activation: Tensor) -> Tensor:
        return activation

    def carry_back(self, place: Place, gradient: Tensor) -> Tensor:
        return gradient

    def run(self, paths: Mapping[Place, Tensor], nudges: Mapping[Place, Tensor]) -> Tensor:
        own = self.own["mlp"][0, :, 0]  # [layer, 2]
        rows = [own + torch.cat([nudges["mlp", index][0, 0] for index in range(len(own))])] if nudges else []
        for (_, layer), path in paths.items():
            for point in path[0, :, 0]:
                rows.append(torch.cat([own[:layer], point[None], own[layer + 1 :]]))
        self.n_rows += len(rows)
        return self._at(torch.stack(rows)).sum(1)[None, :, None]  # [1, row, 1]

    def logits_of(self, final: Tensor) -> Tensor:
        return final

    def baseline(self) -> dict[str, Tensor]:
        return {"mlp": torch.zeros(len(self.functions), 2, dtype=torch.float64)}


def value(logits: Tensor, prompt: Prompt) -> Tensor:
    return logits[:, 0]


def integrated(*layers: Callable[[Tensor], Tensor], tolerance: float = 1e-3, max_nodes: int = 512) -> BatchScores:
    engine = Functions(*layers)
    options: dict[str, Any] = {"targets": [value], "baseline": engine.baseline(), "n_rows": 7}
    return integrate_adaptively(engine, tolerance=tolerance, max_nodes=max_nodes, **options)


def true_scores(*layers: Callable[[Tensor], Tensor]) -> Tensor:
    """By 8,000 panels of 8 nodes, [layer, 2]."""
    end, scores = torch.tensor([1.0, 2.0], dtype=torch.float64), []
    rule = quadrature_rule("gausslegendre", 8)
    nodes = (torch.arange(8000, dtype=torch.float64)[:, None] / 8000 + rule.nodes / 8000).flatten()
    for layer in layers:
        points = (nodes[:, None] * end).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(points).sum(), points)
        scores.append(end * (rule.weights.repeat(8000)[:, None] / 8000 * gradient).sum(0))
    return torch.stack(scores)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_closed_forms_are_within_the_tolerance(name: str, tolerance: float) -> None:
    layers = FUNCTIONS[name], CALM
    scores = integrated(*layers, tolerance=tolerance, max_nodes=2000)
    expected = true_scores(*layers)
    scale = float(expected.abs().max())
    error = (scores.scores[0]["mlp"][0] - expected).abs().amax(1)
    assert scores.error is not None
    assert scores.n_nodes is not None
    estimate = scores.error["mlp"][0]
    assert (error <= tolerance * scale).all()
    assert (estimate >= error / 10 - ROUNDING * scale).all()
    assert (estimate <= 1.001 * tolerance * scale).all()
    # the calm layer takes no more nodes because of the other one
    assert scores.n_nodes["mlp"][0, 1] == 5
    assert name == "polynomial" or scores.n_nodes["mlp"][0, 0] > 5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_not_converged_has_a_large_error(name: str) -> None:
    layers = FUNCTIONS[name], CALM
    scores = integrated(*layers, max_nodes=5)
    expected = true_scores(*layers)
    error = (scores.scores[0]["mlp"][0] - expected).abs().amax(1)
    assert scores.error is not None
    assert (scores.error["mlp"][0] >= error / 10 - ROUNDING * float(expected.abs().max())).all()
    # without refinement the panel is wrong, except for the polynomial
    wrong = error > 1e-3 * expected.abs().max()
    assert wrong.tolist() == [name != "polynomial", False]
    assert (scores.error["mlp"][0] > 1e-3 * expected.abs().max()).tolist() == [name != "polynomial", False]


def test_errors_that_cancel_in_the_sum_are_seen() -> None:
    def cancelling(n: Tensor) -> Tensor:
        # df/da = -df/db / 2 along the path (a, 2 a), so that f does not change, and completeness sees nothing
        first, second = n[..., 0], n[..., 1] / 2
        return (first - second) * torch.cos(40 * (first + second)) + 0.01 * first

    scores = integrated(cancelling)
    expected = true_scores(cancelling)
    error = float((scores.scores[0]["mlp"][0] - expected).abs().max())
    assert error <= 1e-3 * float(expected.abs().max())


def test_the_estimate_is_not_smaller_than_a_tenth_of_the_error_of_a_panel() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        frequency, phase, power = generator.uniform(0.5, 30), generator.uniform(0, 6), generator.uniform(1, 5)
        layers = (lambda n, a=frequency, b=phase, c=power: torch.sin(a * n[..., 0] + b) * n[..., 1] ** c,)
        scores = integrated(*layers, max_nodes=5)
        assert scores.error is not None
        expected = true_scores(*layers)
        error = (scores.scores[0]["mlp"][0] - expected).abs().amax(1)
        assert (scores.error["mlp"][0] >= error / 10 - ROUNDING * float(expected.abs().max())).all()


@pytest.mark.parametrize("method", ["riemann_right", "riemann_middle", "gausslegendre"])
@pytest.mark.parametrize("m", [20, 300])
def test_panels_reproduce_the_sum_of_a_rule(method: str, m: int) -> None:
    rule = quadrature_rule(method, m)
    panel = lobatto_panel(rule)
    for degree in range(8):
        expected = float(rule.weights @ rule.nodes**degree)
        assert float(panel.weights @ panel.nodes**degree) == pytest.approx(expected, abs=1e-12)
        if degree <= 2:
            assert float(panel.coarse @ panel.nodes**degree) == pytest.approx(expected, abs=1e-12)
        if degree <= 4:
            integrals = panel.nodes ** (degree + 1) / (degree + 1)
            torch.testing.assert_close(panel.antiderivative @ panel.nodes**degree, integrals, atol=1e-12, rtol=0)
    assert (panel.weights > 0).all()


def test_the_panel_of_the_integral_is_gauss_lobatto() -> None:
    panel = lobatto_panel()
    inner = math.sqrt(3 / 7) / 2
    assert panel.nodes.tolist() == pytest.approx([0, 0.5 - inner, 0.5, 0.5 + inner, 1])
    assert panel.weights.tolist() == pytest.approx([1 / 20, 49 / 180, 16 / 45, 49 / 180, 1 / 20])
    assert panel.coarse.tolist() == pytest.approx([1 / 6, 0, 2 / 3, 0, 1 / 6])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("method", ["riemann_right", "gausslegendre"])
def test_sums_from_few_nodes(name: str, method: str) -> None:
    engine = Functions(FUNCTIONS[name], CALM)
    options: dict[str, Any] = {"targets": [value], "baseline": engine.baseline(), "n_rows": 7}
    rule = quadrature_rule(method, 20)
    whole = integrate(engine, rule=rule, **options)
    n_whole, engine.n_rows = engine.n_rows, 0
    few = sum_adaptively(engine, rule=rule, tolerance=1e-3, **options)
    scale = float(whole.scores[0]["mlp"].abs().max())
    torch.testing.assert_close(few.scores[0]["mlp"], whole.scores[0]["mlp"], atol=1e-3 * scale, rtol=0)
    torch.testing.assert_close(few.change[0]["mlp"], whole.change[0]["mlp"])
    assert few.n_nodes is not None
    assert few.n_nodes["mlp"].tolist() == [[5 if name == "polynomial" else 25, 5]]
    assert engine.n_rows < n_whole


def assert_equal(one: Attribution, other: Attribution, tolerance: float) -> None:
    assert one.error is not None
    assert other.error is not None
    assert one.n_nodes is not None
    assert other.n_nodes is not None
    for site, expected in other.difference.items():
        largest = float(expected.abs().max())
        torch.testing.assert_close(one.difference[site], expected, atol=tolerance * largest, rtol=0)
        torch.testing.assert_close(one.error[site], other.error[site], atol=tolerance * largest, rtol=1e-4)
        assert torch.equal(one.n_nodes[site], other.n_nodes[site])


@needs_hooked
@pytest.mark.parametrize("style", STYLES)
def test_equal_in_both_engines_and_in_any_passes(style: str) -> None:
    prompts = prompts_of([5, 17, 9])
    options: dict[str, Any] = {"method": "adaptive", "tolerance": 1e-4, "separate": True}
    fast = attribute(styled(style), prompts, engine="shared_prefix", **options)
    assert_equal(fast, attribute(styled(style), prompts, engine="direct", **options), 1e-9)
    assert_equal(fast, attribute(styled(style), prompts, internal_batch_size=3, **options), 1e-9)
    assert fast.right is not None
    assert fast.wrong is not None
    for site, difference in fast.difference.items():
        torch.testing.assert_close(fast.right[site] - fast.wrong[site], difference, atol=1e-12, rtol=0)
    exact = attribute(styled(style), prompts, method="graded", n_steps=400)
    for site, expected in exact.difference.items():
        scale = expected.abs().amax((1, 2), keepdim=True)
        assert ((fast.difference[site] - expected).abs() <= 1e-4 * scale).all()


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_papers_models_converge(name: str, tiny: Callable[..., Model]) -> None:
    model, prompts = tiny(name), prompts_of([12, 23])
    scores = attribute(model, prompts, method="adaptive", max_nodes=2000)
    fine = attribute(model, prompts, method="graded", n_steps=400)
    assert scores.error is not None
    assert scores.n_nodes is not None
    for site, expected in fine.difference.items():
        scale = expected.abs().amax((1, 2))[:, None]
        error = (scores.difference[site] - expected).abs().amax(2) / scale
        assert (scores.error[site] / scale <= 1.1e-3).all()
        assert (error <= 1e-3).all()
    if name in POST_NORM:  # the path has a steep edge, which takes more nodes
        assert max(int(nodes.max()) for nodes in scores.n_nodes.values()) > 20


@needs_hooked
def test_tolerance_zero_and_none_are_every_node_of_the_rule() -> None:
    model, prompts = styled("gpt2"), prompts_of([9, 14])
    whole = attribute(model, prompts)
    zero = attribute(model, prompts, tolerance=0.0)
    few = attribute(model, prompts, tolerance=1e-3)
    assert whole.error is None
    assert few.error is not None
    for site, expected in whole.difference.items():
        assert torch.equal(zero.difference[site], expected)
        assert not torch.equal(few.difference[site], expected)
        scale = expected.abs().amax((1, 2), keepdim=True)
        assert ((few.difference[site] - expected).abs() <= 1e-3 * scale).all()


def test_half_precision_ends(tiny: Callable[..., Model]) -> None:
    prompts = prompts_of([9, 14])
    scores = attribute(tiny("Qwen2.5-3B-Instruct", torch.bfloat16), prompts, method="adaptive", max_nodes=64)
    exact = attribute(tiny("Qwen2.5-3B-Instruct"), prompts, method="adaptive")
    assert scores.error is not None
    for site, expected in exact.difference.items():
        both = torch.stack([scores.difference[site].flatten(), expected.flatten().float()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.98
        assert scores.error[site].isfinite().all()


@needs_hooked
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "adaptive", "tolerance": 0.0}, "tolerance above 0"),
        ({"method": "adaptive", "tolerance": 1.0}, r"in \[0, 1\); got 1"),
        ({"method": "adaptive", "tolerance": -0.1}, r"in \[0, 1\)"),
        ({"method": "adaptive", "tolerance": float("nan")}, r"in \[0, 1\)"),
        ({"method": "adaptive", "max_nodes": 4}, "from 5 to 10,000; got 4"),
    ],
)
def test_bad_numbers(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        attribute(styled("gpt2"), prompts_of([5]), **options)


@needs_hooked
def test_without_refinement_a_place_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = styled("gpt2"), prompts_of([9, 14, 20])
    refined = attribute(model, prompts, method="adaptive", tolerance=1e-5)
    monkeypatch.setattr(refinement._RefinedPaths, "above", lambda *_, **__: {})
    plain = attribute(model, prompts, method="adaptive", tolerance=1e-5)
    assert plain.error is not None
    wrong = []
    for site, expected in refined.difference.items():
        error = (plain.difference[site] - expected).abs().amax(2)
        wrong.append(bool((error > 1e-5 * expected.abs().amax((1, 2))[:, None]).any()))
        assert (plain.error[site] >= error / 10).all()
    assert any(wrong)
