"""The context of a run: the cache of finished chunks, workers, progress bars and captured warnings.

A stage is a pure function that splits expensive work into chunks and passes them to `map_chunks`. The active run decides
whether they are computed in this process, distributed over several workers, or read from a run folder:

    with Run(folder, basis) as run:
        check = run.stage("check", manipulation_check, model, prompts)
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from tqdm.auto import tqdm

from tn_lens.core.errors import BadInput
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.folder import SCORES, WORK, RunFolder
from tn_lens.runs.progress import DELAY, progress_bar

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("tn_lens")
"""Logger of messages about a run that are not results. By default, Python prints its warnings on standard error."""


class Run:
    """State shared by the stages of a run. Outside a run, a default instance computes in memory and stores nothing.

    Args:
        folder: folder in which chunks are stored. None: chunks are computed in memory.
        basis: digest of everything that all chunks depend on.
        progress: whether to show progress bars.
    """

    def __init__(self, folder: RunFolder | None = None, basis: str = "", *, progress: bool = True) -> None:
        self.folder, self.basis, self.progress = folder, basis, progress
        self.names: list[str] = []
        """Names of the running stages, the innermost last."""
        self.notes: dict[str, None] = {}
        """Unique warnings of the stages, in the order in which they were raised."""
        self.is_kept = True
        """Whether the folder is kept when the run ends."""
        self.resources = ExitStack()
        """Resources that are closed when the run ends."""
        self._token: Token[Run] | None = None

    def __enter__(self) -> Run:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    def stage(self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a stage. Its chunks are stored under its name, and its user warnings become notes."""
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", UserWarning)
            result = in_stage(name, function, *args, **kwargs)
        for warning in raised:
            if issubclass(warning.category, UserWarning):
                self.note(str(warning.message))
            else:  # other warnings, such as deprecations, do not concern the result
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result

    def note(self, message: str | None) -> None:
        """Record a warning as a sentence. None is ignored."""
        if message:
            self.notes[f"{message[0].upper()}{message[1:].rstrip('.')}."] = None

    def map(
        self, name: str, keys: Sequence[str], compute: Callable[[int], Tensors], text: str | None = None
    ) -> Iterable[Tensors]:
        """See `map_chunks`."""
        text = text if self.progress else None
        if self.folder is None:
            return [compute(index) for index in progress_bar(range(len(keys)), text, delay=DELAY)]
        folder, workers = self.folder, self.folder.workers
        # scores have a separate folder, since selection with other thresholds reads them
        name = name if name == SCORES else "/".join((WORK, *self.names, name))
        # a stored chunk is reused only in the same run and at the same place in it
        keys = [chunk_key(self.basis, name, key) for key in keys]
        mine = workers.share(len(keys))
        # the first worker checks all chunks, so that a damaged one is reported once
        wanted = range(len(keys)) if workers.is_first else mine
        there = {index for index in wanted if self._is_whole(folder, name, index, keys[index])}
        todo = [index for index in mine if index not in there]
        for index in progress_bar(todo, text if workers.is_first else None):
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as raised:  # logged, since a resumed run raises none
                warnings.simplefilter("always", UserWarning)
                tensors = compute(index)
            for warning in raised:
                folder.log("warning", name=name, index=index, text=str(warning.message))
            folder.write_chunk(name, index, tensors, keys[index])
            folder.log("chunk", name=name, index=index, seconds=round(time.perf_counter() - started, 3))
        # after this, every chunk is complete and can be read by every worker
        workers.wait()
        return StoredChunks(folder, name, tuple(keys))

    @staticmethod
    def _is_whole(folder: RunFolder, name: str, index: int, key: str) -> bool:
        """Whether a chunk is stored completely under its key. The first worker reports a damaged one."""
        path = folder.chunk(name, index)
        if not path.exists():
            return False
        stored = folder.read_chunk(name, index)
        if stored is None and folder.workers.is_first:
            logger.warning("%s is truncated or altered (its checksum does not match); it is computed again", path)
            folder.log("damaged", name=name, index=index)
        return stored is not None and stored[0] == key


_CURRENT: ContextVar[Run] = ContextVar("run", default=Run())  # noqa: B039 (it holds nothing outside a run)


def map_chunks(
    name: str, keys: Sequence[str], compute: Callable[[int], Tensors], text: str | None = None
) -> Iterable[Tensors]:
    """Compute chunks, or read those that the run has already stored.

    Args:
        name: name of this work, unique within its stage.
        keys: one key per chunk, see `chunk_key`. A stored result is reused only if its key is the same.
        compute: function from the index of a chunk to its result, which may depend only on what the key covers.
        text: label of the progress bar. None: no progress bar.

    Returns:
        The results of all chunks, in order.
    """
    return _CURRENT.get().map(name, keys, compute, text)


def in_stage(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function whose chunks are stored under `name`, within the folder of the running stage."""
    names = _CURRENT.get().names
    names.append(name)
    try:
        return function(*args, **kwargs)
    finally:
        names.pop()


def tell(sentences: Iterable[str]) -> None:
    """Print intermediate results of a run that shows its progress."""
    if _CURRENT.get().folder is not None and _CURRENT.get().progress:
        for sentence in sentences:
            tqdm.write(sentence)


def track(items: Collection[T], text: str) -> Iterable[T]:
    """Iterate with a progress bar, unless there is only one item: within a run, its chunk already has a bar."""
    if len(items) < 2:
        return items
    run = _CURRENT.get()
    return progress_bar(items, text if run.progress else None, delay=0.0 if run.folder else DELAY)


@dataclass(frozen=True)
class StoredChunks:
    """The results of chunks, read one at a time during iteration, so that memory does not grow with their number."""

    folder: RunFolder
    name: str
    keys: tuple[str, ...]

    def __iter__(self) -> Iterator[Tensors]:
        return map(self._read, range(len(self.keys)))

    def _read(self, index: int) -> Tensors:
        several = self.folder.workers.n_workers > 1
        for pause in (0, 0.2, 1, 5) if several else (0,):  # files appear late on some shared disks
            time.sleep(pause)
            stored = self.folder.read_chunk(self.name, index)
            if stored is not None and stored[0] == self.keys[index]:
                return stored[1]
        shared = "; all workers need access to the same run folder" if several else ""
        raise BadInput(
            f"{self.folder.chunk(self.name, index)} is missing or damaged; run again to recompute it{shared}"
        )
