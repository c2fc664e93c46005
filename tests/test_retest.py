"""The neurons of a run on other question sets: `tn-lens evaluate`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import write_wrong_answers
from tests.conftest import QUICK_OPTIONS
from tn_lens import Evaluation, Settings, find_truth_neurons, load_model, load_questions, load_run
from tn_lens.pipeline.retest import parts_of, retest, run_of
from tn_lens.runs.seals import fingerprint, sealed

pytestmark = pytest.mark.usefixtures("few_resamples")


def test_evaluating_a_run_makes_both_tables(whole: Path, run: Callable, tmp_path: Path) -> None:
    arguments = ["evaluate", str(whole), "--on", "toy", "toy_true_false", "toy_four_choice", "--model", "toy"]
    arguments += ["--mode", "scale", "--factor", "-5"]  # changes some answers
    code, out, err = run(*arguments, "--repetitions", "2", "--limit", "40", "--out", str(tmp_path / "again"))
    assert code == 0, err
    for said in ("most active", "order-averaged", "toy_four_choice", "Loss on plain text", "McNemar p"):
        assert said in " ".join(out.split()), said
    names = {path.name for path in (tmp_path / "again").iterdir()}
    tables = {f"table{n}.{ending}" for n in (1, 2) for ending in ("md", "tex", "csv")}
    sets = ("toy", "toy_true_false", "toy_four_choice")
    assert names - {"work", ".lock", "log.jsonl"} == tables | {"summary.json"} | {
        f"{name}.safetensors" for name in sets
    }
    numbers = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert tuple(numbers) == sets
    stored = Evaluation.load(tmp_path / "again" / "toy_four_choice.safetensors")
    assert numbers["toy_four_choice"] == stored.to_dict()
    assert stored.n_orders == 4
    conditions = {"unablated", "random", "random_matched", "top_activation", "ablated"}
    assert set(stored.conditions) == set(numbers["toy_four_choice"]["conditions"]) == conditions
    compared = stored.compare("ablated", "random_matched")
    assert compared.low <= compared.difference
    assert stored.by_category(1).n_questions.sum() == 40


@pytest.mark.usefixtures("fewer_toy_questions")
def test_a_run_knows_its_model(run: Callable, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    code, _, err = run("run", "--model", "toy", "--questions", "toy", "--out", folder, *QUICK_OPTIONS)
    assert code == 0, err
    code, out, err = run("evaluate", folder, "--on", "toy_true_false", "--repetitions", "2", "--limit", "10")
    assert code == 0, err
    assert (Path(folder) / "evaluation" / "table1.md").is_file()
    (other,) = load_run(folder).others
    assert (other.name, other.n_questions, other.neurons) == ("toy_true_false", 10, load_run(folder).neurons)
    assert f"Tables and numbers: {Path(folder) / 'evaluation'}" in out


def test_a_set_of_neurons_needs_no_run(whole: Path, run: Callable, tmp_path: Path) -> None:
    neurons = str(whole / "neurons.json")
    common = ["--on", "toy_true_false", "--repetitions", "2", "--limit", "20", "--conditions", "unablated", "ablated"]
    code, out, err = run(
        "evaluate", "--neurons", neurons, "--model", "toy", *common, "--mode", "scale", "--factor", "2"
    )
    assert code == 0, err
    assert "toy_true_false" in out
    assert "random" not in out.split("toy_true_false", 1)[1]
    code, _, err = run("evaluate", str(whole), *common, "--out", str(tmp_path / "x"))
    assert code == 0, err


def test_the_parts_of_a_run_are_told_apart(run: Callable, tmp_path: Path) -> None:
    rows = [f"{q.text},{q.choices[0]},{q.choices[1]}\n" for q in load_questions("toy").part("find")[:60]]
    (tmp_path / "own.csv").write_text("question,right,wrong\n" + "".join(rows))
    folder, file = tmp_path / "run", str(tmp_path / "own.csv")
    questions = load_questions(file)
    lettered = replace(questions, template=load_questions("toy").template)
    model = load_model("toy")
    settings = Settings(
        n_repetitions=2, adaptive_threshold=0.05, order="both", limit=50, n_steps=5, convergence_sample=1
    )
    find_truth_neurons(model, lettered, settings, out=folder)
    provenance, neurons = run_of(folder)
    parts = parts_of(folder, provenance.settings, lettered)
    assert sum(map(len, parts.values())) == 60
    assert len(parts["unseen"]) == 10
    assert not set(parts["half 1 (selection)"]) & set(parts["half 2 (test)"])
    assert parts_of(folder, provenance.settings, questions) == {}, "asked in other words"
    out = tmp_path / "evaluation"
    found = retest(model, neurons, [lettered], out=out, parts={"own": parts}, n_repetitions=2, progress=False)[0]
    shown = found.by_part()
    assert shown.equals(found.by_part(parts))
    assert shown.equals(Evaluation.load(out / "own.safetensors").by_part())
    assert shown[shown.condition == "unablated"].n_questions.sum() == 60
    dropped = shown[(shown.part == "dropped by the check") & (shown.condition == "unablated")]
    assert dropped.order_averaged_accuracy.tolist()[0] < 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected a run folder, or --neurons"),
        (["RUN", "--neurons", "x.json"], "got both"),
        (["RUN", "--model", "toy"], "expected a question set"),
        (["RUN", "--model", "toy", "--on", "nothing"], "unknown question set 'nothing'"),
        (["RUN", "--model", "toy", "--on", "toy", "toy"], "must have different names"),
        (["RUN", "--model", "toy", "--on", "toy", "--limit", "0"], "limit must be a positive integer; got 0"),
        (["RUN", "--model", "toy", "--on", "toy", "--conditions", "unablated"], "'ablated' is missing"),
        (
            ["RUN", "--model", "toy", "--on", "toy", "--mode", "scale"],
            "--mode scale needs a factor; give one with --factor",
        ),
        (["RUN", "--model", "toy", "--on", "toy", "--factor", "2"], "--mode zero takes no factor; omit --factor"),
        (["RUN", "--model", "toy", "--on", "toy", "--text", "nothing.txt"], "cannot read 'nothing.txt'"),
        (["RUN", "--model", "toy", "--on", "mmlu=nowhere"], "pass the folder with test/"),
        (["nowhere", "--model", "toy", "--on", "toy"], "does not contain a run"),
    ],
)
def test_bad_input_to_evaluate(arguments: list[str], said: str, whole: Path, run: Callable, tmp_path: Path) -> None:
    given = [str(whole) if argument == "RUN" else argument for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    code, _, err = run("evaluate", *given, *out)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_neurons_of_other_weights_are_refused(whole: Path, run: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "toy-edited"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["weights_sha256"] = "0" * 64
    manifest["fingerprint"] = fingerprint(manifest["settings"])
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    index = json.loads((folder / "prompts.json").read_text()) | {"run": manifest["fingerprint"]}
    (folder / "prompts.json").write_text(json.dumps(sealed(index)))
    code, _, err = run("evaluate", str(folder), "--model", "toy", "--on", "toy")
    assert code == 2
    assert "were found with other weights of" in err


def test_wrong_answers_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "a.jsonl")
    code = write_wrong_answers.main(["toy", "--out", out, "--chat-model", "x", "--base-url", "http://127.0.0.1:9"])
    assert code == 2
    assert "cannot reach http://127.0.0.1:9" in capsys.readouterr().err
