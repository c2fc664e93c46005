"""The run-time type checks of the tests: jaxtyping for functions of arrays, beartype alone for the others.

jaxtyping's import hook decorates every function, and binds the arguments of every call to compare the shapes of arrays. Most
functions take and return no arrays, are called often, and are checked by beartype in a fraction of that time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import Any, NamedTuple, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_of_arrays = jaxtyping.jaxtyped
_without_arrays = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
_checked: dict[tuple[Any, ...], Callable[..., Any]] = {}


class Stubs(NamedTuple):
    """Two checked functions that do nothing: one with the parameters of a function, and one that takes its result."""

    takes: Callable[..., Any]
    gives: Callable[..., Any]


_stubs: dict[tuple[Any, ...], Stubs | None] = {}
"""The stubs of nested functions, which are defined again at every call of the function around them; None for those of arrays."""


def typechecker(function: FunctionType) -> Callable[..., Any]:
    """Apply beartype to a function that jaxtyping has made from a signature, which depends on nothing but the signature.

    The checks of a nested function are the same at each of its definitions.
    """
    if "<locals>" not in function.__qualname__ or function.__defaults__ or function.__kwdefaults__:
        return beartype(function)
    code = function.__code__
    shape = code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    key = (function.__module__, function.__qualname__, str(function.__annotations__), *shape)
    if key not in _checked:
        _checked[key] = beartype(function)
    return _checked[key]


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """Replacement of `jaxtyping.jaxtyped` that applies it to classes and to functions of arrays only."""
    if function is None:
        return partial(jaxtyped, typechecker=typechecker)
    if not isinstance(function, FunctionType):
        return _of_arrays(function, typechecker=typechecker)
    if "<locals>" not in function.__qualname__ and not inspect.isgeneratorfunction(function):
        function.__annotations__ = hints = _hints_of(function)
        checked = _without_arrays(function)
        # shapes are compared within one call; arguments are checked once, and not again with the result
        return _of_arrays(checked, typechecker=None) if any(map(_has_array, hints.values())) else checked
    key = function.__module__, function.__qualname__, function.__code__
    if key not in _stubs:
        hints = _hints_of(function)
        _stubs[key] = None if any(map(_has_array, hints.values())) else _stubs_of(function, hints)
    stubs = _stubs[key]
    return _of_arrays(function, typechecker=typechecker) if stubs is None else _with_stubs(function, stubs)


def _hints_of(function: FunctionType) -> dict[str, Any]:
    """The annotations of a function; Any, as in jaxtyping, for those that cannot be resolved at run time."""
    try:
        return get_type_hints(function, include_extras=True)
    except Exception:
        hints = {}
        for name, annotation in function.__annotations__.items():
            one = FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
            one.__annotations__ = {name: annotation}
            try:
                hints |= get_type_hints(one, include_extras=True)
            except Exception:
                hints[name] = Any
        return hints


def _has_array(hint: Any) -> bool:
    """Whether an annotation contains a type of arrays."""
    if isinstance(hint, list | tuple):  # the parameters of a Callable
        return any(map(_has_array, hint))
    is_array = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(_has_array, get_args(hint)))


def _stubs_of(function: FunctionType, hints: dict[str, Any]) -> Stubs:
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
        for p in inspect.signature(function).parameters.values()
    ]
    made: dict[str, Any] = {}
    exec(f"def takes{inspect.Signature(parameters)}: pass\ndef gives(value): return value", made)
    for name in ("takes", "gives"):
        made[name].__module__, made[name].__qualname__ = function.__module__, function.__qualname__
    made["takes"].__annotations__ = {name: hint for name, hint in hints.items() if name != "return"}
    made["gives"].__annotations__ = {"return": hints.get("return", Any)}
    return Stubs(_without_arrays(made["takes"]), _without_arrays(made["gives"]))


def _with_stubs(function: FunctionType, stubs: Stubs) -> Callable[..., Any]:
    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        stubs.takes(*args, **kwargs)
        return stubs.gives(function(*args, **kwargs))

    return checked


jaxtyping.jaxtyped = jaxtyped  # the decorator that the import hook looks up
