"""Figures contain the numbers of their results, have the finding as title, and use distinguishable colours."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from tests.browser import CHROMIUM
from tn_lens import (
    Attribution,
    BadInput,
    ConvergenceCheck,
    Evaluation,
    Neuron,
    NeuronSet,
    Prompt,
    PromptSet,
    figures,
    select_neurons,
)
from tn_lens.figures.layout import TITLE_WIDTH, tick_step
from tn_lens.figures.look import LOOKS
from tn_lens.figures.selection import difference_of
from tn_lens.neurons import NeuronSpace

SPACE = NeuronSpace(n_layers=4, d_mlp=6, n_heads=2, d_head=3)
FOUND = NeuronSet(
    [Neuron("mlp", 0, None, 3), Neuron("mlp", 2, None, 1), Neuron("mlp", 2, None, 5), Neuron("attn", 1, 0, 2)]
)
CATEGORIES = ("myths", "law", "<b>sly</b> %{x}")


def prompts(n: int, n_orders: int = 2) -> PromptSet:
    """Questions of three categories with two choices, in every order."""
    return PromptSet(
        tuple(
            Prompt(
                token_ids=(1,),
                label_ids=((2,), (3,)),
                right=order.index(0),
                question=str(question),
                order=order,
                category=CATEGORIES[0 if question < n // 2 else 1 if question < n - 2 else 2],
                text=f"Is {question} < 3?",
            )
            for question in range(n)
            for order in ((0, 1), (1, 0))[:n_orders]
        )
    )


def evaluation(name: str = "m", n: int = 40, n_orders: int = 2, seed: int = 0) -> Evaluation:
    """Random answers, which are worse with the neurons ablated."""
    rng = np.random.default_rng(seed)
    asked = prompts(n, n_orders)
    right = np.array([p.right for p in asked])

    def answers(draws: int, skill: float) -> np.ndarray:
        p = np.clip(skill + 0.2 * rng.normal(size=(draws, len(asked))), 0.02, 0.98)
        return np.stack([np.where(right == 0, p, 1 - p), np.where(right == 0, 1 - p, p)], axis=-1)

    return Evaluation(
        name="truths",
        model_name=name,
        prompts=asked,
        asked=np.arange(n)[None] * n_orders + rng.integers(n_orders, size=(5, n)),
        neurons=FOUND,
        probabilities={
            "unablated": answers(1, 0.8),
            "random": answers(5, 0.78),
            "random_matched": answers(5, 0.77),
            "ablated": answers(1, 0.5),
        },
        seed=0,
    )


def reloaded(e: Evaluation) -> Evaluation:
    """The same evaluation, loaded from a file."""
    return Evaluation.from_bytes(e.to_bytes(".safetensors"), ".safetensors")


def attribution(n: int = 30, seed: int = 0) -> Attribution:
    """Random scores, with an effect in the neurons of FOUND."""
    torch.manual_seed(seed)
    asked = prompts(n, 1)
    difference = {"mlp": torch.randn(n, 4, 6) * 0.02, "attn": torch.randn(n, 4, 6) * 0.02}
    for neuron in FOUND:
        difference[neuron.site][:, neuron.layer, SPACE.flat(neuron)] += 0.1
    change = {site: scores.sum(-1) + 0.01 * torch.randn(n, 4) for site, scores in difference.items()}
    return Attribution(prompts=asked, space=SPACE, difference=difference, change=change)


def bars(figure: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data if trace.type == "bar"}


def test_figure_5_of_one_model() -> None:
    heatmap, written = figures.plot_layers(FOUND, n_layers=4).data
    np.testing.assert_allclose(np.array(heatmap.z), [[0.25, 0, 0.5, 0], [0, 0.25, 0, 0]])
    assert np.array(heatmap.customdata)[..., 0].tolist() == [[1, 0, 2, 0], [0, 1, 0, 0]]
    assert [name.split()[0] for name in heatmap.y] == ["MLP", "Attention"]
    assert list(written.text) == ["1", "", "2", "", "", "1", "", ""]
    (together, _) = figures.plot_layers(FOUND, n_layers=4, sites="together").data
    np.testing.assert_allclose(np.array(together.z), [[0.25, 0.25, 0.5, 0]])


def test_figure_5_of_several_models_keeps_every_layer_and_each_model_sums_to_one() -> None:
    named = {"a": FOUND, "b": NeuronSet(list(FOUND)[:1]), "none": NeuronSet()}
    figure = figures.plot_layers(named, {"a": 4, "b": 3, "none": 5})
    of: dict[str, list[Any]] = {}
    for trace in figure.data:
        of.setdefault(trace.name, []).append(trace)
    assert {name: len(traces) for name, traces in of.items()} == {"a": 2, "b": 2, "none": 2}
    for name, total in (("a", 1), ("b", 1), ("none", 0)):
        assert sum(float(np.sum(trace.z)) for trace in of[name]) == pytest.approx(total)
    for name, depth in (("a", 4), ("b", 3), ("none", 5)):
        for trace in of[name]:
            assert np.array(trace.z).shape == (1, depth)
            np.testing.assert_allclose(trace.x, np.linspace(0, 1, depth + 1), err_msg="relative depth")
    counts = {trace.customdata[0][0][4]: [cell[0] for cell in trace.customdata[0]] for trace in of["a"]}
    assert counts == {"MLP (hook_post)": [1, 0, 2, 0], "Attention (hook_z)": [0, 1, 0, 0]}
    assert list(figure.layout.yaxis.ticktext) == ["a", "b", "none"]
    by_layer = figures.plot_layers(named, {"a": 4, "b": 3, "none": 5}, across="layer", sites="together")
    assert list(by_layer.data[1].x) == [-0.5, 0.5, 1.5, 2.5]
    assert "No truth neurons" in figures.plot_layers({"none": NeuronSet()}, 3).layout.title.text


@pytest.mark.parametrize(
    ("layers", "n_layers", "said"),
    [
        ([5, 5, 5, 0], 12, "75 % of the 4 truth neurons lie in the middle third of 12 layers"),
        ([0, 5, 10, 11], 12, "50 % of the 4 truth neurons lie in the last third"),
        ([0, 5, 11], 12, "spread over 12 layers: 33 % in the first, 33 % in the middle, 33 % in the last third"),
        ([1], 2, "The only truth neuron lies in layer 1, the last of 2"),
        ([1, 1, 0], 4, "67 % of the 3 truth neurons lie in layer 1 of 4, counted from 0"),
        ([0, 0], 2, "100 % of the 2 truth neurons lie in layer 0, the first of 2"),
        ([0, 0], 1, "layer 0, the only one"),
        ([], 9, "No truth neurons were found in 9 layers"),
    ],
)
def test_the_title_of_figure_5_says_where_they_lie(layers: list[int], n_layers: int, said: str) -> None:
    found = NeuronSet(Neuron("mlp", layer, None, place) for place, layer in enumerate(layers))
    assert said in figures.plot_layers(found, n_layers).finding


@pytest.mark.parametrize(
    ("sets", "depths", "said"),
    [
        (([1, 1], [1, 0, 1]), (2, 2), "In 2 of 2 models the largest fraction of the truth neurons lies in layer 1, the last of 2"),
        (([5], [0, 5, 5], [0]), (12, 12, 6), "In 2 of 3 models the largest fraction of the truth neurons lies in the middle third of the layers"),
        (([1], [5]), (2, 12), "Relative depth of the truth neurons of 2 models"),
        (([1], []), (2, 12), "In 1 of 1 model (none were found in 1 other) the largest fraction of the truth neurons lies in layer 1, the last of 2"),
        (([], []), (2, 12), "No truth neurons were found in 2 models"),
    ],
)  # fmt: skip
def test_thirds_are_those_of_models_that_have_some(sets: Any, depths: tuple[int, ...], said: str) -> None:
    named = {str(i): NeuronSet(Neuron("mlp", layer, None, place) for place, layer in enumerate(layers)) for i, layers in enumerate(sets)}  # fmt: skip
    assert figures.plot_layers(named, {str(i): depth for i, depth in enumerate(depths)}).finding == said


def test_figure_5_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(BadInput, match="n_layers"):
        figures.plot_layers(FOUND)
    with pytest.raises(BadInput, match="n_layers of 'b'"):
        figures.plot_layers({"a": FOUND, "b": FOUND}, {"a": 4})
    with pytest.raises(BadInput, match="greater than every neuron's layer"):
        figures.plot_layers(FOUND, n_layers=2)
    with pytest.raises(BadInput, match="got none"):
        figures.plot_layers({})


@pytest.mark.parametrize("stored", [False, True])
def test_table_1_as_bars(stored: bool) -> None:
    one = evaluation()
    shown = reloaded(one) if stored else one
    figure = figures.plot_accuracies(shown)
    drawn = bars(figure)
    assert len(drawn) == 4
    for name, bar in zip(("unablated", "random", "random_matched", "ablated"), drawn.values(), strict=True):
        assert bar.x[0] == pytest.approx(100 * one.conditions[name].accuracy, abs=1e-5)
        assert bar.error_x.array[0] == pytest.approx(100 * one.conditions[name].accuracy_std, abs=1e-5)
    named = {trace.name: trace for trace in figure.data}
    points = sorted(named["one repetition"].x)
    expected = sorted(100 * float(v) for result in one.conditions.values() for v in result.accuracies)
    assert points == pytest.approx(expected)
    averaged = [100 * result.order_averaged_accuracy for result in one.conditions.values()]
    assert list(named["order-averaged"].x) == pytest.approx(averaged, abs=1e-5)
    assert figure.layout.shapes[0].x0 == 50, "chance"
    after, before = (f"{100 * one.conditions[name].accuracy:.1f} %" for name in ("ablated", "unablated"))
    assert f"{after} accuracy with 4 neurons zero-ablated" in figure.finding
    assert before in figure.finding


def test_table_1_without_order_averages_draws_none() -> None:
    one = evaluation(n_orders=1)
    figure = figures.plot_accuracies([one, replace(one, model_name="other")])
    assert "order-averaged" not in {trace.name for trace in figure.data}
    assert list(figure.layout.yaxis.ticktext) == ["m", "other"]
    drawn = evaluation()
    drawn.probabilities["random"][0, 3] = np.nan
    (named,) = [t for t in figures.plot_accuracies(drawn).data if t.name == "order-averaged"]
    assert len(named.x) == 3, "a condition that was not asked every order has no average"


def test_without_a_welch_test_the_interval_over_questions_decides() -> None:
    one = evaluation(n_orders=1, n=80)
    kept = replace(one, probabilities={**one.probabilities, "ablated": one.probabilities["unablated"]})
    assert np.isnan([one.welch_p, kept.welch_p]).all(), "every question has one order"
    assert (one.is_lower, kept.is_lower) == (True, False)
    title = "lowers accuracy in 1 of 2 evaluations"
    by_interval = figures.plot_accuracies([one, replace(kept, name="b", model_name="b")]).finding
    assert f"{title} (95 % interval over questions)" in by_interval
    both = figures.plot_accuracies([evaluation(), replace(kept, name="b", model_name="b")]).finding
    assert f"{title} (one-sided Welch test, p < 0.05; where no two repetitions differ, 95 % interval" in both


@pytest.mark.parametrize("stored", [False, True])
def test_figure_3(stored: bool) -> None:
    several = [evaluation("a"), evaluation("b", seed=1)]
    shown = [reloaded(e) for e in several] if stored else several
    figure = figures.plot_probability_change(shown)
    named = {trace.name: list(trace.x) for trace in figure.data if trace.name}
    assert named["mean (equation 11)"] == pytest.approx([100 * e.probability_change for e in several])
    assert named["floored mean"] == pytest.approx([100 * e.probability_change_floored for e in several])
    assert named["median"] == pytest.approx([100 * e.probability_change_median for e in several])
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]
    (bar,) = bars(figure).values()
    assert list(bar.text) == [f"{100 * e.probability_change:.1f} %" for e in several], "at the bar that it belongs to"
    marks = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(marks) == 2
    assert {trace.mode for trace in marks} == {"markers"}, "no text beside them"
    for row in (0, 1):
        assert all(mark.y[row] > bar.y[row] + bar.width / 2 for mark in marks), "below the bar and its label"


def test_figure_3_of_nothing_shows_whole_marks() -> None:
    one = evaluation()
    one = replace(one, probabilities={**one.probabilities, "ablated": one.probabilities["unablated"]})
    figure = figures.plot_probability_change(one)
    assert [trace.x[0] for trace in figure.data] == [0, 0, 0]
    low, high = figure.layout.xaxis.range
    assert low < 0 < high
    assert "does not change the probability" in figure.finding


@pytest.mark.parametrize("stored", [False, True])
def test_figure_4_hides_small_categories_and_counts_them(stored: bool) -> None:
    one = evaluation()
    shown = reloaded(one) if stored else one
    figure = figures.plot_categories(shown)
    frame = one.by_category()
    (bar,) = bars(figure).values()
    assert list(bar.x) == pytest.approx((100 * frame["share_hurt"]).tolist(), abs=1e-4)
    assert [cell[1] for cell in bar.customdata] == frame["n_questions"].tolist() == [20, 18]
    assert "1 category with fewer than 15 questions (2 questions together) not shown" in figure.remark
    assert {label.split(" (")[0] for label in figure.layout.yaxis.ticktext} == {"myths", "law"}
    everything = figures.plot_categories(shown, least=1)
    assert len(bars(everything)["m"].x) == 3
    assert "not shown" not in everything.remark
    nothing = figures.plot_categories(shown, least=41)
    assert "No category has 41 questions" in nothing.finding
    assert "3 categories with fewer than 41 questions (40 questions together)" in nothing.remark


def test_figure_4_of_several_models_sorts_by_their_mean() -> None:
    several = [evaluation("a"), evaluation("b", seed=1), evaluation("c", seed=2)]
    figure = figures.plot_categories(several, least=1)
    shares = pd.concat([e.by_category(1) for e in several]).groupby("category")["share_hurt"].mean()
    rows = [label.rsplit(" (", 1)[0] for label in figure.layout.yaxis.ticktext]
    expected = shares.sort_values(ascending=False, kind="stable").index
    assert rows == [str(name).replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%&#123;") for name in expected]
    assert len([trace for trace in figure.data if trace.mode == "markers"]) == 3


def test_dose_and_response() -> None:
    rows = [
        {"factor": f, "condition": name, "accuracy": 50 + 10 * f, "order_averaged_accuracy": 60 + 10 * f, "p_right": 0.5,
         "answer_mass": 0.9, "share_a": 0.5}
        for f in (2.0, 0.0, 1.0) for name in ("ablated", "random_matched")
    ]  # fmt: skip
    figure = figures.plot_dose_response(pd.DataFrame(rows))
    named = {trace.name: trace for trace in figure.data}
    assert list(named["truth neurons, order-averaged"].x) == [0, 1, 2]
    assert list(named["truth neurons, order-averaged"].y) == [60, 70, 80]
    assert list(named["matched random neurons, plain"].y) == [50, 60, 70]
    assert "60.0 % with the truth neurons scaled by 0, and 80.0 % scaled by 2" in figure.finding
    unasked = pd.DataFrame(rows).assign(order_averaged_accuracy=float("nan"))
    assert {trace.name for trace in figures.plot_dose_response(unasked).data} == {
        "truth neurons", "matched random neurons"
    }  # fmt: skip
    with pytest.raises(BadInput, match="'share_a' is missing"):
        figures.plot_dose_response(pd.DataFrame(rows).drop(columns="share_a"))
    with pytest.raises(BadInput, match="got none"):
        figures.plot_dose_response(pd.DataFrame(rows).query("condition == 'random_matched'"))


def test_the_sweep_frames_what_was_chosen() -> None:
    frame = pd.DataFrame([{"t": t, "p": p, "n_candidates": 9, "n_found": round(100 * t + 10 * p)} for t in (0.01, 0.2) for p in (0.1, 0.4)])  # fmt: skip
    figure = figures.plot_sweep(frame, chosen=(0.2, 0.4))
    assert np.array(figure.data[0].text).tolist() == [[2, 5], [21, 24]]
    assert list(figure.data[1].text) == ["2", "5", "21", "24"]
    (frame_of,) = figure.layout.shapes
    assert (frame_of.x0, frame_of.y0) == (0.5, 0.5)
    assert not figures.plot_sweep(frame).layout.shapes


def test_the_volcano_holds_every_candidate() -> None:
    selection = select_neurons(attribution(), adaptive_threshold=0.1, share_threshold=0.2)
    figure = figures.plot_candidates(selection)
    assert 0 < selection.found.sum() < len(selection.candidates)
    drawn = {cell[0]: (x, y, trace.name) for trace in figure.data for x, y, cell in zip(trace.x, trace.y, trace.customdata, strict=True)}  # fmt: skip
    assert len(drawn) == len(selection.candidates)
    for i, neuron in enumerate(selection.candidates):
        x, y, name = drawn[str(neuron)]
        assert x == pytest.approx(selection.mean_difference[i])
        assert y == pytest.approx(-np.log10(selection.p_value[i]))
        assert name.endswith(", found") == bool(selection.found[i])
    (border,) = [shape for shape in figure.layout.shapes if shape.y0 == shape.y1]
    assert all((y > border.y0) == name.endswith(", found") for _, y, name in drawn.values())
    assert f"{selection.found.sum()} of {len(selection.candidates)} candidates" in figure.finding


@pytest.mark.parametrize("correction", ["bonferroni", "holm", "benjamini-hochberg", "none"])
def test_the_border_of_the_volcano_parts_found_from_not_found(correction: Any) -> None:
    for seed in range(4):
        selection = select_neurons(
            attribution(n=12, seed=seed), adaptive_threshold=0.05, share_threshold=0.1, correction=correction
        )
        borders = [s.y0 for s in figures.plot_candidates(selection).layout.shapes if s.y0 == s.y1]
        heights = -np.log10(selection.p_value)
        assert all(((heights > border) == selection.found).all() for border in borders)
        assert borders


def test_a_volcano_of_nothing_and_of_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = attribution()
    nothing = replace(scores, difference={site: -scores.abs() for site, scores in scores.difference.items()})
    empty = figures.plot_candidates(select_neurons(nothing, adaptive_threshold=0.2, share_threshold=0.4))
    assert empty.finding == "There are no candidates to test"
    assert not empty.layout.xaxis.visible
    assert not empty.layout.yaxis.visible
    assert not empty.layout.shapes
    assert "No neuron was salient" in empty.layout.annotations[0].text
    monkeypatch.setattr("tn_lens.figures.selection.MOST_CANDIDATES", 5)
    selection = select_neurons(scores, adaptive_threshold=0.1, share_threshold=0.2)
    figure = figures.plot_candidates(selection)
    assert sum(len(trace.x) for trace in figure.data) == 5
    assert f"{len(selection.candidates) - 5} further candidates" in figure.remark
    untested = figures.plot_candidates(select_neurons(scores, adaptive_threshold=0.1, share_threshold=0.2, alpha=None))
    assert all(trace.name.endswith(", found") for trace in untested.data)


def test_one_neuron_on_right_and_wrong_answers() -> None:
    right, wrong = attribution(20), attribution(7, seed=3)
    neuron = Neuron("attn", 1, 0, 2)
    figure = figures.plot_difference(right, neuron, mistaken=wrong)
    for trace, scores in zip(figure.data, (right, wrong), strict=True):
        assert list(trace.x) == pytest.approx(scores.difference["attn"][:, 1, 2].tolist())
    assert [trace.name for trace in figure.data] == ["answered right (20)", "answered wrong (7)"]
    assert f"{float(right.difference['attn'][:, 1, 2].mean()):+.2g} where the model is right" in figure.finding
    both = replace(right, prompts=prompts(10, 2))
    assert difference_of(both, neuron)["0"] == pytest.approx(float(right.difference["attn"][:2, 1, 2].mean()))
    with pytest.raises(BadInput, match="got mlp 9:0"):
        figures.plot_difference(right, Neuron("mlp", 9, None, 0))


def test_the_map_of_one_question() -> None:
    scores = attribution()
    figure = figures.plot_attribution(scores, 3, top=4)
    heatmap, bar = figure.data
    expected = torch.stack([scores.difference[site][3].sum(-1) for site in ("mlp", "attn")])
    np.testing.assert_allclose(np.array(heatmap.z), expected, rtol=1e-5)
    everything = {
        str(SPACE.neuron(site, layer, flat)): float(scores.difference[site][3, layer, flat])
        for site in ("mlp", "attn") for layer in range(4) for flat in range(6)
    }  # fmt: skip
    strongest = sorted(everything, key=lambda name: -abs(everything[name]))[:4]
    assert list(bar.y) == sorted(strongest, key=lambda name: -everything[name])
    assert list(bar.x) == pytest.approx([everything[name] for name in bar.y])
    assert "Is 3 &lt; 3?" in figure.remark
    with pytest.raises(BadInput, match="index of one of 30 attributed prompts; got 30"):
        figures.plot_attribution(scores, 30)
    with pytest.raises(BadInput, match="at least 1"):
        figures.plot_attribution(scores, 0, top=0)


def test_the_completeness_gap() -> None:
    scores = attribution()
    frame = scores.completeness()
    held = {site: {k: of[k].tolist() for k in ("gap", "change")} for site, of in frame.groupby("site")}
    for figure in (figures.plot_completeness(scores), figures.plot_completeness(held)):
        for trace in figure.data:
            kind = "gap" if trace.name == "completeness error" else "change"
            site = "mlp" if trace.yaxis == "y" else "attn"
            if figure.data[0].y[0] == held["mlp"]["change"][0]:
                assert list(trace.y) == pytest.approx(held[site][kind])
    worst = frame.loc[frame["gap"].idxmax()]
    said = f"{100 * worst['gap'] / worst['change']:.1f} % of the change there ({worst['change']:.2g})"
    assert said in figures.plot_completeness(scores).finding
    assert said in scores.summary(), "one definition"
    assert f"{100 * scores.completeness_gap:.1f} %" in scores.summary(), "and its relation to the other"
    beyond = figures.plot_completeness(
        {"mlp": {"gap": [0.01], "change": [0.6]}, "attn": {"gap": [0.42], "change": [0.4]}}
    )
    assert "largest in Attention, layer 0: 0.42 on average, 105.0 % of the change there (0.4)" in beyond.finding
    one = figures.plot_completeness({"mlp": {"gap": [0.0], "change": [0.0]}})
    assert "0.0 %" in one.finding
    assert "where nothing changes" in figures.plot_completeness({"mlp": {"gap": [0.1], "change": [0.0]}}).finding
    with pytest.raises(BadInput, match="got none"):
        figures.plot_completeness({"mlp": {"gap": [], "change": []}})


def test_overlap() -> None:
    overlap = np.array([[1.0, 0.25], [0.25, 1.0]])
    figure = figures.plot_overlap(["a", "b"], overlap)
    np.testing.assert_array_equal(np.array(figure.data[0].z), overlap)
    assert list(figure.data[1].text) == ["100", "25", "25", "100"]
    assert "25 % of their distribution" in figure.finding
    assert figures.plot_overlap(["a", "b"], overlap, title="Mine").finding == "Mine"


@cache
def everything(theme: Any) -> dict[str, figures.Figure]:
    scores, one = attribution(), evaluation("<i>a model</i>" + 50 * "x")
    frame = pd.DataFrame([{"t": 0.1, "p": 0.4, "n_candidates": 3, "n_found": 2}])
    dose = pd.DataFrame([{"factor": 0.0, "condition": "ablated", "accuracy": 1.0, "order_averaged_accuracy": 2.0, "answer_mass": 1.0, "share_a": 0.5}])  # fmt: skip
    return {
        "layers": figures.plot_layers({"<i>a model</i>": FOUND}, 4, theme=theme),
        "several": figures.plot_layers({"<i>a</i>": FOUND, "b": FOUND}, 4, theme=theme),
        "overlap": figures.plot_overlap(["<i>a</i>", "b"], np.eye(2), theme=theme),
        "accuracies": figures.plot_accuracies([one, evaluation()], theme=theme),
        "accuracy": figures.plot_accuracies(one, theme=theme),
        "change": figures.plot_probability_change(one, theme=theme),
        "categories": figures.plot_categories(one, least=1, theme=theme),
        "dose": figures.plot_dose_response(dose, theme=theme),
        "sweep": figures.plot_sweep(frame, theme=theme),
        "candidates": figures.plot_candidates(
            select_neurons(scores, adaptive_threshold=0.1, share_threshold=0.2), theme=theme
        ),
        "difference": figures.plot_difference(scores, Neuron("mlp", 0, None, 3), theme=theme),
        "attribution": figures.plot_attribution(scores, theme=theme),
        "completeness": figures.plot_completeness(scores, theme=theme),
        "convergence": figures.plot_convergence(compared(n_layers=3), theme=theme),
    }


def compared(n_layers: int) -> ConvergenceCheck:
    """The errors of a rule with 5 and 20 steps on two prompts."""
    rng = np.random.default_rng(0)
    return ConvergenceCheck(
        method="riemann_right",
        n_steps=(5, 20),
        tolerance=1e-3,
        n_questions=2,
        error={site: 10.0 ** rng.uniform(-7, 0, (2, 2, n_layers)) for site in ("mlp", "attn")},
        reference_error={site: 10.0 ** rng.uniform(-7, -3, (2, n_layers)) for site in ("mlp", "attn")},
        jaccard=np.ones((2, 2)),
        candidates=(NeuronSet(()), NeuronSet(())),
        converged=NeuronSet(()),
        adaptive_threshold=0.2,
        share_threshold=0.4,
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_has_the_look(theme: Any) -> None:
    for name, figure in everything(theme).items():
        assert figure.layout.paper_bgcolor == LOOKS[theme].paper, name
        assert figure.layout.font.size >= 14
        assert 150 < figure.layout.height < 1200, name
        lines = figure.layout.title.text.split("<br>")
        assert len(lines) <= 3
        assert all(len(line) <= TITLE_WIDTH or " " not in line for line in lines), name
        assert figure.layout.margin.t > 30, name


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    drawn, drawn_again = everything("light"), everything.__wrapped__("light")
    for name, figure in drawn.items():
        again = drawn_again[name]
        assert again is not figure
        assert figure.to_html(include_plotlyjs=False) == again.to_html(include_plotlyjs=False), name
        figure.write_html(tmp_path / "a.html", include_plotlyjs=False)
        again.write_html(tmp_path / "b.html", include_plotlyjs=False)
        assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes(), name
    digests = {figure.digest() for figure in drawn.values()}
    assert len(digests) == len(drawn), "two figures of a page have ids of their own"
    assert 'id="mine"' in drawn["layers"].to_html(include_plotlyjs=False, div_id="mine")


def test_text_of_users_is_escaped_in_every_label() -> None:
    for name, figure in everything("light").items():
        text = figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
        assert "<i>" not in text, name
        assert "<b>sly" not in text, name
        assert "%{x}</b>" not in text.replace("<extra></extra>", ""), name
    assert "&lt;i&gt;a model&lt;/i&gt;" in everything("light")["layers"].finding


@pytest.mark.parametrize(("n", "step"), [(1, 1), (2, 1), (12, 1), (24, 2), (36, 4), (60, 5), (80, 8), (126, 10)])
def test_ticks_are_few_and_round(n: int, step: int) -> None:
    assert tick_step(n) == step
    assert n / step <= 13


# Machado, Oliveira and Fernandes (2009): how colours look to people without one kind of cone.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    v = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    matrix = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    xyz = matrix @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(colours: tuple[str, ...], see: Callable[[np.ndarray], np.ndarray]) -> float:
    return min(float(np.linalg.norm(lab(see(linear(a))) - lab(see(linear(b))))) for a, b in itertools.combinations(colours, 2))  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_told_apart_by_everybody(theme: Any) -> None:
    look = LOOKS[theme]
    eyes = {"all": np.eye(3)} | {kind: np.array(matrix) for kind, matrix in BLINDNESS.items()}
    for kind, matrix in eyes.items():
        for name, least in (("sites", 25), ("conditions", 10), ("series", 10)):
            of = getattr(look, name)
            colours = tuple(of.values()) if isinstance(of, dict) else tuple(of)
            assert apart(colours, lambda rgb, m=matrix: m @ rgb) > least, (name, kind)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_scales_and_sites_survive_grey_print(theme: Any) -> None:
    look = LOOKS[theme]
    lightness = {name: [lab(linear(c))[0] for c in colours] for name, colours in
                 (("scale", [c for _, c in look.scale]), ("sites", look.sites.values()))}  # fmt: skip
    steps = np.diff(lightness["scale"])
    assert (steps < -4).all() or (steps > 4).all(), "a scale goes one way"
    assert abs(np.diff(lightness["sites"])) > 15
    found, unablated = (lab(linear(look.conditions[name]))[0] for name in ("ablated", "unablated"))
    assert abs(found - unablated) > 8
    for text in (look.ink, look.soft):
        a, b = sorted(float(np.dot([0.2126, 0.7152, 0.0722], linear(c))) for c in (text, look.paper))
        assert (b + 0.05) / (a + 0.05) > 4.5, "WCAG AA"


def test_no_sentence_glues_its_percent_sign() -> None:
    for name, figure in everything("light").items():
        said = [figure.finding, figure.remark, *(str(trace.hovertemplate) for trace in figure.data)]
        assert not [text for text in said if re.search(r"\d%|:[^}]*%\}", text)], name


def test_a_condition_that_was_not_run_leaves_no_gap() -> None:
    fewer = evaluation("b")
    fewer = replace(
        fewer, probabilities={name: p for name, p in fewer.probabilities.items() if name != "random_matched"}
    )
    figure = figures.plot_accuracies([evaluation("a"), fewer])
    at = sorted(place for bar in bars(figure).values() for place in bar.y)
    assert at == [0, 1, 2, 3, 5, 6, 7]
    assert list(figure.layout.yaxis.tickvals) == [1.5, 6]


def test_figures_are_saved_by_their_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figures.plot_layers(FOUND, 4)
    figures.save_figure(figure, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "plotly.js v" in page, "works offline"
    assert figure.digest() in page
    assert "width:min(100%, 1000px);" in page, "no wider than its title is wrapped for"
    with pytest.raises(BadInput, match=r"ends in \.html, \.png"):
        figures.save_figure(figure, tmp_path / "a.bmp")
    with pytest.raises(BadInput, match="cannot write"):
        figures.save_figure(figure, tmp_path / "nowhere" / "a.html")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(BadInput, match=r"pip install 'truth-neurons\[image\]'.*\.html, which requires neither"):
        figures.save_figure(figure, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "kaleido", ModuleType("kaleido"))
    asked: dict[str, Any] = {}

    def draw(**options: Any) -> bytes:
        asked.update(options)
        return b"a picture"

    figures.save_figure(_Drawn(draw), tmp_path / "a.svg", width=640)
    assert (tmp_path / "a.svg").read_bytes() == b"a picture"
    assert asked == {"format": "svg", "width": 640, "scale": 2}

    def fail(**_: Any) -> bytes:
        raise RuntimeError("no browser\nhere")

    with pytest.raises(BadInput, match="it requires Chrome or Chromium, and reported 'no browser here'"):
        figures.save_figure(_Drawn(fail), tmp_path / "b.pdf")
    assert not (tmp_path / "b.pdf").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("ending", "begins"), [(".png", b"\x89PNG"), (".svg", b"<svg"), (".pdf", b"%PDF")])
def test_a_picture_is_drawn_where_kaleido_is(ending: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    figures.save_figure(figures.plot_layers(FOUND, 4), tmp_path / f"a{ending}")
    assert (tmp_path / f"a{ending}").read_bytes().startswith(begins)


class _Drawn(go.Figure):
    """A figure whose images are produced by the given function."""

    def __init__(self, draw: Callable[..., bytes] | dict | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_draw", draw)

    def to_image(self, *args: Any, **options: Any) -> bytes:
        return self._draw(**options)
