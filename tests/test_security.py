"""Questions, manifests and run folders from untrusted sources cannot make a run open other files or connections."""

from __future__ import annotations

import ast
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.conftest import QUICK, contents
from tn_lens import BadInput, NeuronSet, QuestionSet, find_truth_neurons, load_model
from tn_lens.models import Model
from tn_lens.pipeline.retest import retest
from tn_lens.questions.question import Question
from tn_lens.runs.context import Run, map_chunks
from tn_lens.runs.folder import RunFolder
from tn_lens.runs.seals import sealed

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("few_resamples")
EVIL = "<script>alert('x')</script>"


def test_no_module_unpickles() -> None:
    forbidden = {"pickle", "dill", "joblib", "shelve", "cloudpickle", "marshal"}
    calls = {("torch", "load"), ("np", "load"), ("pd", "read_pickle"), ("numpy", "load"), ("dist", "all_gather_object")}
    calls |= {("dist", "broadcast_object_list"), ("dist", "gather_object"), ("dist", "scatter_object_list")}
    for path in (ROOT / "tn_lens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {
                    (getattr(node, "module", "") or "").split(".")[0]
                }
                assert not names & forbidden, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in calls, path


def test_a_run_opens_no_connection(
    checkpoint: Callable[[str], Path], few: QuestionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    find_truth_neurons(load_model("toy"), few, QUICK, out=tmp_path / "run")
    load_model(checkpoint("Qwen2.5-3B-Instruct"))
    with pytest.raises((BadInput, AssertionError)):
        load_model("nobody/nothing")  # the check can fail


def test_pickled_weights_are_not_opened(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint("Qwen2.5-3B-Instruct"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_model(folder)


def test_code_in_a_checkpoint_runs_only_when_asked_for_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "coded"
    shutil.copytree(checkpoint("Qwen2.5-3B-Instruct"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}, "architectures": ["Own"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="does not support its architecture"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_names_do_not_lead_out_of_a_run_folder(toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for name in ("../evil", "/tmp/tn_lens_evil", "scores/../../evil", "work/../../../evil"):
        with pytest.raises(ValueError, match="outside the run folder"):
            folder.write(name, b"")
    for stage, name in (("stage", "../../../evil"), ("../../evil", "name")):
        with Run(folder, "basis", progress=False) as run, pytest.raises(ValueError, match="outside the run folder"):
            run.stage(stage, map_chunks, name, ["a"], lambda _: {})
    with pytest.raises(ValueError, match="outside the run folder"):
        retest(
            toy, NeuronSet(), [replace(few, name="../../evil")], out=tmp_path / "out", n_repetitions=1, progress=False
        )
    assert not list(tmp_path.rglob("*evil*"))


def test_a_link_in_a_run_folder_is_not_followed(whole: Path, toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    out, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "00000.safetensors").write_bytes(b"precious")
    (outside / "file").write_bytes(b"precious")
    shutil.copytree(whole, out)
    shutil.rmtree(out / "scores")
    (out / "scores").symlink_to(outside)
    with pytest.raises(ValueError, match="outside the run folder"):
        find_truth_neurons(toy, few, QUICK, out=out)
    with pytest.raises(ValueError, match="outside the run folder"):
        find_truth_neurons(toy, few, QUICK, out=out, overwrite=True)
    (out / "scores").unlink()
    (out / ".report.html.part").symlink_to(outside / "file")
    (out / "summary.json").unlink(missing_ok=True)
    (out / "summary.json").symlink_to(outside / "file")
    with pytest.raises(ValueError, match="cannot write"):
        find_truth_neurons(toy, few, QUICK, out=out)
    (out / ".report.html.part").unlink(missing_ok=True)
    find_truth_neurons(toy, few, QUICK, out=out)
    assert contents(out) == contents(whole)
    assert {p.name: p.read_bytes() for p in outside.iterdir()} == dict.fromkeys(
        ["00000.safetensors", "file"], b"precious"
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("FOLDER", "folders that a manifest names are not opened; give the model with --model"),
        ("../elsewhere", "folders that a manifest names are not opened"),
        (
            "nobody/nothing",
            "models that a manifest names are not downloaded; give the model with --model nobody/nothing",
        ),
        (7, "folders that a manifest names are not opened"),
    ],
)
def test_what_a_manifest_names_is_not_followed(
    source: Any,
    said: str,
    whole: Path,
    run: Callable,
    tmp_path: Path,
    checkpoint: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model_source"] = {"model": str(checkpoint("Qwen2.5-3B-Instruct")) if source == "FOLDER" else source}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    code, _, error = run("evaluate", folder, "--on", "toy")
    assert (code, said in error, error.count("\n")) == (2, True, 1), error
    assert not constants.HF_HUB_OFFLINE, "put back as it was"


def test_a_runs_own_settings_and_questions_name_no_paths(toy: Model, few: QuestionSet, tmp_path: Path) -> None:
    paths = [replace(q, category="../../../evil") for q in few]
    find_truth_neurons(toy, replace(few, questions=tuple(paths), name="../evil"), QUICK, out=tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert not list((tmp_path / "run").rglob("*evil*"))


@pytest.mark.filterwarnings("ignore:.*prompts contain words that:UserWarning")
def test_html_in_questions_and_names_is_text_in_the_report(few: QuestionSet, tmp_path: Path) -> None:
    model = load_model("toy")
    model.cfg.model_name = f"m{EVIL}"
    first = Question(
        text=f"what is the colour of Balum {EVIL}", choices=("red", f"blue {EVIL}"), category=EVIL, split="find"
    )
    asked = tuple(replace(q, category=f"{q.category}{EVIL}") for q in few)
    questions = replace(few, questions=(first, *asked), name=f"q{EVIL}")
    found = find_truth_neurons(model, questions, replace(QUICK, limit=None), out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert EVIL not in page
    assert "<script>alert" not in page
    assert "alert(" in page, "it is shown, as text"
    for shown in (found._repr_html_(), found.diagnosis._repr_html_()):
        assert "<script>alert" not in shown
