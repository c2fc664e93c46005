"""Batched forward passes over many prompts: each as a row, or as trees in which common beginnings are run once.

Rows of similar length are batched with padding on the right, which causal attention masks, and only the positions that are read
are unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tn_lens.core.options import Where
from tn_lens.inference.trees import Path, Tree, groves
from tn_lens.models import Hooks, Model, backend_of
from tn_lens.models.backend import Backend, TokenRows
from tn_lens.models.tensors import Packed
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.chunks import PROMPTS_ASKED

MAX_TOKENS = 2048
"""Maximum number of tokens in one batch, with padding. A constant, since batch sizes affect the rounding of results."""
MAX_PAIRS = 2**21
"""Maximum number of (query, key) pairs in one batch, which is the size of one head's attention scores."""
LEAST_TOKENS = 256
"""Number of tokens that suffices for efficient matrix products. Larger batches are split rather than padded by more than
`PADDING`."""
PADDING = 1.1
MOST_LOGITS = 2**26
"""Maximum number of logits of one batch."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the rows and columns of a batch are."""

    rows: tuple[int, ...]
    """Index of the prompt of each row; empty where prompts share rows."""
    sets: Int[Tensor, " row"] | None = None
    """Index of the set of neurons that is acted on in each row. None: the first."""
    is_token: Bool[Tensor, "row column"]
    """False at padding."""
    is_last: Bool[Tensor, "row column"]
    """True at the last position of a prompt."""
    in_question: Bool[Tensor, "row column"]
    """True from the start of the question on."""

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], rows: Sequence[int], device: torch.device) -> Layout:
        """One row for each of these prompts, padded on the right."""
        tensor = partial(torch.tensor, device=device)
        chosen = [prompts[row] for row in rows]
        lengths = tensor([len(prompt.token_ids) for prompt in chosen])
        columns = torch.arange(int(lengths.max()), device=device)
        starts = tensor([prompt.start for prompt in chosen])
        return cls(
            rows=tuple(rows),
            is_token=columns < lengths[:, None],
            is_last=columns == lengths[:, None] - 1,
            in_question=columns >= starts[:, None],
        )

    @classmethod
    def aligned(cls, prompts: Sequence[Prompt], device: torch.device) -> Layout:
        """One row for each prompt, which all end in the last column."""
        n_columns = max((len(prompt.token_ids) for prompt in prompts), default=0)
        everywhere = torch.ones(len(prompts), n_columns, dtype=torch.bool, device=device)
        last = torch.arange(n_columns, device=device) == n_columns - 1
        return cls(
            rows=tuple(range(len(prompts))), is_token=everywhere, is_last=everywhere & last, in_question=everywhere
        )

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        """Number of tokens of each row."""
        return self.is_token.sum(1)

    def at(self, where: Where) -> Bool[Tensor, "row column"] | None:
        """True where an intervention acts; None for every position."""
        return {"all": None, "last": self.is_last, "question": self.in_question}[where]


