"""The run folder: a manifest with the settings, and files that are written atomically."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.stored import dump_json
from tn_lens.runs.chunks import Tensors
from tn_lens.runs.seals import fingerprint, read_manifest, seal_tensors, sealed, unseal_tensors
from tn_lens.runs.workers import ALONE, Workers

SCORES = "scores"
"""Folder of the chunks of attribution, which selection with other thresholds reads."""
WORK = "work"
"""Folder of all other chunks, which a resumed run reuses."""

RESULT_FILES = (
    "report.html",
    "summary.json",
    "result.json",
    "check.safetensors",
    "evaluation.safetensors",
    "diagnosis.safetensors",
    "cards.json",
    "listing.json",
    "selection.json",
    "neurons.json",
    "prompts.json",
    "manifest.json",
)
"""Files that a run writes in addition to its chunks. The same settings give the same bytes."""
FINISHED = ("report.html", "summary.json", "result.json", "neurons.json")
"""Files that only a finished run has."""
LATE = ("exclude",)
"""Settings that may change when a run is continued, since its chunks do not depend on them."""
LOCK, HOLDER, LOG = ".lock", ".holder", "log.jsonl"
BEGINNINGS = (LOCK, HOLDER, LOG, ".manifest.json.part")
"""Files that a folder may contain if its run was stopped before the manifest was written."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems without locks, for example some network file systems."""

CHUNK = re.compile(r"\.?\d{5,}\.safetensors(\.part)?")
logger = logging.getLogger("tn_lens")


