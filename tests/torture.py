"""Kill a run at random moments with SIGKILL, and check that every resumed run gives the same files: `make torture`.

A process is killed after a random chunk of one of the three phases in turn, and a random fraction of the time that the next
chunk takes. The processes are forks of this one, which has imported all modules and computed nothing, so that a run takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

# imported here so that the forks need not import them
import plotly.graph_objects  # noqa: F401

import tn_lens.cli.console
import tn_lens.pipeline.dry_run
import tn_lens.pipeline.run
import tn_lens.report.page  # noqa: F401
from tests.conftest import N_RESAMPLES, QUICK_OPTIONS, contents, first_of_parts
from tn_lens import cli
from tn_lens.evaluation import comparison
from tn_lens.questions import load
from tn_lens.runs.seals import unseal_tensors

PHASES = ("attribution", "evaluation", "report")
OPTIONS = [*QUICK_OPTIONS, "--threads", "1"]


def start(out: Path) -> int:
    """Start a run in a separate process, and return the process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with (out.parent / "said").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv = ["tn-lens", "run", "--model", "toy", "--questions", "toy", "--out", str(out), *OPTIONS]
            cli.main()
            code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def finish(out: Path) -> None:
    """Start a run, and wait until it has finished."""
    _, status = os.waitpid(start(out), 0)
    assert status == 0, (out.parent / "said").read_text()


def events(out: Path) -> list[dict[str, Any]]:
    """The complete lines of a log."""
    log = out / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def phase_of(event: dict[str, Any]) -> str:
    """The phase of a run after an event of its log."""
    if event["what"] == "start" or event["name"].startswith("work/check") or event["name"] == "scores":
        return "attribution"
    return "evaluation"


def moments(out: Path) -> dict[str, list[tuple[int, float]]]:
    """For each phase: numbers of log lines to wait for, and the seconds from each of these lines to the next."""
    logged = events(out)
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in logged]
    gaps = [after - before for before, after in pairwise(times)]
    found: dict[str, list[tuple[int, float]]] = {phase: [] for phase in PHASES}
    for place, gap in enumerate(gaps):
        last = place == len(gaps) - 1  # from the last chunk to the end: figures, report, result files
        found["report" if last else phase_of(logged[place])].append((place + 1, gap))
    return found


def whole_chunks(out: Path) -> set[tuple[str, int]]:
    """The chunks that exist and can be read."""
    return {
        (str(path.parent.relative_to(out)), int(path.stem))
        for path in out.rglob("*.safetensors")
        if path.stem.isdecimal() and unseal_tensors(path.read_bytes()) is not None
    }


def kill_once(out: Path, n_lines: int, delay: float) -> bool:
    """Start a run, and kill it after a number of log lines and a delay. Returns whether it was still running."""
    before = len(events(out))
    process = start(out)
    while len(events(out)) - before < n_lines and os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(delay)
    try:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        return False
    return os.WIFSIGNALED(status)


def torture(n_kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill runs and return the number of kills by phase; an assertion fails if a resumed run gives other files."""
    toy = load.load_questions("toy")
    few = first_of_parts(toy, find=32, report=16)
    load.load_questions = lambda name, **_: few  # pyright: ignore[reportAttributeAccessIssue]
    comparison.N_RESAMPLES = N_RESAMPLES  # each run writes a report
    rng = random.Random(seed)
    out = folder / "run"  # the same for all, since a manifest holds the command line
    finish(out)
    expected, chunks, where = contents(out), whole_chunks(out), moments(out)
    shutil.rmtree(out)
    done: dict[str, int] = dict.fromkeys(PHASES, 0)
    while sum(done.values()) < n_kills:
        phase = PHASES[sum(done.values()) % len(PHASES)]
        n_lines, gap = rng.choice(where[phase])
        if not kill_once(out, n_lines, rng.uniform(0, gap)):
            shutil.rmtree(out)
            continue
        done[phase] += 1
        logged, kept = [event for event in events(out) if event["what"] == "chunk"], whole_chunks(out)
        lost = len({(event["name"], event["index"]) for event in logged} - kept)
        n_before = len(logged)
        finish(out)
        again = [(event["name"], event["index"]) for event in events(out) if event["what"] == "chunk"][n_before:]
        assert not set(again) & kept, f"computed again although it was there: {set(again) & kept}"
        assert kept | set(again) == chunks
        assert len(again) == len(set(again))
        assert lost == 0, "a chunk that was finished is not there"
        differing = [
            name for name in expected.keys() | contents(out).keys() if expected.get(name) != contents(out).get(name)
        ]
        assert not differing, f"killed in {phase}: {differing} differ"
        shutil.rmtree(out)
    return done


def main() -> None:
    """Run the command line, and print the number of kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = torture(given.kills, given.seed, Path(folder))
    print(
        f"{given.kills} kills ({', '.join(f'{n} in {phase}' for phase, n in done.items())}), every resume ended in the same "
        f"bytes, no chunk that was finished was computed again; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
