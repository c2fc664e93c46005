"""The type checker of the tests: beartype, with the checks of nested functions compiled once."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from beartype import beartype

_checked: dict[tuple[Any, ...], Callable[..., Any]] = {}


def typechecker(function: FunctionType) -> Callable[..., Any]:
    """Apply beartype to a function that jaxtyping has made from a signature, which depends on nothing but the signature.

    A nested function is defined again at every call of the function around it; its checks are the same each time.
    """
    if "<locals>" not in function.__qualname__ or function.__defaults__ or function.__kwdefaults__:
        return beartype(function)
    code = function.__code__
    shape = code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    key = (function.__module__, function.__qualname__, str(function.__annotations__), *shape)
    if key not in _checked:
        _checked[key] = beartype(function)
    return _checked[key]
