"""The result of attribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tn_lens.core.errors import BadInput
from tn_lens.core.seeds import generator
from tn_lens.core.sentences import count, say
from tn_lens.core.stored import Stored
from tn_lens.neurons import Neuron, NeuronSpace, SiteName
from tn_lens.questions.prompts import PromptSet, stream_of

ROUNDING = 1 + 1e-3
"""Factor on the tolerance, since errors are stored in single precision."""
Scores: TypeAlias = Mapping[SiteName, Float[Tensor, "*prompt layer _"]]
"""One number per neuron, by site; attention neurons are flat, head * d_head + index."""
OfOrders: TypeAlias = Mapping[SiteName, Float[Tensor, "order layer _"]]
"""The scores of one question in each order in which it was asked, by site."""
Gaps: TypeAlias = Mapping[str, Mapping[str, list[float]]]
"""Site -> "gap" and "change" -> mean absolute value of every layer."""


class PassSize(NamedTuple):
    """The number of prompts, and of rows per prompt, that run through the model together."""

    n_prompts: int
    n_rows: int
    """Rows of each prompt."""

    def smaller(self) -> PassSize | None:
        """The size with half of the prompts, or with half of the rows of a single prompt; None for a single row."""
        if self.n_prompts > 1:
            return PassSize(self.n_prompts // 2, self.n_rows)
        return PassSize(1, self.n_rows // 2) if self.n_rows > 1 else None


ONE_ROW = PassSize(1, 1)


class Unconverged(NamedTuple):
    """A site and layer where the estimated error of some prompts exceeds the tolerance."""

    site: SiteName
    layer: int
    n_prompts: int
    """Number of these prompts."""
    error: float
    """The largest error, as a fraction of the largest score of the prompt and site."""


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """How far the scores are from the exact integral, or from the whole sum of a rule, by estimate; see `attribute`."""

    tolerance: float
    n_prompts: int
    error: Mapping[SiteName, tuple[float, ...]]
    """Largest error of every layer, as a fraction of the largest score of the prompt and site."""
    n_above: Mapping[SiteName, tuple[int, ...]]
    """Number of prompts whose error exceeds the tolerance."""
    n_nodes: Mapping[SiteName, tuple[float, ...]]
    """Mean number of nodes."""

    @classmethod
    def of(
        cls,
        tolerance: float,
        error: Mapping[SiteName, Float[Tensor, "prompt layer"]],
        n_nodes: Mapping[SiteName, Shaped[Tensor, "prompt layer"]],
        largest: Mapping[SiteName, Float[Tensor, " prompt"]],
    ) -> Convergence:
        """Summarize the errors of all prompts, given the largest score of each prompt and site."""
        relative = {s: (e / largest[s][:, None]).nan_to_num(0, posinf=float("inf")) for s, e in error.items()}
        above = {site: values > tolerance * ROUNDING for site, values in relative.items()}
        return cls(
            tolerance=tolerance,
            n_prompts=len(next(iter(error.values()))),
            error={site: tuple(values.amax(0).tolist()) for site, values in relative.items()},
            n_above={site: tuple(values.sum(0).tolist()) for site, values in above.items()},
            n_nodes={site: tuple(values.double().mean(0).tolist()) for site, values in n_nodes.items()},
        )

    def unconverged(self) -> list[Unconverged]:
        """The sites and layers that have not converged on all prompts, the largest error first."""
        places = [
            Unconverged(site, layer, n, self.error[site][layer])
            for site, counts in self.n_above.items()
            for layer, n in enumerate(counts)
            if n
        ]
        return sorted(places, key=lambda place: -place.error)

    @property
    def nodes_per_place(self) -> float:
        """Mean number of nodes over sites, layers and prompts."""
        return float(np.mean([n for by_layer in self.n_nodes.values() for n in by_layer]))

    def summary(self) -> str:
        """Summary in one or two sentences."""
        return say("attribution.convergence", self)


class ScoreSource(ABC):
    """Scores question by question: an `Attribution`, or the scores that are stored in a run folder."""

    space: NeuronSpace
    prompts: PromptSet

    @abstractmethod
    def each_question(self, questions: Collection[str] | None = None) -> Iterator[tuple[str, OfOrders]]:
        """D of each question (or of some) in each order in which it was asked: [order, layer, neuron] by site."""

    @abstractmethod
    def at(self, neurons: Iterable[Neuron]) -> Float[Tensor, "prompt neuron"]:
        """D of the given neurons.

        Raises:
            BadInput: the model has no such neuron, or its site was not attributed.
        """

    def convergence(self) -> Convergence | None:
        """The estimated errors of the scores; None if the method does not estimate them."""
        return None

    @property
    def categories(self) -> dict[str, str]:
        """Question id -> category."""
        return self.prompts.categories

    @property
    def equal(self) -> dict[str, str]:
        """Question id -> group, for questions that have an equal one; see `tn_lens.questions.repeats`."""
        prompts: PromptSet | None = getattr(self, "prompts", None)
        return {} if prompts is None else prompts.equal

    def per_question(self, questions: Collection[str] | None = None) -> Iterator[tuple[str, Scores]]:
        """D of each question (or of some): the mean over the orders in which it was asked."""
        for question, orders in self.each_question(questions):
            yield question, mean_of_orders(orders)

    def at_questions(self, neurons: Iterable[Neuron]) -> Float[Tensor, "question neuron"]:
        """D of the given neurons: the mean over the orders of each question."""
        return mean_by_question(self.at(neurons), self.prompts)


def mean_by_question(columns: Float[Tensor, "prompt neuron"], prompts: PromptSet) -> Float[Tensor, "question neuron"]:
    """The mean over the orders of each question, computed in the dtype of the scores."""
    means = [columns[rows.start : rows.stop].mean(0) for rows in prompts.groups.values()]
    return torch.stack(means) if means else columns


def mean_of_orders(scores: OfOrders) -> Scores:
    """The mean over the orders of one question."""
    return {site: orders.mean(0) for site, orders in scores.items()}


def drawn_order(question: str, scores: OfOrders, seed: int) -> Scores:
    """The scores of one order of a question, drawn at random with the seed."""
    n_orders = len(next(iter(scores.values())))
    place = int(generator(seed, stream_of(question)).integers(n_orders))
    return {site: orders[place] for site, orders in scores.items()}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attribution(ScoreSource, Stored):
    """Scores of every neuron for a set of prompts, in the unit of the target (by default a probability), on the CPU."""

    prompts: PromptSet
    space: NeuronSpace
    difference: Mapping[str, Float[Tensor, "prompt layer _"]]
    """D, the attribution of f_t - f_f (paper eq. 8), or of another target if one was given."""
    change: Mapping[str, Float[Tensor, "prompt layer"]]
    """target(activation) - target(baseline), which the scores of a site and layer should sum to."""
    right: Mapping[str, Float[Tensor, "prompt layer _"]] | None = None
    """Attr_t, if it was attributed separately."""
    wrong: Mapping[str, Float[Tensor, "prompt layer _"]] | None = None
    """Attr_f, if it was attributed separately."""
    error: Mapping[str, Float[Tensor, "prompt layer"]] | None = None
    """Estimated largest error of a layer's D, in the unit of D; None if the method does not estimate it."""
    n_nodes: Mapping[str, Shaped[Tensor, "prompt layer"]] | None = None
    """Number of nodes at which the path was evaluated; None for methods that have none."""
    tolerance: float | None = None
    """The tolerance of `error`, as a fraction of the largest |D| of the prompt and site."""
    engine: str = "direct"
    """The engine that was used."""
    pass_size: tuple[int, int] = ONE_ROW
    """Prompts and rows in the last passes; smaller than `planned` if memory ran out."""
    planned: tuple[int, int] = ONE_ROW
    """Prompts and rows in one pass, as planned."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, prompt: int) -> Attribution:
        """The scores of one prompt, whose representation lists its strongest neurons."""
        # raises IndexError, and allows negative numbers
        place = range(len(self))[prompt]

        def pick(scores: Mapping[SiteName, Tensor] | None) -> dict[SiteName, Tensor] | None:
            return None if scores is None else {site: values[place : place + 1] for site, values in scores.items()}

        names = ("difference", "change", "right", "wrong", "error", "n_nodes")
        picked = {name: pick(getattr(self, name)) for name in names}
        return replace(self, prompts=self.prompts[place : place + 1], **picked)

    def at(self, neurons: Iterable[Neuron]) -> Float[Tensor, "prompt neuron"]:
        """D of the given neurons.

        Raises:
            BadInput: the model has no such neuron, or its site was not attributed.
        """
        return at_neurons(self.difference, self.space, neurons)

    @property
    def gap(self) -> dict[SiteName, Float[Tensor, "prompt layer"]]:
        """Completeness error (captum: convergence delta): the sum of the scores minus `change`; 0 for an exact integral."""
        return {site: scores.sum(-1) - self.change[site] for site, scores in self.difference.items()}

    @property
    def completeness_gap(self) -> float:
        """The largest completeness error relative to the largest |change|, over all prompts, sites and layers."""
        largest, missing = (
            max((float(values.abs().max()) for values in by_site.values() if values.numel()), default=0.0)
            for by_site in (self.change, self.gap)
        )
        return missing / largest if largest else float(missing > 0)

    def completeness(self) -> pd.DataFrame:
        """The mean of |gap| and of |change| over the prompts, one row for each site and layer."""
        return pd.DataFrame(layer_gaps(self.mean_gaps()), columns=list(LayerGap._fields))

    def mean_gaps(self) -> Gaps:
        """The same means as plain values: for each site, lists over the layers."""
        values = {"gap": self.gap, "change": self.change}
        return {
            site: {name: by_site[site].abs().mean(0).tolist() for name, by_site in values.items()} for site in self.gap
        }

    def convergence(self) -> Convergence | None:
        """The estimated errors of the scores; None if the method does not estimate them."""
        if self.error is None or self.n_nodes is None or self.tolerance is None:
            return None
        largest = {site: scores.abs().amax((1, 2)) for site, scores in self.difference.items()}
        return Convergence.of(self.tolerance, self.error, self.n_nodes, largest)

    def each_question(self, questions: Collection[str] | None = None) -> Iterator[tuple[str, OfOrders]]:
        """D of each question (or of some) in each order in which it was asked: [order, layer, neuron] by site."""
        for question, rows in self.prompts.groups.items():
            if questions is None or question in questions:
                yield question, {s: scores[rows.start : rows.stop] for s, scores in self.difference.items()}

    def top(self, n: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The neurons with the highest mean D, or with the highest D of the prompt at an index."""
        rows = []
        for site, scores in self.difference.items():
            mean = scores.mean(0) if prompt is None else scores[prompt]
            values, places = mean.flatten().topk(min(n, mean.numel()))
            for value, neuron in zip(values.tolist(), self.space.at({site: places}), strict=True):
                rows.append({"neuron": str(neuron), "site": site, "layer": neuron.layer, "D": value})
        frame = pd.DataFrame(rows, columns=["neuron", "site", "layer", "D"])
        return frame.sort_values("D", ascending=False).head(n).reset_index(drop=True)

    def __repr__(self) -> str:
        shown = f"\n{self.top()}" if len(self) == 1 else ""
        return f"{type(self).__name__}: {self.summary()}{shown}"

    def _repr_html_(self) -> str:
        shown = f"<pre>{escape(self.prompts[0].text)}</pre>" if len(self) == 1 else ""
        return f"<p>{escape(self.summary())}</p>{shown}{self.top().to_html()}"

    def summary(self) -> str:
        """One sentence: how much was attributed, and the completeness error."""
        worst = worst_gap(self.mean_gaps()) if len(self) else None
        return say("attribution.summary", self, worst, self.convergence() if len(self) else None)


