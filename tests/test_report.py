"""The report shows the run's numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tn_lens import NeuronSet, Question, QuestionSet, TruthNeurons, find_truth_neurons
from tn_lens.models import Model
from tn_lens.questions.toy import binary


@pytest.fixture(scope="module")
def run(toy: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[TruthNeurons, Path]:
    out = tmp_path_factory.mktemp("report") / "run"
    found = find_truth_neurons(toy, binary(), out=out, limit=60, n_steps=5, n_repetitions=3, t=0.05, progress=False)
    return found, out


def test_summary_json_is_the_contract(run: tuple[TruthNeurons, Path]) -> None:
    found, out = run
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


def test_neurons_json_loads_as_a_set(run: tuple[TruthNeurons, Path]) -> None:
    found, out = run
    assert NeuronSet.load(out / "neurons.json") == found.neurons
    payload = json.loads((out / "neurons.json").read_text())
    assert {"model", "questions", "t", "p", "alpha", "seed"} <= set(payload)
    table = found.selection.to_frame()
    assert [n["mean_difference"] for n in payload["neurons"]] == pytest.approx(table["mean_difference"].tolist())
    assert all(n["p_adjusted"] < 0.05 and 0 <= n["share"] <= 1 and n["t_statistic"] > 0 for n in payload["neurons"])


def test_manifest_and_evaluation(run: tuple[TruthNeurons, Path]) -> None:
    found, out = run
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["order"] == "both"
    assert settings["rendered_prompt"].startswith("Question : ")
    assert settings["versions"]["transformer-lens"].startswith("3.9")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["arms"]["random"]["accuracy"] == pytest.approx(
        (100 * found.evaluation.arms["random"].accuracies).tolist()
    )


def test_the_report_shows_the_numbers_and_needs_no_network(run: tuple[TruthNeurons, Path]) -> None:
    found, out = run
    page = (out / "report.html").read_text()
    for arm in found.evaluation.arms.values():
        assert f"{100 * arm.accuracy:.2f} ± {100 * arm.accuracy_std:.2f}" in page
    assert str(next(iter(found.neurons))) in page
    assert page.count("<script") == page.count("</script>")
    outside = page.split("</script>", 1)[1]
    assert "src=" not in outside
    assert "https://cdn" not in outside
    assert len(page) < 8e6


def test_text_in_the_report_is_escaped(toy: Model, tmp_path: Path) -> None:
    sly = QuestionSet(
        name="<script>alert(1)</script>",
        questions=tuple(
            Question(text=q.text, choices=q.choices, category=q.category) for q in binary().part("find")[:30]
        ),
        template=binary().template,
    )
    found = find_truth_neurons(toy, sly, out=tmp_path / "run", n_steps=2, n_repetitions=2, progress=False)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert found.unseen is not None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["arms_unseen"]["baseline"]["accuracy_mean"] < summary["arms"]["baseline"]["accuracy_mean"]
    assert found.unseen.n_questions == found.check.n_asked - len(found.check.questions)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_report_draws_its_figure_in_a_browser(run: tuple[TruthNeurons, Path], tmp_path: Path) -> None:
    _, out = run
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom",
        (out / "report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "main-svg" in done.stdout, done.stderr[-500:]
