"""Checksums: a file that is cut off or altered is known for it, and never read as if it were whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.runs.units import Tensors

SEAL = re.compile(rb'"seal":"([0-9a-f]*) ([0-9a-f]{64})"')
"""Key and checksum: one entry, since safetensors keeps several in no particular order."""
BLANK = b"0" * 64


def seal_tensors(tensors: Tensors, key: str = "") -> bytes:
    """A safetensors file that carries a checksum over all of its bytes, its header too."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(held, metadata={"seal": f"{key} {BLANK.decode()}"})
    return content.replace(BLANK, hashlib.sha256(content).hexdigest().encode(), 1)


def unseal_tensors(content: bytes) -> tuple[str, dict[str, Tensor]] | None:
    """Key and tensors of a sealed file; None where a byte of it is missing or altered."""
    found = SEAL.search(content, 8, min(len(content), 8 + int.from_bytes(content[:8], "little")))
    if found is None:
        return None
    blank = content[: found.start(2)] + BLANK + content[found.end(2) :]
    if hashlib.sha256(blank).hexdigest().encode() != found[2]:
        return None
    try:
        return found[1].decode(), load(content)
    except SafetensorError:
        return None


def sealed(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a checksum over it, for files that later calls rely on."""
    bare = {key: value for key, value in payload.items() if key != "sha256"}
    return {"sha256": fingerprint(bare), **bare}


def is_sealed(payload: Any) -> bool:
    """Whether the checksum fits."""
    return isinstance(payload, dict) and sealed(payload)["sha256"] == payload.get("sha256")


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest as it was written.

    Raises:
        BadInput: it is damaged, or none of ours.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if (
            is_sealed(held)
            and isinstance(held["settings"], dict)
            and held["fingerprint"] == fingerprint(held["settings"])
        ):
            return held
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        pass
    raise BadInput(f"{path} is damaged or belongs to something else; give another folder, or remove it yourself")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings."""
    return hashlib.sha256(json.dumps(without_nan(settings), sort_keys=True).encode()).hexdigest()


def without_nan(payload: Any) -> Any:
    """The same payload with None for every NaN and infinity, which JSON does not have."""
    match payload:
        case dict():
            return {key: without_nan(value) for key, value in payload.items()}
        case list() | tuple():
            return [without_nan(value) for value in payload]
        case float() if payload != payload or abs(payload) == float("inf"):
            return None
        case _:
            return payload
