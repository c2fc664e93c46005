"""Runs can be stopped and resumed without loss, and altered files are detected."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file, save

from tests.conftest import N_RESAMPLES, QUICK, QUICK_OPTIONS, contents, first_of_parts
from tn_lens import (
    Mean,
    Neuron,
    NeuronSet,
    QuestionSet,
    Resample,
    Scale,
    Settings,
    TruthNeurons,
    Zero,
    build_prompts,
    find_truth_neurons,
    load_run,
)
from tn_lens.models import Model
from tn_lens.report.page import write_report
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import Run, in_stage, map_chunks, track
from tn_lens.runs.folder import RESULT_FILES, SCORES, RunFolder
from tn_lens.runs.progress import progress_bar
from tn_lens.runs.seals import is_sealed, seal_tensors, sealed, unseal_tensors
from tn_lens.selection.stored import StoredScores

pytestmark = pytest.mark.usefixtures("few_resamples")


class Stop(BaseException):
    """Stand-in for a kill signal; a BaseException, so that `except Exception` does not catch it."""


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["what"] == what]


def computed(folder: Path) -> list[tuple[str, int]]:
    return [(event["name"], event["index"]) for event in events(folder, "chunk")]


def test_a_run_stopped_at_every_chunk_computes_each_chunk_once(
    whole: Path, toy: Model, few: QuestionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "run", RunFolder.write_chunk

    def write_one(self: RunFolder, *arguments: Any) -> None:
        if written:
            raise Stop
        real(self, *arguments)
        written.append(arguments[:2])

    monkeypatch.setattr(RunFolder, "write_chunk", write_one)
    for _ in range(100):
        written: list[Any] = []
        try:
            find_truth_neurons(toy, few, QUICK, out=out)
            break
        except Stop:
            continue
    assert contents(out) == contents(whole)
    assert sorted(computed(out)) == sorted(computed(whole))
    assert len(events(out, "start")) == len(computed(whole)) > 10


def test_the_same_stages_in_memory_give_the_same_numbers(whole: Path, toy: Model, few: QuestionSet) -> None:
    found = find_truth_neurons(toy, few, QUICK)
    stored = load_run(whole).evaluation
    np.testing.assert_equal(stored.to_dict(), found.evaluation.to_dict())
    for name, result in found.evaluation.conditions.items():
        assert result.accuracies.tolist() == stored.conditions[name].accuracies.tolist()
    records = json.loads((whole / "neurons.json").read_text())["neurons"]
    assert [record["mean_difference"] for record in found.records()] == [
        stored["mean_difference"] for stored in records
    ]


def test_a_damaged_chunk_is_named_and_computed_again_and_no_other(
    whole: Path, toy: Model, few: QuestionSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    chunks = sorted(path for path in out.rglob("*.safetensors") if path.name not in RESULT_FILES)
    rng = random.Random(0)
    for path in rng.sample(chunks, 3):
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        caplog.clear()
        n_before = len(computed(out))
        with caplog.at_level(logging.WARNING, "tn_lens"):
            find_truth_neurons(toy, few, QUICK, out=out)
        assert [r.getMessage() for r in caplog.records] == [
            f"{path} is truncated or altered (its checksum does not match); it is computed again"
        ]
        assert contents(out) == contents(whole)
        assert [out / name / f"{index:05d}.safetensors" for name, index in computed(out)[n_before:]] == [path]


def test_every_altered_or_missing_byte_breaks_the_seal() -> None:
    content = seal_tensors({"a": torch.arange(5.0), "b": torch.zeros(2, dtype=torch.float16)}, chunk_key("x"))
    key, tensors = unseal_tensors(content) or ("", {})
    assert key == chunk_key("x")
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4]
    for place in range(len(content)):
        for bit in (0, 7):
            altered = bytearray(content)
            altered[place] ^= 1 << bit
            assert unseal_tensors(bytes(altered)) is None
        assert unseal_tensors(content[:place]) is None
    assert unseal_tensors(content + b"\0") is None
    assert unseal_tensors(save({"a": torch.zeros(1)})) is None, "a file without a checksum is not accepted"


def test_sealed_chunks_are_the_same_bytes_and_plain_safetensors(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(n)) for n, name in enumerate("hgfedcba")}
    assert len({seal_tensors(dict(random.Random(n).sample(sorted(tensors.items()), 8)), "0a") for n in range(9)}) == 1
    (tmp_path / "a.safetensors").write_bytes(seal_tensors(tensors))
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [7, 7, 7]


def test_json_that_later_calls_rely_on_is_sealed(whole: Path, tmp_path: Path, run: Callable) -> None:
    assert is_sealed(json.loads((whole / "manifest.json").read_text()))
    assert not is_sealed(sealed({"a": 1}) | {"a": 2})
    assert not is_sealed([1])
    for name, call in (
        ("prompts.json", ["select"]),
        ("manifest.json", ["select"]),
        ("neurons.json", ["evaluate", "--on", "toy"]),
    ):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        text = (folder / name).read_text()
        digit = next(i for i in range(len(text) // 2, len(text)) if text[i] in "123456")
        (folder / name).write_text(text[:digit] + str(int(text[digit]) + 1) + text[digit + 1 :])
        code, _, error = run(call[0], folder, *call[1:])
        assert (code, error.count("\n")) == (2, 1), name
        assert name in error


def test_a_chunk_serves_only_what_it_was_computed_for(tmp_path: Path) -> None:
    def doubled(values: Sequence[int]) -> list[int]:
        def compute(index: int) -> Tensors:
            calls.append(values[index])
            return {"twice": torch.tensor(2 * values[index])}

        return [int(chunk["twice"]) for chunk in map_chunks("double", [chunk_key(v) for v in values], compute)]

    def twice(name: str, values: Sequence[int]) -> list[int]:
        with Run(RunFolder(tmp_path), "basis", progress=False) as run:
            return run.stage(name, doubled, values)

    calls: list[int] = []
    assert twice("a", [1, 2, 3]) == [2, 4, 6]
    assert twice("a", [1, 5, 3]) == [2, 10, 6]
    assert calls == [1, 2, 3, 5]
    assert twice("b", [1]) == [2]
    assert calls == [1, 2, 3, 5, 1], "chunks of different stages are separate"
    with Run(RunFolder(tmp_path), "another basis", progress=False) as run:
        zeros = run.stage("a", map_chunks, "double", [chunk_key(1)], lambda _: {"twice": torch.tensor(0)})
    assert [int(chunk["twice"]) for chunk in zeros] == [0]
    with Run(RunFolder(tmp_path), "basis", progress=False) as run:
        assert run.stage("a", in_stage, "within", doubled, [1]) == [2]
    assert (tmp_path / "work" / "a" / "within" / "double" / "00000.safetensors").is_file()
    assert calls == [1, 2, 3, 5, 1, 1], "a stage within a stage has separate chunks"


def test_outside_a_run_chunks_are_computed_in_memory_every_time(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute(index: int) -> Tensors:
        calls.append(index)
        return {"x": torch.tensor(index)}

    for _ in range(2):
        assert [int(chunk["x"]) for chunk in map_chunks("n", ["a", "b"], compute)] == [0, 1]
    assert calls == [0, 1, 0, 1]
    assert list(track([1, 2], "counting")) == [1, 2]
    with Run(RunFolder(tmp_path), "basis", progress=False) as run:
        stored = run.stage("s", map_chunks, "n", ["a"], compute)
    assert [int(chunk["x"]) for chunk in stored] == [0]
    map_chunks("n", ["a"], compute)
    assert calls == [0, 1, 0, 1, 0, 0], "a run that has ended is no longer active"


def test_the_warnings_of_a_stage_become_notes_once(tmp_path: Path) -> None:
    def stage(text: str) -> int:
        warnings.warn(text, stacklevel=2)
        return 1

    with Run(RunFolder(tmp_path), progress=False) as run:
        assert [run.stage("a", stage, "something is odd"), run.stage("b", stage, "something is odd")] == [1, 1]
        run.stage("c", stage, "another thing.")
        run.note(None)
    assert list(run.notes) == ["Something is odd.", "Another thing."]
    assert run.names == []


def test_keys_tell_everything_apart_that_matters(toy: Model, toy_questions: QuestionSet) -> None:
    a, b = build_prompts(toy, toy_questions.select([0]), order="both")
    one, other = (NeuronSet([Neuron("mlp", 0, None, index)]) for index in (1, 2))
    parts: list[Any] = [
        [a],
        [b],
        [a, b],
        [one, Zero()],
        [other, Zero()],
        [one, Zero(positions="last")],
        [one, Scale(factor=2.0)],
        [one, Scale(factor=3.0)],
        [one, Resample(seed=0)],
        [one, Resample(seed=1)],
        [one, Mean(values={"mlp": torch.zeros(1, 2)})],
        [one, Mean(values={"mlp": torch.ones(1, 2)})],
        torch.zeros(2),
        torch.zeros(2).double(),
        torch.zeros(1, 2),
        None,
        "",
        0,
        1.5,
        ["a", "b"],
        ["ab"],
    ]
    keys = [chunk_key(part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert keys == [chunk_key(part) for part in parts]
    assert chunk_key(one) == chunk_key(NeuronSet([Neuron("mlp", 0, None, 1)]))


def test_prompts_are_cut_by_count_and_questions_stay_together(toy: Model, toy_questions: QuestionSet) -> None:
    prompts = build_prompts(toy, toy_questions.part("find"), order="both")
    chunks = prompts.chunks(64)
    assert [p for chunk in chunks for p in chunk] == list(prompts)
    assert {len(chunk) for chunk in chunks[:-1]} == {64}
    questions = [{p.question for p in chunk} for chunk in chunks]
    assert sum(map(len, questions)) == len(set.union(*questions))


@pytest.mark.usefixtures("fewer_toy_questions")
def test_two_processes_in_one_folder(run: Callable, tmp_path: Path) -> None:
    holding = (
        "import sys, time; from pathlib import Path; from tn_lens.runs.folder import RunFolder\n"
        f"folder = RunFolder.hold(Path({str(tmp_path / 'run')!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        call = ["run", "--model", "toy", "--questions", "toy", "--out", tmp_path / "run", *QUICK_OPTIONS]
        code, _, error = run(*call)
        assert (code, error.count("\n")) == (2, 1)
        assert f"another run is using {tmp_path / 'run'} (process {first.pid} on " in error
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".holder", ".lock"]
        first.kill()
    assert run(*call)[0] == 0, "a dead process holds no lock"


def test_a_folder_left_before_its_manifest_is_taken(whole: Path, toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".holder").write_text("process 1 on a machine that is gone")
    (tmp_path / ".manifest.json.part").write_bytes(b"{")
    (tmp_path / "log.jsonl").touch()
    find_truth_neurons(toy, few, QUICK, out=tmp_path)
    assert {k: v for k, v in contents(tmp_path).items() if not k.endswith(".part")} == contents(whole)


def test_threads_belong_to_the_run(toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    few = first_of_parts(few, find=12, report=2)  # few questions, since two threads are slow if the cores are busy
    find_truth_neurons(toy, few, QUICK, out=tmp_path, threads=2)
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["n_threads"] == 2
    assert torch.get_num_threads() == before
    find_truth_neurons(toy, few, QUICK, out=tmp_path)
    assert [event["n_threads"] for event in events(tmp_path, "start")] == [2, 2], "a resumed run keeps its number"
    with pytest.raises(ValueError, match="n_threads = 2, but this run has n_threads = 1"):
        find_truth_neurons(toy, few, QUICK, out=tmp_path, threads=1)
    with pytest.raises(ValueError, match="threads must be a positive integer; got 0"):
        find_truth_neurons(toy, few, QUICK, out=tmp_path, threads=0)


def test_dates_and_durations_stand_in_the_log_alone(whole: Path) -> None:
    first = events(whole, "start")[0]
    assert first.keys() == {"time", "rank", "what", "n_workers", "n_threads"}
    assert all(event["seconds"] >= 0 for event in events(whole, "chunk"))
    assert [event["what"] for event in map(json.loads, (whole / "log.jsonl").read_text().splitlines())][-1] == "end"
    for name, content in contents(whole).items():
        assert first["time"][:10].encode() not in content, name


def test_starting_over_removes_chunks_too(whole: Path, toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "scores" / "mine.txt").write_text("precious")
    n_chunks = len(list((out / "work").rglob("*.safetensors")))
    assert n_chunks > 5
    find_truth_neurons(toy, few, replace(QUICK, limit=20), out=out, overwrite=True)
    assert len(computed(out)) > 5, "the new run reuses no chunk of the old one"
    assert (out / "scores" / "mine.txt").read_text() == "precious"


def test_scores_without_their_model_refuse_an_altered_chunk(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    chunk = tmp_path / "run" / "scores" / "00000.safetensors"
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match="missing or damaged; run again"):
        list(StoredScores.load(tmp_path / "run").per_question())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_locks_do_not_exist_the_run_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "tn_lens"), RunFolder.hold(tmp_path / "run"):
        assert "do not start a second run in it" in caplog.text


def run_and_count_reads(
    model: Model, questions: QuestionSet, settings: Settings, out: Path
) -> tuple[TruthNeurons, Counter[int]]:
    """A run with several chunks of scores, and the number of times that each of them was read."""
    reads: Counter[int] = Counter()
    real = RunFolder.read_chunk

    def read(self: RunFolder, name: str, index: int) -> Any:
        if name == SCORES:
            reads[index] += 1
        return real(self, name, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tn_lens.evaluation.comparison.N_RESAMPLES", N_RESAMPLES)
        patch.setattr(RunFolder, "read_chunk", read)
        patch.setattr("tn_lens.attribution.attribute.PROMPTS_ATTRIBUTED", 16)
        return find_truth_neurons(model, questions, settings, out=out), reads


@pytest.fixture(scope="module")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, toy: Model, toy_questions: QuestionSet
) -> tuple[Path, TruthNeurons, Counter[int]]:
    """The folder of a run that tunes t and stores Attr_t, its result, and the number of reads of each chunk of scores."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    questions = first_of_parts(toy_questions, tune=8, find=24, report=8)
    settings = replace(QUICK, adaptive_threshold="auto", alpha=0.05, separate=True)
    return folder, *run_and_count_reads(toy, questions, settings, folder)


