"""The command line: its output, and that invalid input gives a one-line message, exit code 2 and no file."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from tests.conftest import QUICK, QUICK_OPTIONS, contents, few_asked
from tn_lens import BadInput, QuestionSet, Settings, find_truth_neurons, load_model, load_questions, load_run
from tn_lens.attribution.engines.shared_prefix import SharedPrefix
from tn_lens.core.settings import PRESETS
from tn_lens.questions.toy import binary
from tn_lens.questions.toy_world import facts
from tn_lens.report.page import command, python_call
from tn_lens.runs.folder import RESULT_FILES

pytestmark = pytest.mark.usefixtures("fewer_toy_questions", "few_resamples")
TOY = ["run", "--model", "toy", "--questions", "toy"]
AGAIN = [*TOY, "--out", "run", *QUICK_OPTIONS]
"""The command that made `finished`; in the directory of a copy it resumes the copy."""


class Finished(NamedTuple):
    """A finished run and what it printed."""

    path: Path
    text: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_questions: QuestionSet, few_resamples: None) -> Finished:
    """A small run on the toy, which no test changes."""
    folder, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    main = importlib.import_module("tn_lens.cli.main").main
    with pytest.MonkeyPatch.context() as patch, few_asked(toy_questions), contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["tn-lens", *AGAIN])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    return Finished(folder / "run", printed.getvalue())


@pytest.fixture
def copy(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, in the working directory: the same command resumes it."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished.path, tmp_path / "run")


def on_one_line(text: str) -> str:
    """The printed text, without the line breaks of the console."""
    return " ".join(text.split())


def test_help_names_the_options() -> None:
    app = importlib.import_module("tn_lens.cli.main").app
    text = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).output
    for option in ("--model", "--questions", "--out", "--limit", "--dry-run", "--order", "--method"):
        assert option in text
    assert "--adaptive-threshold" not in text, "the paper's letters name the thresholds"
    for field in fields(Settings):
        assert (field.metadata["flag"] or f"--{field.name.replace('_', '-')}") in text
        assert " ".join(field.metadata["help"].split()[:2]) in text


def test_help_version_and_import_load_no_heavy_library() -> None:
    """torch and transformers take seconds to import."""
    code = (
        "import contextlib, sys\n"
        "import tn_lens\n"
        "from tn_lens.cli import main\n"
        "for arguments in (['--help'], ['run', '--help'], ['--version']):\n"
        "    sys.argv = ['tn-lens', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "print('loaded:', *sorted({'torch', 'transformers', 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for printed in ("Usage: tn-lens [OPTIONS] COMMAND", "--dry-run", version("truth-neurons")):
        assert printed in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("variables", "printed"),
    [({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "RANK": "1"}, False), ({"FORCE_COLOR": ""}, False)],
)
def test_a_spinner_moves_in_terminals_on_one_worker(variables: dict[str, str], printed: bool) -> None:
    """`FORCE_COLOR` makes rich treat a pipe as a terminal."""
    code = "import time; from tn_lens.cli.waiting import spinner\nwith spinner('loading [b]x'): time.sleep(0.5)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    assert done.stdout == ""
    assert (done.stderr.count("loading [b]x") > 2) is printed
    assert printed or done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--model", "no/such place", "--questions", "toy", "--out", "X"], "neither a folder nor a hub id"),
        (["run", "--model", "toy", "--questions", "riddles", "--out", "X"], "unknown question set 'riddles'"),
        ([*TOY, "--out", "X", "--t", "0"], "adaptive_threshold (t) must be a fraction in (0, 1]"),
        ([*TOY, "--out", "X", "--t", "20"], "not a percentage"),
        ([*TOY, "--out", "X", "--p", "1.5"], "share_threshold (p) must be a fraction in (0, 1]"),
        ([*TOY, "--out", "X", "--alpha", "1"], "alpha must lie in (0, 1)"),
        ([*TOY, "--out", "X", "--limit", "0"], "limit must be a positive integer"),
        ([*TOY, "--out", "X", "--n-steps", "0"], "n_steps must be a positive integer"),
        ([*TOY, "--out", "X", "--limit", "2.5"], "expected an integer for '--limit', got '2.5'"),
        ([*TOY, "--out", "X", "--alpha=x"], "expected a number for '--alpha', got 'x'"),
        (["show", "X", "--top", "-1"], "expected a value greater than or equal to 0 for '--top', got '-1'"),
        ([*TOY, "--out", "X", "--max-memory", "0"], "--max-memory must be greater than 0 GiB; got 0"),
        ([*TOY, "--out", "X", "--max-memory", "nan"], "--max-memory must be greater than 0 GiB"),
        ([*TOY, "--out", "X", "--repetitions", "0"], "n_repetitions must be a positive integer"),
        ([*TOY, "--out", "X", "--device", "cuda:9"], "device 'cuda:9' is not available"),
        ([*TOY, "--out", "X", "--dtype", "int3"], "expected dtype"),
        (TOY, "give one with --out"),
        (["run", "--model", "toy", "--questions", "X.csv", "--out", "X"], "the file 'X.csv' does not exist"),
        ([*TOY, "--out", "X", "--seed", "-1"], "seed must be a non-negative integer"),
        ([*TOY, "--out", "X", "--method", "riemann_trapezoid", "--n-steps", "1"], "from 2 to 10,000"),
        ([*TOY, "--out", "X", "--method", "simpson"], "unknown attribution method 'simpson'"),
        ([*TOY, "--out", "X", "--sites", "mlp", "brain"], "unknown site 'brain'"),
        ([*TOY, "--out", "X", "--preset", "best"], "unknown preset 'best'; expected 'paper' or 'recommended'"),
        ([*TOY, "--out", "X", "--baseline-input", "silence"], "'--baseline-input'"),
        ([*TOY, "--out", "X", "--baseline", "input", "--positions", "all"], "the baseline 'input' is an activation at"),
        ([*TOY, "--out", "X", "--controls", "random", "placebo"], "unknown control 'placebo'"),
        ([*TOY, "--out", "X", "--intervention", "scale"], "the intervention 'scale' needs an argument"),
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


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ((), {}),
        (("--n-steps", "3"), {"n_steps": 3}),
        # the default of an option takes precedence too if it is given
        (
            ("--n-steps", "20", "--baseline", "zero", "--order=random"),
            {"n_steps": 20, "baseline": "zero", "order": "random"},
        ),
        (
            ("--sites", "mlp", "--t", "0.3", "--separate"),
            {"sites": ["mlp"], "adaptive_threshold": 0.3, "separate": True},
        ),
    ],
)
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_given_options_take_precedence_over_a_preset(
    preset: str | None, arguments: tuple[str, ...], changes: dict, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []

    def record(model: object, asked: object, settings: Settings, **_: object) -> None:
        received.append(settings)
        raise BadInput("recorded")

    monkeypatch.setattr("tn_lens.pipeline.dry_run.plan_run", record)
    run(*TOY, "--dry-run", *(["--preset", preset] if preset else []), *arguments)
    expected = {**(PRESETS[preset] if preset else {}), **changes}
    values = {field.name: getattr(received[0], field.name) for field in fields(Settings)}
    assert {name: values[name] for name in expected} == expected
    others = {field.name: field.default for field in fields(Settings) if field.name not in expected}
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    assert {name: plain[name] for name in others} == others


def test_the_version(run: Callable) -> None:
    code, text, _ = run("--version")
    assert (code, text.strip()) == (0, f"tn-lens {version('truth-neurons')}")


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
    code, text, error = run("run", "--model", "toy", "--questions", mine, "--out", out, *QUICK_OPTIONS)
    assert code == 0, error
    assert "toy on mine (24 questions)" in text
    loaded = load_run(out)
    assert f"--questions {mine}" in command(loaded)
    assert f"load_questions({str(mine)!r})" in python_call(loaded)


def test_no_question_left_after_the_check(run: Callable, tmp_path: Path) -> None:
    taught = [fact for fact in facts() if fact.split == "train" and fact.value == fact.typical][:10]
    lies = "".join(
        json.dumps({"question": f.question(), "right": f.distractor, "wrong": f.value}) + "\n" for f in taught
    )
    path = tmp_path / "lies.jsonl"
    path.write_text(lies)
    assert binary()
    code, _, error = run("run", "--model", "toy", "--questions", path, "--out", tmp_path / "run", "--order", "both")
    assert code == 2, error
    assert "no question passed the manipulation check" in error or "cannot read the questions" in error
    assert not (tmp_path / "run").exists()


def test_a_run_ends_with_a_table_and_is_resumed(run: Callable, finished: Finished, copy: Path) -> None:
    assert re.search(r"unablated.*truth neurons zero-ablated", finished.text, re.DOTALL)
    assert 'fraction of "A"' in finished.text
    files = sorted(p.name for p in finished.path.iterdir())
    assert files == sorted([*RESULT_FILES, "scores", "work", ".lock", "log.jsonl"])
    before = contents(finished.path)
    shard = next((copy / "scores").iterdir())
    stamp = shard.stat().st_mtime_ns
    code, again, _ = run(*AGAIN)
    assert code == 0
    assert again == finished.text
    assert contents(copy) == before, "the same run gives the same bytes"
    assert shard.stat().st_mtime_ns == stamp, "nothing is computed twice"
    tensors = load_file(shard)
    narrow = tensors | {"mlp": tensors["mlp"][..., :5].contiguous()}
    for damaged in (shard.read_bytes()[:100], save({}), save({"mlp": tensors["mlp"]}), save(narrow)):
        shard.write_bytes(damaged)
        assert run(*AGAIN)[0] == 0
        assert contents(copy) == before, "a damaged shard is computed anew"


def test_a_folder_of_another_run_is_left_alone(run: Callable, copy: Path) -> None:
    before = (copy / "summary.json").read_bytes()
    code, _, error = run(*AGAIN, "--t", "0.33")
    assert code == 2
    assert "with adaptive_threshold = " in error
    assert "adaptive_threshold = 0.33" in error
    assert "--overwrite" in error
    assert (copy / "summary.json").read_bytes() == before
    (copy / "my_notes.md").write_text("precious")
    assert run(*AGAIN, "--repetitions", "1", "--t", "0.33", "--overwrite")[0] == 0
    assert (copy / "my_notes.md").read_text() == "precious", "only what a run wrote is removed"
    assert json.loads((copy / "summary.json").read_text())["t"] == 0.33


def test_a_folder_that_is_no_run_or_cannot_be_written(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, _, error = run(*TOY, "--out", tmp_path / "mine", *QUICK_OPTIONS, "--overwrite")
    assert (code, "is not empty and does not contain a run" in error) == (2, True)
    for manifest in ('{"name": "an extension"}', '{"settings": null}', "[1]", "{"):
        (tmp_path / "mine" / "manifest.json").write_text(manifest)
        code, _, error = run(*TOY, "--out", tmp_path / "mine", *QUICK_OPTIONS, "--overwrite")
        assert (code, "is damaged or is not a tn_lens manifest" in error) == (2, True)
    (tmp_path / "mine" / "manifest.json").unlink()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    code, _, error = run(*TOY, "--out", tmp_path / "mine" / "thesis.txt", *QUICK_OPTIONS)
    assert (code, "is a file" in error) == (2, True)
    code, _, error = run(*TOY, "--out", "/proc/nowhere/run", *QUICK_OPTIONS)
    assert (code, "cannot write" in error) == (2, True)


def test_a_full_disk_ends_with_one_sentence_and_a_later_run_completes(
    run: Callable, finished: Finished, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    for path in [*(copy / "scores").iterdir(), *(copy / name for name in RESULT_FILES if name != "manifest.json")]:
        path.unlink()
    monkeypatch.setattr(os, "fsync", full)
    code, _, error = run(*AGAIN)
    assert (code, "No space left on device" in error, error.count("\n")) == (2, True, 1)
    assert not list(copy.rglob(".*.part"))
    assert run(*AGAIN)[0] == 0
    assert contents(copy) == contents(finished.path)


def test_a_run_that_ran_out_of_memory_says_so_in_its_manifest_and_report(
    run: Callable, finished: Finished, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = SharedPrefix.run, []

    def small(self: SharedPrefix, paths: dict, nudges: dict) -> torch.Tensor:
        sizes.append(len(self.prompts))
        if len(self.prompts) > 4:
            raise torch.OutOfMemoryError("on purpose")
        return real(self, paths, nudges)

    monkeypatch.setattr(SharedPrefix, "run", small)
    next((copy / "scores").iterdir()).unlink()
    assert run(*AGAIN)[0] == 0
    assert max(sizes) > 4
    assert json.loads((copy / "manifest.json").read_text())["backed_off"] == {"n_prompts": 4, "n_rows": 12}
    report = (copy / "report.html").read_text()
    assert "Out of memory: continuing with smaller passes (prompts: 4, rows: 12)" in report
    assert "Memory ran out during attribution, which continued with passes of 4 prompts and 12 rows" in on_one_line(
        report
    )
    records = [json.loads((folder / "neurons.json").read_text())["neurons"] for folder in (copy, finished.path)]
    assert [record["index"] for record in records[0]] == [record["index"] for record in records[1]]
    sizes.clear()
    next((copy / "scores").iterdir()).unlink()
    assert run(*AGAIN)[0] == 0
    assert max(sizes) == 4, "a resumed run keeps the size that fitted"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_command_prints_in_any_encoding(
    encoding: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONIOENCODING=ascii, LANG=C and the console of Windows: the results are computed before anything is printed."""
    other = shutil.copytree(copy, tmp_path / "ω−±")
    command_lines = (
        AGAIN,
        ["show", other.name],
        ["report", other.name],
        ["select", other.name, "--splits", "2"],
        ["compare", "run", other.name],
        ["evaluate", other.name, "--on", "toy", "--limit", "4", "--repetitions", "2"],
        ["show", "no ω"],
    )
    for arguments in command_lines:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["tn-lens", *arguments])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module("tn_lens.cli.main").main()
        printed = []
        for stream in streams:
            stream.flush()
            printed.append(stream.buffer.getvalue().decode(encoding, errors="replace"))  # pyright: ignore
        assert stop.value.code == (2 if arguments[1] == "no ω" else 0), printed[1]
        assert any(printed)
        if arguments is AGAIN and encoding != "ascii":
            assert " ± " in printed[0]
            assert ("│" in printed[0]) == (encoding == "utf-8")


