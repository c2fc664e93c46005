"""Random inputs give a one-line message or the right result, and never a traceback. `make fuzz` runs all cases."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from tests.conftest import contents
from tn_lens import (
    Attribution,
    BadInput,
    Evaluation,
    ManipulationCheck,
    NeuronSet,
    PromptSet,
    Question,
    QuestionSet,
    Selection,
    Settings,
    TruthNeurons,
    build_prompts,
    find_truth_neurons,
    load_questions,
    load_run,
    select_neurons,
)
from tn_lens.core.stored import Stored
from tn_lens.evaluation.diagnosis import Diagnosis
from tn_lens.models import Model
from tn_lens.neurons import NeuronSpace
from tn_lens.pipeline.retest import run_of
from tn_lens.pipeline.settings import resolve_settings
from tn_lens.questions.prompts import Prompt
from tn_lens.results.card import CardFile
from tn_lens.results.found import _Rest
from tn_lens.selection.stored import StoredScores
from tn_lens.selection.table import split_halves

WHOLE = bool(os.environ.get("TN_LENS_FUZZ"))
"""Whether this is `make fuzz`."""
SHARES: list[int] = []


def cases(n: int) -> Callable:
    """This number of cases in `make fuzz`, and a thirtieth of it in `make test`."""
    SHARES.append(n)
    return settings(
        max_examples=n if WHOLE else max(1, n // 30),
        deadline=None,
        derandomize=not WHOLE,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NASTY = st.sampled_from(
    [
        "", " ", "\ufeff", "\0", '"', '""', "'", ",", "\n", "\r\n", "\r", "\t", "\x1a", "\u2028", "\u0085", "\x1c",
        "\u200f\u05d0\u05d1", "\u202e", "🙂", "👩‍👩‍👧", "e\u0301", "ﬀ", "İ", "ß", "\ud83d", "\\", "{question}", "{{", "</script>",
        "<b>", "=1+1", "NaN", "null", "0", "[1]", "A", "colour", "x" * 10_000, "what is the colour of Balum ?",
    ]
)  # fmt: skip
TEXT = st.lists(NASTY | st.text(max_size=8), max_size=4).map("".join)
SOUND = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "shift-jis"])


def loaded(name: str, content: bytes) -> QuestionSet | None:
    """The questions of a file; None if it was refused with a one-line message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            questions = load_questions(path)
        except BadInput as error:
            is_sentence(error)
            return None
    assert len(questions) > 0
    for question in questions:
        assert question.text.strip()
        assert 2 <= len(question.choices) <= 26
        assert len(set(question.choices)) == len(question.choices)
        assert all(choice.strip() for choice in question.choices)
        assert 0 <= question.answer < len(question.choices)
    return questions


def is_sentence(error: BadInput) -> None:
    """Check that a message can be read in a terminal."""
    said = " ".join(str(error).split())
    assert 10 < len(said) < 2000


def can_be_used(row: tuple[str, str, str]) -> bool:
    question, right, wrong = (" ".join(cell.split()) for cell in row)
    return bool(question and right and wrong) and right != wrong


def folded(row: tuple[str, str, str]) -> tuple[str, ...]:
    """The form in which rows are compared: those that repeat an earlier one are left out."""
    return tuple(" ".join(cell.split()).casefold() for cell in row)


@cases(2500)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=4, unique_by=folded),
    encoding=ENCODINGS,
    quoting=st.sampled_from([0, 1, 2]),
)
def test_csv_files(rows: list[tuple[str, str, str]], encoding: str, quoting: Any) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=quoting).writerows([("question", "right", "wrong"), *rows])
    content = text.getvalue().encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")
    questions = loaded("own.csv", content)
    written = [row for row in rows if any(row)]
    sound = not any(c in "".join(sum(rows, ())) for c in ("\0", "\ud83d")) and all(
        len(c) < 131_072 for r in rows for c in r
    )
    if encoding in ("utf-8", "utf-8-sig") and sound and written and all(map(can_be_used, written)):
        assert questions is not None, "a sound file is read"
        assert [(q.text, *q.choices) for q in questions] == [tuple(cell.strip() for cell in row) for row in written]


