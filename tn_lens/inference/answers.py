"""Answer probabilities: f of every choice shown (paper eq. 6-7), at the last position of each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.inference.forward import (
    MAX_TOKENS,
    Reached,
    asked_chunk_size,
    asked_chunks,
    prompt_logits,
    tree_logits,
)
from tn_lens.inference.interventions import Intervention, Zero, intervention_hooks
from tn_lens.models import Model, backend_of
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks

NO_NEURONS = NeuronSet()
ZERO = Zero()


def ask(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    neurons: NeuronSet = NO_NEURONS,
    intervention: Intervention = ZERO,
    max_tokens: int = MAX_TOKENS,
    share_prefix: bool = True,
) -> Float[Tensor, "prompt choice"]:
    """Answer probabilities: the softmax over the full vocabulary, summed over the label ids of each shown choice.

    They are not renormalized over the labels.

    Args:
        model: model to run.
        prompts: prompts of any length. Common beginnings are run once.
        neurons: neurons to intervene on; none by default.
        intervention: intervention on these neurons; zero-ablation by default.
        max_tokens: maximum number of tokens in one batch.
        share_prefix: whether to run common beginnings once. If False, every prompt is run as a whole.

    Returns:
        Probabilities in [0, 1] on the CPU, in at least float32. If prompts have different numbers of choices, the
        missing choices have probability 0.

    Raises:
        BadInput: the model's logits are not finite, or the neurons do not exist in the model.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "share_prefix": share_prefix}
    return ask_with(model, prompts, [neurons], intervention=intervention, **options)[0]


@isolated
@torch.no_grad()
def ask_with(
    model: Model,
    prompts: Sequence[Prompt],
    sets: Sequence[NeuronSet],
    *,
    intervention: Intervention = ZERO,
    max_tokens: int = MAX_TOKENS,
    share_prefix: bool = True,
) -> Float[Tensor, "set prompt choice"]:
    """Answer probabilities with each set of neurons acted on. The sets share forward passes; see `ask`."""
    width = max((p.n_choices for p in prompts), default=0)
    answers = torch.zeros(len(sets), len(prompts), width, dtype=backend_of(model).wide_dtype)
    for which, rows, logits in _logits_with(model, prompts, sets, intervention, max_tokens, share_prefix):
        asked = [prompts[row] for row in rows.tolist()]
        labels = _label_probabilities(logits.softmax(-1), asked, width)  # [place, choice]
        # one logit that is not finite makes every probability of its row NaN
        if not labels.isfinite().all():
            raise BadInput(
                f"the model's logits are not finite in {backend_of(model).dtype}; load it in bfloat16 or float32"
            )
        answers[which, rows] = labels.cpu()
    return answers


def _logits_with(
    model: Model,
    prompts: Sequence[Prompt],
    sets: Sequence[NeuronSet],
    intervention: Intervention,
    max_tokens: int,
    share_prefix: bool,
) -> Iterator[Reached]:
    """Last logits of the prompts with each set of neurons acted on."""
    is_acting = any(sets)
    if share_prefix and not backend_of(model).unshareable and (intervention.keeps_prefix or not is_acting):
        hooks = intervention_hooks(model, sets, intervention, prompts)
        yield from tree_logits(model, prompts, len(sets), hooks=hooks, max_tokens=max_tokens)
        return
    for index, neurons in enumerate(sets):
        hooks = intervention_hooks(model, [neurons], intervention, prompts)
        for rows, logits in prompt_logits(model, prompts, hooks=hooks, max_tokens=max_tokens):
            yield torch.full((len(rows),), index), torch.tensor(rows), logits


def _label_probabilities(
    probabilities: Float[Tensor, "row vocab"], prompts: Sequence[Prompt], width: int
) -> Float[Tensor, "row choice"]:
    """Sum the probabilities over the ids of each label, adding one id of every row at a time."""
    labels = torch.zeros(len(prompts), width, dtype=probabilities.dtype, device=probabilities.device)
    for shown in range(width):
        ids = [prompt.label_ids[shown] if shown < prompt.n_choices else () for prompt in prompts]
        for place in range(max(map(len, ids), default=0)):
            pairs = [(row, row_ids[place]) for row, row_ids in enumerate(ids) if place < len(row_ids)]
            row, token = torch.tensor(pairs, device=probabilities.device).T
            labels[row, shown] += probabilities[row, token]
    return labels


@dataclass(frozen=True, kw_only=True, eq=False)
class Asking:
    """Prompts to ask, and the intervention and neurons to ask them with."""

    prompts: PromptSet
    neurons: NeuronSet = NO_NEURONS
    intervention: Intervention = ZERO


class _Chunk(NamedTuple):
    askings: list[int]
    """Indices of the askings, which share their prompts and their intervention."""
    part: PromptSet
    key: str


def ask_each(model: Model, askings: Sequence[Asking], *, name: str = "answers") -> list[Float[Tensor, "prompt choice"]]:
    """Call `ask` several times, in chunks with one intervention. Askings of the same prompts share forward passes.

    Args:
        model: model to run.
        askings: prompts and interventions. Each gives one result.
        name: name of the work, unique within its stage.
    """
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for index, asking in enumerate(askings):
        # an intervention with values from the prompts needs all of them
        is_whole = len(asking.neurons) > 0 and asking.intervention.needs_prompts
        alike.setdefault((id(asking.prompts), id(asking.intervention), is_whole), []).append(index)
    chunks: list[_Chunk] = []
    for (_, _, is_whole), members in alike.items():
        prompts, intervention = askings[members[0]].prompts, askings[members[0]].intervention
        parts = (prompts,) if is_whole else asked_chunks(model, prompts)
        size = asked_chunk_size(model, prompts)
        for part in parts:
            key = chunk_key(part)
            # as many sets together as prompts in a chunk allow
            n_sets = max(1, size // max(len(part), 1))
            for first in range(0, len(members), n_sets):
                together = members[first : first + n_sets]
                acting = [askings[index].neurons for index in together]
                chunks.append(_Chunk(together, part, chunk_key("ask", acting, intervention, key)))

    def compute(index: int) -> Tensors:
        chunk = chunks[index]
        sets = [askings[member].neurons for member in chunk.askings]
        intervention = askings[chunk.askings[0]].intervention
        return {"answers": ask_with(model, chunk.part, sets, intervention=intervention)}

    computed = map_chunks(name, [chunk.key for chunk in chunks], compute, "answers")
    answers: list[list[Tensor]] = [[] for _ in askings]
    for chunk, result in zip(chunks, computed, strict=True):
        for index, part in zip(chunk.askings, result["answers"], strict=True):
            # chunks whose prompts show fewer choices are padded to the largest number
            width = askings[index].prompts.n_choices
            answers[index].append(torch.nn.functional.pad(part, (0, width - part.shape[1])))
    return [torch.cat(parts) for parts in answers]