def test_selecting_again_needs_no_model(
    run: Callable, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = finished.path, contents(finished.path)
    monkeypatch.setattr("tn_lens.models.loading.load_model", None)
    stored = json.loads((out / "neurons.json").read_text())
    code, text, error = run("select", out, "--out", tmp_path / "again.json")
    assert code == 0, error
    again = json.loads((tmp_path / "again.json").read_text())
    places = [
        [(n["site"], n["layer"], n["head"], n["index"]) for n in selection["neurons"]] for selection in (stored, again)
    ]
    assert places[0] == places[1] != []
    loose = ["--t", "0.05", "--correction", "holm", "--sweep", "--splits", "3", "--out", tmp_path / "loose.json"]
    code, text, error = run("select", out, *loose)
    assert code == 0, error
    assert "With 3 splits" in text
    assert "number of neurons found with every t (rows) and p (columns)" in on_one_line(text)
    assert (tmp_path / "loose.html").stat().st_size > 1_000_000, "works offline"
    rules = json.loads((tmp_path / "loose.json").read_text())
    assert (rules["adaptive_threshold"], rules["correction"], rules["share_threshold"]) == (0.05, "holm", 0.4)
    assert contents(out) == before, "the run is left as it was"
    assert {"verdict", "case", "cohens_d", "ci_low"} <= stored["neurons"][0].keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--t", "20"], "not a percentage"),
        (["--splits", "1"], "needs at least 2"),
        (["--alpha", "0"], "alpha must lie in (0, 1)"),
        (["--out", "/nowhere/at/all.json"], "a folder that exists"),
    ],
)
def test_bad_input_to_select(arguments: list[str], said: str, run: Callable, finished: Finished) -> None:
    before = contents(finished.path)
    code, _, error = run("select", finished.path, *arguments)
    assert (code, said in error, error.count("\n")) == (2, True, 1)
    assert contents(finished.path) == before