@cases(2500)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["question", "right", "wrong", "choices", "answer", "category", "Question"]),
            TEXT | st.none() | st.integers() | st.floats() | st.booleans() | st.lists(TEXT, max_size=4) | st.just({}),
            max_size=6,
        ),
        max_size=4,
    ),
    ascii_only=st.booleans(),
)
def test_json_lines(rows: list[dict[str, Any]], ascii_only: bool) -> None:
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    loaded("own.jsonl", text.encode(errors="surrogatepass"))


@cases(500)
@given(
    rows=st.lists(st.tuples(SOUND, SOUND, SOUND).filter(can_be_used), min_size=1, max_size=5, unique_by=folded),
    bom=st.booleans(),
)
def test_what_is_sound_comes_back_as_it_was_written(rows: list[tuple[str, str, str]], bom: bool) -> None:
    keys = ("question", "right", "wrong")
    lines = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([keys, *rows])
    for name, content in (("own.jsonl", lines), ("own.csv", text.getvalue())):
        questions = loaded(name, (b"\xef\xbb\xbf" if bom else b"") + content.encode())
        assert questions is not None
        assert [(q.text, *q.choices) for q in questions] == [tuple(cell.strip() for cell in row) for row in rows]


@cases(1500)
@given(content=st.binary(max_size=200), name=st.sampled_from(["own.csv", "own.jsonl"]), header=st.booleans())
def test_bytes(content: bytes, name: str, header: bool) -> None:
    loaded(name, (b"question,right,wrong\n" if header else b"") + content)


VALUES = (
    st.floats()
    | st.integers(-3, 200)
    | st.sampled_from([None, True, "0.2", "auto", "", math.nan, math.inf, 5e-324, 1.0, np.float64(0.3), [0.1], 10**400])
)


@cases(2000)
@given(adaptive_threshold=VALUES, share_threshold=VALUES, alpha=VALUES, n_steps=VALUES, limit=VALUES, seed=VALUES)
def test_settings(toy: Model, **given_values: Any) -> None:
    try:
        found = resolve_settings(toy, Settings(**given_values))
    except BadInput as error:
        is_sentence(error)
        return
    except TypeCheckError:  # the tests' own; `make fuzz` runs without it
        assert not WHOLE
        return
    assert found.adaptive_threshold is not None
    assert found.adaptive_threshold == "auto" or 0 < found.adaptive_threshold <= 1
    assert 0 < found.share_threshold <= 1
    assert 0 < found.alpha < 1
    assert found.n_steps >= 1
    assert found.limit is None or found.limit >= 1
    assert found.seed >= 0


SPACE = NeuronSpace(n_layers=2, d_mlp=3, n_heads=1, d_head=2, d_model=4)


@cases(1000)
@given(
    seed=st.integers(0, 10**6),
    n_questions=st.integers(1, 12),
    t=st.floats(0, 1, exclude_min=True),
    p=st.floats(0, 1, exclude_min=True),
)
def test_candidates_are_those_of_the_definition(seed: int, n_questions: int, t: float, p: float) -> None:
    """Paper 2.3, by hand: D > t * max D of the prompt, in at least a share p of half 1."""
    coins = torch.Generator().manual_seed(seed)
    difference = {
        site: torch.randn(n_questions, 2, width, generator=coins).round(decimals=1)
        for site, width in (("mlp", 3), ("attn", 2))
    }
    rows = {f"question {row}": row for row in range(n_questions)}
    prompts = PromptSet(
        tuple(
            Prompt(token_ids=(1,), label_ids=((0,), (1,)), right=0, question=question, order=(0, 1), category="c")
            for question in rows
        )
    )
    change = {site: values.sum(-1) for site, values in difference.items()}
    scores = Attribution(prompts=prompts, space=SPACE, difference=difference, change=change)
    try:
        selection = select_neurons(scores, adaptive_threshold=t, share_threshold=p)
    except BadInput as error:
        is_sentence(error)
        return
    half, _ = split_halves(scores.categories, 0)
    expected = set()
    for site, values in difference.items():
        own = values[[rows[question] for question in half]]
        largest = own.flatten(1).max(1).values[:, None, None]
        salient = (own > t * largest) & (largest > 0)
        for layer, index in (salient.sum(0) >= p * len(half) - 1e-9).nonzero().tolist():
            if salient[:, layer, index].any():
                expected.add(SPACE.neuron(site, layer, index))
    assert set(selection.candidates) == expected


