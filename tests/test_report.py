"""The report and the page about several runs contain the numbers of the runs; both are also tested in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tn_lens
from tests.browser import CHROMIUM, Page, browser
from tests.conftest import contents
from tn_lens import (
    BadInput,
    Evaluation,
    Neuron,
    NeuronSet,
    Question,
    QuestionSet,
    Selection,
    Settings,
    TruthNeurons,
    find_truth_neurons,
    load_run,
)
from tn_lens.attribution.result import worst_gap
from tn_lens.cli.main import app
from tn_lens.core.sentences import say_each
from tn_lens.models import HAS_HOOKED, Model
from tn_lens.neurons import SITES
from tn_lens.pipeline.retest import load_sets, retest
from tn_lens.pipeline.run import rewrite_report
from tn_lens.questions.toy import binary
from tn_lens.report import page as page_module
from tn_lens.report.page import N_ROWS, command, python_call, write_comparison, write_report
from tn_lens.results import comparison as comparison_module
from tn_lens.results.comparison import RunComparison, compare, names_of, overlap_of, spread_over_depth

pytestmark = pytest.mark.usefixtures("few_resamples")
FAST = Settings(limit=60, n_steps=5, n_repetitions=3, adaptive_threshold=0.05, convergence_sample=2)


@pytest.fixture(scope="module")
def finished(toy: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[TruthNeurons, Path]:
    out = tmp_path_factory.mktemp("report") / "run"
    return find_truth_neurons(toy, binary(), FAST, out=out, progress=False), out


@pytest.fixture(scope="module")
def other(toy: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with another threshold."""
    out = tmp_path_factory.mktemp("report") / "other"
    find_truth_neurons(toy, binary(), replace(FAST, adaptive_threshold=0.2), out=out, progress=False)
    return out


@pytest.fixture(scope="module")
def loaded(finished: tuple[TruthNeurons, Path]) -> TruthNeurons:
    """The first run, loaded from its folder."""
    return load_run(finished[1])


@pytest.fixture(scope="module")
def drawn(loaded: TruthNeurons) -> dict[str, Any]:
    """The figures of its page."""
    return page_module.figures_of(loaded)


@pytest.fixture(scope="module")
def compared(loaded: TruthNeurons, other: Path) -> RunComparison:
    """Both runs side by side."""
    return compare([loaded, other])


