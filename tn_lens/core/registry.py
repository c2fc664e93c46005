"""Registries: things of one kind by name, so that adding one takes one file and one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tn_lens.core.errors import BadInput

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dictionary of named things that code outside this package can add to.

    Args:
        noun: what one entry is called in error messages, for example "question set".
    """

    def __init__(self, noun: str) -> None:
        super().__init__()
        self.noun = noun

    def register(self, name: str, entry: T | None = None) -> Callable[[T], T]:
        """Add an entry under a name, directly or as a decorator.

        Raises:
            BadInput: the name is taken.
        """

        def add(new: T) -> T:
            if name in self:
                raise BadInput(f"there already is a {self.noun} called {name!r}; choose another name")
            self[name] = new
            return new

        if entry is not None:
            add(entry)
        return add

    # dict calls this for `registry[name]`; `in` and `.get` behave as usual
    def __missing__(self, name: str) -> T:
        raise BadInput(f"unknown {self.noun} {name!r}: expected {', '.join(self)}")
