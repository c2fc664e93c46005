"""The run folder: a manifest that says what was asked, and files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from tn_lens.runs.workers import ALONE, Workers
from tn_lens.core.errors import BadInput
from tn_lens.runs.progress import track
from tn_lens.runs.seals import fingerprint, read_manifest, seal_tensors, sealed, unseal_tensors, without_nan
from tn_lens.runs.units import Tensors, unit_key

SCORES = "scores"
"""The units of attribution, which other thresholds are answered from."""
WORK = "work"
"""All other units: what a resumed run need not compute again."""

RESULT_FILES = (
    "report.html",
    "summary.json",
    "diagnosis.json",
    "evaluation.json",
    "cards.json",
    "selection.json",
    "neurons.json",
    "prompts.json",
    "manifest.json",
)
"""What a run writes beside its units: the same bytes for the same settings."""
LOCK, LOG = ".lock", "log.jsonl"
BEGINNINGS = (LOCK, LOG, ".manifest.json.part")
"""What may stand in a folder whose run was stopped before it had a manifest."""

UNIT = re.compile(r"\.?\d{5,}\.safetensors(\.part)?")
said = logging.getLogger("tn_lens")
"""Where words about a run go that are no results; Python shows them on standard error."""


@dataclass(frozen=True)
class RunFolder:
    """A folder whose manifest holds the settings that everything in it was made with."""

    path: Path
    workers: Workers = ALONE
    lock: int | None = field(default=None, compare=False)
    """Descriptor of the lock file; None where nobody holds it."""

    @classmethod
    def open(
        cls, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, workers: Workers = ALONE
    ) -> RunFolder:
        """Create the folder, or go on in one of the same settings; the first worker does it for all.

        Raises:
            BadInput: it holds a run of other settings (the first that differs is named), something else, cannot be
                written, or another run is at work in it.
        """
        path = Path(path)
        if not workers.is_first:
            workers.wait()
            return cls(path, workers)
        settings = json.loads(json.dumps(settings))
        manifest = path / "manifest.json"
        with _writing(path):
            _refuse_foreign(path)
        folder = cls.hold(path, workers)
        try:
            is_run = manifest.exists()
            if is_run:
                there = read_manifest(manifest)["settings"]
                if overwrite:
                    folder.clear()
                else:
                    for key in [*settings, *(there.keys() - settings.keys())]:
                        if settings.get(key) != there.get(key):
                            raise BadInput(
                                f"{path} holds a run with {key} = {_short(there.get(key))}, and this one has {key} = "
                                f"{_short(settings.get(key))}; give another folder, or start over with --overwrite"
                            )
            if overwrite or not is_run:
                folder.write_json("manifest.json", sealed({"fingerprint": fingerprint(settings), "settings": settings}))
        except BaseException:
            folder.release()
            raise
        workers.wait()
        return folder

    @classmethod
    def hold(cls, path: Path, workers: Workers = ALONE) -> RunFolder:
        """The folder, made where it is not there, and locked against other processes until `release`.

        Raises:
            BadInput: another process works in it, or it cannot be written.
        """
        if not workers.is_first:
            return cls(path, workers)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(lock)
        except BlockingIOError:
            holder = os.pread(lock, 100, 0).decode(errors="replace").strip()
            os.close(lock)
            raise BadInput(
                f"another run is at work in {path} ({holder or 'a process'}); wait until it has ended, or give another folder"
            ) from None
        except OSError as error:
            said.warning("%s cannot be locked (%s): do not start a second run in it", path, error.strerror)
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        return cls(path, workers, lock)

    def release(self) -> None:
        """Let others work in the folder."""
        if self.lock is not None:
            os.close(self.lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def noted(self, key: str) -> Any:
        """What was noted in the manifest beside the settings; None where nothing was."""
        return read_manifest(self.path / "manifest.json").get(key)

    def note(self, key: str, value: Any) -> None:
        """Note something in the manifest that does not make it another run; the first worker does it for all."""
        if self.workers.is_first and self.noted(key) != value:
            self.write_json("manifest.json", sealed(read_manifest(self.path / "manifest.json") | {key: value}))

    def digest(self, name: str) -> str:
        """SHA-256 of a file."""
        return hashlib.sha256((self.path / name).read_bytes()).hexdigest()

    def clear(self) -> None:
        """Remove what a run has written, and nothing else."""
        for top in (SCORES, WORK):
            self._refuse_outside(self.path / top)
        with _writing(self.path):
            for top in (SCORES, WORK):
                for parent, _, files in os.walk(self.path / top, topdown=False):  # follows no links
                    for name in filter(UNIT.fullmatch, files):
                        (Path(parent) / name).unlink()
                    with contextlib.suppress(OSError):  # somebody else's files are in it
                        Path(parent).rmdir()
            for name in (LOG, *RESULT_FILES):  # the manifest last, by which the folder is known for a run
                (self.path / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove what a run has written, and the folder itself if nothing else is in it."""
        if self.workers.is_first:
            self.clear()
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
                self.path.rmdir()

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all: under a temporary name, synced, then renamed.

        Raises:
            BadInput: the disk is full, the folder cannot be written, or the name leads out of it.
        """
        path = self.path / name
        temporary = path.with_name(f".{path.name}.part")
        with _writing(path):
            self._refuse_outside(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
                _sync_folder(path.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    def _refuse_outside(self, folder: Path) -> None:
        """Refuse a place that a name or a link leads to outside the run folder."""
        if not folder.resolve().is_relative_to(self.path.resolve()):
            raise BadInput(f"{str(folder)!r} lies outside the run folder {str(self.path)!r}; nothing is written there")

    def write_json(self, name: str, payload: Any) -> None:
        """Write JSON; NaN becomes null."""
        text = json.dumps(without_nan(payload), indent=1, ensure_ascii=False, allow_nan=False)
        self.write(name, (text + "\n").encode(errors="backslashreplace"))

    def log(self, what: str, **about: Any) -> None:
        """Add a line to log.jsonl: the only file with times. A line that cannot be written is left out."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "rank": self.workers.rank, "what": what}
        with contextlib.suppress(OSError):
            log = os.open(self.path / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(log, (json.dumps(event | about) + "\n").encode())  # one call, so that workers do not mix
            finally:
                os.close(log)

    def unit(self, name: str, index: int) -> Path:
        """The file of one unit."""
        return self.path / name / f"{index:05d}.safetensors"

    def write_unit(self, name: str, index: int, tensors: Tensors, key: str = "") -> None:
        """Store the result of a unit under the key of what it depends on."""
        self.write(f"{name}/{index:05d}.safetensors", seal_tensors(tensors, key))

    def read_unit(self, name: str, index: int) -> tuple[str, dict[str, Tensor]] | None:
        """Key and result of a unit; None where it is missing or damaged."""
        try:
            return unseal_tensors(self.unit(name, index).read_bytes())
        except OSError:
            return None


@dataclass(frozen=True)
class StoredUnits:
    """A mapper that keeps every unit in a run folder, shares them out among the workers, and computes none twice."""

    folder: RunFolder
    basis: str
    """Digest of everything that all units depend on."""

    def __call__(
        self, name: str, keys: Sequence[str], compute: Callable[[int], Tensors], text: str | None = None
    ) -> StoredResults:
        workers, folder = self.folder.workers, self.folder
        name = name if name == SCORES else f"{WORK}/{name}"
        keys = [unit_key(self.basis, name, key) for key in keys]
        mine = workers.share(len(keys))
        there = {
            index for index in (range(len(keys)) if workers.is_first else mine) if self._is_whole(name, index, keys)
        }
        todo = [index for index in mine if index not in there]
        for index in track(todo, text if workers.is_first else None):
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as raised:  # a resumed run could not raise them again
                warnings.simplefilter("always", UserWarning)
                tensors = compute(index)
            for warning in raised:
                folder.log("warning", name=name, index=index, text=str(warning.message))
            folder.write_unit(name, index, tensors, keys[index])
            folder.log("unit", name=name, index=index, seconds=round(time.perf_counter() - started, 3))
        workers.wait()
        return StoredResults(folder, name, tuple(keys))

    def _is_whole(self, name: str, index: int, keys: Sequence[str]) -> bool:
        """Whether a unit need not be computed; a damaged one is named, by the first worker alone."""
        path, held = self.folder.unit(name, index), self.folder.read_unit(name, index)
        if held is None and path.exists() and self.folder.workers.is_first:
            said.warning("%s is cut off or altered (its checksum does not fit); it is computed again", path)
            self.folder.log("damaged", name=name, index=index)
        return held is not None and held[0] == keys[index]


@dataclass(frozen=True)
class StoredResults(Sequence[Tensors]):
    """The results of units, each read when it is asked for: memory does not grow with their number."""

    folder: RunFolder
    name: str
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Tensors: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensors]: ...
    def __getitem__(self, index: int | slice) -> Tensors | list[Tensors]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        for pause in (0, 0.2, 1, 5) if self.folder.workers.n_workers > 1 else (0,):  # a shared disk may lag behind
            time.sleep(pause)
            held = self.folder.read_unit(self.name, index)
            if held is not None and held[0] == self.keys[index]:
                return held[1]
        shared = "; all workers must see the same run folder" if self.folder.workers.n_workers > 1 else ""
        raise BadInput(
            f"{self.folder.unit(self.name, index)} is missing or damaged; run again to compute it anew{shared}"
        )


def _refuse_foreign(path: Path) -> None:
    """Refuse what is no run folder and cannot become one; nothing is touched."""
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is a file; expected a folder, or a path that does not exist yet")
    others = [one.name for one in path.iterdir() if one.name not in BEGINNINGS] if path.exists() else []
    if others and not (path / "manifest.json").exists():
        raise BadInput(f"{path} is not empty and holds no run; give another folder")


def _lock(descriptor: int) -> None:
    """Lock a file for this process.

    Raises:
        BlockingIOError: another one has it.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(path: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room and run again: what was computed is kept" if full else "give another folder"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"cannot write {str(path)!r}: {reason}; {todo}") from error
