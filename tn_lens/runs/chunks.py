"""Chunks: parts of expensive work, which are cached, distributed over workers, and reused by a resumed run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from tn_lens.questions.prompts import Prompt

Tensors = Mapping[str, Tensor]
"""The result of a chunk: named tensors on the CPU."""

PROMPTS_ATTRIBUTED = 64
"""Maximum number of prompts per chunk of attribution (a question's prompts stay together). A run that is stopped loses at most
one chunk."""
PROMPTS_ASKED = 512
"""Maximum number of prompts per chunk of answers, which cost about a hundredth of their attribution."""


def chunk_key(*parts: Any) -> str:
    """SHA-256 of everything that a chunk depends on: plain values, dataclasses, collections of them, and tensors."""
    # sorted keys, so that the order of a mapping does not change the key
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True).encode()).hexdigest()


def _plain(part: Any) -> Any:
    match part:
        case Tensor():
            values = part.detach().cpu().contiguous()
            content = values.flatten().view(torch.uint8).numpy().tobytes()
            return [str(values.dtype), list(values.shape), hashlib.sha256(content).hexdigest()]
        case Mapping():
            return {str(key): _plain(value) for key, value in part.items()}
        case Prompt():  # only what the computation depends on, without text and question id
            return [part.token_ids, part.label_ids, part.right, part.start, part.blank_ids]
        case _ if is_dataclass(part) and not isinstance(part, type):
            # with the class, since two interventions may have the same fields
            return [type(part).__name__, {field.name: _plain(getattr(part, field.name)) for field in fields(part)}]
        case str() | int() | float() | None:
            return part
        case Iterable():
            return [_plain(item) for item in part]
        case _:
            return repr(part)
