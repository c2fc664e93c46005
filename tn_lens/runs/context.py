"""The context of a run: the cache of finished chunks, workers, progress bars and captured warnings.

A stage is a pure function. It cuts expensive work into chunks and hands them to `map_chunks`, and does not know whether they
are computed here, by several workers, or found in a run folder. That is decided by the run in whose context it is called:

    with Run(folder, basis) as run:
        check = run.stage("check", manipulation_check, model, prompts)
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from tn_lens.core.errors import BadInput
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.folder import SCORES, WORK, RunFolder
from tn_lens.runs.progress import DELAY, progress_bar

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("tn_lens")
"""Messages about a run that are not results; Python shows them on standard error."""


class Run:
    """What the stages of a run share. Outside a run there is one that computes in memory and keeps nothing.

    Args:
        folder: keeps the chunks; None computes them in memory.
        basis: digest of everything that all chunks depend on.
        progress: show progress bars.
    """

    def __init__(self, folder: RunFolder | None = None, basis: str = "", *, progress: bool = True) -> None:
        self.folder, self.basis, self.progress = folder, basis, progress
        self.names: list[str] = []
        """The stages that are running, the innermost last."""
        self.notes: dict[str, None] = {}
        """Warnings of the stages, each once, in the order in which they were raised."""
        self.is_kept = True
        """Whether the folder stays when the run has ended."""
        self.resources = ExitStack()
        """What is closed when the run has ended."""
        self._token: Token[Run] | None = None

    def __enter__(self) -> Run:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    def stage(self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a stage: its chunks are kept under its name, and its warnings become notes."""
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", UserWarning)
            result = in_stage(name, function, *args, **kwargs)
        for warning in raised:
            if issubclass(warning.category, UserWarning):
                self.note(str(warning.message))
            else:  # deprecations, for example, do not concern the result
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result

    def note(self, message: str | None) -> None:
        """Note a warning as a sentence; None is ignored."""
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
        # scores have a place of their own, since other thresholds are answered from them
        name = name if name == SCORES else "/".join((WORK, *self.names, name))
        # the same work in another run, or at another place of this one, is other work
        keys = [chunk_key(self.basis, name, key) for key in keys]
        mine = workers.share(len(keys))
        # the first worker looks at all chunks, so that a damaged one is named once
        wanted = range(len(keys)) if workers.is_first else mine
        there = {index for index in wanted if self._is_whole(folder, name, index, keys[index])}
        todo = [index for index in mine if index not in there]
        for index in progress_bar(todo, text if workers.is_first else None):
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as raised:  # a resumed run could not raise them again
                warnings.simplefilter("always", UserWarning)
                tensors = compute(index)
            for warning in raised:
                folder.log("warning", name=name, index=index, text=str(warning.message))
            folder.write_chunk(name, index, tensors, keys[index])
            folder.log("chunk", name=name, index=index, seconds=round(time.perf_counter() - started, 3))
        # every worker may read every chunk from here on
        workers.wait()
        return StoredChunks(folder, name, tuple(keys))

    @staticmethod
    def _is_whole(folder: RunFolder, name: str, index: int, key: str) -> bool:
        """Whether a chunk need not be computed; a damaged one is reported, by the first worker alone."""
        path = folder.chunk(name, index)
        if not path.exists():
            return False
        stored = folder.read_chunk(name, index)
        if stored is None and folder.workers.is_first:
            logger.warning("%s is cut off or altered (its checksum does not fit); it is computed again", path)
            folder.log("damaged", name=name, index=index)
        return stored is not None and stored[0] == key


_CURRENT: ContextVar[Run] = ContextVar("run", default=Run())  # noqa: B039 (it holds nothing outside a run)


def map_chunks(
    name: str, keys: Sequence[str], compute: Callable[[int], Tensors], text: str | None = None
) -> Iterable[Tensors]:
    """Compute chunks, or read those that the run has already.

    Args:
        name: name of this work, unique within its stage.
        keys: one for each chunk, see `chunk_key`; a stored result is used again only under the same key.
        compute: number of a chunk -> its result, which depends on nothing but what is in its key.
        text: text of a progress bar; none by default.

    Returns:
        The results of all chunks, in order.
    """
    return _CURRENT.get().map(name, keys, compute, text)


def in_stage(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function whose chunks are kept below those of the running stage, under `name`."""
    names = _CURRENT.get().names
    names.append(name)
    try:
        return function(*args, **kwargs)
    finally:
        names.pop()


def track(items: Iterable[T], text: str) -> Iterable[T]:
    """Iterate with a progress bar."""
    run = _CURRENT.get()
    return progress_bar(items, text if run.progress else None, delay=0.0 if run.folder else DELAY)


@dataclass(frozen=True)
class StoredChunks:
    """The results of chunks, each read when it is asked for: memory does not grow with their number."""

    folder: RunFolder
    name: str
    keys: tuple[str, ...]

    def __iter__(self) -> Iterator[Tensors]:
        return map(self._read, range(len(self.keys)))

    def _read(self, index: int) -> Tensors:
        several = self.folder.workers.n_workers > 1
        for pause in (0, 0.2, 1, 5) if several else (0,):  # a shared disk may lag behind
            time.sleep(pause)
            stored = self.folder.read_chunk(self.name, index)
            if stored is not None and stored[0] == self.keys[index]:
                return stored[1]
        shared = "; all workers must see the same run folder" if several else ""
        raise BadInput(
            f"{self.folder.chunk(self.name, index)} is missing or damaged; run again to compute it anew{shared}"
        )
