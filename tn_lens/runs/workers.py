"""Several workers on torch.distributed: ranks, distribution of the chunks, and detection of dead workers.

Workers exchange results through the run folder and otherwise only synchronize. Each waits until all have finished their
chunks; if a worker dies or fails, the others raise `WorkerLost`.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tn_lens.core.errors import BadInput, WorkerLost

BEAT = 1.0
"""Seconds between two heartbeats."""
SILENCE = 60.0
"""Seconds without a heartbeat after which a worker counts as dead."""
PATIENCE = 10.0
"""Seconds that a failing worker waits for the first worker to report the error, in case all workers have the same one."""
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True, eq=False)
class Workers:
    """The workers of one job, as seen by one of them; a single one unless the job was started with torchrun."""

    rank: int = 0
    n_workers: int = 1
    local_rank: int = 0
    """Rank among the workers of this machine."""
    store: Any = None
    """Key-value store of torch.distributed, through which the workers synchronize."""
    meetings: Any = field(default_factory=count)
    ending: threading.Event = field(default_factory=threading.Event)
    """Set when the process exits, so that the heartbeat stops."""

    @property
    def is_first(self) -> bool:
        """Whether this worker prints and writes the results."""
        return self.rank == 0

    def share(self, n_chunks: int) -> range:
        """The chunks that this worker computes."""
        return range(self.rank, n_chunks, self.n_workers)

    def device(self, asked: str | None) -> str | None:
        """The requested device; with several workers on CUDA, the worker's own GPU.

        Raises:
            BadInput: this machine has fewer GPUs than workers.
        """
        if self.n_workers == 1 or not torch.cuda.is_available() or asked not in (None, "cuda"):
            return asked
        if self.local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"expected one GPU per worker, but this machine has {torch.cuda.device_count()}, none for worker {self.rank}; "
                "start fewer workers, or use --device cpu"
            )
        return f"cuda:{self.local_rank}"

    def wait(self) -> None:
        """Wait until every worker has called this.

        Raises:
            WorkerLost: a worker has died or failed. The message names it.
        """
        if self.n_workers == 1:
            return
        barrier = f"place/{next(self.meetings)}"
        self.store.set(f"{barrier}/{self.rank}", "here")
        seen = {other: ("", time.monotonic()) for other in range(self.n_workers) if other != self.rank}
        # poll often at first, since workers usually arrive together, then less often
        pause = 0.005
        while seen:
            for other in [other for other in seen if self.store.check([f"{barrier}/{other}"])]:
                del seen[other]
            for other, (beat, since) in seen.items():
                if self.store.check([f"failed/{other}"]):
                    raise WorkerLost(f"worker {other} of {self.n_workers}: {self._read(f'failed/{other}')}")
                if (latest := self._read(f"beat/{other}")) != beat:
                    seen[other] = (latest, time.monotonic())
                elif time.monotonic() - since > (SILENCE if latest else 10 * SILENCE):  # it may be loading its model
                    raise WorkerLost(self._lost(other))
            if seen:
                time.sleep(pause)
                pause = min(2 * pause, 0.25)

    def agree(self, settings: Mapping[str, Any], device: str) -> None:
        """Check that all workers have the same settings, weights and versions, since their chunks are combined.

        Raises:
            BadInput: a worker has different ones. The message names the worker and the first setting that differs.
        """
        if self.n_workers == 1:
            return
        self.store.set(f"settings/{self.rank}", json.dumps(settings))
        self.wait()
        if not dist.is_initialized():
            backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
            group = dist.PrefixStore("group", self.store)
            dist.init_process_group(
                backend,
                store=group,
                rank=self.rank,
                world_size=self.n_workers,
                timeout=timedelta(seconds=SILENCE),
                device_id=torch.device(device) if backend == "nccl" else None,
            )
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
        digests = [torch.empty_like(mine) for _ in range(self.n_workers)]
        dist.all_gather(digests, mine)
        for other, theirs in enumerate(digests):
            if not torch.equal(theirs, digests[0]):
                first, differing = (json.loads(self._read(f"settings/{rank}")) for rank in (0, other))
                key = next(key for key in first | differing if first.get(key) != differing.get(key))
                raise BadInput(
                    f"worker {other} has {key} = {differing.get(key)!r:.60} where worker 0 has {first.get(key)!r:.60}; "
                    "all workers need the same machine type, installation, model and data"
                )

    def fail(self, sentence: str) -> bool:
        """Report this worker's failure to the others. Returns whether this worker should report it to the user."""
        if self.n_workers == 1:
            return True
        _write_for_torchrun(sentence)
        try:
            self.store.set(f"failed/{self.rank}", sentence)
            give_up = time.monotonic() + (0 if self.is_first else PATIENCE)
            while time.monotonic() < give_up and not self.store.check(["said"]):
                time.sleep(0.05)
            return self.store.add("said", 1) == 1
        except (RuntimeError, OSError):  # the worker that hosts the store has exited
            return True

    def leave(self) -> None:
        """Wait until all workers have finished, since the first one may host the store that the others still need."""
        if self.n_workers == 1:
            return
        self.wait()
        self.store.set(f"left/{self.rank}", "")
        if self.is_first:
            give_up = time.monotonic() + PATIENCE
            names = [f"left/{rank}" for rank in range(self.n_workers)]
            while time.monotonic() < give_up and not self.store.check(names):
                time.sleep(0.01)
        if dist.is_initialized():
            dist.destroy_process_group()

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _lost(self, other: int) -> str:
        place = self._read(f"process/{other}").replace(" ", ", process ")
        return (
            f"worker {other} of {self.n_workers} ({place or 'never seen'}) has died or does not respond; run the same command again to "
            "continue"
        )

    def start_heartbeat(self) -> None:
        """Tell the other workers every `BEAT` seconds, from a thread, that this one is alive."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()

        # at the end of the process the interpreter kills daemon threads, and killing one inside the store aborts the process
        def stop() -> None:
            self.ending.set()
            thread.join(PATIENCE)

        atexit.register(stop)

    def _beat(self) -> None:
        for number in count(1):
            try:
                self.store.set(f"beat/{self.rank}", str(number))
            except (RuntimeError, OSError):
                return
            if self.ending.wait(BEAT):
                return

    def _terminated(self, *signal_and_frame: Any) -> None:
        """Handle SIGTERM. Torchrun terminates all workers when one has died; report it if it ran on this machine."""
        with contextlib.suppress(RuntimeError, OSError):
            self.store.set(f"ended/{self.rank}", "")
            for other in set(range(self.n_workers)) - {self.rank}:
                host, _, process = self._read(f"process/{other}").rpartition(" ")
                told = self.store.check([f"ended/{other}"]) or self.store.check([f"failed/{other}"])
                if host == socket.gethostname() and not told and not _is_alive(int(process)):
                    if self.store.add("said", 1) == 1:
                        sys.stderr.write(f"error: {self._lost(other)}\n")
                        sys.stderr.flush()
                    break
        # exit without cleanup, since other threads may hang in calls to a store that no longer exists
        os._exit(TERMINATED)


ALONE = Workers()


@cache
def workers() -> Workers:
    """The workers that torchrun started, as seen by this process; a single one if there are none.

    Raises:
        BadInput: the environment variables are invalid, or the workers cannot connect.
    """
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    if not given["WORLD_SIZE"] or given["WORLD_SIZE"] == "1":
        return ALONE
    try:
        n_workers, rank, local_rank = (int(number) for number in given.values())
        if not 0 <= rank < n_workers:
            raise ValueError(f"rank {rank} of {n_workers}")
        store: Any = next(dist.rendezvous("env://", timeout=timedelta(seconds=5 * SILENCE)))[0]
    except (ValueError, RuntimeError) as error:
        raise BadInput(
            f"the workers cannot connect ({' '.join(str(error).split())[:200]}); start them with torchrun, or unset "
            "WORLD_SIZE"
        ) from error
    store.set_timeout(timedelta(seconds=SILENCE))
    joined = Workers(rank, n_workers, local_rank, store)
    store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
    joined.start_heartbeat()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, joined._terminated)
    return joined


def _is_alive(process: int) -> bool:
    """Whether a process is running on this machine. Zombies are not."""
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True


def _write_for_torchrun(sentence: str) -> None:
    """Write the message to the file from which torchrun reports a worker's failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        report = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(report), encoding="utf-8")