def text_of(page: str) -> str:
    """The visible text of a page, on one line."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_summary_json_is_the_contract(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {
        "model", "questions", "n_neurons", "t", "p", "n_layers", "neurons_by_layer", "conditions", "welch_p",
        "reduction_points", "probability_change", "probability_change_floored", "probability_change_median",
        "verdicts", "damage", "cases", "mean_jaccard",
    }  # fmt: skip
    assert set(summary["conditions"]) == {"unablated", "random", "random_matched", "ablated"}
    numbers = {
        "accuracy_mean",
        "accuracy_std",
        "order_averaged_accuracy",
        "auc",
        "answer_mass",
        "share_a",
        "accuracies",
    }
    for condition in summary["conditions"].values():
        assert set(condition) == numbers
        assert 1 < condition["accuracy_mean"] <= 100
        assert 0 <= condition["answer_mass"] <= 1
        assert 0 <= condition["share_a"] <= 1
    assert summary["t"] == 0.05
    assert set(summary["neurons_by_layer"]) == {"mlp", "attn"}
    assert all(len(counts) == summary["n_layers"] for counts in summary["neurons_by_layer"].values())
    assert sum(map(sum, summary["neurons_by_layer"].values())) == summary["n_neurons"] == len(found.neurons) > 0


def test_neurons_json_loads_as_a_set(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    assert NeuronSet.load(out / "neurons.json") == found.neurons
    payload = json.loads((out / "neurons.json").read_text())
    assert {"model", "questions", "adaptive_threshold", "share_threshold", "alpha", "seed"} <= set(payload)
    table = found.selection.to_frame()
    assert [n["mean_difference"] for n in payload["neurons"]] == pytest.approx(table["mean_difference"].tolist())
    assert all(n["p_adjusted"] < 0.05 and 0 <= n["share"] <= 1 and n["t_statistic"] > 0 for n in payload["neurons"])


def test_manifest_and_evaluation(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["order"] == "both"
    assert settings["rendered_prompt"].startswith("Question : ")
    assert settings["versions"]["transformer-lens"].startswith("3.9" if HAS_HOOKED else "4.")
    assert settings["backend"] == ("hooked" if HAS_HOOKED else "bridge")
    expected = pytest.approx((100 * found.evaluation.conditions["random"].accuracies).tolist())
    stored = Evaluation.load(out / "evaluation.safetensors")
    assert (100 * stored.conditions["random"].accuracies).tolist() == expected
    summary = json.loads((out / "summary.json").read_text())
    assert summary["conditions"]["random"]["accuracies"] == expected


def test_a_run_reads_back_as_it_was(finished: tuple[TruthNeurons, Path], loaded: TruthNeurons) -> None:
    found, _ = finished
    assert loaded.neurons == found.neurons
    assert loaded.selection.summary() == found.selection.summary()
    assert loaded.selection.candidates == found.selection.candidates
    for name in ("share", "mean_difference", "std", "p_value", "p_adjusted", "found"):
        np.testing.assert_array_equal(getattr(loaded.selection, name), getattr(found.selection, name))
    assert loaded.completeness_gap == pytest.approx(found.completeness_gap)
    assert loaded.warnings() == found.warnings()
    for condition, result in found.evaluation.conditions.items():
        stored = loaded.evaluation.conditions[condition]
        np.testing.assert_allclose(stored.accuracies, result.accuracies)
        for name in ("accuracy", "accuracy_std", "order_averaged_accuracy", "auc", "answer_mass", "share_a"):
            assert getattr(stored, name) == pytest.approx(getattr(result, name), abs=1e-6), (condition, name)
    for pair in (("ablated", "random"), ("random", "unablated")):
        assert repr(loaded.evaluation.compare(*pair)) == repr(found.evaluation.compare(*pair))
    assert loaded.evaluation.explain() == found.evaluation.explain()
    stored, live = loaded.evaluation.by_category(), found.evaluation.by_category()
    assert stored["category"].tolist() == live["category"].tolist()
    assert (stored.attrs["hidden"], stored.attrs["hidden_questions"]) == (live.attrs["hidden"], live.attrs["hidden_questions"])  # fmt: skip
    with pytest.raises(BadInput, match="condition 'top_activation' was not run"):
        loaded.evaluation.compare("ablated", "top_activation")


def test_what_is_no_run_or_damaged_is_refused(finished: tuple[TruthNeurons, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not contain a run"):
        load_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished[1], copy)
    (copy / "selection.json").unlink()
    with pytest.raises(BadInput, match=r"has no selection\.json yet"):
        load_run(copy)
    (copy / "selection.json").write_text("{}")
    with pytest.raises(BadInput, match=r"selection\.json is damaged"):
        load_run(copy)
    (copy / "selection.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        load_run(copy)
    with pytest.raises(BadInput, match="damaged"):
        Evaluation.from_bytes(b'{"conditions": {}}', ".json")
    assert Selection.load(finished[1] / "selection.json").neurons == finished[0].neurons


def test_the_report_shows_the_numbers_and_needs_no_network(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    page = (out / "report.html").read_text()
    seen = text_of(page)
    for condition in found.evaluation.conditions.values():
        assert f"{100 * condition.accuracy:.2f} ± {100 * condition.accuracy_std:.2f}" in seen
        assert f"{condition.auc:.3f}" in seen
    assert all(str(neuron) in seen for neuron in found.neurons)
    assert found.selection.summary() in seen
    assert found.stability.summary() in seen
    assert all(sentence in seen for sentence in found.diagnosis.explain())
    assert all(sentence in seen for sentence in found.evaluation.explain())
    assert all(warning in seen for warning in found.warnings())
    assert (
        f"completeness error of the worst site and layer, relative to its change {100 * found.completeness_gap:.1f} %"
        in seen
    )
    for row in found.check.calibration().to_dict("records"):
        assert f"{row['n_prompts']:,} {100 * row['confidence']:.1f} {100 * row['accuracy']:.1f}" in seen
    assert page.count("plotly.js v") == 1
    assert "src=" not in re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert "https://" not in re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert len(page.encode()) < 8e6


def test_the_figures_of_the_report_hold_the_run(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    figures = figures_of((out / "report.html").read_text())
    errors = {"completeness", "convergence"}
    assert set(figures) == {"damage", "layers", "accuracies", "change", "categories", "candidates"} | errors
    for of in figures.values():
        assert set(of) == {"light", "dark"}
        assert of["light"]["layout"]["paper_bgcolor"] != of["dark"]["layout"]["paper_bgcolor"]
    counts = found.neurons.by_layer(found.selection.space.n_layers)
    (heatmap, _) = figures["layers"]["light"]["data"]
    assert [[int(n or 0) for n in row] for row in heatmap["text"]] == [counts["mlp"], counts["attn"]]
    points = sum(len(trace["customdata"]) for trace in figures["candidates"]["light"]["data"])
    assert points == len(found.selection.candidates)


def test_calibration_counts_every_prompt_once(finished: tuple[TruthNeurons, Path]) -> None:
    frame = finished[0].check.calibration()
    assert frame["n_prompts"].sum() == len(finished[0].check.asked)
    assert ((frame["confidence"] >= frame["low"]) & (frame["confidence"] <= frame["high"])).all()
    right = (frame["accuracy"] * frame["n_prompts"]).sum() / len(finished[0].check.asked)
    answered = finished[0].check.to_frame()
    assert right == pytest.approx((answered["p_right"] > answered["answer_mass"] / 2).mean())


def test_the_report_can_be_written_again_and_gains_table_2(
    toy: Model, finished: tuple[TruthNeurons, Path], tmp_path: Path
) -> None:
    found, out = finished
    copy = tmp_path / "another name"
    shutil.copytree(out, copy)
    before = (copy / "report.html").read_bytes()
    rewrite_report(copy)
    assert (copy / "report.html").read_bytes() == before, "the same run gives the same bytes, wherever it lies"
    sets = load_sets(["toy_true_false"], limit=20)
    retest(toy, found.neurons, sets, out=copy / "evaluation", n_repetitions=2, progress=False)
    page = write_report(load_run(copy))
    evaluation = json.loads((copy / "evaluation" / "summary.json").read_text())["toy_true_false"]
    seen = text_of(page)
    assert f"{evaluation['conditions']['ablated']['accuracy_mean']:.2f}" in seen
    assert "Parts of the change on toy_true_false" in seen
    assert "elsewhere" in figures_of(page)
    fewer = NeuronSet(list(found.neurons)[:3])
    retest(toy, fewer, sets, out=copy / "evaluation", n_repetitions=2, progress=False)
    again = write_report(load_run(copy))
    assert "elsewhere" not in figures_of(again), "numbers of other neurons are not shown"
    assert "also holds an evaluation of other neurons on toy_true_false" in text_of(again)


OPTIONS = {
    "--model": "toy", "--questions": "toy", "--limit": "16", "--n-steps": "2", "--repetitions": "2", "--t": "0.05",
    "--order": "both", "--convergence-sample": "1", "--alpha": "0.001", "--backend": "hooked" if HAS_HOOKED else "bridge", "--engine": "direct", "--separate": None,
    "--max-memory": "1.5",
}  # fmt: skip
"""Options of a run and their values; None for a flag."""


def called(python: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, QuestionSet, Settings, dict[str, Any]]:
    """The arguments with which a page's Python code calls `find_truth_neurons`."""
    calls: list[Any] = []

    def record(model: Model, questions: QuestionSet, settings: Settings, **keywords: Any) -> None:
        calls.append((model, questions, settings, keywords))

    with monkeypatch.context() as patch:
        patch.setattr(tn_lens, "find_truth_neurons", record)
        exec(python, {})  # the page's own code
    (call,) = calls
    return call


