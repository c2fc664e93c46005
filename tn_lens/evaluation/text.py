"""The loss on plain text under an intervention, which shows how specific its effect is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from tn_lens.core.errors import BadInput
from tn_lens.inference.answers import NO_NEURONS, ZERO
from tn_lens.inference.forward import Layout, pad_right
from tn_lens.inference.interventions import Intervention, intervention_hooks
from tn_lens.models import Model, backend_of
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet
from tn_lens.questions.toy_world import facts

MOST_TOKENS = 512
"""Maximum number of tokens of one text; longer texts are truncated."""
N_TOY = 200
"""Number of facts of the toy world that serve as plain text for the toy model."""
MOST_LOGITS = 2**26
"""Maximum number of logits of one batch."""

Text: TypeAlias = str | tuple[str, str] | list[int]
"""A text, a pair of a prefix and the continuation on which the loss is computed, or token ids."""


Encoded: TypeAlias = tuple[int, list[int]]
"""The index of the first predicted token of a text, and its token ids."""


@isolated
@torch.no_grad()
def text_loss(
    model: Model, texts: Sequence[Text], *, neurons: NeuronSet = NO_NEURONS, intervention: Intervention = ZERO
) -> float:
    """Mean next-token loss over all positions of the given texts, in nats per token.

    Args:
        model: a model, with a tokenizer unless all texts are token ids.
        texts: plain texts, pairs of a prefix and a continuation, of which only the continuation counts, or lists of token ids.
        neurons: neurons to act on; none by default.
        intervention: an intervention at all positions that takes no values from prompts; zero-ablation by default.

    Raises:
        BadInput: there is no token to predict, the model has no tokenizer, or the intervention needs prompts or acts at some
            positions only.
    """
    if intervention.needs_prompts or intervention.positions != "all":
        raise BadInput(
            "loss on plain text needs an intervention at all positions that takes no values from prompts: zero, scale, or "
            f"mean with values; got {intervention.description!r}"
        )
    if model.tokenizer is None and not all(isinstance(text, list) for text in texts):
        raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
    backend = backend_of(model)
    hooks = intervention_hooks(model, neurons, intervention, ())
    encoded = _encode(model, texts)
    total, count = 0.0, sum(len(ids) - first for first, ids in encoded)
    for rows in _batches(encoded, MOST_LOGITS // backend.d_vocab):
        tokens = pad_right([ids for _, ids in rows]).to(backend.device)
        with backend.hooks(hooks(Layout.aligned((), backend.device)) if hooks else []):
            logits = backend.all_logits(tokens)  # [row, column, vocab]
        for (first, ids), row, target in zip(rows, logits, tokens, strict=True):
            # the logits at a position predict the token after it
            predicted, expected = row[first - 1 : len(ids) - 1], target[first : len(ids)]
            total += float(torch.nn.functional.cross_entropy(predicted, expected, reduction="sum"))
    if not count:
        raise BadInput("loss on plain text needs a text of at least two tokens; got none")
    return total / count


def _encode(model: Model, texts: Sequence[Text]) -> list[Encoded]:
    """The index of the first predicted token and the token ids of every text, the shortest text first."""
    encoded: list[Encoded] = []
    most, tokenizer = min(MOST_TOKENS, backend_of(model).n_ctx), cast(Any, model.tokenizer)
    for text in texts:
        if isinstance(text, list):
            encoded += [(1, text[:most])] if len(text) > 1 else []
            continue
        beginning, rest = ("", text) if isinstance(text, str) else text
        ids = tokenizer(beginning + rest, verbose=False)["input_ids"][:most]
        # nothing predicts the first token of a text
        first = max(1, len(tokenizer(beginning, verbose=False)["input_ids"]) if beginning else 1)
        if len(ids) > first:
            encoded.append((first, ids))
    return sorted(encoded, key=lambda row: len(row[1]))


def _batches(encoded: Sequence[Encoded], most: int) -> Iterator[Sequence[Encoded]]:
    """Split texts, the shortest first, into batches of at most `most` padded tokens, but at least one text."""
    start = 0
    for end in range(1, len(encoded) + 1):
        is_last = end == len(encoded)
        if is_last or (end - start + 1) * len(encoded[end][1]) > most:
            yield encoded[start:end]
            start = end


def plain_texts(model: Model) -> list[Text]:
    """Plain texts for a model: a few paragraphs on everyday topics; for the toy model, its facts as open questions."""
    if backend_of(model).name == "toy":
        known = [fact for fact in facts() if fact.split == "train"][:N_TOY]
        return [(f"Question : {fact.question()} Answer :", f" {fact.value}") for fact in known]
    content = resources.files("tn_lens.evaluation").joinpath("plain.txt").read_text(encoding="utf-8")
    return list(paragraphs(content))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, which empty lines separate, each joined into one line."""
    return [part.replace("\n", " ").strip() for part in text.split("\n\n") if part.strip()]


def read_texts(path: Path) -> list[str]:
    """The paragraphs of a text file.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        return paragraphs(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error
