"""Every bad input of docs/bad_input.md, and what comes back: `python -m tests.test_bad_input` writes the table anew."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tn_lens as tn
from tn_lens import Neuron, NeuronSet, QuestionSet
from tn_lens.attribution.result import PassSize
from tn_lens.cli import main as cli
from tn_lens.models import Model
from tn_lens.pipeline.retest import retest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "bad_input.md"

HEAD = """# What comes back for bad input

One sentence each: what was expected, what came, what to do. A command prints it after `error:` and ends with exit code 2; a
call raises `BadInput`, which is a `ValueError`. Nothing is written. `DIR` stands for a folder of the user's. Every row is
held by a test (`tests/test_bad_input.py`, which also writes this table), and `make fuzz` looks for what is not in it.

"""


@dataclass(frozen=True)
class Case:
    """One row: where, what goes in, and files that must be there."""

    where: str
    what: str
    given: Any
    """Arguments of the command, or a call that gets the folder, the toy and its questions."""
    files: tuple[tuple[str, str | bytes], ...] = ()


RUN = ("run", "--model", "toy", "--questions", "toy")
OUT = (*RUN, "--out", "DIR/run")


def option(*arguments: str) -> Case:
    return Case("`tn-lens run`", f"`{' '.join(arguments)}`", (*OUT, *arguments))


def file(what: str, name: str, content: str | bytes) -> Case:
    given = ("run", "--model", "toy", "--questions", f"DIR/{name}", "--out", "DIR/run")
    return Case("question file", what, given, ((name, content),))


def call(what: str, given: Callable[[Path, Model, QuestionSet], Any]) -> Case:
    return Case("call", what, given)


CASES = [
    option("--t", "0"),
    option("--t", "20"),
    option("--t", "nan"),
    option("--t", "often"),
    option("--p", "1.5"),
    option("--alpha", "1"),
    option("--limit", "0"),
    option("--limit", "many"),
    option("--n-steps", "0"),
    option("--method", "simpson"),
    option("--method", "riemann_trapezoid", "--n-steps", "1"),
    option("--repetitions", "0"),
    option("--seed", "-1"),
    option("--threads", "0"),
    option("--max-memory", "0"),
    option("--order", "chaos"),
    option("--engine", "shared_prefix", "--positions", "all"),
    option("--separate", "--target", "log_ratio"),
    option("--device", "abacus"),
    option("--dtype", "int3"),
    option("--treshold", "0.2"),
    Case("`tn-lens run`", "no `--out`", RUN),
    Case("`tn-lens run`", "no `--model`", ("run", "--questions", "toy", "--out", "DIR/run")),
    Case("`tn-lens run`", "`--out` with a name too long", (*RUN, "--out", "DIR/" + "x" * 300)),
    Case("`tn-lens run`", "`--out` is a file", (*RUN, "--out", "DIR/thesis.txt"), (("thesis.txt", "precious"),)),
    Case("`tn-lens run`", "`--out` holds other files", (*RUN, "--out", "DIR"), (("thesis.txt", "precious"),)),
    Case("`tn-lens run`", "`--out` holds another manifest", (*RUN, "--out", "DIR"), (("manifest.json", '{"a": 1}'),)),
    Case("`tn-lens run`", "a damaged manifest", (*RUN, "--out", "DIR"), (("manifest.json", '{"settings": {'),)),
    Case("`tn-lens run`", "a model that is no name", ("run", "--model", "a b c", *RUN[3:], "--out", "DIR/run")),
    Case(
        "`tn-lens run`", "a model folder without config.json", ("run", "--model", "DIR", *RUN[3:], "--out", "DIR/run")
    ),
    Case(
        "`tn-lens run`",
        "a model folder with a broken config.json",
        ("run", "--model", "DIR", *RUN[3:], "--out", "DIR/run"),
        (("config.json", "{"),),
    ),
    Case(
        "`tn-lens run`",
        "a LoRA adapter",
        ("run", "--model", "DIR", *RUN[3:], "--out", "DIR/run"),
        (("adapter_config.json", "{}"),),
    ),
    Case("`tn-lens run`", "an unknown question set", (*RUN[:4], "riddles", "--out", "DIR/run")),
    file("an unknown kind of file", "own.txt", "question,right,wrong\n"),
    file("an empty file", "own.csv", ""),
    file("a header alone", "own.csv", "question,right,wrong\n"),
    file("no column `wrong`", "own.csv", "question,right\nQ?,Yes\n"),
    file("other column names", "own.csv", "frage,right,wrong\nQ?,Yes,No\n"),
    file("a comma without quotes", "own.csv", "question,right,wrong\nWell, who barks?,dog,cup\n"),
    file("an empty question", "own.csv", "question,right,wrong\n ,Yes,No\n"),
    file("an empty answer", "own.csv", "question,right,wrong\nQ?,Yes,\n"),
    file("equal answers", "own.csv", "question,right,wrong\nQ?,Yes,Yes\n"),
    file("a NUL character", "own.csv", b"question,right,wrong\nQ\0?,Yes,No\n"),
    file("Latin-1", "own.csv", "question,right,wrong\nOù?,là,ici\n".encode("latin-1")),
    file("UTF-16", "own.csv", "question,right,wrong\nQ?,Yes,No\n".encode("utf-16")),
    file("a field of more than 131,072 characters", "own.csv", f"question,right,wrong\n{'x' * 140_000},Yes,No\n"),
    file("words that the tokenizer does not know", "own.csv", "question,right,wrong\nKtoz?,Tak,Nie\n"),
    file("a line that is no JSON", "own.jsonl", "{not json}\n"),
    file("a line that is no object", "own.jsonl", "[1]\n"),
    file("a question that is no text", "own.jsonl", '{"question": {"a": 1}, "right": "a", "wrong": "b"}\n'),
    file("an answer beyond the choices", "own.jsonl", '{"question": "Q?", "choices": ["a", "b"], "answer": 2}\n'),
    file("an unknown answer letter", "own.jsonl", '{"question": "Q?", "choices": ["a", "b"], "answer": "Z"}\n'),
    file("a single choice", "own.jsonl", '{"question": "Q?", "choices": ["a"], "answer": 0}\n'),
    file("half of an emoji", "own.jsonl", '{"question": "\\ud83d?", "right": "a", "wrong": "b"}\n'),
    Case("`tn-lens select`", "no run there", ("select", "DIR")),
    Case("`tn-lens select`", "a damaged manifest", ("select", "DIR"), (("manifest.json", "[]"),)),
    Case("`tn-lens evaluate`", "neither a run nor neurons", ("evaluate", "--on", "toy")),
    Case("`tn-lens evaluate`", "no run there", ("evaluate", "DIR", "--on", "toy")),
    Case(
        "`tn-lens evaluate`",
        "no such neurons",
        ("evaluate", "--neurons", "DIR/no.json", "--on", "toy", "--model", "toy"),
    ),
    Case(
        "`tn-lens evaluate`",
        "neurons without a layer",
        ("evaluate", "--neurons", "DIR/n.json", "--on", "toy", "--model", "toy"),
        (("n.json", '{"neurons": [{"site": "mlp", "head": null, "index": 1}]}'),),
    ),
    Case(
        "`tn-lens evaluate`",
        "neurons of a larger model",
        ("evaluate", "--neurons", "DIR/n.json", "--on", "toy", "--model", "toy", "--out", "DIR/evaluation"),
        (("n.json", '{"neurons": [{"site": "mlp", "layer": 99, "head": null, "index": 1}]}'),),
    ),
    Case(
        "`tn-lens evaluate`",
        "no question set",
        ("evaluate", "--neurons", "DIR/n.json", "--model", "toy"),
        (("n.json", '{"neurons": []}'),),
    ),
    Case(
        "`tn-lens evaluate`",
        "a limit of 0",
        ("evaluate", "--neurons", "DIR/n.json", "--model", "toy", "--on", "toy", "--limit", "0"),
        (("n.json", '{"neurons": []}'),),
    ),
    call('`find_truth_neurons("toy", questions)`', lambda folder, toy, few: tn.find_truth_neurons("toy", few)),
    call('`find_truth_neurons(model, "toy")`', lambda folder, toy, few: tn.find_truth_neurons(toy, "toy")),
    call("`find_truth_neurons(..., speed=3)`", lambda folder, toy, few: tn.find_truth_neurons(toy, few, speed=3)),
    call(
        "`find_truth_neurons(..., n_steps=2.5)`", lambda folder, toy, few: tn.find_truth_neurons(toy, few, n_steps=2.5)
    ),
    call("`find_truth_neurons(..., t=True)`", lambda folder, toy, few: tn.find_truth_neurons(toy, few, t=True)),
    call("`find_truth_neurons(..., threads=0)`", lambda folder, toy, few: tn.find_truth_neurons(toy, few, threads=0)),
    call(
        "questions longer than the context window",
        lambda folder, toy, few: tn.build_prompts(
            toy, replace(few, questions=(replace(few[0], text="colour " * 10_000),))
        ),
    ),
    call(
        "a label that is two tokens",
        lambda folder, toy, few: tn.build_prompt(toy, "Question :", right=" red blue", wrong=" green"),
    ),
    call("`attribute(model, [])`", lambda folder, toy, few: tn.attribute(toy, [])),
    call(
        "`attribute(..., pass_size=PassSize(0, 1))`",
        lambda folder, toy, few: tn.attribute(toy, tn.build_prompts(toy, few), pass_size=PassSize(0, 1)),
    ),
    call(
        '`attribute(..., target="truth")`',
        lambda folder, toy, few: tn.attribute(toy, tn.build_prompts(toy, few), target="truth"),
    ),
    call(
        "`evaluate` with a list of neurons", lambda folder, toy, few: tn.evaluate(toy, few, [Neuron("mlp", 0, None, 1)])
    ),
    call(
        "`evaluate(..., n_repetitions=0)`",
        lambda folder, toy, few: tn.evaluate(toy, few, NeuronSet(), n_repetitions=0),
    ),
    call('`evaluate(..., mode="scale")`', lambda folder, toy, few: tn.evaluate(toy, few, NeuronSet(), mode="scale")),
    call(
        "a question set called `../../etc`",
        lambda folder, toy, few: retest(
            toy, NeuronSet(), [replace(few, name="../../etc")], out=folder / "out", progress=False
        ),
    ),
]


def put(case: Case, folder: Path) -> None:
    for name, content in case.files:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def shown(sentence: str, folder: Path) -> str:
    """The sentence as the table has it."""
    sentence = sentence.removeprefix("error: ").strip().replace(str(folder), "DIR")
    sentence = re.sub(r"this machine has .*", "this machine has cpu", sentence)
    return re.sub(r"x{100,}", "xxx...", sentence)


def result_of(case: Case, folder: Path) -> dict[str, Any]:
    """Exit code, sentence, and whether the folder was left as it was; to be called without the tests' type checker."""
    put(case, folder)
    before = sorted(folder.rglob("*"))
    said = io.StringIO()
    code = 0
    if callable(case.given):
        toy, questions = tn.load_model("toy"), tn.load_questions("toy")
        try:
            case.given(folder, toy, questions.select(range(12)))
        except tn.BadInput as error:
            code = 2
            said.write(str(error))
    else:
        sys.argv = ["tn-lens", *(argument.replace("DIR", str(folder)) for argument in case.given)]
        try:
            with contextlib.redirect_stderr(said):
                cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    left = [path for path in sorted(folder.rglob("*")) if path.name not in (".lock", "log.jsonl", "out")]
    return {"code": code, "said": shown(said.getvalue(), folder), "untouched": left == before}


