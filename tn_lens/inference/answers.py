"""Answer probabilities: f of every choice shown (paper eq. 6-7), at the last position of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.inference.forward import MAX_TOKENS, asked_chunks, prompt_logits
from tn_lens.inference.interventions import Intervention, Zero, intervention_hooks
from tn_lens.models import Model, backend_of
from tn_lens.models.isolation import isolated
from tn_lens.neurons import NeuronSet
from tn_lens.questions.prompts import Prompt, PromptSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks

NO_NEURONS = NeuronSet()
ZERO = Zero()


@isolated
@torch.no_grad()
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
        prompts: prompts of any length. Common prefixes are run once.
        neurons: neurons to intervene on; none by default.
        intervention: intervention on these neurons; zero-ablation by default.
        max_tokens: maximum number of tokens in one batch.
        share_prefix: whether to run common prefixes once. If False, every prompt is run as a whole.

    Returns:
        Probabilities in [0, 1] on the CPU, in at least float32. If prompts have different numbers of choices, the
        missing choices have probability 0.

    Raises:
        BadInput: the model's logits are not finite, or the neurons do not exist in the model.
    """
    width = max((p.n_choices for p in prompts), default=0)
    # [prompt, choice]
    answers = torch.zeros(len(prompts), width, dtype=backend_of(model).wide_dtype)
    hooks = intervention_hooks(model, neurons, intervention, prompts)
    shareable = share_prefix and (hooks is None or intervention.keeps_prefix)
    for rows, logits in prompt_logits(model, prompts, hooks=hooks, max_tokens=max_tokens, share_prefix=shareable):
        probabilities = logits.softmax(-1)  # [row, vocab]
        if not probabilities.isfinite().all():
            raise BadInput(
                f"the model's logits are not finite in {backend_of(model).dtype}; load it in bfloat16 or float32"
            )
        answers[rows] = _label_probabilities(probabilities, [prompts[row] for row in rows], width).cpu()
    return answers


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
    asking: Asking
    part: PromptSet
    key: str


def ask_each(model: Model, askings: Sequence[Asking], *, name: str = "answers") -> list[Float[Tensor, "prompt choice"]]:
    """Call `ask` several times, in chunks with one intervention and at most `PROMPTS_ASKED` prompts.

    Args:
        model: model to run.
        askings: prompts and interventions. Each gives one result.
        name: name of the work, unique within its stage.
    """
    chunks: list[_Chunk] = []
    parts_of: dict[int, list[tuple[PromptSet, str]]] = {}  # the same prompts are split and hashed once
    n_chunks = []
    for asking in askings:
        is_whole = asking.intervention.needs_prompts and len(asking.neurons) > 0
        place = id(asking.prompts)
        if is_whole:
            parts = [(asking.prompts, chunk_key(asking.prompts))]
        elif place in parts_of:
            parts = parts_of[place]
        else:
            parts = parts_of[place] = [(part, chunk_key(part)) for part in asked_chunks(model, asking.prompts)]
        acting = [asking.neurons, asking.intervention] if asking.neurons else None
        chunks += [_Chunk(asking, part, chunk_key("ask", acting, key)) for part, key in parts]
        n_chunks.append(len(parts))

    def compute(index: int) -> Tensors:
        asking, part, _ = chunks[index]
        return {"answers": ask(model, part, neurons=asking.neurons, intervention=asking.intervention)}

    computed = iter(map_chunks(name, [chunk.key for chunk in chunks], compute, "answers"))
    answers = []
    for asking, n in zip(askings, n_chunks, strict=True):
        parts = [next(computed)["answers"] for _ in range(n)]
        # chunks whose prompts show fewer choices are padded to the largest number
        width = asking.prompts.n_choices
        answers.append(torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]))
    return answers
