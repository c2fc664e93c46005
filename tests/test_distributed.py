"""Any number of workers writes the same bytes, and error messages name a lost worker."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.conftest import N_RESAMPLES, QUICK, QUICK_OPTIONS, contents
from tn_lens import QuestionSet, Settings, find_truth_neurons
from tn_lens.core.errors import WorkerLost
from tn_lens.models import Model
from tn_lens.runs import workers as distributed
from tn_lens.runs.workers import Workers

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
METHODS = {"rule": {}, "adaptive": {"method": "adaptive", "tolerance": 0.01, "max_nodes": 30}}
FEW = {"find": 32, "report": 16}
PROMPTS_ATTRIBUTED = 8
"""Prompts in a chunk of scores: few, so that every worker has a chunk."""

RUN = """
import os, signal, sys
from dataclasses import replace
from tn_lens import cli
from tn_lens.attribution import attribute
from tn_lens.evaluation import comparison
from tn_lens.questions import load
from tn_lens.runs.folder import RunFolder
attribute.PROMPTS_ATTRIBUTED, comparison.N_RESAMPLES = {n_prompts!r}, {n_resamples!r}
toy = load.load_questions("toy")
few = tuple(question for part, n in {few!r}.items() for question in toy.part(part)[:n])
load.load_questions = lambda name, **_: replace(toy, questions=few)
real = RunFolder.write_chunk
def write(self, name, index, *rest):
    if {dies!r} == self.workers.rank and name == "work/diagnosis/labels":
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, name, index, *rest)
RunFolder.write_chunk = write
sys.argv = {command!r}
cli.main()
"""
COMMAND = ["tn-lens", "run", "--model", "toy", "--questions", "toy", "--out", "run", *QUICK_OPTIONS]


def settings(method: str) -> Settings:
    return replace(QUICK, **METHODS[method])


def command(method: str) -> list[str]:
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in METHODS[method].items()]
    return COMMAND + [word for option in options for word in option]


def script_of(command: list[str], dies: int | None = None) -> str:
    """A script that runs the command on few questions; worker `dies` is killed in the diagnosis."""
    return RUN.format(few=FEW, command=command, dies=dies, n_prompts=PROMPTS_ATTRIBUTED, n_resamples=N_RESAMPLES)


def torchrun(n_workers: int, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A job as a user would start it, on a separate port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_workers)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    command += map(str, arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300, cwd=cwd)


def forked(n_workers: int, script: str, cwd: Path) -> SimpleNamespace:
    """The same job without torchrun: forks of a process that has imported all modules, so that they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_distributed", *PRELOADED])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, n_workers, port, script, cwd) for rank in range(n_workers)]
    processes = [context.Process(target=work, args=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode is not None, "a worker did not end"
    stdout, stderr = ("".join((cwd / f"{name}{rank}").read_text() for rank in range(n_workers)) for name in NAMES)
    return SimpleNamespace(returncode=max(abs(p.exitcode or 0) for p in processes), stdout=stdout, stderr=stderr)


PRELOADED = ("tn_lens.cli.console", "tn_lens.pipeline.run", "tn_lens.pipeline.dry_run", "plotly.graph_objects")
NAMES = ("stdout", "stderr")


def work(rank: int, n_workers: int, port: int, script: str, cwd: Path) -> None:
    """One worker of such a job, with the environment that torchrun would give it."""
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": n_workers,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(place) for name, place in places.items()})
    os.environ.pop("OMP_NUM_THREADS", None)
    os.chdir(cwd)
    for descriptor, name in enumerate(NAMES, 1):
        with Path(f"{name}{rank}").open("w") as file:
            os.dup2(file.fileno(), descriptor)
    exec(script, {"__name__": "job"})


@pytest.fixture(scope="module")
def small_chunks(few_resamples: None) -> Iterator[None]:
    """The same constants as in `script_of`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tn_lens.attribution.attribute.PROMPTS_ATTRIBUTED", PROMPTS_ATTRIBUTED)
        yield


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, toy: Model, few: QuestionSet, small_chunks: None
) -> dict[str, Path]:
    """Folders of runs with one worker, by method."""
    folders = {method: tmp_path_factory.mktemp("runs") / "run" for method in METHODS}
    for method, out in folders.items():
        options = {"out": out, "threads": 1, "command": command(method)}
        find_truth_neurons(toy, few, settings(method), **options)
        assert len(list((out / "scores").iterdir())) > 1
    return folders


@pytest.mark.parametrize(("n_workers", "method"), [(2, "rule"), (2, "adaptive"), (4, "adaptive")])
def test_any_number_of_workers_gives_the_same_bytes(
    n_workers: int, method: str, alone: dict[str, Path], tmp_path: Path
) -> None:
    out, script = tmp_path / "run", tmp_path / "run.py"
    script.write_text(script_of(command(method)))
    by_torchrun = method == "rule"
    done = torchrun(n_workers, script, cwd=tmp_path) if by_torchrun else forked(n_workers, script.read_text(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report:") == done.stdout.count("│ unablated ") == 1, "only one worker prints"
    assert contents(out) == contents(alone[method])
    events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    chunks = [event for event in events if event["what"] == "chunk"]
    assert len({(event["name"], event["index"]) for event in chunks}) == len(chunks), "no chunk is computed twice"
    assert {event["rank"] for event in chunks} == set(range(n_workers))


def test_a_killed_worker_is_named_and_one_worker_goes_on(
    alone: dict[str, Path], toy: Model, few: QuestionSet, tmp_path: Path
) -> None:
    out, script = tmp_path / "run", tmp_path / "run.py"
    script.write_text(script_of(command("adaptive"), dies=1))
    done = torchrun(2, script, cwd=tmp_path)
    assert done.returncode != 0
    assert "error: worker 1 of 2" in done.stderr
    assert "has died or does not respond; run the same command again" in done.stderr
    held = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert any(path.parent.name == "scores" for path in held)
    find_truth_neurons(toy, few, settings("adaptive"), out=out, command=command("adaptive"))
    assert contents(out) == contents(alone["adaptive"]), "a run of two workers resumes on one"
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in held.items()), "nothing is computed twice"


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "tn_lens", *COMMAND[1:], "--t", "7", cwd=tmp_path)  # its store outlives the workers
    assert done.returncode != 0
    assert done.stderr.count("error: adaptive_threshold (t) must be a fraction in (0, 1]") == 1
    assert not done.stdout
    assert not (tmp_path / "run").exists()


def test_workers_of_different_settings_do_not_mix(tmp_path: Path) -> None:
    script = (
        "import sys; from tn_lens.runs.workers import workers\n"
        "me = workers()\n"
        "me.agree({'model': 'toy', 'seed': 0}, 'cpu')\n"
        "print('agreed')\n"
        "try: me.agree({'model': 'toy', 'seed': me.rank}, 'cpu')\n"
        "except ValueError as error: print(f'{me.rank}: {error}')\n"
        "me.leave()\n"
    )
    done = forked(2, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agreed") == 2
    for rank in (0, 1):
        assert f"{rank}: worker 1 has seed = 1 where worker 0 has 0; all workers need the same" in done.stdout


def pair() -> tuple[Workers, Workers]:
    """Two workers with a common store in one process."""
    store = dist.HashStore()
    return Workers(0, 2, 0, store), Workers(1, 2, 1, store)


def test_shares_are_disjoint_and_complete() -> None:
    for n_workers in (1, 2, 3, 4, 7):
        shares = [list(Workers(rank, n_workers).share(10)) for rank in range(n_workers)]
        assert sorted(chunk for share in shares for chunk in share) == list(range(10))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_waiting_ends_when_all_have_come() -> None:
    first, second = pair()
    arrived = []
    thread = threading.Thread(target=lambda: (first.wait(), arrived.append(time.monotonic())))
    thread.start()
    time.sleep(0.1)
    assert not arrived
    second.wait()
    thread.join(5)
    assert arrived


def test_a_worker_that_fails_ends_the_waiting_of_the_others_with_its_reason() -> None:
    first, second = pair()
    assert second.n_workers == 2
    second.store.set("failed/1", "the disk is full")
    with pytest.raises(WorkerLost, match="worker 1 of 2: the disk is full"):
        first.wait()


def test_a_silent_worker_is_dead_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "SILENCE", 0.2)
    first, second = pair()
    second.store.set("beat/1", "1")
    second.store.set("process/1", "node7 4711")
    with pytest.raises(
        WorkerLost,
        match=r"worker 1 of 2 \(node7, process 4711\) has died or does not respond; run the same command again",
    ):
        first.wait()


def test_a_worker_that_exits_while_its_heartbeat_is_in_the_store_does_not_abort(tmp_path: Path) -> None:
    script = tmp_path / "exits.py"
    script.write_text(
        "import contextlib, time\n"
        "from datetime import timedelta\n"
        "import torch.distributed as dist\n"
        "from tn_lens.runs import workers\n"
        "class Slow(dist.TCPStore):\n"
        "    def set(self, key, value):\n"
        "        with contextlib.suppress(RuntimeError):\n"
        "            self.wait(['never set'], timedelta(milliseconds=5))\n"
        "workers.BEAT = 0.0\n"
        "store = Slow('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "workers.Workers(0, 2, 0, store).start_heartbeat()\n"
        "time.sleep(0.1)\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_only_one_worker_says_why_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    first, second = pair()
    assert first.fail("bad input")
    assert not second.fail("bad input")
    first, second = pair()
    assert second.fail("the first one is busy")
    assert not first.fail("later")
    assert Workers().fail("alone")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "many", "RANK": "0", "LOCAL_RANK": "0"}, "start them with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "rank 2 of 2"),
        ({"WORLD_SIZE": "2"}, "the workers cannot connect"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
    ],
)
def test_an_environment_without_sense_is_bad_input(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, run: Callable, tmp_path: Path
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.workers.cache_clear()
    code, _, error = run("run", "--model", "toy", "--questions", "toy", "--out", tmp_path / "run")
    distributed.workers.cache_clear()
    assert (code, said in error, error.count("\n")) == (2, True, 1)


def test_each_worker_takes_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Workers(rank, 4, rank % 2).device(None) for rank in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert Workers(1, 2, 1).device("cpu") == "cpu"
    assert Workers().device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="this machine has 2, none for worker 2"):
        Workers(2, 3, 2).device("cuda")