def assert_read_thrice(folder: Path, reads: Counter[int]) -> None:
    n_chunks = len(list((folder / "scores").iterdir()))
    assert n_chunks > 1
    assert set(reads) == set(range(n_chunks)), "every chunk is counted"
    assert max(reads.values()) <= 3


def test_every_chunk_of_scores_is_read_at_most_three_times(toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    _, reads = run_and_count_reads(toy, few, QUICK, tmp_path / "run")
    assert_read_thrice(tmp_path / "run", reads)


def test_a_search_for_t_reads_the_scores_no_more_often(tuned: tuple[Path, TruthNeurons, Counter[int]]) -> None:
    folder, found, reads = tuned
    assert found.tuning is not None
    assert len(found.tuning.steps) > 3, "many thresholds are tried"
    assert_read_thrice(folder, reads)


@pytest.mark.parametrize("kind", ["plain", "tuned"])
def test_a_loaded_run_is_the_one_that_was_returned(
    kind: str, small_run: tuple[Path, TruthNeurons], tuned: tuple[Path, TruthNeurons, Counter[int]]
) -> None:
    folder, ours = small_run if kind == "plain" else tuned[:2]
    loaded = load_run(folder)
    assert type(loaded) is type(ours) is TruthNeurons
    for name in ("model_name", "questions_name", "settings", "completeness", "is_held_out", "found_again", "notes"):
        assert getattr(loaded, name) == getattr(ours, name), name
    for name in ("neurons", "completeness_gap", "others", "strangers"):
        assert getattr(loaded, name) == getattr(ours, name), name
    assert (loaded.tuning is None) == (ours.tuning is None) == (kind == "plain")
    if loaded.tuning is not None and ours.tuning is not None:
        assert_frame_equal(loaded.tuning.to_frame(), ours.tuning.to_frame())
        assert loaded.tuning.summary() == ours.tuning.summary()
    for sentences in (TruthNeurons.summary, TruthNeurons.warnings, repr, TruthNeurons._repr_html_):
        assert sentences(loaded) == sentences(ours)
    np.testing.assert_equal(loaded.records(), ours.records())
    check, checked = loaded.check, ours.check
    torch.testing.assert_close(check.probabilities, checked.probabilities, atol=0, rtol=0, check_dtype=False)
    assert_frame_equal(check.to_frame(), checked.to_frame())
    assert_frame_equal(check.calibration(), checked.calibration())
    assert (check.summary(), check.questions, check.dropped) == (checked.summary(), checked.questions, checked.dropped)
    assert_frame_equal(loaded.selection.to_frame(candidates=True), ours.selection.to_frame(candidates=True))
    for name in ("half_1", "half_2", "space", "rules", "seed", "adaptive_threshold", "largest_share"):
        assert getattr(loaded.selection, name) == getattr(ours.selection, name), name
    assert loaded.selection.summary() == ours.selection.summary()
    assert (loaded.stability.seeds, loaded.stability.sets) == (ours.stability.seeds, ours.stability.sets)
    assert loaded.stability.summary() == ours.stability.summary()
    pairs = [(loaded.evaluation, ours.evaluation), (loaded.diagnosis.evaluation, ours.diagnosis.evaluation)]
    for stored, made in [*pairs, (loaded.unseen, ours.unseen)]:
        assert (stored is None) == (made is None)
        if stored is not None and made is not None:
            np.testing.assert_equal(stored.to_dict(), made.to_dict())
            assert (stored.summary(), stored.explain()) == (made.summary(), made.explain())
    np.testing.assert_equal(loaded.diagnosis.records(), ours.diagnosis.records())
    assert loaded.diagnosis.summary() == ours.diagnosis.summary()
    assert len(loaded.cards) == len(ours.cards) > 0
    for stored, made in zip(loaded.cards, ours.cards, strict=True):
        assert (stored.to_text(), stored.to_html(), stored.summary()) == (
            made.to_text(),
            made.to_html(),
            made.summary(),
        )
    assert loaded.provenance.name == ours.provenance.name == folder.name
    assert loaded.provenance.settings == ours.provenance.settings
    written = dict(ours.files())
    assert dict(loaded.files()) == written
    assert {name: (folder / name).read_bytes() for name in written} == written
    page = write_report(loaded)
    assert page == write_report(ours)
    assert page.encode(errors="xmlcharrefreplace") == (folder / "report.html").read_bytes()


def test_a_run_that_is_not_finished_or_damaged_is_not_loaded(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not contain a run"):
        load_run(tmp_path)
    for name in ("result.json", "evaluation.safetensors", "check.safetensors", "cards.json"):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load_run(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"has no {name} yet; finish the run"):
            load_run(folder)


def test_a_batch_job_logs_its_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("tn_lens.runs.progress.time.monotonic", lambda: next(clock))
    assert list(progress_bar("abcd", "attribution")) == list("abcd")
    # one line after at least 30 seconds: the times are 0 (start), 20, 40, 60 and 80
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["attribution: 1 of 4, 02:00 left", "attribution: 3 of 4, 00:26 left"]
    for options in ({"text": None}, {"text": "attribution", "delay": 2.0}):
        list(progress_bar("abcd", **options))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    list(progress_bar("abcd", "attribution"))
    assert capsys.readouterr().err == ""