def given_to(settings: Settings) -> dict[str, Any]:
    """Settings by name, as they are in a manifest."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


@pytest.mark.usefixtures("fewer_toy_questions")
def test_the_command_makes_the_same_run_again(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a run"
    given = ["run", *(word for pair in OPTIONS.items() for word in pair if word is not None), "--out", str(out)]
    code, _, error = run(*given)
    assert code == 0, error
    found = load_run(out)
    stored = found.provenance.settings
    threads, *words = shlex.split(command(found))
    assert threads == f"OMP_NUM_THREADS={stored['n_threads']}"
    assert words == ["tn-lens", *given]
    options = [word for word in words if word.startswith("--")]
    assert sorted(options) == sorted([*OPTIONS, "--out"]), "what was not given is not spelt out"
    seen = text_of((out / "report.html").read_text())
    assert " ".join(command(found).split()) in seen
    assert " ".join(python_call(found).split()) in seen
    assert stored["separate"] is True
    assert (stored["engine"], stored["backend"]) == ("direct", OPTIONS["--backend"])
    assert stored["max_memory"] == 3 * 2**29

    before = contents(out)
    code, _, error = run(*words[1:])
    assert code == 0, error
    assert contents(out) == before, "the printed command is that of this run"

    settings: dict[str, Any] = {}
    monkeypatch.setattr(
        "tn_lens.pipeline.run.find_truth_neurons",
        lambda model, questions, given, **_: settings.update(given_to(given)) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        app(words[1:], standalone_mode=False)
    assert settings == {field.name: stored[field.name] for field in fields(Settings)}


def test_the_python_call_makes_the_same_run_again(
    finished: tuple[TruthNeurons, Path], loaded: TruthNeurons, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = loaded.provenance.settings
    assert command(loaded) == "", "it was started from Python"
    python = python_call(loaded)
    seen = text_of((finished[1] / "report.html").read_text())
    assert " ".join(python.split()) in seen
    assert "OMP_NUM_THREADS=" not in seen
    _, questions, settings, keywords = called(python, monkeypatch)
    assert questions.digest == stored["questions_sha256"]
    assert keywords["threads"] == stored["n_threads"]
    values = given_to(settings)
    for name in ("adaptive_threshold", "share_threshold", "alpha", "order", "n_steps", "method", "n_repetitions", "seed", "limit", "correction"):  # fmt: skip
        assert values[name] == stored[name], name
    assert values["max_memory"] is None, "the usual one is not spelt out"
    assert "max_memory" not in python
    changes = {
        "max_memory": 3 * 2**29,
        "separate": True,
        "engine": "direct",
        "controls": ["random"],
        "method": "graded",
    }
    changed = replace(loaded, provenance=replace(loaded.provenance, settings={**stored, **changes}))
    assert f"max_memory={3 * 2**29}" in python_call(changed)
    values = given_to(called(python_call(changed), monkeypatch)[2])
    assert {name: values[name] for name in changes} == changes


def test_cautions_are_drawn_from_the_run(finished: tuple[TruthNeurons, Path], loaded: TruthNeurons) -> None:
    found, _ = finished
    worst = worst_gap(loaded.completeness)
    said = " ".join(say_each("run.cautions", loaded, worst, SITES[worst.site].label))
    assert "says nothing about large models" in said
    comparison = found.evaluation.compare("ablated", "unablated")
    assert f"from {comparison.low:.1f} to {comparison.high:.1f}" in said
    assert f"{len(found.selection.candidates)} candidates were tested on {len(found.selection.half_2)}" in said
    least = float(re.search(r"below about ([\d.]+) of its standard deviation", said).group(1))
    effects, passed = found.selection.cohens_d, found.selection.found
    assert (effects[passed] > least - 0.01).all()
    assert (effects[~passed] < least + 0.01).all()


def sly_set(n: int = 30) -> QuestionSet:
    name = "</script><script>alert(1)</script><b>%{x}"
    return QuestionSet(
        name=name,
        questions=tuple(
            Question(text=q.text, choices=q.choices, category="<img src=x onerror=alert(2)>" if i % 2 else name)
            for i, q in enumerate(binary().part("find")[:n])
        ),
        template=binary().template,
    )


@pytest.fixture(scope="module")
def sly(toy: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[TruthNeurons, Path]:
    out = tmp_path_factory.mktemp("sly") / "run"
    return find_truth_neurons(
        toy,
        sly_set(40),
        Settings(n_steps=2, n_repetitions=2, alpha=0.01, convergence_sample=1),
        out=out,
        progress=False,
    ), out


def test_text_in_the_report_is_escaped(sly: tuple[TruthNeurons, Path]) -> None:
    found, out = sly
    page = (out / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "<img" not in re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert "&lt;script&gt;alert(1)" in page
    assert found.unseen is not None
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["conditions_unseen"]["unablated"]["accuracy_mean"] < summary["conditions"]["unablated"]["accuracy_mean"]
    )
    assert found.unseen.n_questions == found.check.n_asked - len(found.check.questions)


def test_a_run_that_finds_nothing_has_a_report(toy: Model, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = replace(FAST, adaptive_threshold=1.0, share_threshold=1.0, limit=24, n_steps=2, n_repetitions=2)
    found = find_truth_neurons(toy, binary(), settings, out=out, progress=False)
    assert not found.neurons
    seen = text_of((out / "report.html").read_text())
    assert "No neurons were found." in seen
    assert "singles out none of its 960 neurons, so none was ablated" in seen
    assert "in no question of half 1 does any neuron's D exceed t = 100 % of the largest" in seen
    assert set(figures_of((out / "report.html").read_text())) == {"completeness", "convergence"}, (
        "nothing that has nothing to show"
    )
    assert "random neurons zero-ablated" not in seen, "rows that would repeat the first"
    assert "No neuron is found with any of" in seen
    assert "Welch" not in seen
    assert load_run(out).selection.largest_share == found.selection.largest_share == 0


def test_two_questions_are_too_few_and_the_report_says_so(toy: Model, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = replace(FAST, limit=2, n_steps=2, n_repetitions=1)
    with pytest.raises(
        ValueError, match=r"only [12] of 2 questions passed the manipulation check.*ask more questions; --force"
    ):
        find_truth_neurons(toy, binary(), settings, out=out, progress=False)
    find_truth_neurons(toy, binary(), settings, out=out, force=True, progress=False)
    seen = text_of((out / "report.html").read_text())
    assert re.search(
        r"only [12] questions? passed the check, so half 2 has (1|none), and the test needs at least two", seen
    )
    assert "from 1 question, tested on" in seen
    assert not re.search(r"\b1 (questions|repetitions|others|candidates)\b", seen)
    assert not re.search(r"\bnan\b", seen)


def test_the_star_of_table_1_is_explained_where_there_is_one(
    loaded: TruthNeurons, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(p: float) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(page_module, "figures_of", lambda _: drawn)  # no figure shows the test
            patch.setattr(Evaluation, "welch_p", p)
            return text_of(write_report(loaded))

    starred, plain = page(0.001), page(0.73)
    assert "* below unablated, one-sided Welch p = 0.001" in starred
    assert "*" not in plain
    assert "Ablated is not below unablated (one-sided Welch p = 0.73)" in plain
    evaluation = loaded.evaluation
    first = {name: p[:1] for name, p in evaluation.probabilities.items()}
    once = replace(loaded, evaluation=replace(evaluation, asked=evaluation.asked[:1], probabilities=first), cards=())
    assert np.isnan(once.evaluation.welch_p)
    seen = text_of(write_report(once))
    assert "No Welch test: no two repetitions differ." in seen
    assert "1 repetitions" not in seen
    assert "±" not in seen, "one repetition has no spread"
    assert "p = nan" not in seen
    assert "with random neurons and" in plain
    assert "matched random neurons zero-ablated" in plain


def test_no_sentence_of_the_report_glues_its_percent_sign(finished: tuple[TruthNeurons, Path]) -> None:
    seen = text_of((finished[1] / "report.html").read_text())
    assert not re.findall(r"\d%", seen)


def test_a_long_list_is_cut_and_counted(
    loaded: TruthNeurons, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert N_ROWS == 1000
    monkeypatch.setattr("tn_lens.report.page.N_ROWS", 3)
    monkeypatch.setattr(page_module, "figures_of", lambda _: drawn)
    seen = text_of(write_report(loaded))
    assert f"Only the strongest 3 are shown; {len(loaded.neurons) - 3} more are in neurons.json." in seen


def replace_plots(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Callable[..., Any]], Any]) -> None:
    """Replace every figure function that the pages call, by its name and itself."""
    for module in (page_module, comparison_module):
        names = [name for name in vars(module) if name.startswith("plot_")]
        assert names
        for name in names:
            monkeypatch.setattr(module, name, change(name, getattr(module, name)))


def with_others(run: TruthNeurons) -> TruthNeurons:
    """The same run with an evaluation on another question set, whose page has every figure."""
    return replace(run, others=(replace(run.evaluation, name="elsewhere"),))


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_the_dark_figures_are_those_of_the_dark_theme(
    kind: str, loaded: TruthNeurons, compared: RunComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Any = write_report if kind == "report" else write_comparison
    result: Any = with_others(loaded) if kind == "report" else compared
    shown = figures_of(write(result))
    dark: dict[str, Any] = {}

    def in_dark_theme(_: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: draw(*args, **options | {"theme": "dark"})

    replace_plots(monkeypatch, in_dark_theme)
    monkeypatch.setattr(page_module, "page", lambda _, figures, **__: dark.update(figures) or "")
    write(result)
    others = {"elsewhere", "damage", "candidates", "completeness", "convergence"} if kind == "report" else {"overlap"}
    assert set(dark) == set(shown) == others | {"layers", "accuracies", "change", "categories"}
    for name, figure in dark.items():
        assert shown[name]["dark"] == figure.bare(), name
        assert shown[name]["dark"] != shown[name]["light"], name


def test_every_figure_of_a_page_is_drawn_once(
    loaded: TruthNeurons, compared: RunComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name.removeprefix("plot_")] += 1
            return draw(*args, **options)

        return call

    replace_plots(monkeypatch, counted)
    write_report(with_others(loaded))
    one = ("candidates", "probability_change", "layers", "categories", "damage", "completeness", "convergence")
    # the run's own question set, and both sets
    assert calls == {**dict.fromkeys(one, 1), "accuracies": 2}
    calls.clear()
    write_comparison(compared)
    assert calls == dict.fromkeys(("layers", "overlap", "accuracies", "probability_change", "categories"), 1)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def shown(page: Page) -> list[list[str]]:
    """The visible rows of the table of neurons, cell by cell."""
    return page.run(
        "[...document.querySelectorAll('#neurons tbody')].filter(b => !b.hidden && b.offsetHeight)"
        ".map(b => [...b.rows[0].cells].map(c => c.textContent.trim()))"
    )


@needs_chromium
def test_the_report_works_in_a_browser(finished: tuple[TruthNeurons, Path], chrome: Page, tmp_path: Path) -> None:
    found, out = finished
    page = tmp_path / "report.html"
    page.write_text(write_report(replace(load_run(out), cards=found.cards[:5])))
    chrome.open(page.as_uri())
    assert chrome.requests() == [page.as_uri()], "nothing but the page itself"
    n_figures = chrome.run("document.querySelectorAll('[data-figure]').length")
    assert n_figures == 8
    assert chrome.run("document.querySelectorAll('[data-figure] .main-svg').length") >= n_figures
    rows = shown(chrome)
    assert len(rows) == min(25, len(found.neurons))
    assert [row[0] for row in rows] == [str(Neuron.from_dict(r)) for r in found.records()[:25]]

    chrome.run("document.querySelector('#more').click()")
    assert len(shown(chrome)) == len(found.neurons)
    assert [row[1] for row in shown(chrome)] == [r["verdict"] for r in found.records()], "early, where it is seen"
    for column, name in ((2, "layer"), (5, "cohens_d"), (3, "mean_difference")):
        for way in ("descending", "ascending"):
            chrome.run(f"document.querySelectorAll('#neurons th')[{column}].querySelector('button').focus()")
            chrome.press("Enter")
            assert chrome.run(f"document.querySelectorAll('#neurons th')[{column}].ariaSort") == way
            by_name = {str(Neuron.from_dict(r)): r[name] for r in found.records()}
            values = [by_name[row[0]] for row in shown(chrome)]
            assert values == sorted(values, reverse=way == "descending"), name
    assert chrome.run("[...document.querySelectorAll('#neurons th')].filter(h => /ing$/.test(h.ariaSort)).length") == 1

    chrome.run(
        "(s => { s.value = 'ATTN 1.h0'; s.dispatchEvent(new Event('input')) })(document.querySelector('#search'))"
    )
    fitting = [str(n) for n in found.neurons if "attn 1.h0" in str(n)]
    assert sorted(row[0] for row in shown(chrome)) == sorted(fitting)
    assert (
        chrome.run("document.querySelector('#shown').textContent")
        == f"{len(fitting)} of {len(fitting)} matching neurons shown"
    )
    word = found.cards[0].supports[0].text
    chrome.run(
        f"(s => {{ s.value = {json.dumps(word)}; s.dispatchEvent(new Event('input')) }})(document.querySelector('#search'))"
    )
    about = [card for card in found.cards[:5] if all(part in text_of(card.to_html()) for part in word.split())]
    assert {str(card.neuron) for card in about} <= {row[0] for row in shown(chrome)}, "cards are searched too"
    assert 0 < len(shown(chrome)) <= 5

    button = "document.querySelector('#neurons tbody:not([hidden]) button[aria-controls]')"
    card = f"document.getElementById({button}.getAttribute('aria-controls'))"
    assert chrome.run(f"{card}.offsetHeight") == 0
    chrome.run(f"{button}.focus()")
    chrome.press(" ")
    assert chrome.run(f"{button}.ariaExpanded") == "true"
    assert word in " ".join(chrome.run(f"{card}.innerText").split())
    chrome.press("Enter")
    assert chrome.run(f"{card}.offsetHeight") == 0
    assert chrome.complaints() == []


@needs_chromium
def test_hovering_tells_counts(finished: tuple[TruthNeurons, Path], chrome: Page) -> None:
    found, out = finished
    chrome.open((out / "report.html").as_uri())
    chrome.run("document.querySelector('[data-figure=layers]').scrollIntoView({block: 'center', behavior: 'instant'})")
    chrome.settle()
    place = chrome.run(
        "(r => [r.left, r.top, r.width, r.height])(document.querySelector('[data-figure=layers] .nsewdrag')"
        ".getBoundingClientRect())"
    )
    chrome.point_at(place[0] + 0.75 * place[2], place[1] + 0.75 * place[3])
    said = chrome.run(
        "new Promise(done => setTimeout(() => done(document.querySelector('[data-figure=layers] .hoverlayer').textContent), 400))"
    )
    count = found.neurons.by_layer(2)["attn"][1]
    assert "Attention (hook_z), layer 1" in said
    assert f"{count} neurons, {100 * count / len(found.neurons):.1f} % of those found" in said
    assert chrome.complaints() == []


@needs_chromium
@pytest.mark.parametrize("width", [400, 800, 1600])
def test_the_report_fits_every_window_light_and_dark(
    finished: tuple[TruthNeurons, Path], chrome: Page, width: int, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(write_report(replace(load_run(finished[1]), cards=finished[0].cards[:2])))
    for dark in (False, True):
        chrome.open(page.as_uri(), width=width, dark=dark)
        assert chrome.run("document.documentElement.scrollWidth") <= width
        inside = chrome.run(
            "[...document.querySelectorAll('[data-figure]')].every(d => "
            "d.querySelector('.main-svg').getBoundingClientRect().width <= d.clientWidth + 1)"
        )
        assert inside
        colours = chrome.run(
            "[getComputedStyle(document.body).backgroundColor, ...[...document.querySelectorAll('[data-figure]')]"
            ".map(d => d.layout.paper_bgcolor)]"
        )
        assert colours[0] == ("rgb(20, 25, 31)" if dark else "rgb(255, 255, 255)")
        assert set(colours[1:]) == {"#14191f" if dark else "#ffffff"}
        small = chrome.run(
            "Math.min(...[...document.querySelectorAll('[data-figure] text')].filter(t => t.textContent.trim())"
            ".map(t => parseFloat(getComputedStyle(t).fontSize)))"
        )
        assert small >= 10, "every label can be read"
        box, inner = chrome.run(
            "(b => [[b.clientWidth, b.scrollWidth], b.querySelector('th').getBoundingClientRect().left])"
            "(document.querySelector('#neurons').parentElement)"
        )
        assert inner < width
        assert box[1] <= box[0] or width < 800, "no column of the table is cut"
    assert chrome.complaints() == []


@needs_chromium
def test_a_dark_page_is_printed_light(finished: tuple[TruthNeurons, Path], chrome: Page) -> None:
    chrome.open((finished[1] / "report.html").as_uri(), dark=True)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    chrome.call("Emulation.setEmulatedMedia", media="print", features=dark)
    chrome.settle()
    drawn = "[...document.querySelectorAll('[data-figure]')].map(d => d.layout.paper_bgcolor)"
    assert set(chrome.run(drawn)) == {"#ffffff"}
    heights = "[...document.querySelectorAll('[data-figure]')].every(d => d.querySelector('.main-svg').clientHeight <= d.clientHeight)"
    assert chrome.run(heights), "nothing overlaps the captions"
    chrome.call("Emulation.setEmulatedMedia", media="", features=dark)
    chrome.settle()
    assert set(chrome.run(drawn)) == {"#14191f"}


@needs_chromium
def test_a_sly_run_runs_nothing(sly: tuple[TruthNeurons, Path], chrome: Page) -> None:
    chrome.open((sly[1] / "report.html").as_uri())
    assert chrome.run("document.querySelectorAll('img').length") == 0
    assert chrome.complaints() == []
    assert chrome.requests() == [(sly[1] / "report.html").as_uri()]
    ticks = chrome.run("[...document.querySelectorAll('[data-figure=categories] .ytick')].map(t => t.textContent)")
    assert any("<img src=x" in tick for tick in ticks), "shown as it is written"


@needs_chromium
def test_the_check_of_the_browser_can_fail(chrome: Page, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('no'); nothing()</script><img src='http://example.org/a.png'>")
    chrome.open(page.as_uri())
    assert len(chrome.complaints()) >= 2
    assert "http://example.org/a.png" in chrome.requests()


def test_runs_beside_each_other(compared: RunComparison) -> None:
    comparison, runs = compared, list(compared.runs.values())
    assert list(comparison.runs) == ["toy, run", "toy, other"]
    shared = runs[0].neurons.jaccard(runs[1].neurons)
    np.testing.assert_allclose(comparison.jaccard, [[1, shared], [shared, 1]])
    np.testing.assert_allclose(np.diag(comparison.overlap), 1)
    counts = [r.neurons.by_layer(2) for r in runs]
    expected = sum(
        min(counts[0][site][layer] / len(runs[0].neurons), counts[1][site][layer] / len(runs[1].neurons))
        for site in ("mlp", "attn") for layer in range(2)
    )  # fmt: skip
    assert comparison.overlap[0, 1] == pytest.approx(expected)
    frame = comparison.to_frame()
    assert frame["neurons"].tolist() == [len(r.neurons) for r in runs]
    assert "first_third" not in frame, "two layers have no thirds"
    said = comparison.summary()
    assert "2 runs of 1 model: between" in said
    assert "third" not in said
    assert "Most neurons lie in layer 1, the last of 2, in 2 of 2 runs" in said
    assert not re.search(r"\d%|\d\.\d{3,} ", said)
    assert "2 models" not in said + comparison.plot_layers().finding + comparison.plot_accuracies().finding
    assert (
        comparison.plot_layers().finding
        == "In 2 of 2 runs the largest fraction of the truth neurons lies in layer 1, the last of 2"
    )
    assert "of 2 runs (one-sided" in comparison.plot_accuracies().finding
    mean = comparison.means().iloc[-1]
    assert mean["unablated"] == pytest.approx(frame["unablated"].mean())
    assert mean["reduction_points"] == pytest.approx((frame["unablated"] - frame["ablated"]).mean())
    with pytest.raises(BadInput, match="at least two"):
        compare(runs[:1])


def test_accuracies_on_different_questions_have_no_mean(compared: RunComparison) -> None:
    runs = list(compared.runs.values())
    assert "on average from" in compared.summary()
    evaluation = runs[1].evaluation
    for changed, said in (
        (replace(evaluation, name="mmlu"), "report on different question sets (toy, mmlu)"),
        (evaluation.only(list(evaluation.prompts.groups)[:7]), "report on different questions of toy"),
    ):
        apart = compare([runs[0], replace(runs[1], evaluation=changed)])
        assert "on average" not in apart.summary()
        assert f"The runs {said}, so their accuracies cannot be compared." in apart.summary()
        assert apart.means().empty
        assert "Group means" not in text_of(write_comparison(apart))
    deep = replace(runs[1].selection, space=replace(runs[1].selection.space, n_layers=8))
    mixed = compare([runs[0], replace(runs[1], selection=deep)]).to_frame()
    assert mixed["last_third"].isna().tolist() == [True, False], "a layer of two straddles the thirds"


def test_overlap_by_relative_depth() -> None:
    def mlp(*layers: int) -> NeuronSet:
        return NeuronSet(Neuron("mlp", layer, None, place) for place, layer in enumerate(layers))

    def overlap(a: NeuronSet, n: int, b: NeuronSet, m: int) -> float:
        return overlap_of(spread_over_depth(a, n), spread_over_depth(b, m))

    assert overlap(mlp(0), 2, mlp(0), 4) == pytest.approx(0.5), "half of the first half"
    assert overlap(mlp(0), 2, mlp(0, 1), 4) == pytest.approx(1)
    assert overlap(mlp(0), 2, mlp(1), 2) == 0
    assert overlap(mlp(1), 3, mlp(1), 2) == pytest.approx(1 / 3), "from one half to two thirds"
    assert overlap(mlp(0), 2, NeuronSet([Neuron("attn", 0, 0, 0)]), 2) == 0, "the sites are apart"
    assert overlap(mlp(0), 2, NeuronSet(), 2) == 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, m = rng.integers(1, 40, 2)
        a, b = mlp(*rng.integers(0, n, 9).tolist()), mlp(*rng.integers(0, m, 5).tolist())
        there, back = overlap(a, int(n), b, int(m)), overlap(b, int(m), a, int(n))
        assert there == pytest.approx(back)
        assert 0 <= there <= 1 + 1e-9


def test_runs_are_called_as_shortly_as_possible(loaded: TruthNeurons) -> None:
    def one(model: str, questions: str, folder: str) -> TruthNeurons:
        provenance = replace(loaded.provenance, name=folder)
        return replace(loaded, model_name=model, questions_name=questions, provenance=provenance)

    assert names_of([one("a", "q", "1"), one("b", "q", "2")]) == ["a", "b"]
    assert names_of([one("a", "q", "1"), one("a", "r", "2")]) == ["a, q", "a, r"]
    assert names_of([one("a", "q", "1"), one("a", "q", "2")]) == ["a, 1", "a, 2"]
    assert names_of([one("a", "q", "1"), one("a", "q", "1")]) == ["a, 1 (1)", "a, 1 (2)"]


@pytest.fixture(scope="module")
def comparison_page(compared: RunComparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about both runs."""
    path = tmp_path_factory.mktemp("compare") / "compare.html"
    path.write_text(write_comparison(compared))
    return path


