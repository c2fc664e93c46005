"""Compare runs with one worker and with two: `python benchmarks/workers.py`.

The same run on the embedded model is executed alternately with one worker and with two. The times are taken from the log of the
run, from the first chunk to the last, so that they do not include loading and figures. The rows also contain the CPU load of other
processes during the run. Writes workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 3
OPTIONS = [
    "--model",
    "toy",
    "--questions",
    "toy",
    "--order",
    "both",
    "--n-steps",
    "200",
    "--repetitions",
    "10",
    "--threads",
    "1",
]


def measured(n_workers: int, out: Path) -> dict[str, Any]:
    """Execute one run, and return its times in seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_workers)]
    cpu_before, times_before = psutil.cpu_times(), os.times()
    subprocess.run([*command, "-m", "tn_lens", "run", *OPTIONS, "--out", out], check=True, capture_output=True)
    cpu_after, times_after = psutil.cpu_times(), os.times()
    busy = sum(getattr(cpu_after, kind) - getattr(cpu_before, kind) for kind in ("user", "nice", "system"))
    ours = sum(
        getattr(times_after, kind) - getattr(times_before, kind) for kind in ("children_user", "children_system")
    )
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    chunks = [(datetime.fromisoformat(e["time"]).timestamp(), e) for e in events if e["what"] == "chunk"]

    def seconds(*names: str) -> float:
        chosen = [(end, chunk["seconds"]) for end, chunk in chunks if not names or chunk["name"] in names]
        return round(max(end for end, _ in chosen) - min(end - taken for end, taken in chosen), 2)

    return {
        "n_workers": n_workers,
        "seconds": seconds(),
        "attribution": seconds("scores"),
        "evaluation": seconds("work/evaluation/answers"),
        "others": round((busy - ours) / (times_after.elapsed - times_before.elapsed), 2),
    }


def main() -> None:
    """Measure alternately, so that other load on the machine affects both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="number of runs with each number of workers")
    rounds = parser.parse_args().rounds
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for n_workers in (1, 2):
                rows.append(measured(n_workers, Path(folder) / f"{turn}-{n_workers}"))
                print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps({"cores": os.cpu_count(), "runs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
