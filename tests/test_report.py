"""The report shows the run's numbers, in sentences and in a browser; so does the page about several runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import CHROMIUM, Page, browser
from tn_lens import BadInput, Neuron, NeuronSet, Question, QuestionSet, Selection, TruthNeurons, find_truth_neurons
from tn_lens.evaluation import StoredEvaluation
from tn_lens.models import HAS_HOOKED, Model
from tn_lens.pipeline.retest import load_sets, retest
from tn_lens.pipeline.run import report_of
from tn_lens.questions.toy import binary
from tn_lens.report.page import N_ROWS, write_comparison, write_report
from tn_lens.report.prose import cautions, command, python_call
from tn_lens.results.comparison import compare, names_of, overlap_of, spread_over_depth
from tn_lens.results.run import load_run

FAST: dict[str, Any] = {"limit": 60, "n_steps": 5, "n_repetitions": 3, "t": 0.05, "progress": False}


@pytest.fixture(scope="module")
def finished(toy: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[TruthNeurons, Path]:
    out = tmp_path_factory.mktemp("report") / "run"
    return find_truth_neurons(toy, binary(), out=out, **FAST), out


@pytest.fixture(scope="module")
def other(toy: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with another threshold."""
    out = tmp_path_factory.mktemp("report") / "other"
    find_truth_neurons(toy, binary(), out=out, **(FAST | {"t": 0.2}))
    return out


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
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
        "model", "questions", "n_neurons", "t", "p", "n_layers", "neurons_by_layer", "arms", "welch_p"
    }  # fmt: skip
    assert set(summary["arms"]) == {"baseline", "random", "random_matched", "suppressed"}
    for arm in summary["arms"].values():
        assert set(arm) == {"accuracy_mean", "accuracy_std", "order_averaged_accuracy", "answer_mass", "share_a"}
        assert 1 < arm["accuracy_mean"] <= 100
        assert 0 <= arm["answer_mass"] <= 1
        assert 0 <= arm["share_a"] <= 1
    assert summary["t"] == 0.05
    assert set(summary["neurons_by_layer"]) == {"mlp", "attn"}
    assert all(len(counts) == summary["n_layers"] for counts in summary["neurons_by_layer"].values())
    assert sum(map(sum, summary["neurons_by_layer"].values())) == summary["n_neurons"] == len(found.neurons) > 0