def test_selecting_needs_the_files_of_a_run(run: Callable, copy: Path, tmp_path: Path) -> None:
    code, _, error = run("select", tmp_path, "--t", "0.1")
    assert (code, "does not contain a run" in error) == (2, True)
    (copy / "prompts.json").write_text("{")
    code, _, error = run("select", copy)
    assert (code, "is missing, damaged or written by another version" in error) == (2, True)


def test_attr_t_may_be_stored_beside_d(run: Callable, finished: Finished, tmp_path: Path) -> None:
    plain, out = finished.path, tmp_path / "separate"
    assert run(*TOY, "--out", out, *QUICK_OPTIONS, "--separate")[0] == 0
    stored = [{p.name: load_file(p) for p in (folder / "scores").iterdir()} for folder in (plain, out)]
    for name, tensors in stored[1].items():
        assert {"mlp.right", "attn.right"} <= tensors.keys() - stored[0][name].keys()
        assert tensors["mlp.right"].dtype == tensors["mlp"].dtype == torch.float16
    records = [json.loads((folder / "neurons.json").read_text())["neurons"] for folder in (plain, out)]
    assert records[0]
    assert [(n["layer"], n["index"], n["case"]) for n in records[0]] == [
        (n["layer"], n["index"], n["case"]) for n in records[1]
    ]
    for one, other in zip(*records, strict=True):  # few prompts: both runs attribute the labels on all of half 2
        assert one["attr_right"] == pytest.approx(other["attr_right"], rel=0.01, abs=1e-5)
        assert one["attr_wrong"] == pytest.approx(other["attr_wrong"], rel=0.01, abs=1e-5)
    code, _, error = run(*TOY, "--out", tmp_path / "x", *QUICK_OPTIONS, "--separate", "--target", "log_ratio")
    assert (code, "requires the target probability_difference" in error) == (2, True)