@cases(1000)
@given(
    payload=st.recursive(
        st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["mlp", "attn", "x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["neurons", "site", "layer", "head", "index"]), inner, max_size=5)
        ),
        max_leaves=12,
    )
)
def test_neuron_files(payload: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "neurons.json"
        path.write_text(json.dumps(payload))
        try:
            found = NeuronSet.load(path)
        except BadInput as error:
            is_sentence(error)
            return
    assert all(neuron.layer >= 0 and neuron.index >= 0 for neuron in found)


def is_short(text: str) -> bool:
    return 0 < len(text.strip()) < 1000


@cases(300)
@given(
    texts=st.lists(TEXT.filter(is_short), min_size=1, max_size=3),
    choices=st.lists(TEXT.filter(is_short), min_size=2, max_size=4, unique=True),
)
@pytest.mark.filterwarnings("ignore:.*prompts contain words that:UserWarning")
def test_prompts(toy: Model, toy_questions: QuestionSet, texts: list[str], choices: list[str]) -> None:
    known = toy_questions[0]
    asked = [known, *(Question(text=text, choices=tuple(choices)) for text in texts)]
    questions = replace(toy_questions, questions=tuple(asked))
    answers = {question.id: given.answer for question, given in zip(questions, asked, strict=True)}
    assert len(answers) == len(asked), "ids are unique, also where questions are equal"
    try:
        prompts = build_prompts(toy, questions, order="both")
    except BadInput as error:
        is_sentence(error)
        return
    for prompt in prompts:
        assert prompt.order[prompt.right] == answers[prompt.question]
        assert len(prompt.token_ids) <= toy.cfg.n_ctx
        assert 0 <= prompt.start < len(prompt.token_ids)


SMALL = Settings(limit=16, n_steps=1, n_repetitions=1, order="both")


@pytest.fixture(scope="module")
def few(toy_questions: QuestionSet) -> QuestionSet:
    places = [
        i for part in ("find", "report") for i in [i for i, q in enumerate(toy_questions) if q.split == part][:16]
    ]
    return toy_questions.select(places)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy: Model, few: QuestionSet) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    find_truth_neurons(toy, few, SMALL, out=folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """The result files of the run without its scores, with an evaluation as `tn-lens evaluate` adds it."""
    folder = tmp_path_factory.mktemp("results") / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("scores", "work", "report.html", "log.jsonl", ".lock"))
    (folder / "evaluation").mkdir()
    replace(load_run(folder).evaluation, name="again").save(folder / "evaluation" / "again.safetensors")
    return folder


def numbers(run: TruthNeurons) -> dict[str, list[Any]]:
    """Every field of a run, in a form in which NaN equals NaN."""
    values = {field.name: getattr(run, field.name) for field in fields(run)}
    return {
        name: [
            part.to_bytes(".safetensors") if isinstance(part, Stored) else repr(part)
            for part in (value if isinstance(value, tuple) else (value,))
        ]
        for name, value in values.items()
    }


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, list[Any]]:
    return numbers(load_run(whole))


@pytest.fixture(scope="module")
def expected_results(results: Path) -> dict[str, list[Any]]:
    run = load_run(results)
    assert [evaluation.name for evaluation in run.others] == ["again"]
    return numbers(run)


DAMAGE = st.sampled_from(["flip", "cut", "empty", "delete", "append", "swap", "folder", "link", "zeros", "text"])


