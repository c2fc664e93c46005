"""Saving and loading of results: frozen dataclasses as JSON, or as safetensors where they hold large arrays.

A file contains the fields of the dataclass and a checksum. Fields are decoded by their type annotations, so the classes
need no separate readers, and the content of a file never determines which code runs.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from tn_lens.core.errors import BadInput

R = TypeVar("R", bound="Stored")

SEAL = re.compile(rb'("sha256\\?": \\?")[^"\\]{64}')
"""The checksum in a file; in the header of a safetensors file its quotation marks are escaped."""
BLANK = "0" * 64


class Stored:
    """Mixin for result dataclasses with `save`, `load`, and a `repr` that shows the summary."""

    def save(self, path: str | Path) -> None:
        """Write the result to a .json or a .safetensors file.

        Raises:
            BadInput: the file extension is not supported, or the file cannot be written.
        """
        path = Path(path)
        try:
            path.write_bytes(self.to_bytes(path.suffix))
        except OSError as error:
            raise BadInput(f"cannot write {str(path)!r}: {error.strerror}; give another path") from error

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Load a result that `save` has written.

        Raises:
            BadInput: the file does not exist, is damaged, or was written for another class or by another version.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
            # only the checksum detects an altered digit in a number
            if content != _seal(content):
                raise BadInput("is damaged: its checksum does not match; run the same command again to recreate it")
            return cls.from_bytes(content, path.suffix)
        except FileNotFoundError:
            raise BadInput(
                f"{path.parent} has no {path.name} yet; finish the run with the same command, or check the path"
            ) from None
        except BadInput as error:
            raise BadInput(f"{path} {error}") from error
        except OSError as error:
            raise BadInput(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error

    def to_bytes(self, ending: str) -> bytes:
        """The content of the file that `save` writes."""
        match ending:
            case ".json":
                return _seal(dump_json({"sha256": BLANK, **_encode(self, None)}))
            case ".safetensors":
                from safetensors.torch import save

                arrays: dict[str, Any] = {}
                encoded = dump_json({"sha256": BLANK, **_encode(self, arrays)}).decode()
                return _seal(save(arrays, metadata={"result": encoded}))
            case _:
                raise BadInput(f"expected a .json or .safetensors file, got the file extension {ending!r}")

    @classmethod
    def from_bytes(cls: type[R], content: bytes, ending: str) -> R:
        """The inverse of `to_bytes`. The checksum is not verified here, but by `load`."""
        try:
            # safetensors: 8 bytes for the length of the header, the header as JSON, then the arrays
            if ending == ".safetensors":
                from safetensors.torch import load

                n_header = int.from_bytes(content[:8], "little")
                encoded = json.loads(content[8 : 8 + n_header])["__metadata__"]["result"]
                payload, arrays = json.loads(encoded), load(content)
            else:
                payload, arrays = json.loads(content), {}
            payload.pop("sha256", None)
            return _decode(cls, payload, arrays)
        except BadInput:
            raise
        except Exception as error:  # damaged files raise many types of exceptions
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            raise BadInput(
                f"is damaged or was written by another version of tn_lens ({reason}); run the same command again to recreate it"
            ) from error

    def __repr__(self) -> str:
        summary = getattr(self, "summary", None)
        return f"{type(self).__name__}: {summary()}" if summary else object.__repr__(self)


def _seal(content: bytes) -> bytes:
    """Set the checksum in the content to the SHA-256 of all other bytes. Content without a checksum is unchanged."""
    # the checksum is computed with zeros in its place
    blank = SEAL.sub(rb"\g<1>" + BLANK.encode(), content, count=1)
    return SEAL.sub(rb"\g<1>" + sha256(blank).hexdigest().encode(), content, count=1)


def dump_json(payload: Any) -> bytes:
    """Encode as JSON, with null for NaN and infinity, which JSON cannot represent."""
    # allow_nan=False raises if any is left, since json.dumps would write "NaN", which is not valid JSON
    text = json.dumps(without_nan(payload), indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode(errors="backslashreplace")


def without_nan(payload: Any) -> Any:
    """Replace every NaN and infinity with None."""
    match payload:
        case Mapping():
            return {str(key): without_nan(value) for key, value in payload.items()}
        case list() | tuple():
            return [without_nan(value) for value in payload]
        case float() if payload != payload or abs(payload) == float("inf"):
            return None
        case _:
            return payload


def _encode(value: Any, arrays: dict[str, Any] | None, at: str = "") -> Any:
    """Encode a value for JSON. Arrays are added to `arrays` by path, or become lists in the JSON if it is None."""
    if hasattr(value, "to_plain"):  # neurons, sets of neurons and prompts have their own short form
        return _encode(value.to_plain(), arrays, at)
    if is_dataclass(value):
        # derived fields (init=False) are computed from the others
        return {f.name: _encode(getattr(value, f.name), arrays, f"{at}/{f.name}") for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): _encode(item, arrays, f"{at}/{key}") for key, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) or type(value).__module__ == "torch":
        if arrays is None or value.ndim == 0:
            return value.tolist()
        import torch

        arrays[at] = torch.as_tensor(value).contiguous()
        return {"array": at}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Collection) and not isinstance(value, str):
        return [_encode(item, arrays, f"{at}/{place}") for place, item in enumerate(value)]
    return value


def _decode(hint: Any, value: Any, arrays: Mapping[str, Any]) -> Any:
    """The inverse of `_encode`, guided by the annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        others = [one for one in inner if one is not type(None)]
        if value is None and len(others) < len(inner):
            return None
        return _decode(others[0], value, arrays) if len(others) == 1 else value
    if hasattr(hint, "array_type"):  # jaxtyping
        return _decode_array(hint, value, arrays)
    if hasattr(hint, "from_plain"):
        return hint.from_plain(value)
    if is_dataclass(hint):
        hints = _hints(hint)  # pyright: ignore[reportArgumentType]
        return hint(**{name: _decode(hints[name], item, arrays) for name, item in value.items()})  # pyright: ignore
    if hint is float:
        return float("nan") if value is None else float(value)
    if origin is tuple and inner[1:] != (Ellipsis,):
        return tuple(_decode(one, item, arrays) for one, item in zip(inner, value, strict=True))
    if origin is not None and isinstance(value, Mapping):
        key_hint, value_hint = inner
        return {_decode_key(key_hint, key): _decode(value_hint, item, arrays) for key, item in value.items()}
    if origin is not None and origin is not Literal and isinstance(value, list):
        decoded = [_decode(inner[0], item, arrays) for item in value]
        return decoded if origin is list else frozenset(decoded) if origin is frozenset else tuple(decoded)
    return value


def _decode_array(hint: Any, value: Any, arrays: Mapping[str, Any]) -> Any:
    """Decode an array or tensor from a list in the JSON or from the tensors of the file."""
    if isinstance(value, Mapping):
        tensor = arrays[value["array"]]
        return tensor.numpy() if hint.array_type is np.ndarray else tensor
    kind = next(iter(hint.dtypes))  # for example "float64" or "int8", by the class of jaxtyping
    dtype = np.bool_ if kind.startswith("bool") else np.int64 if "int" in kind else np.float64
    array = np.array(value, dtype=dtype)  # None becomes NaN
    if hint.array_type is np.ndarray:
        return array
    import torch

    return torch.from_numpy(array)


def _decode_key(hint: Any, key: str) -> Any:
    if hasattr(hint, "from_plain"):
        return hint.from_plain(key)
    return int(key) if hint is int else key


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
