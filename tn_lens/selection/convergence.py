"""How far the scores of a quadrature rule are from convergence, and what that means for the neurons that are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from tn_lens.attribution.attribute import attribute, space_of
from tn_lens.attribution.baseline import Baseline, rows_of
from tn_lens.attribution.result import ROUNDING, Attribution, mean_of_orders
from tn_lens.core.errors import BadInput
from tn_lens.core.options import NEURON_SITES
from tn_lens.core.sentences import say
from tn_lens.core.settings import MAX_NODES
from tn_lens.core.stored import Stored
from tn_lens.models import Model
from tn_lens.neurons import NeuronSet, SiteName
from tn_lens.questions.prompt_set import Prompt, PromptSet
from tn_lens.runs.chunks import Tensors, chunk_key
from tn_lens.runs.context import map_chunks
from tn_lens.selection.result import Rules
from tn_lens.selection.table import check_thresholds, least_count, salient

N_STEPS = (5, 10, 20, 40, 80, 160, 320)
"""Numbers of steps that are compared by default."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ConvergenceCheck(Stored):
    """Scores of a quadrature rule next to converged scores of the same prompts."""

    method: str
    n_steps: tuple[int, ...]
    """The numbers of steps of the rule, in the order of `error` and `candidates`."""
    tolerance: float
    """The tolerance of the converged scores."""
    n_questions: int
    error: Mapping[SiteName, Float[np.ndarray, "step prompt layer"]]
    """Largest error of a layer's scores, as a fraction of the largest converged score of the prompt and site."""
    reference_error: Mapping[SiteName, Float[np.ndarray, "prompt layer"]]
    """The estimated error of the converged scores themselves, in the same unit."""
    jaccard: Float[np.ndarray, "step question"]
    """Overlap of the neurons that are salient in a question by both scores, over all sites."""
    candidates: tuple[NeuronSet, ...]
    """For each number of steps, the neurons that are salient in at least a fraction p of the questions."""
    converged: NeuronSet
    """The same for the converged scores."""
    adaptive_threshold: float | None
    """The threshold t above which a neuron is salient."""
    share_threshold: float | None
    """The threshold p on the fraction of questions."""

    def lost(self, step: int = -1) -> NeuronSet:
        """The candidates by the rule that are none by the converged scores; `step` is an index into `n_steps`."""
        return NeuronSet(self.candidates[step] - self.converged)

    def gained(self, step: int = -1) -> NeuronSet:
        """The candidates by the converged scores that are none by the rule."""
        return NeuronSet(self.converged - self.candidates[step])

    def worst(self, step: int = -1) -> tuple[SiteName, int, float]:
        """The site and layer with the largest error of any prompt, and this error."""
        by_layer = {site: error[step].max(0) for site, error in self.error.items()}
        site = max(by_layer, key=lambda s: by_layer[s].max())
        return site, int(by_layer[site].argmax()), float(by_layer[site].max())

    def median(self, step: int = -1) -> float:
        """The median error over sites, layers and prompts."""
        return float(np.median(np.concatenate([error[step].ravel() for error in self.error.values()])))

    @property
    def n_unconverged(self) -> int:
        """Number of sites and layers where the converged scores exceed their own tolerance in some prompt."""
        return sum(int((error > self.tolerance * ROUNDING).any(0).sum()) for error in self.reference_error.values())

    def summary(self) -> str:
        """The errors, and how the candidates change, in a few sentences; for the largest number of steps."""
        return say("selection.convergence", self)


