"""Common prefixes of prompts: which are run once, and which prompts continue them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from tn_lens.questions.prompts import Prompt

PASS_TOKENS = {"cpu": 64, "other": 1024}
"""Number of tokens, by device, that take as long as the two forward passes that each further length of prefixes adds."""


@dataclass(frozen=True)
class Group:
    """Prompts that continue prefixes of one length, and therefore run together."""

    families: tuple[tuple[int, ...], ...]
    """Indices of the prompts that continue each prefix."""
    n_shared: int
    """Number of tokens of each prefix; 0 if the prompts are run as a whole."""

    @property
    def rows(self) -> list[int]:
        """Indices of all prompts."""
        return list(chain.from_iterable(self.families))

    @property
    def prefix_of(self) -> dict[int, int]:
        """Index of the prefix of every prompt."""
        return {row: index for index, family in enumerate(self.families) for row in family}


def prefix_groups(prompts: Sequence[Prompt], device: str = "cpu") -> list[Group]:
    """Group prompts by common prefixes so that few tokens are run, such as the few-shot examples of a subject only once.

    Prompts of one template share a short prefix, those of one subject a longer one. Prefixes of one length run in one batch,
    so the number of lengths is kept small.

    Args:
        prompts: prompts of any length.
        device: type of the device they run on.
    """
    sharing = _Sharing(prompts)
    by_row = sharing.fewest_tokens(sorted(range(len(prompts)), key=lambda row: prompts[row].token_ids), 0)[1]
    least = PASS_TOKENS.get(device, PASS_TOKENS["other"])
    kept = 0
    for length in sorted({*by_row.values()} - {0}):
        rows = [row for row, n_shared in by_row.items() if n_shared == length]
        # in ascending order, so prompts fall back on the longest of the shorter lengths that are kept
        if sharing.n_tokens(rows, kept) - sharing.n_tokens(rows, length) < least:
            by_row |= dict.fromkeys(rows, kept)
        else:
            kept = length
    rows_of = {n: [row for row in by_row if by_row[row] == n] for n in sorted({*by_row.values()})}
    return [Group(sharing.families(rows, n_shared), n_shared) for n_shared, rows in rows_of.items()]


@dataclass(frozen=True)
class _Sharing:
    prompts: Sequence[Prompt]

    def families(self, rows: Iterable[int], n_shared: int) -> tuple[tuple[int, ...], ...]:
        """The prompts that continue the same prefix of this length; all of them if it is empty."""

        def prefix(row: int) -> tuple:
            prompt = self.prompts[row]
            # an intervention from the start of the question must begin at the same position of the prefix
            return prompt.token_ids[:n_shared], min(prompt.start, n_shared)

        families: dict[tuple, list[int]] = {}
        for row in rows:
            families.setdefault(prefix(row), []).append(row)
        return tuple(map(tuple, families.values()))

    def n_own(self, rows: Sequence[int], n_shared: int) -> int:
        """Number of tokens after prefixes of this length."""
        return sum(len(self.prompts[row].token_ids) - n_shared for row in rows)

    def n_tokens(self, rows: Sequence[int], n_shared: int) -> int:
        """Number of tokens to run if the prompts continue prefixes of this length."""
        return n_shared * len(self.families(rows, n_shared)) + self.n_own(rows, n_shared)

    def fewest_tokens(self, rows: Sequence[int], known: int) -> tuple[int, dict[int, int]]:
        """The smallest number of tokens to run, and the length of the prefix that each prompt continues.

        Args:
            rows: prompts, sorted by token ids.
            known: number of first tokens that are equal.
        """
        token_ids = [self.prompts[row].token_ids for row in rows]
        if len(rows) < 2:
            return sum(map(len, token_ids)), dict.fromkeys(rows, 0)
        most = min(map(len, token_ids)) - 1  # at least one token must be left to run
        starts = {self.prompts[row].start for row in rows}
        most = min(most, *starts) if len(starts) > 1 else most
        n_shared = min(known, most)
        first, last = token_ids[0], token_ids[-1]  # sorted, so these two share the fewest tokens
        while n_shared < most and first[n_shared] == last[n_shared]:
            n_shared += 1
        together = n_shared + self.n_own(rows, n_shared), dict.fromkeys(rows, n_shared)
        # prompts that share more tokens may continue a longer prefix
        apart, by_row, rest = 0, dict[int, int](), list[int]()
        for _, part in groupby(rows, key=lambda row: self.prompts[row].token_ids[n_shared : n_shared + 1]):
            family = list(part)
            if len(family) == len(rows):
                return together
            n_tokens, lengths = self.fewest_tokens(family, n_shared + 1)
            if n_tokens < self.n_own(family, n_shared):
                apart += n_tokens
                by_row |= lengths
            else:
                rest += family
        if rest:
            apart += n_shared + self.n_own(rest, n_shared)
            by_row |= dict.fromkeys(rest, n_shared)
        return (apart, by_row) if apart < together[0] else together
