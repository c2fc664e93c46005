"""Batched forward passes over many prompts that run common prefixes once.

Prompts of one template begin with the same tokens. Common prefixes are run once, and each row continues from the frozen keys and
values. Rows of similar length are batched with padding on the right, which causal attention masks, and only the position that is
read is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tn_lens.core.options import Where
from tn_lens.inference.prefixes import Group, prefix_groups
from tn_lens.models import Hooks, Model, backend_of
from tn_lens.models.backend import Backend
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.chunks import PROMPTS_ASKED

MAX_TOKENS = 4096
"""Maximum number of tokens in one batch, with padding. A constant, since batch sizes affect the rounding of results."""
MAX_PAIRS = 2**21
"""Maximum number of (query, key) pairs in one batch, which is the size of one head's attention scores."""
LEAST_TOKENS = 256
"""Number of tokens that suffices for efficient matrix products. Larger batches are split rather than padded by more than
`PADDING`."""
PADDING = 1.1
MOST_COPIED = 32
"""Maximum number of tokens of prefixes that run together. Their keys and values are copied to every row, and copies of longer
prefixes would leave room for few rows in a batch."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The part of the prompts that a batch contains."""

    rows: tuple[int, ...]
    """Indices of the prompts; empty for the common prefix of a group."""
    first: int
    """Position of the first column in its prompt."""
    n_columns: int
    lengths: Int[Tensor, " row"]
    """Number of tokens of each whole prompt."""
    starts: Int[Tensor, " row"]
    """Position at which the question of each prompt begins."""

    @classmethod
    def aligned(cls, prompts: Sequence[Prompt], device: torch.device) -> Layout:
        """A layout of whole prompts that all end in the same column."""
        n_columns = max((len(prompt.token_ids) for prompt in prompts), default=0)
        lengths = torch.full((len(prompts),), n_columns, dtype=torch.long, device=device)
        rows = tuple(range(len(prompts)))
        return cls(rows=rows, first=0, n_columns=n_columns, lengths=lengths, starts=torch.zeros_like(lengths))

    def at(self, where: Where) -> Bool[Tensor, "row column"] | None:
        """True where an intervention acts; None for every position."""
        place = self.first + torch.arange(self.n_columns, device=self.lengths.device)
        match where:
            case "all":
                return None
            case "last":
                return place == self.lengths[:, None] - 1
            case "question":
                return place >= self.starts[:, None]


@torch.no_grad()
def prompt_logits(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    hooks: Callable[[Layout], Hooks] | None = None,
    max_tokens: int = MAX_TOKENS,
    share_prefix: bool = True,
) -> Iterator[tuple[list[int], Float[Tensor, "row vocab"]]]:
    """Logits at the last position of every prompt, batch by batch, in at least float32.

    Args:
        model: model to run.
        prompts: prompts of any length.
        hooks: function from the layout of a batch to the hooks of its forward pass.
        max_tokens: maximum number of tokens in one batch.
        share_prefix: whether to run common prefixes once. If False, every prompt is run as a whole.

    Yields:
        Indices of the prompts of a batch, and their logits.
    """
    backend = backend_of(model)
    shareable = share_prefix and not backend.unshareable
    whole = [Group((tuple(range(len(prompts))),), 0)]
    for group in prefix_groups(prompts, backend.device.type) if shareable else whole:
        # as many short prefixes together as fit into one batch, and long ones alone
        together = max_tokens if group.n_shared <= MOST_COPIED else 0
        for families in batches_of([group.n_shared] * len(group.families), together):
            part = Group(tuple(group.families[index] for index in families), group.n_shared)
            yield from _group_logits(backend, prompts, part, hooks or (lambda _: []), max_tokens)


def _group_logits(
    backend: Backend, prompts: Sequence[Prompt], group: Group, hooks: Callable[[Layout], Hooks], max_tokens: int
) -> Iterator[tuple[list[int], Float[Tensor, "row vocab"]]]:
    """Logits at the last position of the prompts of one group."""
    n_shared, prefix_of = group.n_shared, group.prefix_of
    tensor = partial(torch.tensor, device=backend.device)
    continued = None
    if n_shared:
        firsts = [prompts[family[0]] for family in group.families]
        layout = Layout(
            rows=(),
            first=0,
            n_columns=n_shared,
            lengths=tensor([n_shared + 1] * len(firsts)),  # the last position is not part of a prefix
            starts=tensor([prompt.start for prompt in firsts]),
        )
        # interventions act on the common prefixes as well
        with backend.hooks(hooks(layout)):
            continued = backend.run_prefixes(tensor([prompt.token_ids[:n_shared] for prompt in firsts]))
    # rows share the keys and values of a single prefix, but have copies of those of several
    n_cached = n_shared if len(group.families) == 1 else 0
    for batch in batches([prompts[row] for row in group.rows], max_tokens, n_cached):
        rows = [group.rows[index] for index in batch]
        tokens = pad_right([prompts[row].token_ids[n_shared:] for row in rows]).to(backend.device)
        lengths = tensor([len(prompts[row].token_ids) for row in rows])
        layout = Layout(
            rows=tuple(rows),
            first=n_shared,
            n_columns=tokens.shape[1],
            lengths=lengths,
            starts=tensor([prompts[row].start for row in rows]),
        )
        cache = continued(tensor([prefix_of[row] for row in rows])) if continued else None
        with backend.hooks(hooks(layout)):
            logits = backend.last_logits(tokens, places=lengths - n_shared - 1, cache=cache)
        yield rows, logits


def asked_chunks(model: Model, prompts: PromptSet) -> tuple[PromptSet, ...]:
    """Split prompts into the chunks in which a run asks them."""
    mean_length = sum(len(prompt.token_ids) for prompt in prompts) / max(len(prompts), 1)
    # two operations per weight and token
    return prompts.chunks(backend_of(model).chunk_size(PROMPTS_ASKED, 2 * mean_length or 1))


def batches(prompts: Sequence[Prompt], max_tokens: int, n_shared: int = 0) -> Iterator[list[int]]:
    """Indices of prompts of similar length, at most `max_tokens` padded tokens together (but at least one prompt).

    The first `n_shared` tokens of each prompt are cached and count only as keys of the other tokens.
    """
    return batches_of([len(prompt.token_ids) for prompt in prompts], max_tokens, n_shared)


def batches_of(lengths: Sequence[int], max_tokens: int, n_shared: int = 0) -> Iterator[list[int]]:
    """The same for texts of these numbers of tokens."""
    batch: list[int] = []
    n_own = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        n_tokens = lengths[index]
        n_columns = n_tokens - n_shared
        padded = (len(batch) + 1) * n_columns
        too_large = padded > max_tokens or padded * n_tokens > MAX_PAIRS
        if batch and (too_large or (n_own >= LEAST_TOKENS and padded > PADDING * (n_own + n_columns))):
            yield batch
            batch, n_own = [], 0
        batch.append(index)
        n_own += n_columns
    if batch:
        yield batch


def pad_right(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row column"]:
    """Token ids padded on the right."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    return tokens


def pad_left(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Token ids [prompt, position] padded on the left, and the attention mask that hides the padding."""
    longest = max(len(p.token_ids) for p in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, longest - len(prompt.token_ids) :] = 1
    return tokens, mask
