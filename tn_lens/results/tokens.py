"""Text that is safe to show: tokens as they read, and questions without characters that act on their surroundings."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

SPACES: Mapping[str, str] = {" ": "␣", "\n": "⏎", "\t": "⇥"}
"""White space made visible in tokens."""
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of the text around them."""


def visible(text: str, *, spaces: bool = False) -> str:
    """The text with control characters and turns of direction shown instead of obeyed; white space too where asked."""

    def show(character: str) -> str:
        if spaces and character in SPACES:
            return SPACES[character]
        if character in "\n\t":
            return " "
        kind = unicodedata.category(character)
        hidden = kind == "Cc" or character in TURNS or (spaces and kind in ("Cf", "Zs", "Zl", "Zp", "Mn"))
        return f"<U+{ord(character):04X}>" if hidden else character

    return "".join(map(show, text))


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it reads, with its white space visible, and its bytes where it is a part of a character."""
    if tokenizer is None:
        return f"<{token}>"
    raw = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token]))
    if "\ufffd" in text:
        of = _bytes()
        by_bytes = not raw.isascii() and all(c in of for c in raw)  # <0xE2> is readable already
        shown = " ".join(f"{of[c]:02X}" for c in raw) if by_bytes else ""
        return f"<{shown}>" if shown else visible(raw, spaces=True)
    if raw.startswith("▁") and not text.startswith(" "):
        text = " " + text
    return visible(text, spaces=True) or f"<{token}>"


def unknown_tokens(tokenizer: Any, n_vocab: int) -> list[int]:
    """Rows that only fill the vocabulary up."""
    if tokenizer is None:
        return []
    return [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(n_vocab)))) if token is None]


@cache
def _bytes() -> dict[str, int]:
    """The characters that stand for single bytes in byte-level vocabularies: printable ones for themselves, then from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): b for place, b in enumerate(others)}
