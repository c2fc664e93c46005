"""Counterparts: the prompts of the same question in which another label is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.options import NEURON_SITES
from tn_lens.inference.activations import last_activations
from tn_lens.models import Model
from tn_lens.models.isolation import isolated
from tn_lens.neurons import SiteName
from tn_lens.questions.prompts import Prompt, PromptSet


def counterparts(prompts: Sequence[Prompt]) -> list[int]:
    """Index of the counterpart of each prompt: the next order of its question in which another label is right.

    With letters, this is the next rotation of the choices; with statements, the other statement.

    Raises:
        BadInput: a prompt has no counterpart.
    """
    prompts = PromptSet.of(prompts)
    found = []
    for question, rows in prompts.groups.items():
        for row in rows:
            # the later orders first, then the earlier ones
            others = (*range(row + 1, rows.stop), *range(rows.start, row))
            other = next((other for other in others if prompts[other].right != prompts[row].right), None)
            if other is None:
                raise BadInput(
                    "attribution_patching needs every question in several orders with different right labels, but question "
                    f"{question!r} has no such order; build the prompts with order='both', in the format letters or statement"
                )
            found.append(other)
    return found


@isolated
@torch.no_grad()
def counterpart_activations(
    model: Model, prompts: Sequence[Prompt], *, sites: Sequence[SiteName] = NEURON_SITES
) -> dict[SiteName, Float[Tensor, "prompt layer _"]]:
    """Activations at the last position of each prompt's counterpart, on the CPU: a baseline for each prompt.

    Args:
        model: model without interventions.
        prompts: prompts of every question in several orders.
        sites: sites to read.

    Raises:
        BadInput: a prompt has no counterpart.
    """
    rows = counterparts(prompts)
    return {site: values[rows] for site, values in last_activations(model, prompts, sites).items()}
