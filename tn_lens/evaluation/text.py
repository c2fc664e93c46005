"""The loss on plain text under an intervention, which shows how specific its effect is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TypeAlias

from tn_lens.core.errors import BadInput
from tn_lens.evaluation.likelihoods import Row, summed_log_probabilities, tokenizer_of
from tn_lens.inference.answers import NO_NEURONS, ZERO
from tn_lens.inference.interventions import Intervention, check_acts_on_any_text
from tn_lens.models import Model, backend_of
from tn_lens.neurons import NeuronSet
from tn_lens.questions.toy_world import facts

MOST_TOKENS = 512
"""Maximum number of tokens of one text; longer texts are truncated."""
N_TOY = 50
"""Number of facts of the toy world that serve as plain text for the toy model."""

Text: TypeAlias = str | tuple[str, str] | list[int]
"""A text, a pair of a prefix and the continuation on which the loss is computed, or token ids."""


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
    return loss_of_rows(model, encode_texts(model, texts), neurons=neurons, intervention=intervention)


def loss_of_rows(model: Model, encoded: Sequence[Row], *, neurons: NeuronSet, intervention: Intervention) -> float:
    """The same for encoded texts, for callers that measure many sets of neurons on them."""
    check_acts_on_any_text(intervention, "loss on plain text")
    count = sum(len(ids) - first for first, ids in encoded)
    return -sum(summed_log_probabilities(model, encoded, neurons=neurons, intervention=intervention)) / count


def encode_texts(model: Model, texts: Sequence[Text]) -> list[Row]:
    """The index of the first predicted token and the token ids of every text that has a token to predict.

    Raises:
        BadInput: no text has one, or the model has no tokenizer.
    """
    encoded: list[Row] = []
    most = min(MOST_TOKENS, backend_of(model).n_ctx)
    tokenizer = None if all(isinstance(text, list) for text in texts) else tokenizer_of(model)
    for text in texts:
        if isinstance(text, list):
            encoded += [(1, text[:most])] if len(text) > 1 else []
            continue
        beginning, rest = ("", text) if isinstance(text, str) else text
        assert tokenizer is not None
        ids = tokenizer(beginning + rest, verbose=False)["input_ids"][:most]
        # nothing predicts the first token of a text
        first = max(1, len(tokenizer(beginning, verbose=False)["input_ids"]) if beginning else 1)
        if len(ids) > first:
            encoded.append((first, ids))
    if not encoded:
        raise BadInput("loss on plain text needs a text of at least two tokens; got none")
    return encoded


def plain_texts(model: Model) -> list[Text]:
    """Plain texts for a model: a few paragraphs on everyday topics; for the toy model, its facts as open questions."""
    if backend_of(model).name == "toy":
        known = [fact for fact in facts() if fact.split == "train"]
        known = known[:: len(known) // N_TOY][:N_TOY]  # of every topic
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