@dataclass(frozen=True)
class RunFolder:
    """A folder with the files of one run. Its manifest contains the settings of the run."""

    path: Path
    workers: Workers = ALONE
    lock: FileLock | None = field(default=None, compare=False)
    """Held while the folder is open; None for folders that are only read."""

    @classmethod
    def open(
        cls, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, workers: Workers = ALONE
    ) -> RunFolder:
        """Create the folder, or open the folder of a run with the same settings. Only the first worker writes.

        Raises:
            BadInput: the folder contains a run with other settings (the message names the first that differs) or other
                files, is not writable, or is in use by another run.
        """
        path = Path(path)
        if not workers.is_first:
            workers.wait()
            return cls(path, workers)
        # converted as in the stored manifest, so that tuples compare equal to lists
        settings = json.loads(json.dumps(settings))
        manifest = path / "manifest.json"
        with _writing(path):
            _refuse_foreign(path)
        folder = cls.hold(path, workers)
        try:
            is_run = manifest.exists()
            if is_run and overwrite:
                read_manifest(manifest)
                folder.clear()
            elif is_run:
                stored = read_manifest(manifest)
                _refuse_other_settings(path, stored["settings"], settings)
                if stored["settings"] != settings:
                    folder._change(stored, settings)
            if overwrite or not is_run:
                folder.write_json("manifest.json", sealed({"fingerprint": fingerprint(settings), "settings": settings}))
        # BaseException, so that the lock is released after Ctrl-C as well
        except BaseException:
            folder.release()
            raise
        workers.wait()
        return folder

    @classmethod
    def hold(cls, path: Path, workers: Workers = ALONE) -> RunFolder:
        """Create the folder if needed, and lock it against other processes until `release`.

        Raises:
            BadInput: another process uses the folder, or it is not writable.
        """
        if not workers.is_first:
            return cls(path, workers)
        lock = FileLock(path / LOCK)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise BadInput(
                    f"another run is using {path} ({_holder(path)}); wait until it has ended, or use another folder"
                ) from None
            except (NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                    raise
                logger.warning("%s cannot be locked (%s): do not start a second run in it", path, error)
        with contextlib.suppress(OSError):
            (path / HOLDER).write_text(f"process {os.getpid()} on {os.uname().nodename}\n", encoding="utf-8")
        return cls(path, workers, lock)

    def release(self) -> None:
        """Unlock the folder, so that other processes can use it."""
        if self.lock is not None:
            with contextlib.suppress(OSError):
                (self.path / HOLDER).unlink()
            self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def noted(self, key: str) -> Any:
        """Read a note from the manifest; None if there is none."""
        return read_manifest(self.path / "manifest.json").get(key)

    def note(self, key: str, value: Any) -> None:
        """Write a note to the manifest. Notes are not settings, so the run stays the same. Only the first worker writes."""
        if self.workers.is_first and self.noted(key) != value:
            self.write_json("manifest.json", sealed(read_manifest(self.path / "manifest.json") | {key: value}))

    def digest(self, name: str) -> str:
        """SHA-256 of a file."""
        return hashlib.sha256((self.path / name).read_bytes()).hexdigest()

    def clear(self) -> None:
        """Remove the files that a run has written, and no others."""
        for top in (SCORES, WORK):
            self._refuse_outside(self.path / top)
        with _writing(self.path):
            for top in (SCORES, WORK):
                for parent, _, files in os.walk(self.path / top, topdown=False):  # follows no links
                    for name in filter(CHUNK.fullmatch, files):
                        (Path(parent) / name).unlink()
                    with contextlib.suppress(OSError):  # it contains other files
                        Path(parent).rmdir()
            for name in (LOG, *RESULT_FILES):  # the manifest last: it marks the folder as a run
                (self.path / name).unlink(missing_ok=True)

    def _change(self, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Continue a run with other late settings. It is not finished until its result has been written again."""
        for name in FINISHED:
            (self.path / name).unlink(missing_ok=True)
        notes = {key: value for key, value in stored.items() if key not in ("sha256", "neurons_sha256")}
        self.write_json("manifest.json", sealed({**notes, "fingerprint": fingerprint(settings), "settings": settings}))

    def remove(self) -> None:
        """Remove the files that a run has written, and the folder itself if it contains no others."""
        if self.workers.is_first:
            self.clear()
            with contextlib.suppress(OSError):
                for name in (HOLDER, LOCK):
                    (self.path / name).unlink(missing_ok=True)
                self.path.rmdir()

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically: under a temporary name, synced, then renamed.

        Raises:
            BadInput: the disk is full, the folder is not writable, or the name refers to a path outside of it.
        """
        path = self.path / name
        temporary = path.with_name(f".{path.name}.part")
        with _writing(path):
            self._refuse_outside(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # O_NOFOLLOW: a link in the folder must not redirect the write
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                    file.write(content)
                    # on disk before the rename, or a power failure could leave an empty file under the final name
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
                _sync_folder(path.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    def _refuse_outside(self, folder: Path) -> None:
        """Reject a folder that is outside the run folder, for example because of a link."""
        if not folder.resolve().is_relative_to(self.path.resolve()):
            raise BadInput(f"{str(folder)!r} is outside the run folder {str(self.path)!r}, so nothing is written there")

    def write_json(self, name: str, payload: Any) -> None:
        """Write JSON; NaN becomes null."""
        self.write(name, dump_json(payload))

    def log(self, what: str, **about: Any) -> None:
        """Append an event to log.jsonl, the only file with timestamps. Errors of the file system are ignored."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "rank": self.workers.rank, "what": what}
        with contextlib.suppress(OSError):
            log = os.open(self.path / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(log, (json.dumps(event | about) + "\n").encode())  # one call, so that lines do not mix
            finally:
                os.close(log)

    def chunk(self, name: str, index: int) -> Path:
        """The file of one chunk."""
        return self.path / name / f"{index:05d}.safetensors"

    def write_chunk(self, name: str, index: int, tensors: Tensors, key: str = "") -> None:
        """Store the result of a chunk with its key, see `chunk_key`."""
        self.write(f"{name}/{index:05d}.safetensors", seal_tensors(tensors, key))

    def read_chunk(self, name: str, index: int) -> tuple[str, dict[str, Tensor]] | None:
        """Key and result of a chunk; None if it is missing or damaged."""
        try:
            return unseal_tensors(self.chunk(name, index).read_bytes())
        except OSError:
            return None


def _holder(path: Path) -> str:
    """Name of the process that uses a folder, or "a process" if it is unknown."""
    with contextlib.suppress(OSError):
        return (path / HOLDER).read_text(encoding="utf-8", errors="replace").strip()[:100] or "a process"
    return "a process"


def _refuse_foreign(path: Path) -> None:
    """Reject a path that is neither a run folder nor usable for one. Nothing is changed."""
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is a file; expected a folder, or a path that does not exist yet")
    others = [entry.name for entry in path.iterdir() if entry.name not in BEGINNINGS] if path.exists() else []
    if others and not (path / "manifest.json").exists():
        raise BadInput(f"{path} is not empty and does not contain a run; use another folder")


def _refuse_other_settings(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Reject a run with other settings. The message names the first that differs."""
    for key in dict.fromkeys((*settings, *stored)):
        if key not in LATE and settings.get(key) != stored.get(key):
            raise BadInput(
                f"{path} contains a run with {key} = {stored.get(key)!r:.60}, but this run has {key} = "
                f"{settings.get(key)!r:.60}; use another folder, or start over with --overwrite"
            )


def _sync_folder(path: Path) -> None:
    """Sync a folder, so that a rename survives a power failure, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system into `BadInput`."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "free disk space and run again; finished chunks are kept" if full else "use another folder"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadInput(f"cannot write {str(path)!r}: {reason}; {todo}") from error