def damage(folder: Path, how: str, data: st.DataObject, name: str | None = None) -> None:
    """Damage one file of a run folder: the given one, or a random one."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock",))
    path = data.draw(st.sampled_from(files), label="file") if name is None else folder / name
    content = path.read_bytes()
    place = data.draw(st.integers(0, max(0, len(content) - 1)), label="place")
    match how:
        case "flip" if content:
            bit = 1 << data.draw(st.integers(0, 7), label="bit")
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        case "cut":
            path.write_bytes(content[:place])
        case "empty":
            path.write_bytes(b"")
        case "delete":
            path.unlink()
        case "append":
            path.write_bytes(content + data.draw(st.binary(min_size=1, max_size=9), label="bytes"))
        case "swap":
            other = data.draw(st.sampled_from(files), label="other")
            theirs = other.read_bytes()
            other.write_bytes(content)
            path.write_bytes(theirs)
        case "folder":
            path.unlink()
            path.mkdir()
        case "link":
            path.unlink()
            path.symlink_to(folder.parent / "outside")
        case "zeros":
            path.write_bytes(bytes(len(content)))
        case "text":
            path.write_text(
                data.draw(st.sampled_from(["{}", "[]", "null", '{"settings": {}}', "[" * 5000]), label="text")
            )


@cases(900)
@given(how=DAMAGE, data=st.data())
def test_damaged_folders_are_not_read_as_whole(
    whole: Path, expected: dict[str, list[Any]], how: str, data: st.DataObject
) -> None:
    thresholds: dict[str, Any] = {"adaptive_threshold": 0.05, "share_threshold": 0.3}
    selected = select_neurons(StoredScores.load(whole), **thresholds).neurons
    neurons = run_of(whole)[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("report.html"))
        damage(folder, how, data)
        try:
            assert select_neurons(StoredScores.load(folder), **thresholds).neurons == selected
        except BadInput as error:
            is_sentence(error)
        try:
            assert run_of(folder)[1] == neurons
        except BadInput as error:
            is_sentence(error)
        try:
            assert numbers(load_run(folder)) == expected
        except BadInput as error:
            is_sentence(error)
        assert not (Path(scratch) / "outside").exists()


STORED: dict[str, type[Stored]] = {
    "check.safetensors": ManipulationCheck,
    "selection.json": Selection,
    "evaluation.safetensors": Evaluation,
    "diagnosis.safetensors": Diagnosis,
    "cards.json": CardFile,
    "result.json": _Rest,
    "evaluation/again.safetensors": Evaluation,
}
"""The files that hold a result, and its class."""
OTHERS = ("summary.json", "neurons.json", "listing.json", "prompts.json", "manifest.json")
"""The other files of a run but its report, its log and its chunks."""
ALTERED = st.sampled_from(["flip", "flip", "flip", "cut", "cut", "empty", "append", "folder", "link", "zeros", "text"])
"""Damage that does not remove the file: a run folder without an evaluation on another question set is valid."""


def test_every_result_file_is_damaged_below(results: Path) -> None:
    files = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    assert files == {*STORED, *OTHERS}


@pytest.mark.parametrize("name", [*STORED, *OTHERS])
@cases(240)
@given(how=ALTERED, data=st.data())
def test_a_damaged_result_is_refused_or_whole(
    results: Path, expected_results: dict[str, list[Any]], name: str, how: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        shutil.copytree(results, folder)
        damage(folder, how, data, name)
        try:
            assert numbers(load_run(folder)) == expected_results
        except BadInput as error:
            is_sentence(error)
        assert not (Path(scratch) / "outside").exists()


@pytest.mark.parametrize("name", STORED)
@cases(240)
@given(data=st.data())
def test_altered_content_is_refused_or_read(results: Path, name: str, data: st.DataObject) -> None:
    """Several altered bytes and a cut, without the checksum of `load` before the parser."""
    content = bytearray((results / name).read_bytes())
    # most bytes are numbers: the names and brackets at the beginning are altered as often as all the others
    place = st.integers(0, min(2000, len(content) - 1)) | st.integers(0, len(content) - 1)
    for at, byte in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=4), label="bytes"):
        content[at] = byte
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)), label="end")
    try:
        result = STORED[name].from_bytes(bytes(content[:end]), Path(name).suffix)
    except BadInput as error:
        is_sentence(error)
        return
    assert type(result) is STORED[name]


@cases(120)
@given(how=DAMAGE, data=st.data())
def test_damaged_folders_are_mended_or_refused(
    whole: Path, toy: Model, few: QuestionSet, how: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        shutil.copytree(whole, folder)
        damage(folder, how, data)
        try:
            find_truth_neurons(toy, few, SMALL, out=folder, progress=False)
        except BadInput as error:
            is_sentence(error)
            return
        assert contents(folder) == contents(whole)
        assert not (Path(scratch) / "outside").exists()


def test_there_are_enough_cases() -> None:
    assert sum(SHARES) >= 10_000
