"""What benchmarks that compare attribution methods share: questions, integrals, sets of neurons, and the number of rows."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import tn_lens as tn
from tn_lens.attribution.engines.direct import Direct
from tn_lens.attribution.engines.shared_prefix import SharedPrefix
from tn_lens.attribution.methods import Engine
from tn_lens.attribution.methods.method import Place
from tn_lens.attribution.methods.paths import Part, Paths, evaluate
from tn_lens.attribution.quadrature import quadrature_rule
from tn_lens.attribution.target import probability_difference
from tn_lens.models import Model
from tn_lens.neurons import NEURON_SITES


def city_questions(path: Path, n: int, seed: int = 0) -> tn.QuestionSet:
    """Completions of "The city of X is in the country of" with the right country and a random other one.

    Args:
        path: CSV file with the columns city and correct_country.
        n: number of questions, drawn with the seed.
        seed: seed of the draws.
    """
    with path.open(encoding="utf-8", newline="") as file:
        country_of = {row["city"]: row["correct_country"] for row in csv.DictReader(file)}
    countries, rng = sorted(set(country_of.values())), random.Random(seed)
    questions = []
    for city, right in country_of.items():
        # completions must differ in their first token
        others = [country for country in countries if country.split()[0] != right.split()[0]]
        text = f"The city of {city} is in the country of"
        questions.append(tn.Question(text=text, choices=(right, rng.choice(others))))
    rng.shuffle(questions)
    return tn.QuestionSet(name="cities", questions=tuple(questions[:n])).with_format("completion")


def composite(n_panels: int, n: int = 8) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a Gauss-Legendre rule on each of several equal panels."""
    rule = quadrature_rule("gausslegendre", n)
    low = torch.arange(n_panels, dtype=torch.float64)[:, None] / n_panels
    return (low + rule.nodes / n_panels).flatten(), (rule.weights / n_panels).repeat(n_panels)


def summed(
    paths: Paths, places: Sequence[Place], nodes: Tensor, weights: Tensor, n_rows: int = 400
) -> dict[Place, Tensor]:
    """The integrals at some places by one rule, in float64.

    Args:
        paths: the paths of one prompt.
        places: sites and layers, in the order of `paths.places`.
        nodes: nodes of the rule.
        weights: its weights.
        n_rows: number of rows in one pass.
    """
    totals: dict[Place, Tensor] = {}
    alphas = dict.fromkeys(places, nodes[None])
    for part in evaluate(paths, [probability_difference], alphas, n_rows):
        assert isinstance(part, Part)
        site, layer = part.place
        slopes = (paths.delta[site][:, layer, None] * paths.engine.carry_back(part.place, part.gradients[0]))[0, :, 0]
        totals[part.place] = totals.get(part.place, 0) + weights[part.nodes].to(slopes.device) @ slopes.double()
    return totals


def from_zero(model: Model, prompt: tn.Prompt) -> Paths:
    """The paths of one prompt from zero activation."""
    engine = SharedPrefix(model, [prompt], NEURON_SITES)
    return Paths(engine, {site: torch.zeros_like(own[0, :, 0]) for site, own in engine.own.items()})


@contextmanager
def counted_rows() -> Iterator[list[int]]:
    """Collect the number of rows of every pass of the engines, summed over the prompts of the pass."""
    counts: list[int] = []

    def counting(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def count(engine: Engine, paths: Any, nudges: Any) -> Tensor:
            final = run(engine, paths, nudges)
            counts.append(final.shape[0] * final.shape[1])
            return final

        return count

    with ExitStack() as stack:
        for engine in (Direct, SharedPrefix):
            stack.enter_context(patch.object(engine, "run", counting(engine.run)))
        yield counts


def salient(scores: np.ndarray, t: float) -> set[int]:
    """The neurons whose score exceeds the fraction `t` of the largest one."""
    return set(np.flatnonzero(scores > t * scores.max()).tolist())


def jaccard(one: set[int], other: set[int]) -> float:
    """The size of the intersection of two sets relative to that of their union."""
    return len(one & other) / len(one | other) if one | other else 1.0
