"""A run that is stopped loses nothing, and nothing that was altered is taken for what was computed."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from tn_lens import QuestionSet, find_truth_neurons
from tn_lens.models import Model
from tn_lens.runs.folder import RunFolder, StoredUnits
from tn_lens.runs.seals import is_sealed, seal_tensors, sealed, unseal_tensors
from tn_lens.runs.units import Tensors, cut_prompts, in_memory, unit_key, within
from tn_lens.selection.stored import StoredScores

from .conftest import contents

SMALL: dict[str, Any] = {"limit": 24, "n_steps": 2, "n_repetitions": 2, "order": "both", "progress": False}


@pytest.fixture(scope="module")
def few(toy_questions: QuestionSet) -> QuestionSet:
    """So few questions that a run takes a second."""
    places = [place for part in ("find", "report") for place in places_of(toy_questions, part)[:24]]
    return toy_questions.select(places)


def places_of(questions: QuestionSet, part: str) -> list[int]:
    return [place for place, question in enumerate(questions) if question.split == part]


class Stop(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy: Model, few: QuestionSet) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    find_truth_neurons(toy, few, out=folder, **SMALL)
    return folder


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["what"] == what]


def computed(folder: Path) -> list[tuple[str, int]]:
    return [(event["name"], event["index"]) for event in events(folder, "unit")]


def test_a_run_stopped_at_every_unit_computes_each_unit_once(
    whole: Path, toy: Model, few: QuestionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "run", RunFolder.write_unit

    def write_one(self: RunFolder, *arguments: Any) -> None:
        if written:
            raise Stop
        real(self, *arguments)
        written.append(arguments[:2])

    monkeypatch.setattr(RunFolder, "write_unit", write_one)
    for _ in range(100):
        written: list[Any] = []
        try:
            find_truth_neurons(toy, few, out=out, **SMALL)
            break
        except Stop:
            continue
    assert contents(out) == contents(whole)
    assert sorted(computed(out)) == sorted(computed(whole))
    assert len(events(out, "start")) == len(computed(whole)) > 10


def test_the_same_stages_in_memory_give_the_same_numbers(whole: Path, toy: Model, few: QuestionSet) -> None:
    found = find_truth_neurons(toy, few, **SMALL)
    held = json.loads((whole / "evaluation.json").read_text())["arms"]
    assert {name: (100 * arm.accuracies).tolist() for name, arm in found.evaluation.arms.items()} == {
        name: arm["accuracy"] for name, arm in held.items()
    }
    records = json.loads((whole / "neurons.json").read_text())["neurons"]
    assert [record["mean_difference"] for record in found.records()] == [one["mean_difference"] for one in records]


def test_a_damaged_unit_is_named_and_computed_again_and_no_other(
    whole: Path, toy: Model, few: QuestionSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    find_truth_neurons(toy, few, out=out, **SMALL)
    before, units = contents(out), sorted(out.rglob("*.safetensors"))
    rng = random.Random(0)
    for path in rng.sample(units, 3):
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        caplog.clear()
        n_before = len(computed(out))
        with caplog.at_level(logging.WARNING, "tn_lens"):
            find_truth_neurons(toy, few, out=out, **SMALL)
        assert [r.getMessage() for r in caplog.records] == [
            f"{path} is cut off or altered (its checksum does not fit); it is computed again"
        ]
        assert contents(out) == before == contents(whole)
        assert [out / name / f"{index:05d}.safetensors" for name, index in computed(out)[n_before:]] == [path]


def test_every_altered_or_missing_byte_breaks_the_seal() -> None:
    content = seal_tensors({"a": torch.arange(5.0), "b": torch.zeros(2, dtype=torch.float16)}, unit_key("x"))
    key, tensors = unseal_tensors(content) or ("", {})
    assert key == unit_key("x")
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4]
    for place in range(len(content)):
        for bit in (0, 7):
            altered = bytearray(content)
            altered[place] ^= 1 << bit
            assert unseal_tensors(bytes(altered)) is None
        assert unseal_tensors(content[:place]) is None
    assert unseal_tensors(content + b"\0") is None
    assert unseal_tensors(save({"a": torch.zeros(1)})) is None, "whoever wrote that, a run did not"


def test_sealed_units_are_the_same_bytes_and_plain_safetensors(tmp_path: Path) -> None:
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
        subprocess.run(["cp", "-r", whole, folder], check=True)
        text = (folder / name).read_text()
        digit = next(i for i in range(len(text) // 2, len(text)) if text[i] in "123456")
        (folder / name).write_text(text[:digit] + str(int(text[digit]) + 1) + text[digit + 1 :])
        code, _, error = run(call[0], folder, *call[1:])
        assert (code, error.count("\n")) == (2, 1), name
        assert name in error


def test_a_unit_serves_only_what_it_was_computed_for(tmp_path: Path) -> None:
    def twice(name: str, values: Sequence[int]) -> list[int]:
        def compute(index: int) -> Tensors:
            calls.append(values[index])
            return {"twice": torch.tensor(2 * values[index])}

        mapper = within(StoredUnits(RunFolder(tmp_path), "basis"), name)
        return [int(one["twice"]) for one in mapper("double", [unit_key(v) for v in values], compute)]

    calls: list[int] = []
    assert twice("a", [1, 2, 3]) == [2, 4, 6]
    assert twice("a", [1, 5, 3]) == [2, 10, 6]
    assert calls == [1, 2, 3, 5]
    assert twice("b", [1]) == [2]
    assert calls == [1, 2, 3, 5, 1], "another stage's unit is another unit"
    mapper = StoredUnits(RunFolder(tmp_path), "another basis")
    assert int(mapper("a/double", [unit_key(1)], lambda _: {"twice": torch.tensor(0)})[0]["twice"]) == 0


def test_keys_tell_everything_apart_that_matters(toy: Model, toy_questions: QuestionSet) -> None:
    from tn_lens import Intervention, NeuronSet, build_prompts
    from tn_lens.neurons.neuron import Neuron

    a, b = build_prompts(toy, toy_questions.select([0]), order="both")
    one, other = (NeuronSet([Neuron("mlp", 0, None, index)]) for index in (1, 2))
    parts: list[Any] = [
        [a],
        [b],
        [a, b],
        Intervention(neurons=one),
        Intervention(neurons=other),
        Intervention(neurons=one, mode="scale", factor=2.0),
        Intervention(neurons=one, mode="mean", values={"mlp": torch.zeros(1, 2)}),
        Intervention(neurons=one, mode="mean", values={"mlp": torch.ones(1, 2)}),
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
    keys = [unit_key(part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert keys == [unit_key(part) for part in parts]
    assert unit_key(one) == unit_key(NeuronSet([Neuron("mlp", 0, None, 1)]))


def test_units_are_cut_by_count_and_questions_stay_together(toy: Model, toy_questions: QuestionSet) -> None:
    from tn_lens import build_prompts

    prompts = build_prompts(toy, toy_questions.part("find"), order="both")
    shards = cut_prompts(prompts, 64)
    assert [p for shard in shards for p in shard] == prompts
    assert {len(shard) for shard in shards[:-1]} == {64}
    owners = [{p.question for p in shard} for shard in shards]
    assert sum(map(len, owners)) == len(set.union(*owners))
    assert in_memory("n", ["a", "b"], lambda index: {"x": torch.tensor(index)})[1]["x"] == 1


def test_two_processes_in_one_folder(run: Callable, tmp_path: Path) -> None:
    holding = (
        "import sys, time; from pathlib import Path; from tn_lens.storage import RunFolder\n"
        f"RunFolder.hold(Path({str(tmp_path / 'run')!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        arguments = ["--limit", 24, "--n-steps", 2, "--repetitions", 2, "--order", "both"]
        call = ["run", "--model", "toy", "--questions", "toy", "--out", tmp_path / "run", *arguments]
        code, _, error = run(*call)
        assert (code, error.count("\n")) == (2, 1)
        assert f"another run is at work in {tmp_path / 'run'} (process {first.pid} on " in error
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock"]
        first.kill()
    assert run(*call)[0] == 0, "a dead process holds no lock"


def test_a_folder_left_before_its_manifest_is_taken(whole: Path, toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.part").write_bytes(b"{")
    (tmp_path / "log.jsonl").touch()
    find_truth_neurons(toy, few, out=tmp_path, **SMALL)
    assert {k: v for k, v in contents(tmp_path).items() if not k.endswith(".part")} == contents(whole)


def test_threads_belong_to_the_run(toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    few = few.select(
        [*places_of(few, "find")[:12], *places_of(few, "report")[:2]]
    )  # threads wait for each other where cores are busy
    find_truth_neurons(toy, few, out=tmp_path, threads=2, **SMALL)
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["n_threads"] == 2
    assert torch.get_num_threads() == before
    find_truth_neurons(toy, few, out=tmp_path, **SMALL)
    assert [event["n_threads"] for event in events(tmp_path, "start")] == [2, 2], "a resumed run keeps the folder's"
    with pytest.raises(ValueError, match="n_threads = 2, and this one has n_threads = 1"):
        find_truth_neurons(toy, few, out=tmp_path, threads=1, **SMALL)
    with pytest.raises(ValueError, match="threads must be a whole number"):
        find_truth_neurons(toy, few, out=tmp_path, threads=0, **SMALL)


def test_dates_and_durations_stand_in_the_log_alone(whole: Path) -> None:
    first = events(whole, "start")[0]
    assert first.keys() == {"time", "rank", "what", "n_workers", "n_threads"}
    assert all(event["seconds"] >= 0 for event in events(whole, "unit"))
    assert [event["what"] for event in map(json.loads, (whole / "log.jsonl").read_text().splitlines())][-1] == "end"
    for name, content in contents(whole).items():
        assert first["time"][:10].encode() not in content, name


def test_starting_over_removes_units_too(toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    find_truth_neurons(toy, few, out=tmp_path, **SMALL)
    (tmp_path / "scores" / "mine.txt").write_text("precious")
    n_units = len(list((tmp_path / "work").rglob("*.safetensors")))
    assert n_units > 5
    find_truth_neurons(toy, few, out=tmp_path, overwrite=True, **SMALL | {"limit": 20})
    assert len(computed(tmp_path)) > 5, "nothing of the old run serves the new one"
    assert (tmp_path / "scores" / "mine.txt").read_text() == "precious"


def test_scores_without_their_model_refuse_an_altered_shard(whole: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", whole, tmp_path / "run"], check=True)
    shard = tmp_path / "run" / "scores" / "00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="missing or damaged; run again"):
        list(StoredScores.load(tmp_path / "run").per_question())


def test_where_locks_do_not_exist_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "tn_lens"), RunFolder.hold(tmp_path / "run"):
        assert "do not start a second run in it" in caplog.text
