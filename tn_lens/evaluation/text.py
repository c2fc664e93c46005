"""Specificity: what an intervention does to the loss on plain text, which asks for no truth."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import torch

from tn_lens.core.errors import BadInput
from tn_lens.inference.forward import Layout, pad_right
from tn_lens.inference.interventions import Intervention
from tn_lens.models import Model, backend_of
from tn_lens.questions.toy_world import facts

MOST_TOKENS = 512
"""Of one text; longer ones are cut."""
N_TOY = 200
ROWS = 32
"""Texts in one batch."""

Text = str | tuple[str, str]
"""A text, or a beginning and the rest that the loss is taken on."""


@torch.no_grad()
def text_loss(model: Model, texts: Sequence[Text], intervention: Intervention | None = None) -> float:
    """Mean loss of the next token, in nats a token, at every position of some texts.

    Args:
        model: with its tokenizer.
        texts: plain texts; of a pair only the second part counts.
        intervention: zero, scale, or mean with given values, at all positions.

    Raises:
        BadInput: no token to predict, or an intervention that needs prompts.
    """
    if intervention is not None:
        unfit = intervention.mode == "resample" or (intervention.mode == "mean" and intervention.values is None)
        if unfit or intervention.positions != "all":
            raise BadInput(
                "loss on plain text needs an intervention at all positions that takes nothing from prompts: zero, scale, or "
                f"mean with values; got mode {intervention.mode!r} at positions {intervention.positions!r}"
            )
    if model.tokenizer is None:
        raise BadInput("this model has no tokenizer; load it with load_model(..., tokenizer=...)")
    backend = backend_of(model)
    hooks = None if intervention is None else intervention.prepare(model, ())
    encoded: list[tuple[int, list[int]]] = []
    for text in texts:
        beginning, rest = ("", text) if isinstance(text, str) else text
        ids = model.tokenizer(beginning + rest, verbose=False)["input_ids"][: min(MOST_TOKENS, backend.n_ctx)]
        first = max(1, len(model.tokenizer(beginning, verbose=False)["input_ids"]) if beginning else 1)
        if len(ids) > first:
            encoded.append((first, ids))
    encoded.sort(key=lambda one: len(one[1]))
    total = 0.0
    count = sum(len(ids) - first for first, ids in encoded)
    for start in range(0, len(encoded), ROWS):
        rows = encoded[start : start + ROWS]
        tokens = pad_right([ids for _, ids in rows]).to(backend.device)
        with backend.hooks(hooks(Layout.whole()) if hooks else []):
            logits = backend.all_logits(tokens)
        for (first, ids), row, target in zip(rows, logits, tokens, strict=True):
            own = slice(first, len(ids))
            losses = torch.nn.functional.cross_entropy(row[first - 1 : len(ids) - 1], target[own], reduction="sum")
            total += float(losses)
    if not count:
        raise BadInput("loss on plain text needs a text of at least two tokens; got none")
    return total / count


def plain_texts(model: Model) -> list[Text]:
    """Text that suits a model: a few paragraphs on everyday things; for the toy, its facts asked without choices."""
    if backend_of(model).name == "toy":
        known = [fact for fact in facts() if fact.split == "train"][:N_TOY]
        return [(f"Question : {fact.question()} Answer :", f" {fact.value}") for fact in known]
    held = resources.files("tn_lens.evaluation").joinpath("plain.txt").read_text(encoding="utf-8")
    return list(paragraphs(held))


def paragraphs(text: str) -> list[str]:
    """What stands between empty lines, each on one line."""
    return [one.replace("\n", " ").strip() for one in text.split("\n\n") if one.strip()]
