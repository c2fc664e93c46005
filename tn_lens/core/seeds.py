"""Random numbers: always from a seed, never from a global state."""

from __future__ import annotations

import numpy as np

from tn_lens.core.errors import BadInput


def generator(seed: int, *stream: int) -> np.random.Generator:
    """A generator of its own for a seed and, where one seed serves several purposes, the number of the purpose.

    Raises:
        BadInput: the seed is not a whole number from 0.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise BadInput(f"a seed is a whole number from 0; got {seed!r}")
    return np.random.default_rng([int(seed), *stream])