def convergence_check(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: str = "riemann_right",
    n_steps: int | Sequence[int] = N_STEPS,
    baseline: Baseline = "zero",
    adaptive_threshold: float | None = 0.2,
    share_threshold: float | None = 0.4,
    tolerance: float = 1e-3,
    max_nodes: int = MAX_NODES,
    **options: Any,
) -> ConvergenceCheck:
    """Compare the scores of a quadrature rule with those of the method `"adaptive"`.

    t is a fraction of the largest score, so a large error at a single layer can change which neurons are salient in all
    others. This function measures both: the error by site and layer, and the candidates that depend on it.

    Args:
        model: model without interventions.
        prompts: a sample of the prompts, since converged scores take several hundred nodes where the path has a peak.
        method: name of a quadrature rule.
        n_steps: number of steps of the rule, or several.
        baseline: see `attribute`.
        adaptive_threshold: threshold t, see `select_neurons`.
        share_threshold: threshold p, see `select_neurons`; here a fraction of all questions.
        tolerance: tolerance of the converged scores.
        max_nodes: number of nodes at a place from which the converged scores are not refined any further.
        options: other keyword arguments of `attribute`.

    Raises:
        BadInput: there are no prompts, or an argument is out of range.
    """
    steps = (n_steps,) if isinstance(n_steps, int) else tuple(n_steps)
    prompts = PromptSet.of(prompts)
    check_thresholds(adaptive_threshold, Rules(share_threshold=share_threshold))
    if not prompts or not steps:
        raise BadInput(
            f"convergence_check needs at least one prompt and one number of steps; got {len(prompts)} and {len(steps)}"
        )
    space = space_of(model, options.get("sites", NEURON_SITES))
    parts = prompts.chunks(1)
    firsts = [prompts.groups[part[0].question].start for part in parts]

    def compute(index: int) -> Tensors:
        part, rows = parts[index], slice(firsts[index], firsts[index] + len(parts[index]))
        start = rows_of(baseline, rows) if isinstance(baseline, Mapping) else baseline
        scores = partial(attribute, model, part, baseline=start, **options)
        converged = scores(method="adaptive", tolerance=tolerance, max_nodes=max_nodes)
        return _compared([scores(method=method, n_steps=m) for m in steps], converged, adaptive_threshold)

    # the baseline and the other options are part of the key of all chunks of a run
    keys = [chunk_key("convergence", method, steps, adaptive_threshold, tolerance, max_nodes, part) for part in parts]
    compared = list(map_chunks("convergence", keys, compute, "convergence"))
    # [1 + step, site and layer and neuron]: number of questions in which a neuron is salient, the converged scores first
    counts = {site: sum(part[f"salient {site}"].int() for part in compared) for site in space.sites}
    least = least_count(share_threshold, len(parts))
    sets = [
        NeuronSet(space.at({site: (counts[site][row] >= least).flatten().nonzero().flatten() for site in space.sites}))  # pyright: ignore
        for row in range(1 + len(steps))
    ]
    return ConvergenceCheck(
        method=method,
        n_steps=steps,
        tolerance=tolerance,
        n_questions=len(parts),
        error={s: np.concatenate([part[f"error {s}"].numpy() for part in compared], axis=1) for s in space.sites},
        reference_error={s: np.concatenate([part[f"own {s}"].numpy() for part in compared]) for s in space.sites},
        jaccard=np.stack([part["jaccard"].numpy() for part in compared], axis=1),
        candidates=tuple(sets[1:]),
        converged=sets[0],
        adaptive_threshold=adaptive_threshold,
        share_threshold=share_threshold,
    )


def _compared(scores: Sequence[Attribution], converged: Attribution, t: float | None) -> Tensors:
    """Errors and salient neurons of one question, in each of its orders."""
    assert converged.error is not None
    results: Tensors = {}
    n_shared, n_either = (torch.zeros(len(scores)) for _ in range(2))
    for site, exact in converged.difference.items():
        # [prompt, 1]: without a score there is no error
        scale = exact.abs().amax((1, 2)).clamp_min(torch.finfo(exact.dtype).tiny)[:, None]
        differences = [(each.difference[site] - exact).abs().amax(2) / scale for each in scores]
        results[f"error {site}"] = torch.stack(differences).double()
        results[f"own {site}"] = (converged.error[site] / scale).double()
        means = [mean_of_orders(each.difference)[site] for each in (converged, *scores)]
        is_salient = torch.stack([salient(mean, t) for mean in means])
        results[f"salient {site}"] = is_salient
        n_shared += (is_salient[0] & is_salient[1:]).sum((1, 2))
        n_either += (is_salient[0] | is_salient[1:]).sum((1, 2))
    # 1 for two empty sets
    results["jaccard"] = torch.where(n_either > 0, n_shared / n_either.clamp_min(1), 1.0).double()
    return results