def test_the_page_about_several_runs(
    finished: tuple[TruthNeurons, Path], other: Path, sly: tuple[TruthNeurons, Path], comparison_page: Path,
    tmp_path: Path, run: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    out = tmp_path / "compare.html"
    code, said, error = run("compare", finished[1], other, "--out", out)
    assert code == 0, error
    assert f"Page: {out}" in said
    assert out.read_bytes() == comparison_page.read_bytes(), "the same runs give the same bytes"
    seen = text_of(out.read_text())
    for path in (finished[1], other):
        summary = json.loads((path / "summary.json").read_text())
        assert f"{summary['conditions']['ablated']['accuracy_mean']:.2f}" in seen
    figures = figures_of(out.read_text())
    assert set(figures) == {"layers", "overlap", "accuracies", "change", "categories"}
    assert "Categories whose right answers lose probability, by run." in seen
    assert "{{" not in seen
    assert run("compare", finished[1], other, sly[1], "--out", out)[0] == 0
    assert "report on different question sets" in text_of(out.read_text())
    assert "<script>alert(1)" not in out.read_text()


@needs_chromium
def test_the_page_about_several_runs_in_a_browser(comparison_page: Path, chrome: Page) -> None:
    out = comparison_page
    for width in (400, 800, 1600):
        chrome.open(out.as_uri(), width=width)
        assert chrome.run("document.documentElement.scrollWidth") <= width
        assert chrome.run("document.querySelectorAll('[data-figure] .main-svg').length") >= 5
        if width == 800:
            cut = "[...document.querySelectorAll('.wide')].filter(b => b.scrollWidth > b.clientWidth).map(b => b.ariaLabel)"
            assert chrome.run(cut) == []
        if width > 400:
            chrome.run("document.querySelector('[data-figure=overlap]').scrollIntoView({behavior: 'instant'})")
            bar, plot = chrome.run(
                "(f => [f.querySelector('.modebar').getBoundingClientRect().bottom,"
                " f.querySelector('.nsewdrag').getBoundingClientRect().top])(document.querySelector('[data-figure=overlap]'))"
            )
            assert bar <= plot, "the buttons are above the cells"
        assert chrome.complaints() == []
        assert chrome.requests() == [out.as_uri()]


def test_bad_input_of_the_pages(
    finished: tuple[TruthNeurons, Path], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    for arguments, said in (
        (["compare", finished[1], "--out", tmp_path / "a.html"], "at least two runs"),
        (["compare", finished[1], finished[1], "--out", tmp_path / "a.html"], "given twice"),
        (["compare", finished[1], tmp_path, "--out", tmp_path / "a.html"], "does not contain a run"),
        (["compare", finished[1], tmp_path, "--out", tmp_path], "expected an .html file"),
        (["report", tmp_path], "does not contain a run"),
    ):
        code, _, error = run(*arguments)
        assert (code, said in error) == (2, True), error
    assert not (tmp_path / "a.html").exists()
    code, text, _ = run("report", finished[1])
    assert (code, "report.html" in text) == (0, True)
