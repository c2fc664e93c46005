"""Registries of named entries, for example question sets. Adding an entry takes a single call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tn_lens.core.errors import BadInput

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dictionary of named entries to which code outside this package can add.

    Args:
        noun: name for one entry in error messages, for example "question set".
    """

    def __init__(self, noun: str) -> None:
        super().__init__()
        self.noun = noun

    def register(self, name: str, entry: T | None = None) -> Callable[[T], T]:
        """Add an entry under a name, directly or as a decorator.

        Raises:
            BadInput: the name is already registered.
        """

        def add(new: T) -> T:
            if name in self:
                raise BadInput(f"the {self.noun} {name!r} is already registered; choose another name")
            self[name] = new
            return new

        if entry is not None:
            add(entry)
        return add

    # dict calls this for `registry[name]`; `in` and `.get` behave as usual
    def __missing__(self, name: str) -> T:
        raise BadInput(f"unknown {self.noun} {name!r}: expected {', '.join(self)}")
