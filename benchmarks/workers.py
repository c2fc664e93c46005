"""How much faster several workers are: the same run on the embedded model with one worker and with two, in turns.

Times are those of the run's own log: from the first unit to the last, so that loading and figures do not count. What other
processes took of the processors meanwhile stands beside them.
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
    """Seconds of one run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_workers)]
    before, own = psutil.cpu_times(), os.times()
    subprocess.run([*command, "-m", "tn_lens", "run", *OPTIONS, "--out", out], check=True, capture_output=True)
    after, now = psutil.cpu_times(), os.times()
    busy = sum(getattr(after, kind) - getattr(before, kind) for kind in ("user", "nice", "system"))
    ours = now.children_user - own.children_user + now.children_system - own.children_system
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    units = [(datetime.fromisoformat(e["time"]).timestamp(), e) for e in events if e["what"] == "unit"]

    def seconds(*names: str) -> float:
        chosen = [(end, unit["seconds"]) for end, unit in units if not names or unit["name"] in names]
        return round(max(end for end, _ in chosen) - min(end - taken for end, taken in chosen), 2)

    return {
        "n_workers": n_workers,
        "seconds": seconds(),
        "attribution": seconds("scores"),
        "evaluation": seconds("work/evaluation/answers"),
        "others": round((busy - ours) / (now.elapsed - own.elapsed), 2),
    }


def main() -> None:
    """Measure in turns, so that whatever else the machine does meets both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
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
