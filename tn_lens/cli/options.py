"""Options of the command line: those that several commands share, and those made from `Settings`."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import typer

from tn_lens.core.errors import BadInput
from tn_lens.core.options import BackendName, Condition, Method, Mode, list_sets
from tn_lens.core.settings import GIB, PRESETS, Settings

Dtype: TypeAlias = Annotated[str | None, typer.Option(help="Dtype: float32, bfloat16, float16 or float64.")]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1 or mps.")]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Backend: TypeAlias = Annotated[
    BackendName | None, typer.Option(help="HookedTransformer or TransformerBridge; the numbers are the same.")
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(help="Torch threads of each worker; by default as in the existing run, else torch's own.")
]
Preset: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar=f"<{'|'.join(PRESETS)}>",
        help="Values of several settings; options that are given take precedence. Default: the defaults below.",
    ),
]
DropLong: TypeAlias = Annotated[bool, typer.Option(help="Leave out questions that exceed the context window.")]
PlainText: TypeAlias = Annotated[
    Path | None, typer.Option(help="Plain-text file to measure the loss on; by default a text in this package.")
]
TrustRemoteCode: TypeAlias = Annotated[bool, typer.Option(help="Run Python code that is part of the checkpoint.")]
RunPath: TypeAlias = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]

SETS_HELP = "Question set: a name, NAME=PATH for a local copy, or a .csv or .jsonl file."
"""Help of the options that take question sets; the names are at the end of the help."""
SET_NAMES = f"Names of question sets: {list_sets()}."

BUILT_IN: Mapping[str, Sequence[str]] = {
    "method": get_args(Method),
    "controls": [name for name in get_args(Condition) if not name.endswith("ablated")],
    "intervention": [name for name in get_args(Mode) if name != "scale"],  # "scale" needs a factor
}
"""The built-in names that the help shows for settings by registered name; more names can be registered."""


def choices(names: Sequence[str]) -> str:
    """Format names for the help of an option that also accepts other names."""
    return f"<{'|'.join(names)}>"


def with_settings(*names: str, unset: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of these settings; the command receives them as keyword arguments.

    Name, type, help and default of an option are those of the field of `Settings`.

    Args:
        names: fields of `Settings`; all by default.
        unset: whether the default of every option is None, for commands whose defaults are the settings of a run.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        explicit = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        if "context" in signature.parameters:
            # typer recognizes its context by this annotation, but passes an object of the base class
            command.__annotations__ = {**command.__annotations__, "context": typer.Context}
        generated = [_parameter(field, unset) for field in fields(Settings) if not names or field.name in names]
        # typer reads the parameters of a command from its signature
        command.__signature__ = signature.replace(parameters=[*explicit, *generated])  # pyright: ignore
        return command

    return add


def _parameter(field: Field[Any], unset: bool) -> inspect.Parameter:
    """The parameter of a command that sets a field of `Settings`."""
    hint: Any = get_type_hints(Settings)[field.name]
    default: Any = field.default
    details: dict[str, Any] = {"help": field.metadata["help"], "rich_help_panel": "Settings"}
    if field.name in CONVERTED:
        hint, details["callback"] = CONVERTED[field.name]
    elif get_origin(hint) is Sequence:
        hint, default, details["callback"] = list[str], list(default), lambda values: tuple(values)
    if field.name in BUILT_IN:
        details["metavar"] = choices(BUILT_IN[field.name])
    flags = [field.metadata["flag"]] if field.metadata["flag"] else []
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if unset else default,
        annotation=Annotated[hint | None if unset else hint, typer.Option(*flags, **details)],
    )


def only_given(context: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that were given on the command line, without defaults."""
    # the enumeration of sources has different classes in typer and click
    sources = {name: context.get_parameter_source(name) for name in values}
    return {name: value for name, value in values.items() if (source := sources[name]) and source.name != "DEFAULT"}


def _threshold(text: str | None) -> float | Literal["auto"] | None:
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"expected a number in (0, 1] or 'auto' for '--t', got {text!r}") from None


def _bytes(gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 < gib < math.inf:
        raise BadInput(f"--max-memory must be greater than 0 GiB; got {gib:g}")
    return max(1, round(gib * GIB))


def _variables(given: Sequence[str] | None) -> dict[str, Any] | None:
    """Parse NAME=VALUE pairs, with values in JSON or as plain text, and JSON objects."""
    variables: dict[str, Any] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        is_object = text.lstrip().startswith("{")
        try:
            parsed: Any = json.loads(text if is_object else value)
        except json.JSONDecodeError as error:
            if is_object or not name or "=" not in text:
                raise BadInput(
                    f"expected NAME=VALUE or a JSON object for --template-kwargs, got {text!r}; for example enable_thinking=true"
                ) from error
            parsed = value
        variables |= parsed if is_object else {name: parsed}
    return variables or None


CONVERTED: Mapping[str, tuple[Any, Callable[..., Any]]] = {
    "adaptive_threshold": (str | None, _threshold),
    "max_memory": (float | None, _bytes),
    "template_kwargs": (list[str] | None, _variables),
}
"""Settings whose command-line option has a different type: that type, and the conversion."""
