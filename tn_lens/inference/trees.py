"""Prompts as trees: common beginnings are run once.

The prompts of a tree are one row of tokens, in which a column that several prompts share appears once and every column attends
only to the tokens before it in its prompts. Nothing is padded inside a tree. A long beginning that several trees share is run
before them, and they continue its keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from tn_lens.questions.prompts import Prompt

MOST_COLUMNS = (128, 256)
"""Maximum number of columns of a tree, unless one prompt is longer; the cheapest is used."""
PAIR_TOKENS = 3e-4
"""Cost, in tokens, of comparing one column of a tree with another, which attention does for all of them."""
PASS_TOKENS = {"cpu": 64, "other": 1024}
"""Number of tokens, by device, that take as long as a further forward pass."""


class Column(NamedTuple):
    """A token of one or several prompts. Columns that differ in any field are not shared."""

    token: int
    in_question: bool
    """Whether it is not before the start of the question."""
    is_last: bool
    """Whether a prompt ends here. Its last position is not shared with longer prompts, so that an intervention can act on it."""


Path = tuple[Column, ...]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Prompts with one column for every distinct beginning."""

    columns: tuple[Column, ...]
    positions: tuple[int, ...]
    """Position of each column in its prompts."""
    parents: tuple[int, ...]
    """Column of the preceding token; -1 where there is none in this tree."""
    ends: Mapping[int, int]
    """Column of the last token of each prompt, by the prompt's index."""

    def __len__(self) -> int:
        return len(self.columns)

    @cached_property
    def visible(self) -> Bool[np.ndarray, "column key"]:
        """The columns of the beginning that ends at each column, itself included."""
        visible = np.eye(len(self), dtype=bool)
        for column, parent in enumerate(self.parents):
            if parent >= 0:
                visible[column] |= visible[parent]
        return visible


@dataclass(frozen=True)
class Grove:
    """Trees that continue one prefix."""

    prefix: Path
    """Columns that are run before the trees; empty if nothing is."""
    trees: tuple[Tree, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens to run."""
        return len(self.prefix) + sum(map(len, self.trees))


@lru_cache(maxsize=4)  # the same prompts are asked with many sets of neurons
def groves(prompts: tuple[Prompt, ...], device: str = "cpu", most_columns: int | None = None) -> tuple[Grove, ...]:
    """Arrange prompts so that few tokens are run, such as the few-shot examples of a subject only once.

    Args:
        prompts: prompts of any length.
        device: type of the device they run on.
        most_columns: maximum number of columns of a tree, unless one prompt is longer, if it is less than `MOST_COLUMNS`.
    """
    paths = [_path(prompt) for prompt in prompts]
    if not paths:
        return ()
    # related prompts are neighbours
    rows = sorted(range(len(paths)), key=paths.__getitem__)
    pass_tokens = PASS_TOKENS.get(device, PASS_TOKENS["other"])
    sizes = {min(size, most_columns or size) for size in MOST_COLUMNS}
    return min((tuple(_Planner(paths, pass_tokens, size).plan(rows, 0)[1]) for size in sorted(sizes)), key=_cost)


def _cost(planned: tuple[Grove, ...]) -> float:
    """The cost of running groves, in tokens, without that of passes."""
    trees = [(len(grove.prefix), len(tree)) for grove in planned for tree in grove.trees]
    n_pairs = sum(size * (n_before + size) for n_before, size in trees)
    return sum(grove.n_tokens for grove in planned) + PAIR_TOKENS * n_pairs


def _path(prompt: Prompt) -> Path:
    last = len(prompt.token_ids) - 1
    return tuple(Column(token, at >= prompt.start, at == last) for at, token in enumerate(prompt.token_ids))


def _n_common(first: Path, second: Path, known: int = 0) -> int:
    """Number of equal columns at the beginning, of which `known` are known."""
    most = min(len(first), len(second))
    while known < most and first[known] == second[known]:
        known += 1
    return known


@dataclass(frozen=True)
class _Planner:
    paths: Sequence[Path]
    pass_tokens: int
    most_columns: int

    def plan(self, rows: Sequence[int], known: int) -> tuple[int, list[Grove]]:
        """The cost in tokens, and the arrangement.

        Args:
            rows: prompts, in an order in which related prompts are neighbours.
            known: number of first columns that are equal.
        """
        cost, grove = self._together(rows, known)
        # the columns of a single tree are distinct already
        if len(grove.trees) == 1:
            return cost, [grove]
        n_shared = self._n_shared(rows, known)
        apart, apart_cost, rest = list[Grove](), 0, list[int]()
        for _, part in groupby(rows, key=lambda row: self.paths[row][n_shared : n_shared + 1]):
            family = list(part)
            if len(family) == len(rows):
                return cost, [grove]
            own = self._trees(family, n_shared)
            # apart, a family that fits into one tree saves nothing
            if len(own) == 1:
                rest += family
                continue
            family_cost, planned = self.plan(family, n_shared + 1)
            if family_cost < sum(map(len, own)):
                apart_cost += family_cost
                apart += planned
            else:
                rest += family
        if not apart:
            return cost, [grove]
        if rest:
            rest_cost, remaining = self._together(rest, n_shared)
            apart_cost, apart = apart_cost + rest_cost, [*apart, remaining]
        return (apart_cost, apart) if apart_cost < cost else (cost, [grove])

    def _together(self, rows: Sequence[int], known: int) -> tuple[int, Grove]:
        """All rows in one grove, with or without a prefix that is run before the trees."""
        whole = Grove((), self._trees(rows, 0))
        n_shared = self._n_shared(rows, known)
        if len(whole.trees) == 1 or not n_shared:
            return whole.n_tokens + self.pass_tokens, whole
        continued = Grove(self.paths[rows[0]][:n_shared], self._trees(rows, n_shared))
        # the prefix needs a separate pass
        costs = [whole.n_tokens + self.pass_tokens, continued.n_tokens + 2 * self.pass_tokens]
        return min(zip(costs, (whole, continued), strict=True), key=lambda pair: pair[0])

    def _n_shared(self, rows: Sequence[int], known: int) -> int:
        """Number of columns that all rows share. The last column of a prompt is not part of a prefix."""
        first = self.paths[rows[0]]
        n_shared = len(first) - 1
        for row in rows[1:]:
            n_shared = min(n_shared, _n_common(first, self.paths[row], min(known, n_shared)), len(self.paths[row]) - 1)
        return n_shared

    def _trees(self, rows: Sequence[int], n_shared: int) -> tuple[Tree, ...]:
        """Pack rows, whose first `n_shared` columns are run before, into trees."""
        trees: list[Tree] = []
        columns: list[Column] = []
        positions: list[int] = []
        parents: list[int] = []
        ends: dict[int, int] = {}
        trail: list[int] = []  # the columns of the last prompt
        previous: Path = ()

        def finish() -> None:
            trees.append(
                Tree(columns=tuple(columns), positions=tuple(positions), parents=tuple(parents), ends=dict(ends))
            )
            for each in (columns, positions, parents, ends):
                each.clear()

        for row in rows:
            path = self.paths[row][n_shared:]
            n_common = _n_common(path, previous) if ends else 0
            if ends and len(columns) + len(path) - n_common > self.most_columns:
                finish()
                n_common = 0
            trail = trail[:n_common]
            for depth in range(n_common, len(path)):
                parents.append(trail[-1] if trail else -1)
                positions.append(n_shared + depth)
                trail.append(len(columns))
                columns.append(path[depth])
            ends[row], previous = trail[-1], path
        finish()
        return tuple(trees)
