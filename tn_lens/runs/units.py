"""Expensive work cut into units by count, so that whoever calls may keep them, share them out, and go on after a stop.

A stage says what its units are and what each depends on, and hands them to a mapper. It does not know whether the mapper
computes them one by one, on several workers, or finds them in a run folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tn_lens.runs.progress import track
from tn_lens.prompts import Prompt, by_question

Tensors = Mapping[str, Tensor]
"""What a unit gives: named tensors on the CPU."""

PROMPTS_ATTRIBUTED = 64
"""Prompts in one unit of attribution (a question's prompts stay together): at most this much work is lost."""
PROMPTS_ASKED = 512
"""Prompts in one unit of asking, which costs a hundredth of attributing them."""


@runtime_checkable
class Mapper(Protocol):
    """Computes units of work, or knows them already."""

    def __call__(
        self, name: str, keys: Sequence[str], compute: Callable[[int], Tensors], text: str | None = None
    ) -> Sequence[Tensors]:
        """The results of all units, in order.

        Args:
            name: of this work, one of its own within a stage.
            keys: one a unit, see `unit_key`: a result that is kept serves again only under the same key.
            compute: a unit's number -> its result, from nothing but what its key was made of.
            text: of a progress bar; none by default.
        """
        ...


def in_memory(
    name: str, keys: Sequence[str], compute: Callable[[int], Tensors], text: str | None = None
) -> list[Tensors]:
    """The mapper of a stage that is called by itself: every unit here and now."""
    return [compute(index) for index in track(range(len(keys)), text)]


def within(mapper: Mapper, stage: str) -> Mapper:
    """The same mapper, for what a stage asks of another one: its names begin with the stage's."""

    def named(
        name: str, keys: Sequence[str], compute: Callable[[int], Tensors], text: str | None = None
    ) -> Sequence[Tensors]:
        return mapper(f"{stage}/{name}", keys, compute, text)

    return named


def unit_key(*parts: Any) -> str:
    """SHA-256 over everything that a unit depends on: plain values, dataclasses, collections of them, and tensors."""
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True).encode()).hexdigest()


def _plain(part: Any) -> Any:
    match part:
        case Tensor():
            held = part.detach().cpu().contiguous()
            content = held.flatten().view(torch.uint8).numpy().tobytes()
            return [str(held.dtype), list(held.shape), hashlib.sha256(content).hexdigest()]
        case Mapping():
            return {str(key): _plain(value) for key, value in part.items()}
        case Prompt():  # what the model does with it; not its words, nor where its question stands in a set
            return [part.token_ids, part.label_ids, part.right, part.start]
        case _ if is_dataclass(part) and not isinstance(part, type):
            return {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
        case str() | int() | float() | None:
            return part
        case Iterable():
            return [_plain(one) for one in part]
        case _:
            return repr(part)


def cut_prompts(prompts: Sequence[Prompt], size: int = PROMPTS_ATTRIBUTED) -> tuple[tuple[Prompt, ...], ...]:
    """Cut prompts by count, never by workers; a question's prompts stay together."""
    shards: list[list[Prompt]] = []
    for _, group in by_question(prompts):
        if not shards or len(shards[-1]) + len(group) > size:
            shards.append([])
        shards[-1] += group
    return tuple(map(tuple, shards))
