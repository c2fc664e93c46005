"""The loss on plain text under an intervention: how specific is the effect?"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any, TypeAlias, cast

import torch

from tn_lens.core.errors import BadInput
from tn_lens.inference.answers import NO_NEURONS, ZERO
from tn_lens.inference.forward import Layout, pad_right
from tn_lens.inference.interventions import Intervention, intervention_hooks
from tn_lens.models import Model, backend_of
from tn_lens.neurons import NeuronSet
from tn_lens.questions.toy_world import facts

MOST_TOKENS = 512
"""Maximum number of tokens of one text; longer texts are cut."""
N_TOY = 200
"""Facts of the toy's world that serve as its plain text."""
ROWS = 32
"""Texts in one batch."""

Text: TypeAlias = str | tuple[str, str]
"""A text, or a beginning and the rest that the loss is taken on."""


@torch.no_grad()
def text_loss(
    model: Model, texts: Sequence[Text], *, neurons: NeuronSet = NO_NEURONS, intervention: Intervention = ZERO
) -> float:
    """Mean next-token loss over every position of some texts, in nats per token.

    Args:
        model: with its tokenizer.
        texts: plain texts; of a pair the second part counts.
        neurons: neurons to act on; none by default.
        intervention: acts at all positions and takes no values from prompts; zero-ablation by default.

    Raises:
        BadInput: no token to predict, or an intervention that needs prompts.
    """
    if intervention.needs_prompts or intervention.positions != "all":
        raise BadInput(
            "loss on plain text needs an intervention at all positions that takes no values from prompts: zero, scale, or "
            f"mean with values; got {intervention.description!r}"
        )
    if model.tokenizer is None:
        raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
    backend = backend_of(model)
    hooks = intervention_hooks(model, neurons, intervention, ())
    encoded = _encode(model, texts)
    total, count = 0.0, sum(len(ids) - first for first, ids in encoded)
    for start in range(0, len(encoded), ROWS):
        rows = encoded[start : start + ROWS]
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


def _encode(model: Model, texts: Sequence[Text]) -> list[tuple[int, list[int]]]:
    """The first position that counts and the tokens of every text, the shortest first."""
    encoded: list[tuple[int, list[int]]] = []
    most, tokenizer = min(MOST_TOKENS, backend_of(model).n_ctx), cast(Any, model.tokenizer)
    for text in texts:
        beginning, rest = ("", text) if isinstance(text, str) else text
        ids = tokenizer(beginning + rest, verbose=False)["input_ids"][:most]
        # the first token of a text has nothing that predicts it
        first = max(1, len(tokenizer(beginning, verbose=False)["input_ids"]) if beginning else 1)
        if len(ids) > first:
            encoded.append((first, ids))
    return sorted(encoded, key=lambda row: len(row[1]))


def plain_texts(model: Model) -> list[Text]:
    """Text that suits a model: a few paragraphs on everyday things; for the toy, its facts asked without choices."""
    if backend_of(model).name == "toy":
        known = [fact for fact in facts() if fact.split == "train"][:N_TOY]
        return [(f"Question : {fact.question()} Answer :", f" {fact.value}") for fact in known]
    content = resources.files("tn_lens.evaluation").joinpath("plain.txt").read_text(encoding="utf-8")
    return list(paragraphs(content))


def paragraphs(text: str) -> list[str]:
    """The parts of a text between empty lines, each on one line."""
    return [part.replace("\n", " ").strip() for part in text.split("\n\n") if part.strip()]