@torch.no_grad()
def prompt_logits(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    hooks: Callable[[Layout], Hooks] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Iterator[tuple[list[int], Float[Tensor, "row vocab"]]]:
    """Logits at the last position of every prompt, batch by batch, in at least float32. Every prompt is a row.

    Args:
        model: model to run.
        prompts: prompts of any length.
        hooks: function from the layout of a batch to the hooks of its forward pass.
        max_tokens: maximum number of tokens in one batch.

    Yields:
        Indices of the prompts of a batch, and their logits.
    """
    backend = backend_of(model)
    for rows in batches(prompts, max_tokens):
        tokens = pad_right([prompts[row].token_ids for row in rows]).to(backend.device)
        layout = Layout.of_prompts(prompts, rows, backend.device)
        with backend.hooks(hooks(layout) if hooks else []):
            logits = backend.last_logits(tokens, places=layout.lengths - 1)
        yield rows, logits


Reached = tuple[Int[Tensor, " end"], Int[Tensor, " end"], Float[Tensor, "end vocab"]]
"""Index of the set of neurons and of the prompt of each place, and the logits there."""


@torch.no_grad()
def tree_logits(
    model: Model,
    prompts: Sequence[Prompt],
    n_sets: int = 1,
    *,
    hooks: Callable[[Layout], Hooks] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Iterator[Reached]:
    """Logits at the last position of every prompt under several interventions, with common beginnings run once.

    Args:
        model: model that is not `unshareable`.
        prompts: prompts of any length.
        n_sets: number of interventions, one for each set of neurons.
        hooks: function from the layout of a batch, whose `sets` say which rows are acted on how, to the hooks of its pass.
        max_tokens: maximum number of tokens in one batch.
    """
    backend = backend_of(model)
    most_columns = min(max_tokens, backend.n_ctx)
    for grove in groves(tuple(prompts), backend.device.type, most_columns):
        rows = [(index, tree) for index in range(n_sets) for tree in grove.trees]
        n_before = len(grove.prefix)
        most_ends = max(1, MOST_LOGITS // backend.d_vocab)
        for batch in batches_of([len(tree) + n_before for _, tree in rows], max_tokens, n_before):
            for part in _limited([rows[index] for index in batch], most_ends):
                yield _run_trees(backend, grove.prefix, part, hooks or (lambda _: []))


def _limited(rows: Sequence[tuple[int, Tree]], most_ends: int) -> Iterator[list[tuple[int, Tree]]]:
    """Split rows so that at most so many prompts end in them (but at least one row)."""
    part: list[tuple[int, Tree]] = []
    for row in rows:
        if part and sum(len(tree.ends) for _, tree in (*part, row)) > most_ends:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _run_trees(
    backend: Backend, prefix: Path, rows: Sequence[tuple[int, Tree]], hooks: Callable[[Layout], Hooks]
) -> Reached:
    """Run one batch of trees, each with the index of a set of neurons."""
    device, trees = backend.device, [tree for _, tree in rows]
    tensor = partial(torch.tensor, device=device)
    sets = tensor([index for index, _ in rows])
    cache = None
    if prefix:
        used, prefix_of = sets.unique(return_inverse=True)  # interventions act on the prefix as well
        tokens, layout = _laid_out([prefix] * len(used), used)
        with backend.hooks(hooks(layout)):
            cache = backend.run_prefixes(tokens)(prefix_of)
    tokens, layout = _laid_out([tree.columns for tree in trees], sets)
    n_columns = tokens.shape[1]
    positions = torch.zeros(len(trees), n_columns, dtype=torch.long)
    visible = torch.eye(n_columns, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        positions[row, : len(tree)] = torch.tensor(tree.positions)
        visible[row, : len(tree), : len(tree)] = torch.from_numpy(tree.visible)
    packed = Packed(tokens=tokens, positions=positions.to(device), visible=visible.to(device), n_before=len(prefix))
    ends = [(row, column) for row, tree in enumerate(trees) for column in tree.ends.values()]
    with backend.hooks(hooks(layout)):
        logits = backend.packed_logits(packed, tensor(ends), cache)
    asked = [(index, prompt) for index, tree in rows for prompt in tree.ends]
    which, reached = torch.tensor(asked).T
    return which, reached, logits


def _laid_out(paths: Sequence[Path], sets: Int[Tensor, " row"]) -> tuple[TokenRows, Layout]:
    """Columns as rows of token ids, padded on the right, and their layout."""
    fields = [pad_right([[int(column[field]) for column in path] for path in paths]) for field in range(3)]
    tokens, in_question, is_last = (field.to(sets.device) for field in fields)
    is_token = pad_right([[1] * len(path) for path in paths]).to(sets.device)
    layout = Layout(rows=(), sets=sets, is_token=is_token == 1, is_last=is_last == 1, in_question=in_question == 1)
    return tokens, layout


def asked_chunks(model: Model, prompts: PromptSet) -> tuple[PromptSet, ...]:
    """Split prompts into the chunks in which a run asks them."""
    return prompts.chunks(asked_chunk_size(model, prompts))


def asked_chunk_size(model: Model, prompts: PromptSet) -> int:
    """Number of prompts that a run asks in one chunk."""
    mean_length = sum(len(prompt.token_ids) for prompt in prompts) / max(len(prompts), 1)
    # two operations per weight and token
    return backend_of(model).chunk_size(PROMPTS_ASKED, 2 * mean_length or 1)


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
