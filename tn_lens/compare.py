"""Several runs side by side: where their neurons sit, how alike that is, and what suppressing them does (paper 3.3, 3.5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
import pandas as pd
from jaxtyping import Float

from .errors import BadInput
from .evaluation import StoredEvaluation, Table, group_means, table1, table2
from .evaluation.reference import PAPER
from .figures import Figure, Theme, plot_layers, plot_overlap
from .figures.layers import THIRDS, shares_of_thirds
from .neurons import SITES, NeuronSet
from .runs import Run


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunComparison:
    """What several runs found, beside each other."""

    runs: Mapping[str, Run]
    """By a name of their own: the model's, and the question set or the folder where that is not enough."""
    overlap: Float[np.ndarray, "run run"]
    """How alike the fractions of found neurons over relative depth are, MLP and attention apart; 1: the same."""
    jaccard: Float[np.ndarray, "run run"]
    """Neurons that both found over those that either found, where both runs are of one model; else NaN."""

    @property
    def depths(self) -> dict[str, int]:
        """Layers of each model."""
        return {name: run.selection.space.n_layers for name, run in self.runs.items()}

    @property
    def evaluations(self) -> list[StoredEvaluation]:
        """The runs' own evaluations, called as the runs are."""
        return [replace(run.evaluation, model_name=name) for name, run in self.runs.items()]

    @property
    def sets(self) -> list[str]:
        """The question sets that the runs report on."""
        return list(dict.fromkeys(run.evaluation.name for run in self.runs.values()))

    @property
    def others(self) -> list[StoredEvaluation]:
        """The evaluations on other question sets than those the neurons were found on."""
        return [
            replace(one, model_name=name)
            for name, run in self.runs.items()
            for one in run.others
            if one.name != run.evaluation.name
        ]

    def plot_layers(self, theme: Theme = "light") -> Figure:
        """Figure 5 with all models."""
        return plot_layers({name: run.selection for name, run in self.runs.items()}, theme=theme)

    def plot_overlap(self, theme: Theme = "light") -> Figure:
        """How alike the distributions over relative depth are."""
        return plot_overlap(list(self.runs), self.overlap, theme=theme)

    def tables1(self) -> list[Table]:
        """Table 1 of all models, one for each question set."""
        return [table1([e for e in self.evaluations if e.name == name]) for name in self.sets]

    def table2(self) -> Table | None:
        """Table 2, where a run was evaluated on other question sets."""
        return table2(self.others) if self.others else None

    def to_frame(self) -> pd.DataFrame:
        """One row a run: what was found, where, and what suppressing it does; accuracies in percent, shares in [0, 1]."""
        rows = []
        for name, run in self.runs.items():
            thirds = thirds_of(run)
            before, after = (run.evaluation.arms[arm] for arm in ("baseline", "suppressed"))
            rows.append(
                {
                    "run": name,
                    "layers": run.selection.space.n_layers,
                    "neurons": len(run.neurons),
                    "share_of_all": len(run.neurons) / run.selection.space.n_neurons,
                    "share_mlp": len(run.neurons.at("mlp")) / len(run.neurons) if run.neurons else float("nan"),
                    **{f"{third}_third": share for third, share in zip(THIRDS, thirds, strict=True)},
                    "untouched": 100 * before.accuracy,
                    "suppressed": 100 * after.accuracy,
                    "order_averaged_untouched": 100 * before.order_averaged_accuracy,
                    "order_averaged_suppressed": 100 * after.order_averaged_accuracy,
                    "welch_p": run.evaluation.welch_p,
                }
            )
        return pd.DataFrame(rows)

    def means(self) -> pd.DataFrame:
        """Means over the models of one size, as in section 3.3 of the paper, for its six; and over all runs (percent)."""
        evaluations = [run.evaluation for run in self.runs.values()]
        known = {e.model_name: e for e in evaluations if e.model_name in PAPER and e.name == "truthfulqa"}
        grouped = group_means(list(known.values())) if known else pd.DataFrame()
        pairs = [[100 * e.arms[arm].accuracy for arm in ("baseline", "suppressed")] for e in evaluations]
        before, after = (float(np.mean(of)) for of in zip(*pairs, strict=True))
        everything = {
            "size": "all",
            "models": len(evaluations),
            "baseline": before,
            "suppressed": after,
            "reduction_points": before - after,
            "relative_reduction": 100 * (before - after) / before if before else float("nan"),
        }
        return pd.concat([grouped, pd.DataFrame([everything])], ignore_index=True)

    def sentences(self) -> list[str]:
        """What the comparison shows, in words."""
        frame = self.to_frame()
        found = [run for run in self.runs.values() if run.neurons]
        said = [
            f"{len(self.runs)} runs found between {frame['neurons'].min():,} and {frame['neurons'].max():,} neurons, "
            f"{frame['share_of_all'].min():.3%} to {frame['share_of_all'].max():.3%} of all."
        ]
        if found:
            where = [thirds_of(run) for run in found]
            favourite = Counter(int(shares.argmax()) for shares in where)
            said.append(
                "Most neurons sit in the "
                + ", in the ".join(f"{THIRDS[third]} third in {n}" for third, n in sorted(favourite.items()))
                + f" of the {len(found)} that found any; the paper sees most of them in the middle layers."
            )
        pairs = self.overlap[np.triu_indices(len(self.runs), 1)]
        said.append(f"Two runs share {_range(pairs)} of their distribution over relative depth.")
        same = self.jaccard[np.triu_indices(len(self.runs), 1)]
        if np.isfinite(same).any():
            said.append(
                f"Two runs of one model share {_range(same[np.isfinite(same)])} of the neurons that either found (Jaccard)."
            )
        lower = sum(run.evaluation.welch_p < 0.05 for run in self.runs.values())
        mean = self.means().iloc[-1]
        said.append(
            f"Suppression lowers accuracy in {lower} of {len(self.runs)} (one-sided Welch test, p < 0.05), on average from "
            f"{mean['baseline']:.1f} to {mean['suppressed']:.1f} %."
        )
        if len(self.sets) > 1:
            said.append(
                f"The runs are about different question sets ({', '.join(self.sets)}): their accuracies do not compare."
            )
        differing = [key for key in ("p", "order", "method", "target", "correction") if self._differs(key)]
        if differing:
            said.append(f"The runs differ in {', '.join(differing)} too, and not only in the model.")
        return said

    def _differs(self, key: str) -> bool:
        return len({str(run.settings.get(key)) for run in self.runs.values()}) > 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def summary(self) -> str:
        """The sentences in one."""
        return " ".join(self.sentences())

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().round(3).to_html(index=False)}"


