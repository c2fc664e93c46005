"""Text that is safe to display: readable tokens, and questions without control and direction characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

SPACES: Mapping[str, str] = {" ": "␣", "\n": "⏎", "\t": "⇥"}
"""White space made visible in tokens."""
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the direction of the text around them."""


def visible(text: str, *, spaces: bool = False) -> str:
    """The text with control and direction characters replaced by their codes; with `spaces` also white space."""

    return "".join(_visible(character, spaces) for character in text)


@cache
def _visible(character: str, spaces: bool) -> str:
    if spaces and character in SPACES:
        return SPACES[character]
    if character in "\n\t":
        return " "
    kind = unicodedata.category(character)
    is_hidden = kind == "Cc" or character in TURNS or (spaces and kind in ("Cf", "Zs", "Zl", "Zp", "Mn"))
    return f"<U+{ord(character):04X}>" if is_hidden else character


def token_text(tokenizer: Any, token: int) -> str:
    """A token as readable text, with visible white space, and as bytes if it is only a part of a character."""
    if tokenizer is None:
        return f"<{token}>"
    raw = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token]))
    if "\ufffd" in text:
        table = _bytes()
        # the ASCII form "<0xE2>" of a byte is readable as it is
        if raw.isascii() or not all(character in table for character in raw):
            return visible(raw, spaces=True)
        return f"<{' '.join(f'{table[character]:02X}' for character in raw)}>"
    if raw.startswith("▁") and not text.startswith(" "):
        text = " " + text  # decoding a single token drops its leading space
    return visible(text, spaces=True) or f"<{token}>"


def unknown_tokens(tokenizer: Any, n_vocab: int) -> list[int]:
    """Ids without a token, which pad the vocabulary."""
    if tokenizer is None:
        return []
    return [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(n_vocab)))) if token is None]


@cache
def _bytes() -> dict[str, int]:
    """The characters that represent single bytes in byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