def test_neurons_json_loads_as_a_set(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    assert NeuronSet.load(out / "neurons.json") == found.neurons
    payload = json.loads((out / "neurons.json").read_text())
    assert {"model", "questions", "t", "p", "alpha", "seed"} <= set(payload)
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
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["arms"]["random"]["accuracy"] == pytest.approx(
        (100 * found.evaluation.arms["random"].accuracies).tolist()
    )


def test_a_run_reads_back_as_it_was(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    held = load_run(out)
    assert held.neurons == found.neurons
    assert held.selection.summary() == found.selection.summary()
    assert held.selection.candidates == found.selection.candidates
    for name in ("share", "mean_difference", "std", "p_value", "p_adjusted", "found"):
        np.testing.assert_array_equal(getattr(held.selection, name), getattr(found.selection, name))
    assert held.completeness_gap == pytest.approx(found.completeness_gap)
    assert list(held.warnings) == found.warnings()
    for arm, of in found.evaluation.arms.items():
        stored = held.evaluation.arms[arm]
        np.testing.assert_allclose(stored.accuracies, of.accuracies)
        for name in ("accuracy", "accuracy_std", "order_averaged_accuracy", "auc", "answer_mass", "share_a"):
            assert getattr(stored, name) == pytest.approx(getattr(of, name), abs=1e-6), (arm, name)
    assert repr(held.evaluation.compare("suppressed", "random")) == repr(
        found.evaluation.compare("suppressed", "random")
    )
    assert held.evaluation.explain() == found.evaluation.explain()
    stored, own = held.evaluation.by_category(), found.evaluation.by_category()
    assert stored["category"].tolist() == own["category"].tolist()
    assert (stored.attrs["hidden"], stored.attrs["hidden_questions"]) == (own.attrs["hidden"], own.attrs["hidden_questions"])  # fmt: skip
    with pytest.raises(BadInput, match="only 'suppressed' beside"):
        held.evaluation.compare("random", "baseline")


def test_what_is_no_run_or_damaged_is_refused(finished: tuple[TruthNeurons, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        load_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished[1], copy)
    (copy / "selection.json").unlink()
    with pytest.raises(BadInput, match=r"has no selection\.json yet"):
        load_run(copy)
    (copy / "selection.json").write_text("{}")
    with pytest.raises(BadInput, match="expected a selection"):
        load_run(copy)
    (copy / "selection.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        load_run(copy)
    with pytest.raises(BadInput, match="expected an evaluation"):
        StoredEvaluation.from_dict({"arms": {}})
    assert Selection.from_dict(json.loads((finished[1] / "selection.json").read_text())).neurons == finished[0].neurons


def test_the_report_shows_the_numbers_and_needs_no_network(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    page = (out / "report.html").read_text()
    seen = text_of(page)
    for arm in found.evaluation.arms.values():
        assert f"{100 * arm.accuracy:.2f} ± {100 * arm.accuracy_std:.2f}" in seen
        assert f"{arm.auc:.3f}" in seen
    assert all(str(neuron) in seen for neuron in found.neurons)
    assert found.selection.summary() in seen
    assert found.stability.summary() in seen
    assert all(sentence in seen for sentence in found.diagnosis.sentences())
    assert all(sentence in seen for sentence in found.evaluation.explain())
    assert all(warning in seen for warning in found.warnings())
    assert f"completeness gap of the worst layer, of its own change {100 * found.completeness_gap:.1f} %" in seen
    for row in found.check.calibration().to_dict("records"):
        assert f"{row['n_prompts']:,} {100 * row['confidence']:.1f} {100 * row['accuracy']:.1f}" in seen
    assert page.count("plotly.js v") == 1
    assert "src=" not in re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert "https://" not in re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert len(page.encode()) < 8e6


def test_the_figures_of_the_report_hold_the_run(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    figures = figures_of((out / "report.html").read_text())
    assert set(figures) == {"layers", "accuracies", "change", "categories", "candidates", "completeness"}
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
    assert report_of(copy) == before, "the same run gives the same bytes, wherever it lies"
    sets = load_sets(["toy_true_false"], limit=20)
    retest(toy, found.neurons, sets, out=copy / "evaluation", n_repetitions=2, progress=False)
    page = report_of(copy).decode()
    evaluation = json.loads((copy / "evaluation" / "toy_true_false.json").read_text())
    seen = text_of(page)
    assert f"{evaluation['arms']['suppressed']['accuracy_mean']:.2f}" in seen
    assert "What the change on toy_true_false is made of" in seen
    assert "elsewhere" in figures_of(page)
    fewer = NeuronSet(list(found.neurons)[:3])
    retest(toy, fewer, sets, out=copy / "evaluation", n_repetitions=2, progress=False)
    again = report_of(copy).decode()
    assert "elsewhere" not in figures_of(again), "numbers of other neurons are not shown"
    assert "also holds an evaluation of other neurons on toy_true_false" in text_of(again)


def test_the_command_makes_the_same_run_again(
    finished: tuple[TruthNeurons, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    from tn_lens.cli import main as cli

    held = load_run(finished[1])
    threads, *words = shlex.split(command(held))
    assert threads == f"OMP_NUM_THREADS={held.settings['n_threads']}"
    seen: dict[str, Any] = {}
    monkeypatch.setattr("tn_lens.pipeline.find_truth_neurons", lambda *_, **settings: seen.update(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.app(words[1:], standalone_mode=False)
    for name in ("t", "p", "alpha", "order", "n_steps", "method", "n_repetitions", "seed", "limit", "correction"):
        assert seen[name] == held.settings[name], name
    assert seen["max_memory"] is None, "the usual one is not spelt out"
    held = replace(held, settings={**held.settings, "max_memory": 3 * 2**29})
    assert f"max_memory={3 * 2**29}" in python_call(held)
    with pytest.raises(ZeroDivisionError):
        cli.app(shlex.split(command(held))[2:], standalone_mode=False)
    assert seen["max_memory"] == 3 * 2**29


def test_cautions_are_drawn_from_the_run(finished: tuple[TruthNeurons, Path]) -> None:
    found, out = finished
    said = " ".join(cautions(load_run(out)))
    assert "says nothing about large models" in said
    comparison = found.evaluation.compare("suppressed", "baseline")
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
    return find_truth_neurons(toy, sly_set(40), out=out, n_steps=2, n_repetitions=2, progress=False), out


def test_text_in_the_report_is_escaped(sly: tuple[TruthNeurons, Path]) -> None:
    found, out = sly
    page = (out / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "<img" not in re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert "&lt;script&gt;alert(1)" in page
    assert found.unseen is not None
    summary = json.loads((out / "summary.json").read_text())
    assert summary["arms_unseen"]["baseline"]["accuracy_mean"] < summary["arms"]["baseline"]["accuracy_mean"]
    assert found.unseen.n_questions == found.check.n_asked - len(found.check.questions)


def test_a_run_that_finds_nothing_has_a_report(toy: Model, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = find_truth_neurons(toy, binary(), out=out, **(FAST | {"t": 1.0, "p": 1.0, "limit": 24}))
    assert not found.neurons
    seen = text_of((out / "report.html").read_text())
    assert "None was found." in seen
    assert "single out none of its 960 neurons, so that none was suppressed" in seen
    assert "t stopped all, as no neuron's D exceeds t = 100 % of the largest in any question of half 1" in seen
    assert set(figures_of((out / "report.html").read_text())) == {"completeness"}, "nothing that has nothing to show"
    assert "random neurons at zero" not in seen, "rows that would repeat the first"
    assert "no neuron is found in any" in seen
    assert "Welch" not in seen
    assert load_run(out).selection.largest_share == found.selection.largest_share == 0


def test_two_questions_are_too_few_and_the_report_says_so(toy: Model, tmp_path: Path) -> None:
    out = tmp_path / "run"
    find_truth_neurons(toy, binary(), out=out, **(FAST | {"limit": 2, "n_repetitions": 1}))
    seen = text_of((out / "report.html").read_text())
    assert re.search(r"only [12] questions? passed the check, so that half 2 has (1|none), and a test needs two", seen)
    assert "from 1 question, tested on" in seen
    assert not re.search(r"\b1 (questions|repetitions|others|candidates)\b", seen)
    assert not re.search(r"\bnan\b", seen)


def test_the_star_of_table_1_is_explained_where_there_is_one(finished: tuple[TruthNeurons, Path]) -> None:
    held = load_run(finished[1])

    def caption(**changes: Any) -> str:
        return text_of(write_report(replace(held, evaluation=replace(held.evaluation, **changes))))

    starred, plain = caption(welch_p=0.001), caption(welch_p=0.73)
    assert "* below untouched, one-sided Welch p = 0.001" in starred
    assert "*" not in plain
    assert "Suppressed is not below untouched (one-sided Welch p = 0.73)" in plain
    once = caption(welch_p=float("nan"), n_repetitions=1)
    assert "No Welch test: no two repetitions differ." in once
    assert "1 repetitions" not in once
    assert "±" not in once, "one repetition has no spread"
    assert "p = nan" not in once
    assert "with random neurons and" in plain
    assert "random neurons of the same layers at zero" in plain


def test_no_sentence_of_the_report_glues_its_percent_sign(finished: tuple[TruthNeurons, Path]) -> None:
    seen = text_of((finished[1] / "report.html").read_text())
    assert not re.findall(r"\d%", seen)


def test_a_long_list_is_cut_and_counted(finished: tuple[TruthNeurons, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert N_ROWS == 1000
    monkeypatch.setattr("tn_lens.report.N_ROWS", 3)
    seen = text_of(write_report(load_run(finished[1])))
    assert f"The strongest 3; {len(finished[0].neurons) - 3} more are in neurons.json." in seen


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
    page.write_text(write_report(load_run(out), cards=found.cards[:5]))
    chrome.open(page.as_uri())
    assert chrome.requests() == [page.as_uri()], "nothing but the page itself"
    n_figures = chrome.run("document.querySelectorAll('[data-figure]').length")
    assert n_figures == 6
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
        chrome.run("document.querySelector('#shown').textContent") == f"{len(fitting)} of {len(fitting)} that fit shown"
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
    page.write_text(write_report(load_run(finished[1]), cards=finished[0].cards[:2]))
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


def test_runs_beside_each_other(finished: tuple[TruthNeurons, Path], other: Path) -> None:
    runs = [load_run(finished[1]), load_run(other)]
    comparison = compare(runs)
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
    assert "2 runs of 1 model found between" in said
    assert "third" not in said
    assert "Most neurons sit in layer 1, the last of 2, in 2 of the 2" in said
    assert not re.search(r"\d%|\d\.\d{3,} ", said)
    assert "2 models" not in said + comparison.plot_layers().finding + comparison.plot_accuracies().finding
    assert comparison.plot_layers().finding == "In 2 of 2 runs the most truth neurons sit in layer 1, the last of 2"
    assert "of 2 runs (one-sided" in comparison.plot_accuracies().finding
    mean = comparison.means().iloc[-1]
    assert mean["baseline"] == pytest.approx(frame["untouched"].mean())
    assert mean["reduction_points"] == pytest.approx((frame["untouched"] - frame["suppressed"]).mean())
    with pytest.raises(BadInput, match="at least two"):
        compare(runs[:1])


def test_accuracies_on_different_questions_have_no_mean(finished: tuple[TruthNeurons, Path], other: Path) -> None:
    runs = [load_run(finished[1]), load_run(other)]
    assert "on average from" in compare(runs).summary()
    for change, said in (
        ({"name": "mmlu"}, "are about different question sets (toy, mmlu)"),
        ({"n_questions": 7}, "are about different questions of toy"),
    ):
        apart = compare([runs[0], replace(runs[1], evaluation=replace(runs[1].evaluation, **change))])
        assert "on average" not in apart.summary()
        assert f"The runs {said}: their accuracies do not compare." in apart.summary()
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


def test_runs_are_called_as_shortly_as_possible(finished: tuple[TruthNeurons, Path]) -> None:
    def one(model: str, questions: str, folder: str) -> Any:
        held = load_run(finished[1])
        return replace(held, settings={"model": model, "questions": questions}, name=folder)

    assert names_of([one("a", "q", "1"), one("b", "q", "2")]) == ["a", "b"]
    assert names_of([one("a", "q", "1"), one("a", "r", "2")]) == ["a, q", "a, r"]
    assert names_of([one("a", "q", "1"), one("a", "q", "2")]) == ["a, 1", "a, 2"]
    assert names_of([one("a", "q", "1"), one("a", "q", "1")]) == ["a, 1 (1)", "a, 1 (2)"]


@needs_chromium
def test_the_page_about_several_runs(
    finished: tuple[TruthNeurons, Path], other: Path, sly: tuple[TruthNeurons, Path], chrome: Page, tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    out = tmp_path / "compare.html"
    code, said, error = run("compare", finished[1], other, "--out", out)
    assert code == 0, error
    assert f"Page: {out}" in said
    first = out.read_bytes()
    assert run("compare", finished[1], other, "--out", out)[0] == 0
    assert out.read_bytes() == first
    seen = text_of(out.read_text())
    for path in (finished[1], other):
        summary = json.loads((path / "summary.json").read_text())
        assert f"{summary['arms']['suppressed']['accuracy_mean']:.2f}" in seen
    figures = figures_of(out.read_text())
    assert set(figures) == {"layers", "overlap", "accuracies", "change", "categories"}
    assert "hurt, by run." in seen
    assert "{{" not in seen
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
            assert bar <= plot, "the buttons stand above the cells"
        assert chrome.complaints() == []
        assert chrome.requests() == [out.as_uri()]
    assert run("compare", finished[1], other, sly[1], "--out", out)[0] == 0
    assert "are about different question sets" in text_of(out.read_text())
    assert "<script>alert(1)" not in out.read_text()


def test_bad_input_of_the_pages(
    finished: tuple[TruthNeurons, Path], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    for arguments, said in (
        (["compare", finished[1], "--out", tmp_path / "a.html"], "at least two runs"),
        (["compare", finished[1], finished[1], "--out", tmp_path / "a.html"], "given twice"),
        (["compare", finished[1], tmp_path, "--out", tmp_path / "a.html"], "holds no run"),
        (["compare", finished[1], tmp_path, "--out", tmp_path], "expected an .html file"),
        (["report", tmp_path], "holds no run"),
    ):
        code, _, error = run(*arguments)
        assert (code, said in error) == (2, True), error
    assert not (tmp_path / "a.html").exists()
    code, text, _ = run("report", finished[1])
    assert (code, "report.html" in text) == (0, True)