def _range(shares: Float[np.ndarray, " pair"]) -> str:
    low, high = shares.min(), shares.max()
    return f"{low:.0%}" if len(shares) == 1 else f"between {low:.0%} and {high:.0%}"


def compare(runs: Sequence[Run]) -> RunComparison:
    """Put runs beside each other.

    Args:
        runs: at least two, from `load_run`.

    Raises:
        BadInput: fewer than two.
    """
    if len(runs) < 2:
        raise BadInput(f"compare needs at least two runs; got {len(runs)}")
    named = dict(zip(names_of(runs), runs, strict=True))
    spread = [spread_over_depth(run.neurons, run.selection.space.n_layers) for run in runs]
    overlap = np.array([[overlap_of(a, b) for b in spread] for a in spread])
    weights = [run.settings["weights_sha256"] for run in runs]
    jaccard = np.array(
        [
            [a.neurons.jaccard(b.neurons) if weights[i] == weights[j] else np.nan for j, b in enumerate(runs)]
            for i, a in enumerate(runs)
        ]
    )
    return RunComparison(runs=named, overlap=overlap, jaccard=jaccard)


def names_of(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: as little as needed of model, question set, folder and place."""
    kinds = (
        [run.model_name for run in runs],
        [f"{run.model_name}, {run.questions_name}" for run in runs],
        [f"{run.model_name}, {run.name}" for run in runs],
    )
    numbered = [f"{run.model_name}, {run.name} ({place})" for place, run in enumerate(runs, 1)]
    return next((names for names in kinds if len(set(names)) == len(names)), numbered)


def spread_over_depth(neurons: NeuronSet, n_layers: int) -> dict[str, Float[np.ndarray, " layer"]]:
    """Per site the fraction of all neurons in each layer: constant over the depth from layer / n_layers to the next."""
    total = max(len(neurons), 1)
    return {site: np.array(counts) / total for site, counts in neurons.by_layer(n_layers).items() if site in SITES}


def overlap_of(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """What two distributions over relative depth have in common, in [0, 1]: the integral of the smaller density.

    The models may have different numbers of layers: a layer's neurons are spread evenly over its share of the depth.
    """
    shared = 0.0
    for site in a:
        edges = np.unique(np.concatenate([np.linspace(0, 1, len(of[site]) + 1) for of in (a, b)]))
        middles = (edges[:-1] + edges[1:]) / 2
        densities = [of[site][(middles * len(of[site])).astype(int)] * len(of[site]) for of in (a, b)]
        shared += float((np.minimum(*densities) * np.diff(edges)).sum())
    return shared


def thirds_of(run: Run) -> Float[np.ndarray, " third"]:
    """The fraction of a run's neurons in each third of its model's depth."""
    counts = run.neurons.by_layer(run.selection.space.n_layers)
    return shares_of_thirds(np.sum([counts[site] for site in SITES], axis=0))
