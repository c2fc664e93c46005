"""Seeded random number generators, independent of global random state."""

from __future__ import annotations

import numpy as np

from tn_lens.core.errors import BadInput


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Create a generator from a seed. Different `stream` numbers give independent generators for the same seed.

    Raises:
        BadInput: the seed is not a non-negative integer.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise BadInput(f"seed must be a non-negative integer; got {seed!r}")
    return np.random.default_rng([int(seed), *stream])
