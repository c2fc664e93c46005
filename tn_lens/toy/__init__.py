"""The embedded model, its invented world, and a model with planted truth neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tn_lens.toy.plant import Planted, planted

__all__ = ["Planted", "planted"]


def __getattr__(name: str) -> Any:
    """`planted`, which stands on models and prompts, while those stand on this package's question world."""
    if name in __all__:
        from tn_lens.toy import plant

        return getattr(plant, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