def test_t_is_tuned_on_separate_questions(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, error = run(*TOY, "--out", out, *QUICK_OPTIONS, "--repetitions", "1", "--t", "auto")
    assert code == 0, error
    summary = json.loads((out / "summary.json").read_text())
    tuning = json.loads((out / "result.json").read_text())["tuning"]
    assert summary["t"] == tuning["t"]
    assert tuning["n_questions"] == 144
    assert "How t was chosen" in (out / "report.html").read_text()
    assert f"t = {100 * summary['t']:.0f} % lowers" in on_one_line(text)
    code, _, error = run(*TOY, "--out", tmp_path / "other", *QUICK_OPTIONS, "--t", "often")
    assert (code, "a number in (0, 1] or 'auto'" in error) == (2, True)


def test_stopping_by_hand_says_how_to_continue(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tn_lens.pipeline.run.attribute", stop)
    code, _, error = run(*TOY, "--out", tmp_path / "run", *QUICK_OPTIONS)
    assert (code, "run the same command again" in error) == (130, True)


def test_edited_weights_are_another_model(copy: Path) -> None:
    model, questions = load_model("toy"), load_questions("toy")
    found = find_truth_neurons(model, questions, QUICK, out=copy, progress=False)
    assert found.neurons == load_run(copy).neurons
    model.blocks[0].mlp.W_out.data *= 0.5
    with pytest.raises(ValueError, match="weights_sha256"):
        find_truth_neurons(model, questions, QUICK, out=copy, progress=False)


WRONG_SETTINGS = (
    ({"correction": "hope"}, "BadInput: correction must be one of"),
    ({"order": "chaos"}, "BadInput: order must be one of"),
    ({"n_steps": 2.5}, "BadInput: n_steps must be a positive integer; got 2.5"),
    ({"max_memory": 0}, "BadInput: max_memory must be a positive integer; got 0"),
    (
        {"adaptive_threshold": "0.2"},
        "BadInput: adaptive_threshold (t) must be a number in (0, 1], or 'auto'; got '0.2'",
    ),
    ({"speed": 3}, "TypeError: Settings.__init__() got an unexpected keyword argument 'speed'"),
    ({"out": ""}, "BadInput: expected the path of a run folder, got an empty one"),
)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bool]]:
    """For each of the wrong settings the error, and whether a run folder was made.

    They are tried in one process without the type checker of the tests, as users call it.
    """
    code = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import tn_lens as tn
