"""What attribution returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tn_lens.core.wording import plural
from tn_lens.neurons.neuron import NeuronSpace, Site
from tn_lens.prompts import Prompt, by_question

Scores = Mapping[Site, Float[Tensor, "*prompt layer _"]]
"""One number per neuron, per site; attention neurons are flat, head * d_head + index."""


class PassSize(NamedTuple):
    """What goes through the model together."""

    n_prompts: int
    n_rows: int
    """Rows of each prompt."""

    def smaller(self) -> PassSize | None:
        """Half of the prompts, or of the rows of a single one; None for a single row."""
        if self.n_prompts > 1:
            return PassSize(self.n_prompts // 2, self.n_rows)
        return PassSize(1, self.n_rows // 2) if self.n_rows > 1 else None


ONE_ROW = PassSize(1, 1)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attribution:
    """Scores of every neuron for some prompts, in the unit of the target (a probability), on the CPU."""

    prompts: tuple[Prompt, ...]
    space: NeuronSpace
    difference: Mapping[Site, Float[Tensor, "prompt layer _"]]
    """D, the attribution of f_t - f_f (paper eq. 8), or of the target that was given."""
    change: Mapping[Site, Float[Tensor, "prompt layer"]]
    """target(activation) - target(baseline): what the scores of one site and layer should sum to."""
    right: Mapping[Site, Float[Tensor, "prompt layer _"]] | None = None
    """Attr_t, where it was asked for apart."""
    wrong: Mapping[Site, Float[Tensor, "prompt layer _"]] | None = None
    """Attr_f, where it was asked for apart."""
    engine: str = "direct"
    """Which engine ran."""
    pass_size: PassSize = ONE_ROW
    """Prompts and rows in one pass at the end: fewer than `planned` where memory ran out."""
    planned: PassSize = ONE_ROW
    """Prompts and rows in one pass, as planned from the budget."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, prompt: int) -> Attribution:
        """One prompt's scores; shown as its strongest neurons."""
        place = range(len(self))[prompt]

        def pick(scores: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
            return {site: values[place : place + 1] for site, values in scores.items()}

        return replace(
            self,
            prompts=self.prompts[place : place + 1],
            difference=pick(self.difference),
            change=pick(self.change),
            right=None if self.right is None else pick(self.right),
            wrong=None if self.wrong is None else pick(self.wrong),
        )

    @property
    def gap(self) -> dict[Site, Float[Tensor, "prompt layer"]]:
        """Completeness gap: the sum of the scores less `change`; 0 for an exact integral."""
        return {site: scores.sum(-1) - self.change[site] for site, scores in self.difference.items()}

    @property
    def completeness_gap(self) -> float:
        """The largest gap relative to the largest |change|, over all prompts, sites and layers."""
        return relative_gap(self.gap, self.change)

    @property
    def categories(self) -> dict[int, str]:
        """Question index -> category."""
        return {prompt.question: prompt.category for prompt in self.prompts}

    def completeness(self) -> pd.DataFrame:
        """Per site and layer, the mean of |gap| and of |change| over the prompts."""
        rows = [
            {"site": site, "layer": layer, "gap": gap, "change": change}
            for site, of in self.mean_gaps().items()
            for layer, (gap, change) in enumerate(zip(of["gap"], of["change"], strict=True))
        ]
        return pd.DataFrame(rows, columns=["site", "layer", "gap", "change"])

    def mean_gaps(self) -> dict[str, dict[str, list[float]]]:
        """The same by site, a list of the layers each: as a run keeps it."""
        of = {"gap": self.gap, "change": self.change}
        return {site: {name: held[site].abs().mean(0).tolist() for name, held in of.items()} for site in self.gap}

    def per_question(self, questions: Set[int] | None = None) -> Iterator[tuple[int, Scores]]:
        """D of each question (or of some): the mean over the orders in which it was asked (one under order="random")."""
        start = 0
        for question, group in by_question(self.prompts):
            rows = slice(start, start + len(group))
            if questions is None or question in questions:
                yield question, {site: scores[rows].mean(0) for site, scores in self.difference.items()}
            start += len(group)

    def top(self, n: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The neurons with the highest mean D (of one prompt, if its place in the list is given)."""
        rows = []
        for site, scores in self.difference.items():
            mean = scores.mean(0) if prompt is None else scores[prompt]
            values, places = mean.flatten().topk(min(n, mean.numel()))
            for value, place in zip(values.tolist(), places.tolist(), strict=True):
                neuron = self.space.neuron(site, *divmod(place, self.space.width(site)))
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
        """One sentence: how much was attributed, and how well the integral was met."""
        said = f"{len(self)} {plural('prompt', len(self))} x {self.space.n_neurons:,} neurons"
        if not len(self):
            return f"{said}."
        worst = worst_gap(self.mean_gaps())
        return (
            f"{said}; the scores of a site and layer should sum to its change, f(activation) - f(baseline), and miss it most "
            f"in {worst.site} of layer {worst.layer}, {worst.summary()} (completeness_gap, the largest gap of a single "
            f"prompt over the largest change of any: {100 * self.completeness_gap:.1f} %)."
        )


def relative_gap(gap: Scores, change: Scores) -> float:
    """Largest |gap| over largest |change|; 0 where nothing changes and nothing is missing."""
    largest = max((float(c.abs().max()) for c in change.values() if c.numel()), default=0.0)
    missing = max((float(g.abs().max()) for g in gap.values() if g.numel()), default=0.0)
    return missing / largest if largest else float(missing > 0)


class WorstGap(NamedTuple):
    """The site and layer whose scores miss their sum most, on the mean over prompts."""

    site: str
    layer: int
    gap: float
    """Mean |gap|, in the unit of the target (a probability)."""
    change: float
    """Mean |change| of the same site and layer: what its scores should sum to."""

    @property
    def share(self) -> float:
        """The gap as a fraction of that site and layer's own change; 0 where nothing is missing."""
        return self.gap / self.change if self.change else (float("inf") if self.gap else 0.0)

    def summary(self) -> str:
        """How much, and what the percentage divides by: half a sentence."""
        if not self.change and self.gap:
            return f"by {self.gap:.2g} on average where nothing changes"
        return f"by {self.gap:.2g} on average, {100 * self.share:.1f} % of the change there ({self.change:.2g})"


def worst_gap(completeness: Mapping[str, Mapping[str, list[float]]]) -> WorstGap:
    """Where the mean |gap| is largest, beside the mean |change| of the same site and layer."""
    every = [
        WorstGap(site, layer, gap, change)
        for site, of in completeness.items()
        for layer, (gap, change) in enumerate(zip(of["gap"], of["change"], strict=True))
    ]
    return max(every, key=lambda one: one.gap, default=WorstGap("mlp", 0, 0.0, 0.0))
