"""Ask the model: the probability of every shown choice (paper eq. 6-7), at the last position of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.inference.forward import MAX_TOKENS, prompt_logits
from tn_lens.inference.interventions import Intervention
from tn_lens.models import Model, backend_of
from tn_lens.prompts import Prompt
from tn_lens.runs.progress import counter
from tn_lens.runs.units import PROMPTS_ASKED, Mapper, Tensors, cut_prompts, unit_key


@torch.no_grad()
def ask(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    intervention: Intervention | None = None,
    max_tokens: int = MAX_TOKENS,
    share_prefix: bool = True,
    progress: str | None = None,
) -> Float[Tensor, "prompt choice"]:
    """Full-vocabulary softmax, summed over the label ids of each shown choice; never renormalised over the labels.

    Args:
        model: to ask.
        prompts: of any length; what they have in common at the beginning is run once.
        intervention: what is done to some neurons on the way.
        max_tokens: in one batch.
        share_prefix: whether to run common beginnings once, or every prompt whole.
        progress: text of a progress bar; none by default.

    Returns:
        Probabilities in [0, 1] on the CPU, in at least float32; 0 where a prompt has fewer choices than the widest.

    Raises:
        BadInput: the model answers NaN, with the dtype to change; the intervention does not fit the model.
    """
    width = max((p.n_choices for p in prompts), default=0)
    answers = torch.zeros(len(prompts), width, dtype=backend_of(model).wide_dtype)
    hooks = None if intervention is None else intervention.prepare(model, prompts)
    shareable = share_prefix and (intervention is None or intervention.keeps_prefix)
    bar = counter(len(prompts), progress)
    with bar if bar is not None else nullcontext():
        for rows, logits in prompt_logits(model, prompts, hooks=hooks, max_tokens=max_tokens, share_prefix=shareable):
            probabilities = logits.softmax(-1)
            labels = torch.zeros(len(rows), width, dtype=probabilities.dtype, device=probabilities.device)
            for shown in range(width):
                ids = [prompts[row].label_ids[shown : shown + 1] for row in rows]
                longest = max((len(one[0]) for one in ids if one), default=0)
                for place in range(longest):
                    held = [(at, one[0][place]) for at, one in enumerate(ids) if one and place < len(one[0])]
                    at, token = (
                        torch.tensor(column, device=probabilities.device) for column in zip(*held, strict=True)
                    )
                    labels[at, shown] += probabilities[at, token]
            if not probabilities.isfinite().all():
                raise BadInput(
                    f"the model's logits are not finite in {backend_of(model).dtype}; load it in bfloat16 or float32"
                )
            answers[rows] = labels.cpu()
            if bar is not None:
                bar.update(len(rows))
    return answers


def ask_each(
    model: Model,
    asked: Sequence[tuple[Intervention | None, Sequence[Prompt]]],
    *,
    mapper: Mapper,
    name: str = "answers",
    progress: str | None = None,
) -> list[Float[Tensor, "prompt choice"]]:
    """`ask` several times, in units of one intervention and some hundreds of prompts.

    Args:
        model: to ask.
        asked: what is done to the neurons, and the prompts to ask meanwhile.
        mapper: computes the units, or knows them.
        name: of the work.
        progress: text of a progress bar; none by default.
    """
    cut = {id(prompts): cut_prompts(prompts, PROMPTS_ASKED) for _, prompts in asked}
    units: list[tuple[Intervention | None, Sequence[Prompt]]] = []
    n_units = []
    for intervention, prompts in asked:
        whole = intervention is not None and intervention.needs_all_prompts
        parts = (prompts,) if whole else cut[id(prompts)]
        units += [(intervention, part) for part in parts]
        n_units.append(len(parts))
    prompt_keys = {id(part): unit_key(part) for _, part in units}

    def compute(index: int) -> Tensors:
        intervention, part = units[index]
        return {"answers": ask(model, part, intervention=intervention)}

    keys = [unit_key("ask", intervention, prompt_keys[id(part)]) for intervention, part in units]
    held = iter(mapper(name, keys, compute, progress))
    answers = []
    for (_, prompts), n in zip(asked, n_units, strict=True):
        width = max((p.n_choices for p in prompts), default=0)
        parts = [next(held)["answers"] for _ in range(n)]
        answers.append(torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]))
    return answers