model, questions, refusals = tn.load_model("toy"), tn.load_questions("toy"), []
for given in json.loads(sys.argv[2]):
    out, error = Path(sys.argv[1]) / str(len(refusals)), None
    try:
        where = given.pop("out", out)
        tn.find_truth_neurons(model, questions, tn.Settings(**given), out=where)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    refusals.append((error, out.exists()))
print(json.dumps(refusals))
"""
    given = json.dumps([wrong for wrong, _ in WRONG_SETTINGS])
    command_line = [sys.executable, "-c", code, str(tmp_path_factory.mktemp("refused")), given]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", range(len(WRONG_SETTINGS)), ids=[str(wrong) for wrong, _ in WRONG_SETTINGS])
def test_wrong_settings_are_refused_before_anything_runs(place: int, refusals: list[tuple[str, bool]]) -> None:
    error, is_there = refusals[place]
    assert WRONG_SETTINGS[place][1] in error
    assert not is_there


def test_a_dry_run_estimates_the_cost_and_writes_nothing(run: Callable, tmp_path: Path) -> None:
    code, text, _ = run(*TOY, "--out", tmp_path / "run", *QUICK_OPTIONS, "--dry-run")
    assert code == 0
    assert re.search(r"24 questions, 48 prompts of up to \d+ tokens; about \d+ min \d+ s .* GiB", text)
    assert re.search(r"The manipulation check kept \d+ of 16 questions", text)
    assert not (tmp_path / "run").exists()


def test_a_real_checkpoint_that_knows_nothing_ends_well(run: Callable, tmp_path: Path, shared: Path) -> None:
    out = tmp_path / "run"
    model, questions = shared / "models" / "tinystories-656k", shared / "data" / "TruthfulQA.csv"
    command = ("run", "--model", model, "--questions", questions, "--out", out)
    options = ("--limit", 30, "--n-steps", 4, "--repetitions", 2)
    code, text, error = run(*command, *options, "--symbols", "Q", "Z", "--overwrite")
    assert code == 2
    assert re.search(r"the answers have only 0\.\d % of the probability.*does not answer with Q or Z.*--force", error)
    code, text, error = run(*command, *options, "--overwrite")
    assert code == 0, error
    assert "The manipulation check kept" in text
    assert "Most probable next tokens: " in text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_layers"] == 2
    assert summary["t"] == 0.2
    assert sum(map(sum, summary["neurons_by_layer"].values())) == summary["n_neurons"]
    assert "hardly follows the instruction" in on_one_line(text)
    assert summary["n_neurons"] or "No truth neurons were found" in on_one_line(text)
    assert (out / "report.html").stat().st_size > 1e6
