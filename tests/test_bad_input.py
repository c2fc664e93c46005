"""The error messages of docs/bad_input.md; `python -m tests.test_bad_input` writes this page again."""

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
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tn_lens as tn
from tn_lens import Neuron, NeuronSet, QuestionSet, Settings
from tn_lens.attribution.result import PassSize
from tn_lens.cli import main
from tn_lens.models import Model
from tn_lens.pipeline.retest import retest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "bad_input.md"

HEAD = """# Error messages for invalid input

A message states what was expected and what was found, and in most cases what to do. The command line prints it after `error:` and exits with
code 2; in Python, `BadInput` is raised, which is a `ValueError`. No results are written. `DIR` is a placeholder for a folder. Every row
is tested (`tests/test_bad_input.py`, which also writes this page), and `make fuzz` tests random inputs that are not in the table.

"""


@dataclass(frozen=True)
class Case:
    """One row of the table: command or function, input, and files that must exist."""

    where: str
    what: str
    given: Any
    """Arguments of the command, or a function of the folder, the toy model and twelve of its questions."""
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


def relation(what: str, content: str, **options: Any) -> Case:
    def load(folder: Path, toy: Model, few: QuestionSet) -> QuestionSet:
        return tn.load_questions("country_language", source=folder / "own.json", **options)

    return Case('`load_questions("country_language", source="own.json")`', what, load, (("own.json", content),))


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
    option("--preset", "best"),
    option("--baseline", "one"),
    option("--baseline", "input", "--baseline-input", "silence"),
    option("--baseline", "input", "--positions", "all"),
    option("--sites", "mlp", "brain"),
    option("--controls", "placebo"),
    option("--intervention", "scale"),
    option("--format", "figure_0"),
    option("--engine", "shared_prefix", "--positions", "all"),
    option("--separate", "--target", "log_ratio"),
    option("--device", "abacus"),
    option("--dtype", "int3"),
    option("--treshold", "0.2"),
    Case("`tn-lens run`", "no `--out`", RUN),
    Case("`tn-lens run`", "no `--model`", ("run", "--questions", "toy", "--out", "DIR/run")),
    Case("`tn-lens run`", "`--out` with a name that is too long", (*RUN, "--out", "DIR/" + "x" * 300)),
    Case("`tn-lens run`", "`--out` is a file", (*RUN, "--out", "DIR/thesis.txt"), (("thesis.txt", "precious"),)),
    Case("`tn-lens run`", "`--out` holds other files", (*RUN, "--out", "DIR"), (("thesis.txt", "precious"),)),
    Case("`tn-lens run`", "`--out` holds another manifest", (*RUN, "--out", "DIR"), (("manifest.json", '{"a": 1}'),)),
    Case("`tn-lens run`", "a damaged manifest", (*RUN, "--out", "DIR"), (("manifest.json", '{"settings": {'),)),
    Case("`tn-lens run`", "an invalid model name", ("run", "--model", "a b c", *RUN[3:], "--out", "DIR/run")),
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
    Case("`tn-lens run`", "a missing copy of a set", (*RUN[:4], "cities=DIR/cities.csv", "--out", "DIR/run")),
    file("an unknown kind of file", "own.txt", "question,right,wrong\n"),
    file("an empty file", "own.csv", ""),
    file("only a header", "own.csv", "question,right,wrong\n"),
    file("no column `wrong`", "own.csv", "question,right\nQ?,Yes\n"),
    file("other column names", "own.csv", "frage,right,wrong\nQ?,Yes,No\n"),
    file("an unquoted comma", "own.csv", "question,right,wrong\nWell, who barks?,dog,cup\n"),
    file("two columns of one name", "own.csv", "question,right,wrong,right\nQ?,Yes,No,Perhaps\n"),
    file("backslashes before quotation marks", "own.csv", 'question,right,wrong\n"He said \\"hi\\"?",Yes,No\n'),
    file("an empty question", "own.csv", "question,right,wrong\n ,Yes,No\n"),
    file("an empty answer", "own.csv", "question,right,wrong\nQ?,Yes,\n"),
    file("equal answers", "own.csv", "question,right,wrong\nQ?,Yes,Yes\n"),
    file("a NUL character", "own.csv", b"question,right,wrong\nQ\0?,Yes,No\n"),
    file("Latin-1", "own.csv", "question,right,wrong\nOù?,là,ici\n".encode("latin-1")),
    file("UTF-16", "own.csv", "question,right,wrong\nQ?,Yes,No\n".encode("utf-16")),
    file("a field of more than 131,072 characters", "own.csv", f"question,right,wrong\n{'x' * 140_000},Yes,No\n"),
    file("words that the tokenizer does not know", "own.csv", "question,right,wrong\nKtoz?,Tak,Nie\n"),
    file("a line that is not JSON", "own.jsonl", "{not json}\n"),
    file("a line that is not an object", "own.jsonl", "[1]\n"),
    file("a question that is not text", "own.jsonl", '{"question": {"a": 1}, "right": "a", "wrong": "b"}\n'),
    file("a missing value", "own.jsonl", '{"question": "Q?", "right": NaN, "wrong": "b"}\n'),
    file("two values for a key", "own.jsonl", '{"question": "Q?", "right": "a", "right": "b", "wrong": "c"}\n'),
    file(
        "an answer that is an index and a choice",
        "own.jsonl",
        '{"question": "Q?", "choices": ["2", "1", "0"], "answer": "0"}\n',
    ),
    file("a label that is not 0, 1, true or false", "own.csv", "statement,label\nSnow is cold.,yes\n"),
    file("an answer index out of range", "own.jsonl", '{"question": "Q?", "choices": ["a", "b"], "answer": 2}\n'),
    file("an unknown answer letter", "own.jsonl", '{"question": "Q?", "choices": ["a", "b"], "answer": "Z"}\n'),
    file("a single choice", "own.jsonl", '{"question": "Q?", "choices": ["a"], "answer": 0}\n'),
    file("half of an emoji", "own.jsonl", '{"question": "\\ud83d?", "right": "a", "wrong": "b"}\n'),
    Case("`tn-lens select`", "a folder without a run", ("select", "DIR")),
    Case("`tn-lens select`", "a damaged manifest", ("select", "DIR"), (("manifest.json", "[]"),)),
    Case("`tn-lens evaluate`", "neither a run nor neurons", ("evaluate", "--on", "toy")),
    Case("`tn-lens evaluate`", "a folder without a run", ("evaluate", "DIR", "--on", "toy")),
    Case(
        "`tn-lens evaluate`",
        "a missing neuron file",
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
    Case(
        "`tn-lens evaluate`",
        "`--mode scale` without `--factor`",
        ("evaluate", "--neurons", "DIR/n.json", "--model", "toy", "--on", "toy", "--mode", "scale"),
        (("n.json", '{"neurons": []}'),),
    ),
    Case(
        "`tn-lens evaluate`",
        "`--factor` without `--mode scale`",
        ("evaluate", "--neurons", "DIR/n.json", "--model", "toy", "--on", "toy", "--factor", "2"),
        (("n.json", '{"neurons": []}'),),
    ),
    call('`find_truth_neurons("toy", questions)`', lambda folder, toy, few: tn.find_truth_neurons("toy", few)),
    call('`find_truth_neurons(model, "toy")`', lambda folder, toy, few: tn.find_truth_neurons(toy, "toy")),
    call(
        "`find_truth_neurons(model, questions, {'t': 0.2})`",
        lambda folder, toy, few: tn.find_truth_neurons(toy, few, {"t": 0.2}),  # pyright: ignore
    ),
    call(
        "`Settings(n_steps=2.5)`",
        lambda folder, toy, few: tn.find_truth_neurons(toy, few, Settings(n_steps=2.5)),  # pyright: ignore
    ),
    call(
        "`Settings(adaptive_threshold=True)`",
        lambda folder, toy, few: tn.find_truth_neurons(toy, few, Settings(adaptive_threshold=True)),
    ),
    call("`find_truth_neurons(..., threads=0)`", lambda folder, toy, few: tn.find_truth_neurons(toy, few, threads=0)),
    call(
        "questions longer than the context window",
        lambda folder, toy, few: tn.build_prompts(
            toy, replace(few, questions=(replace(few[0], text="colour " * 10_000),))
        ),
    ),
    call(
        "an answer that is the beginning of another",
        lambda folder, toy, few: tn.build_prompt(toy, "Question :", right=" red", wrong=" red blue"),
    ),
    call("`attribute(model, [])`", lambda folder, toy, few: tn.attribute(toy, [])),
    call(
        "`attribute(..., internal_batch_size=PassSize(0, 1))`",
        lambda folder, toy, few: tn.attribute(toy, tn.build_prompts(toy, few), internal_batch_size=PassSize(0, 1)),
    ),
    call(
        '`attribute(..., baseline="input", baseline_input="blanked")` with `build_prompt`',
        lambda folder, toy, few: tn.attribute(
            toy,
            tn.build_prompt(toy, "Question :", right=" red", wrong=" blue"),
            baseline="input",
            baseline_input="blanked",
        ),
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
    call(
        '`evaluate(..., intervention="scale")`',
        lambda folder, toy, few: tn.evaluate(toy, few, NeuronSet(), intervention="scale"),
    ),
    relation("a file that is not a relation", "[]"),
    relation(
        "a relation without another answer",
        '{"prompt_templates": ["{} is"], "samples": [{"subject": "a", "object": "b"}]}',
    ),
    relation("a template that the relation lacks", '{"prompt_templates": ["{} is"], "samples": []}', template=1),
    call("`Scale(factor=nan)`", lambda folder, toy, few: tn.Scale(factor=float("nan"))),
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


def shown(message: str, folder: Path) -> str:
    """The message as in the table."""
    message = message.removeprefix("error: ").strip().replace(str(folder), "DIR")
    message = re.sub(r"this machine's devices: .*", "this machine's devices: cpu", message)
    return re.sub(r"x{100,}", "xxx...", message)


@cache
def loaded() -> tuple[Model, QuestionSet]:
    """The toy model and some of its questions."""
    return tn.load_model("toy"), tn.load_questions("toy").select(range(12))


def result_of(case: Case, folder: Path) -> dict[str, Any]:
    """Exit code and message, and whether the folder is unchanged. Call it without the type checker of the tests."""
    put(case, folder)
    before = sorted(folder.rglob("*"))
    printed = io.StringIO()
    code = 0
    if callable(case.given):
        try:
            case.given(folder, *loaded())
        except tn.BadInput as error:
            code = 2
            printed.write(str(error))
    else:
        sys.argv = ["tn-lens", *(argument.replace("DIR", str(folder)) for argument in case.given)]
        try:
            with contextlib.redirect_stderr(printed):
                main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    left = [path for path in sorted(folder.rglob("*")) if path.name not in (".lock", "log.jsonl", "out")]
    return {"code": code, "message": shown(printed.getvalue(), folder), "unchanged": left == before}


def rows() -> list[dict[str, Any]]:
    """The result of every case."""
    results = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            results.append(result_of(case, Path(folder)))
    return results


def table(messages: list[str]) -> str:
    """The page."""
    lines = ["| where | input | message |", "|---|---|---|"]
    for case, message in zip(CASES, messages, strict=True):
        cells = [case.where, case.what, re.sub(r"([<>|*_`])", r"\\\1", message)]
        lines.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Run in another process without the type checker of the tests, as for users."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_bad_input", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", range(len(CASES)), ids=[f"{case.where} {case.what}"[:60] for case in CASES])
def test_bad_input_ends_with_one_sentence(place: int, results: list[dict[str, Any]]) -> None:
    result = results[place]
    assert result["code"] == 2, result
    assert result["message"]
    assert len(result["message"].splitlines()) == 1
    assert "Traceback" not in result["message"]
    assert result["unchanged"], "nothing is written"


def test_the_page_shows_these_messages(results: list[dict[str, Any]]) -> None:
    assert len(CASES) >= 40
    assert TABLE.read_text(encoding="utf-8") == table([result["message"] for result in results])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    as_json = "--json" in sys.argv
    made = rows()
    if as_json:
        print(json.dumps(made))
    else:
        TABLE.write_text(table([result["message"] for result in made]), encoding="utf-8")
