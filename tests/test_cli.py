"""The command line: what it prints, and that bad input is one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from tn_lens import load_questions
from tn_lens.cli import main as cli
from tn_lens.report.prose import command, python_call
from tn_lens.results.run import load_run
from tn_lens.runs.folder import RESULT_FILES

from .conftest import contents

TOY = ["run", "--model", "toy", "--questions", "toy"]
FAST = ["--limit", "24", "--n-steps", "2", "--repetitions", "2", "--order", "both"]


def test_help_names_the_options() -> None:
    text = (
        CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).output
    )
    for option in ("--model", "--questions", "--out", "--limit", "--dry-run", "--order", "--method"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--model", "no/such place", "--questions", "toy", "--out", "X"], "neither a folder nor a hub id"),
        (["run", "--model", "toy", "--questions", "riddles", "--out", "X"], "no question set 'riddles'"),
        ([*TOY, "--out", "X", "--t", "0"], "t must lie in"),
        ([*TOY, "--out", "X", "--t", "20"], "a fraction and not a percentage"),
        ([*TOY, "--out", "X", "--p", "1.5"], "p must lie in"),
        ([*TOY, "--out", "X", "--alpha", "1"], "alpha must lie in"),
        ([*TOY, "--out", "X", "--limit", "0"], "limit must be a whole number"),
        ([*TOY, "--out", "X", "--n-steps", "0"], "n_steps must be a whole number"),
        ([*TOY, "--out", "X", "--max-memory", "0"], "expected more than 0 GiB for '--max-memory', got 0"),
        ([*TOY, "--out", "X", "--max-memory", "nan"], "expected more than 0 GiB"),
        ([*TOY, "--out", "X", "--repetitions", "0"], "n_repetitions must be a whole number"),
        ([*TOY, "--out", "X", "--device", "cuda:9"], "device 'cuda:9' is not available"),
        ([*TOY, "--out", "X", "--dtype", "int3"], "expected dtype"),
        (TOY, "give one with --out"),
        (["run", "--model", "toy", "--questions", "X.csv", "--out", "X"], "there is no file"),
        ([*TOY, "--out", "X", "--seed", "-1"], "a seed is a whole number from 0"),
        ([*TOY, "--out", "X", "--method", "riemann_trapezoid", "--n-steps", "1"], "from 2 to 10,000"),
        ([*TOY, "--out", "X", "--method", "simpson"], "simpson"),
        ([*TOY, "--out", "X", "--t", "abc"], "'--t'"),
        ([*TOY, "--out", "X", "--engine", "shared_prefix", "--positions", "all"], "positions='all'"),
        (["run", "--questions", "toy", "--out", "X"], "--model"),
        ([*TOY, "--out", "X" * 300], "cannot write"),
    ],
)
def test_bad_input(arguments: list[str], said: str, run: Callable, tmp_path: Path) -> None:
    code, _, error = run(*[str(tmp_path / "run") if a == "X" else a for a in arguments])
    assert code == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_the_version(run: Callable) -> None:
    code, text, _ = run("--version")
    assert (code, text.strip()) == (0, f"tn-lens {version('tn_lens')}")


def test_an_unknown_option_is_a_usage_error(run: Callable) -> None:
    code, _, error = run(*TOY, "--treshold", "0.2")
    assert code == 2
    assert "--treshold" in error


def test_questions_without_a_needed_column(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("question,right\nQ?,Yes\n")
    code, _, error = run("run", "--model", "toy", "--questions", path, "--out", tmp_path / "run")
    assert (code, "no column 'wrong'" in error) == (2, True)


def test_a_file_of_ones_own_is_asked_and_can_be_repeated(run: Callable, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.csv", tmp_path / "run"
    rows = [f'"{q.text}",{q.choices[q.answer]},{q.choices[1 - q.answer]}' for q in load_questions("toy").part("find")]
    mine.write_text("\n".join(["question,right,wrong", *rows[:30]]) + "\n", encoding="utf-8")
    code, text, error = run("run", "--model", "toy", "--questions", mine, "--out", out, *FAST)
    assert code == 0, error
    assert "toy on mine (24 questions)" in text
    assert f"--questions {mine}" in command(load_run(out))
    assert f"load_questions({str(mine)!r})" in python_call(load_run(out))


def test_no_question_left_after_the_check(run: Callable, tmp_path: Path) -> None:
    from tn_lens.questions.toy import binary
    from tn_lens.questions.toy_world import facts

    taught = [fact for fact in facts() if fact.split == "train" and not fact.is_exception][:10]
    lies = "".join(
        json.dumps({"question": f.question(), "right": f.distractor, "wrong": f.value}) + "\n" for f in taught
    )
    path = tmp_path / "lies.jsonl"
    path.write_text(lies)
    assert binary()
    code, _, error = run("run", "--model", "toy", "--questions", path, "--out", tmp_path / "run", "--order", "both")
    assert code == 2, error
    assert "no question is left" in error or "cannot read the questions" in error
    assert not (tmp_path / "run").exists()


def test_a_run_ends_with_a_table_and_goes_on_where_it_was(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "small"
    code, text, error = run(*TOY, "--out", out, *FAST)
    assert code == 0, error
    assert re.search(r"untouched.*truth neurons at zero", text, re.DOTALL)
    assert 'share of "A"' in text
    files = sorted(p.name for p in out.iterdir())
    assert files == sorted([*RESULT_FILES, "scores", "work", ".lock", "log.jsonl"])
    before = contents(out)
    shard = next((out / "scores").iterdir())
    stamp = shard.stat().st_mtime_ns
    code, again, _ = run(*TOY, "--out", out, *FAST)
    assert code == 0
    assert again == text
    assert contents(out) == before, "the same run gives the same bytes"
    assert shard.stat().st_mtime_ns == stamp, "nothing is computed twice"
    tensors = load_file(shard)
    narrow = tensors | {"mlp": tensors["mlp"][..., :5].contiguous()}
    for damaged in (shard.read_bytes()[:100], save({}), save({"mlp": tensors["mlp"]}), save(narrow)):
        shard.write_bytes(damaged)
        assert run(*TOY, "--out", out, *FAST)[0] == 0
        assert contents(out) == before, "a damaged shard is computed anew"


def test_a_folder_of_another_run_is_left_alone(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*TOY, "--out", out, *FAST)[0] == 0
    before = (out / "summary.json").read_bytes()
    code, _, error = run(*TOY, "--out", out, *FAST, "--t", "0.33")
    assert code == 2
    assert "with t = " in error
    assert "t = 0.33" in error
    assert "--overwrite" in error
    assert (out / "summary.json").read_bytes() == before
    (out / "my_notes.md").write_text("precious")
    assert run(*TOY, "--out", out, *FAST, "--t", "0.33", "--overwrite")[0] == 0
    assert (out / "my_notes.md").read_text() == "precious", "only what a run wrote is removed"
    assert json.loads((out / "summary.json").read_text())["t"] == 0.33


def test_a_folder_that_is_no_run_or_cannot_be_written(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, _, error = run(*TOY, "--out", tmp_path / "mine", *FAST, "--overwrite")
    assert (code, "holds no run" in error) == (2, True)
    for manifest in ('{"name": "an extension"}', '{"settings": null}', "[1]", "{"):
        (tmp_path / "mine" / "manifest.json").write_text(manifest)
        code, _, error = run(*TOY, "--out", tmp_path / "mine", *FAST, "--overwrite")
        assert (code, "is damaged or belongs to something else" in error) == (2, True)
    (tmp_path / "mine" / "manifest.json").unlink()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    code, _, error = run(*TOY, "--out", tmp_path / "mine" / "thesis.txt", *FAST)
    assert (code, "is a file" in error) == (2, True)
    code, _, error = run(*TOY, "--out", "/proc/nowhere/run", *FAST)
    assert (code, "cannot write" in error) == (2, True)


def test_a_full_disk_ends_with_one_sentence_and_a_later_run_completes(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    real = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, _, error = run(*TOY, "--out", tmp_path / "run", *FAST)
    assert (code, "No space left on device" in error, error.count("\n")) == (2, True, 1)
    assert not list((tmp_path / "run").rglob(".*.part"))
    assert run(*TOY, "--out", tmp_path / "run", *FAST)[0] == 0


def test_a_run_that_ran_out_of_memory_says_so_in_its_manifest_and_report(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from tn_lens.attribution.engines.shared_prefix import SharedPrefix

    real, sizes = SharedPrefix.run, []

    def small(self: SharedPrefix, paths: dict, nudges: dict) -> torch.Tensor:
        sizes.append(len(self.prompts))
        if len(self.prompts) > 4:
            raise torch.OutOfMemoryError("on purpose")
        return real(self, paths, nudges)

    out = tmp_path / "run"
    assert run(*TOY, "--out", tmp_path / "whole", *FAST)[0] == 0
    monkeypatch.setattr(SharedPrefix, "run", small)
    assert run(*TOY, "--out", out, *FAST)[0] == 0
    assert json.loads((out / "manifest.json").read_text())["backed_off"] == {"n_prompts": 4, "n_rows": 12}
    assert "Out of memory: going on with 12 rows of 4 prompts" in (out / "report.html").read_text()
    found = [json.loads((f / "neurons.json").read_text())["neurons"] for f in (out, tmp_path / "whole")]
    assert [row["index"] for row in found[0]] == [row["index"] for row in found[1]]
    sizes.clear()
    next((out / "scores").iterdir()).unlink()
    assert run(*TOY, "--out", out, *FAST)[0] == 0
    assert max(sizes) == 4, "a resumed run keeps the size that fitted"


def test_selecting_again_needs_no_model(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    assert run(*TOY, "--out", out, *FAST)[0] == 0
    before = contents(out)
    monkeypatch.setattr("tn_lens.loading.load_model", None)
    found = json.loads((out / "neurons.json").read_text())
    code, text, error = run("select", out, "--out", tmp_path / "again.json")
    assert code == 0, error
    again = json.loads((tmp_path / "again.json").read_text())
    places = [[(n["site"], n["layer"], n["head"], n["index"]) for n in of["neurons"]] for of in (found, again)]
    assert places[0] == places[1] != []
    code, text, error = run(
        "select",
        out,
        "--t",
        "0.05",
        "--correction",
        "holm",
        "--sweep",
        "--splits",
        "3",
        "--out",
        tmp_path / "loose.json",
    )
    assert code == 0, error
    assert "Over 3 splits" in text
    assert "neurons found, t down, p across" in text
    assert (tmp_path / "loose.html").stat().st_size > 1_000_000, "works offline"
    assert contents(out) == before, "the run is left as it was"
    assert {"verdict", "case", "cohens_d", "ci_low"} <= found["neurons"][0].keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--t", "20"], "fraction and not a percentage"),
        (["--splits", "1"], "needs at least 2"),
        (["--alpha", "0"], "alpha must lie in (0, 1)"),
        (["--out", "/nowhere/at/all.json"], "a folder that exists"),
    ],
)
def test_bad_input_to_select(arguments: list[str], said: str, run: Callable, tmp_path: Path) -> None:
    code, _, error = run("select", tmp_path, "--t", "0.1")
    assert (code, "holds no run" in error) == (2, True)
    out = tmp_path / "run"
    assert run(*TOY, "--out", out, *FAST)[0] == 0
    code, _, error = run("select", out, *arguments)
    assert (code, said in error, error.count("\n")) == (2, True, 1)
    (out / "prompts.json").write_text("{")
    code, _, error = run("select", out)
    assert (code, "is missing or damaged" in error) == (2, True)


def test_attr_t_may_be_stored_beside_d(run: Callable, tmp_path: Path) -> None:
    out, plain = tmp_path / "separate", tmp_path / "plain"
    assert run(*TOY, "--out", plain, *FAST)[0] == 0
    assert run(*TOY, "--out", out, *FAST, "--separate")[0] == 0
    held = [{p.name: load_file(p) for p in (folder / "scores").iterdir()} for folder in (plain, out)]
    for name, tensors in held[1].items():
        assert {"mlp.right", "attn.right"} <= tensors.keys() - held[0][name].keys()
        assert tensors["mlp.right"].dtype == tensors["mlp"].dtype == torch.float16
    found = [json.loads((folder / "neurons.json").read_text())["neurons"] for folder in (plain, out)]
    assert [(n["layer"], n["index"], n["case"]) for n in found[0]] == [
        (n["layer"], n["index"], n["case"]) for n in found[1]
    ]
    for one, other in zip(*found, strict=True):  # few prompts: both ways take all of half 2
        assert one["attr_right"] == pytest.approx(other["attr_right"], rel=0.01, abs=1e-5)
        assert one["attr_wrong"] == pytest.approx(other["attr_wrong"], rel=0.01, abs=1e-5)
    code, _, error = run(*TOY, "--out", tmp_path / "x", *FAST, "--separate", "--target", "log_ratio")
    assert (code, "only probability_difference has" in error) == (2, True)


def test_t_is_searched_on_questions_of_its_own(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, error = run(*TOY, "--out", out, *FAST, "--t", "auto")
    assert code == 0, error
    summary = json.loads((out / "summary.json").read_text())
    tuning = json.loads((out / "diagnosis.json").read_text())["tuning"]
    assert summary["t"] == tuning["t"]
    assert tuning["n_questions"] == 144
    assert "How t was chosen" in (out / "report.html").read_text()
    assert f"t = {100 * summary['t']:.0f} % lowers" in " ".join(text.split())
    code, _, error = run(*TOY, "--out", tmp_path / "other", *FAST, "--t", "often")
    assert (code, "a number in (0, 1] or 'auto'" in error) == (2, True)


def test_stopping_by_hand_says_how_to_go_on(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tn_lens.pipeline.attribute", stop)
    code, _, error = run(*TOY, "--out", tmp_path / "run", *FAST)
    assert (code, "run the same command again" in error) == (130, True)


def test_edited_weights_are_another_model(tmp_path: Path) -> None:
    from tn_lens import find_truth_neurons, load_model, load_questions

    options = {"out": tmp_path / "run", "limit": 20, "n_steps": 2, "n_repetitions": 2, "progress": False}
    model, questions = load_model("toy"), load_questions("toy")
    find_truth_neurons(model, questions, **options)
    model.blocks[0].mlp.W_out.data *= 0.5
    with pytest.raises(ValueError, match="weights_sha256"):
        find_truth_neurons(model, questions, **options)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"correction": "hope"}, "expected correction"),
        ({"order": "chaos"}, "expected order"),
        ({"n_steps": 2.5}, "n_steps must be a whole number"),
        ({"max_memory": 0}, "max_memory must be a whole number and at least 1"),
        ({"t": "0.2"}, "t must be a number"),
        ({"speed": 3}, "unknown setting 'speed'"),
        ({"out": ""}, "run folder's name is empty"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(setting: dict, said: str, toy: object, tmp_path: Path) -> None:
    """Without the type checker of the tests, as users call it."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import tn_lens as tn\n"
        "try: tn.find_truth_neurons(tn.load_model('toy'), tn.load_questions('toy'), "
        f"**({{'out': {str(tmp_path / 'run')!r}}} | {setting!r}))\n"
        "except tn.BadInput as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(run: Callable, tmp_path: Path) -> None:
    code, text, _ = run(*TOY, "--out", tmp_path / "run", *FAST, "--dry-run")
    assert code == 0
    assert re.search(r"24 questions, 48 prompts of up to \d+ tokens; at most about \d+ min \d+ s .* GiB", text)
    assert not (tmp_path / "run").exists()


def test_a_real_checkpoint_that_knows_nothing_ends_well(run: Callable, tmp_path: Path, shared: Path) -> None:
    out = tmp_path / "run"
    model, questions = shared / "models" / "tinystories-656k", shared / "data" / "TruthfulQA.csv"
    code, text, error = run(
        "run", "--model", model, "--questions", questions, "--out", out, "--limit", 30, "--repetitions", 2
    )
    assert code == 0, error
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_layers"] == 2
    assert summary["t"] == 0.2
    assert sum(map(sum, summary["neurons_by_layer"].values())) == summary["n_neurons"]
    assert "hardly follows the instruction" in text
    assert summary["n_neurons"] or "No truth neurons were found" in text
    assert (out / "report.html").stat().st_size > 1e6