def at_neurons(
    scores: Mapping[SiteName, Float[Tensor, "*prompt layer _"]], space: NeuronSpace, neurons: Iterable[Neuron]
) -> Float[Tensor, "*prompt neuron"]:
    """The scores of the given neurons.

    Raises:
        BadInput: the model has no such neuron, or its site was not attributed.
    """
    columns = []
    for neuron in neurons:
        if neuron.site not in scores or not space.holds(neuron):
            raise BadInput(
                f"expected a neuron of the model at an attributed site (sites {', '.join(scores)}; {count(space.n_layers, 'layer')}); "
                f"got {neuron}"
            )
        # [prompt, layer, neuron] -> [prompt]
        columns.append(scores[neuron.site][..., neuron.layer, space.flat(neuron)])
    if not columns:
        return next(iter(scores.values()))[..., 0, :0]
    return torch.stack(columns, dim=-1)


class LayerGap(NamedTuple):
    """The completeness error of a site and layer, averaged over prompts."""

    site: str
    layer: int
    gap: float
    """Mean |gap|, in the unit of the target (a probability)."""
    change: float
    """Mean |change| of the same site and layer, which its scores should sum to."""

    @property
    def share(self) -> float:
        """The error as a fraction of the change of the same site and layer; 0 if there is no error."""
        return self.gap / self.change if self.change else (float("inf") if self.gap else 0.0)


def layer_gaps(completeness: Gaps) -> list[LayerGap]:
    """The completeness errors of all sites and layers."""
    return [
        LayerGap(site, layer, gap, change)
        for site, means in completeness.items()
        for layer, (gap, change) in enumerate(zip(means["gap"], means["change"], strict=True))
    ]


def worst_gap(completeness: Gaps) -> LayerGap:
    """The site and layer with the largest mean |gap|."""
    return max(layer_gaps(completeness), key=lambda layer: layer.gap, default=LayerGap("mlp", 0, 0.0, 0.0))