def rows() -> list[dict[str, Any]]:
    """What comes back for every case."""
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(result_of(case, Path(folder)))
    return found


def table(said: list[str]) -> str:
    """The document."""
    lines = ["| where | what goes in | what comes back |", "|---|---|---|"]
    for case, sentence in zip(CASES, said, strict=True):
        cells = [case.where, case.what, re.sub(r"([<>|*_`])", r"\\\1", sentence)]
        lines.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """From a process of its own, as users have it: without the type checker."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_bad_input", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", range(len(CASES)), ids=[f"{case.where} {case.what}"[:60] for case in CASES])
def test_a_bad_input_is_one_sentence(place: int, results: list[dict[str, Any]]) -> None:
    found = results[place]
    assert found["code"] == 2, found
    assert found["said"]
    assert len(found["said"].splitlines()) == 1
    assert "Traceback" not in found["said"]
    assert found["untouched"], "nothing is written"


def test_the_table_in_the_docs_is_what_comes_back(results: list[dict[str, Any]]) -> None:
    assert len(CASES) >= 40
    assert TABLE.read_text(encoding="utf-8") == table([found["said"] for found in results])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    as_json = "--json" in sys.argv
    made = rows()
    if as_json:
        print(json.dumps(made))
    else:
        TABLE.write_text(table([found["said"] for found in made]), encoding="utf-8")
