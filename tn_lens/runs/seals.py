"""Checksums that detect truncated or altered files when they are read."""

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
from tn_lens.core.stored import without_nan
from tn_lens.runs.chunks import Tensors

SEAL = re.compile(rb'"seal":"([0-9a-f]*) ([0-9a-f]{64})"')
"""Pattern of the metadata entry with key and checksum. It is one entry, since safetensors does not keep their order."""
BLANK = b"0" * 64


def seal_tensors(tensors: Tensors, key: str = "") -> bytes:
    """A safetensors file with a checksum over all of its bytes, the header included."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # the checksum is computed with zeros in its place
    content = save(whole, metadata={"seal": f"{key} {BLANK.decode()}"})
    return content.replace(BLANK, hashlib.sha256(content).hexdigest().encode(), 1)


def unseal_tensors(content: bytes) -> tuple[str, dict[str, Tensor]] | None:
    """Key and tensors of a sealed file; None if a byte is missing or altered."""
    seal = SEAL.search(content, 8, min(len(content), 8 + int.from_bytes(content[:8], "little")))
    if seal is None:
        return None
    blank = content[: seal.start(2)] + BLANK + content[seal.end(2) :]
    if hashlib.sha256(blank).hexdigest().encode() != seal[2]:
        return None
    try:
        return seal[1].decode(), load(content)
    except SafetensorError:
        return None


def sealed(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Add a checksum to the payload of a file that later calls rely on."""
    bare = {key: value for key, value in payload.items() if key != "sha256"}
    return {"sha256": fingerprint(bare), **bare}


def is_sealed(payload: Any) -> bool:
    """Whether the payload has the correct checksum."""
    return isinstance(payload, dict) and sealed(payload)["sha256"] == payload.get("sha256")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        BadInput: the file is damaged, or is not a manifest of tn_lens.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (
            is_sealed(manifest)
            and isinstance(manifest["settings"], dict)
            and manifest["fingerprint"] == fingerprint(manifest["settings"])
        ):
            return manifest
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        pass
    raise BadInput(f"{path} is damaged or is not a tn_lens manifest; use another folder, or remove the file")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings."""
    return hashlib.sha256(json.dumps(without_nan(settings), sort_keys=True).encode()).hexdigest()
