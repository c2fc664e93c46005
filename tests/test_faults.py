"""A full disk or a read-only folder gives a one-line message, and a later run completes."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, contents
from tn_lens import BadInput, QuestionSet, find_truth_neurons
from tn_lens.models import Model

pytestmark = pytest.mark.usefixtures("few_resamples")


class Failing:
    """A system call that fails after a number of calls."""

    def __init__(self, real: Callable[..., Any], inside: Path, budget: list[int], number: int) -> None:
        self.real, self.inside, self.budget, self.number = real, inside, budget, number

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        target = arguments[0]
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else os.fspath(target)
        if str(path).startswith(str(self.inside)) and Path(path).name not in ("log.jsonl", ".lock", ".holder"):
            self.budget[0] -= 1
            if self.budget[0] < 0:
                raise OSError(self.number, os.strerror(self.number), str(path))
        return self.real(*arguments, **options)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "free disk space and run again"), (errno.EACCES, "use another folder")],
)
def test_every_call_that_writes_may_fail(
    number: int,
    said: str,
    whole: Path,
    toy: Model,
    few: QuestionSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each start makes a few more calls before it fails; every failure gives a one-line message and no partial file."""
    out = tmp_path / "run"
    budget = [0]
    for name in ("mkdir", "fsync", "replace", "ftruncate"):
        monkeypatch.setattr(os, name, Failing(getattr(os, name), out, budget, number))
    real_open = os.open
    failing_open = Failing(real_open, out, budget, number)
    monkeypatch.setattr(
        os,
        "open",
        lambda path, flags, *rest, **o: (failing_open if flags & os.O_CREAT else real_open)(path, flags, *rest, **o),
    )
    sentences = []
    for n_calls in range(1, 500, 4):
        budget[0] = n_calls
        try:
            find_truth_neurons(toy, few, QUICK, out=out)
            break
        except BadInput as error:
            sentences.append(str(error))
        assert not list(out.rglob("*.part"))
    assert all("cannot write" in one and said in one and os.strerror(number) in one for one in sentences)
    assert len(sentences) > 5
    assert contents(out) == contents(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full_and_one_that_cannot_be_written(
    small_disk: Path, whole: Path, run: Callable, toy: Model, few: QuestionSet
) -> None:
    out = small_disk / "run"
    with pytest.raises(ValueError, match="No space left on device; free disk space and run again; finished chunks"):
        find_truth_neurons(toy, few, QUICK, out=out)
    held = contents(out)
    assert held
    assert "report.html" not in held
    assert not list(out.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,ro,size=300k", small_disk], check=True)
    with pytest.raises(ValueError, match="Read-only file system; use another folder"):
        find_truth_neurons(toy, few, QUICK, out=out)
    with pytest.raises(ValueError, match="Read-only file system"):
        find_truth_neurons(toy, few, QUICK, out=small_disk / "other")
    subprocess.run(["mount", "-o", "remount,rw,size=50m", small_disk], check=True)
    find_truth_neurons(toy, few, QUICK, out=out)
    assert contents(out) == contents(whole)
