"""Comparison of several runs: the layers of their neurons, the overlap, and the effect of ablation (paper 3.3, 3.5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tn_lens.core.errors import BadInput
from tn_lens.core.options import Theme
from tn_lens.core.sentences import say, say_each
from tn_lens.evaluation.reference import PAPER
from tn_lens.evaluation.result import Evaluation
from tn_lens.evaluation.tables import Table, group_means, mean_row, table1, table2
from tn_lens.figures import Figure, plot_accuracies, plot_layers, plot_overlap
from tn_lens.figures.layers import LEAST_LAYERS, THIRDS, FullestPlace, fullest_place, shares_of_thirds
from tn_lens.neurons import NeuronSet
from tn_lens.results.found import TruthNeurons, load_run
from tn_lens.selection.significance import LEVEL

COMPARED = ("share_threshold", "order", "method", "target", "correction")
"""Settings that should be equal in all runs if their models are compared."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunComparison:
    """The results of several runs, and measures of their overlap."""

    runs: Mapping[str, TruthNeurons]
    """Runs by unique names: the model, with the question set or the folder if needed to distinguish them."""
    overlap: Float[np.ndarray, "run run"]
    """Overlap of the fractions of found neurons over relative depth, computed for each site; 1 for equal distributions."""
    jaccard: Float[np.ndarray, "run run"]
    """Neurons found in both runs over those found in either, for runs of one model; else NaN."""

    @property
    def n_models(self) -> int:
        """Number of different models, by their weights."""
        return len(set(map(_weights, self.runs.values())))

    @property
    def noun(self) -> str:
        """What the runs are called: "models" if each has a different model, otherwise "runs"."""
        return "models" if self.n_models == len(self.runs) else "runs"

    @property
    def what(self) -> str:
        """What is compared, for example "2 runs of 1 model"."""
        return say("comparison.what", self)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The runs' own evaluations, under the names of the runs."""
        return [replace(run.evaluation, model_name=name) for name, run in self.runs.items()]

    @cached_property
    def others(self) -> list[Evaluation]:
        """The evaluations on question sets other than a run's own, under the names of the runs."""
        return [replace(other, model_name=name) for name, run in self.runs.items() for other in run.elsewhere]

    @property
    def sets(self) -> list[str]:
        """Names of the question sets that the runs report on."""
        return list(dict.fromkeys(e.name for e in self.evaluations))

    @property
    def has_one_set(self) -> bool:
        """Whether all runs report on the same questions, so that their accuracies can be compared."""
        digests = [run.provenance.settings.get("questions_sha256") for run in self.runs.values()]
        asked = {(e.name, e.n_questions, d) for e, d in zip(self.evaluations, digests, strict=True)}
        return len(asked) == 1

    @property
    def n_with_neurons(self) -> int:
        """Number of runs in which any neurons were found."""
        return sum(bool(run.neurons) for run in self.runs.values())

    @property
    def by_third(self) -> dict[int, int]:
        """Third of the depth with most neurons -> number of runs; empty if a model is too shallow for thirds."""
        # runs without neurons have no distribution, and are not counted
        thirds = [thirds_of(run) for run in self.runs.values() if run.neurons]
        if any(np.isnan(shares).any() for shares in thirds):
            return {}
        return dict(sorted(Counter(int(shares.argmax()) for shares in thirds).items()))

    @property
    def fullest(self) -> FullestPlace | None:
        """The place in which most runs have most of their neurons, see `fullest_place`; None if no run has any."""
        counts = [counts_of(run) for run in self.runs.values() if run.neurons]
        return fullest_place(counts) if counts else None

    def pairs(self, matrix: Float[np.ndarray, "run run"]) -> list[float]:
        """The values of all pairs of runs."""
        return matrix[np.triu_indices(len(self.runs), 1)].tolist()

    def plot_layers(self, theme: Theme = "light") -> Figure:
        """Figure 5 with all runs."""
        return plot_layers({name: run.selection for name, run in self.runs.items()}, noun=self.noun, theme=theme)

    def plot_overlap(self, theme: Theme = "light") -> Figure:
        """The overlap of the distributions over relative depth."""
        return plot_overlap(list(self.runs), self.overlap, noun=self.noun, theme=theme)

    def plot_accuracies(self, theme: Theme = "light") -> Figure:
        """Table 1 of all runs as a figure."""
        return plot_accuracies(self.evaluations, noun=self.noun, theme=theme)

    def tables1(self) -> list[Table]:
        """Table 1 of all runs, one for each question set."""
        return [table1([e for e in self.evaluations if e.name == name]) for name in self.sets]

    def table2(self) -> Table | None:
        """Table 2, if a run was evaluated on other question sets."""
        return table2(self.others) if self.others else None

    def to_frame(self) -> pd.DataFrame:
        """One row per run: number and places of the neurons, and the effect; accuracies in percent, fractions in [0, 1].

        Models with fewer than six layers have no thirds (NaN); if all models are that shallow, the columns are missing.
        """
        is_deep = any(len(counts_of(run)) >= LEAST_LAYERS for run in self.runs.values())
        rows = []
        for name, run in self.runs.items():
            n, space = len(run.neurons), run.selection.space
            row: dict[str, Any] = {"run": name, "layers": space.n_layers, "neurons": n}
            row["share_of_all"] = n / space.n_neurons
            row["share_mlp"] = len(run.neurons.at("mlp")) / n if n else float("nan")
            if is_deep:
                row |= {f"{third}_third": share for third, share in zip(THIRDS, thirds_of(run), strict=True)}
            results = {name: run.evaluation.conditions[name] for name in ("unablated", "ablated")}
            row |= {name: 100 * result.accuracy for name, result in results.items()}
            row |= {f"order_averaged_{name}": 100 * r.order_averaged_accuracy for name, r in results.items()}
            rows.append({**row, "welch_p": run.evaluation.welch_p})
        return pd.DataFrame(rows)

    def means(self) -> pd.DataFrame:
        """Means over the models of one size, as in section 3.3 of the paper, for its six models (percent).

        The last row is the mean over all runs, if they report on the same questions.
        """
        evaluations = [run.evaluation for run in self.runs.values()]
        known = {e.model_name: e for e in evaluations if e.model_name in PAPER and e.name == "truthfulqa"}
        grouped = group_means(list(known.values())) if known else pd.DataFrame()
        if not self.has_one_set:
            return grouped
        frame = self.to_frame()
        pairs = list(zip(frame["unablated"].tolist(), frame["ablated"].tolist(), strict=True))
        name = "all" if self.noun == "models" else f"all {len(pairs)} runs"
        return pd.concat([grouped, pd.DataFrame([mean_row(name, self.n_models, pairs)])], ignore_index=True)

    def sentences(self) -> list[str]:
        """The results of the comparison, in sentences."""
        evaluations = [run.evaluation for run in self.runs.values()]
        mean = self.means().iloc[-1].to_dict() if self.has_one_set else None
        settings = [run.settings for run in self.runs.values()]
        differing = [name for name in COMPARED if len({getattr(s, name) for s in settings}) > 1]
        # the share threshold is called p in sentences, as in the paper
        differing = ["p" if name == "share_threshold" else name for name in differing]
        return say_each("comparison.sentences", self, evaluations, LEVEL, mean, differing)

    def summary(self) -> str:
        """The sentences as one paragraph."""
        return " ".join(self.sentences())

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.summary())}</p>{self.to_frame().round(3).to_html(index=False)}"


def compare(runs: Sequence[TruthNeurons | str | Path]) -> RunComparison:
    """Compare several runs.

    Args:
        runs: at least two results of `find_truth_neurons`, or run folders.

    Raises:
        BadInput: there are fewer than two runs, or a folder contains no finished run.
    """
    if len(runs) < 2:
        raise BadInput(f"compare needs at least two runs; got {len(runs)}")
    loaded = [run if isinstance(run, TruthNeurons) else load_run(run) for run in runs]
    spread = [spread_over_depth(run.neurons, run.selection.space.n_layers) for run in loaded]
    # [run, run]; equal names in different models do not denote the same neuron
    jaccard = [[a.neurons.jaccard(b.neurons) if _weights(a) == _weights(b) else np.nan for b in loaded] for a in loaded]
    return RunComparison(
        runs=dict(zip(names_of(loaded), loaded, strict=True)),
        overlap=np.array([[overlap_of(a, b) for b in spread] for a in spread]),
        jaccard=np.array(jaccard),
    )


def names_of(runs: Sequence[TruthNeurons]) -> list[str]:
    """Unique names of the runs: the model, and only if needed the question set, or the folder and a number."""
    folders = [f"{run.model_name}, {run.provenance.name or 'in memory'}" for run in runs]
    with_questions = [f"{run.model_name}, {run.questions_name}" for run in runs]
    # the numbers make the last candidate unique
    numbered = [f"{name} ({number})" for number, name in enumerate(folders, 1)]
    candidates = ([run.model_name for run in runs], with_questions, folders, numbered)
    return next(names for names in candidates if len(set(names)) == len(names))


def spread_over_depth(neurons: NeuronSet, n_layers: int) -> dict[str, Float[np.ndarray, " layer"]]:
    """For each site the fraction of all neurons in each layer, constant over the depth from layer / n_layers to the next."""
    total = max(len(neurons), 1)
    return {site: np.array(counts) / total for site, counts in neurons.by_layer(n_layers).items()}


def overlap_of(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Overlap of two distributions over relative depth, in [0, 1]: the integral of the smaller density.

    The models may have different numbers of layers: the neurons of a layer are spread evenly over its part of the depth.
    """
    overlap = 0.0
    for site in (site for site in a if site in b):
        pair = (a[site], b[site])
        # the borders of all cells of both models, between which both densities are constant
        edges = np.unique(np.concatenate([np.linspace(0, 1, len(fractions) + 1) for fractions in pair]))
        middles = (edges[:-1] + edges[1:]) / 2
        densities = [fractions[(middles * len(fractions)).astype(int)] * len(fractions) for fractions in pair]
        overlap += float((np.minimum(*densities) * np.diff(edges)).sum())
    return overlap


def thirds_of(run: TruthNeurons) -> Float[np.ndarray, " third"]:
    """The fraction of a run's neurons in each third of its model's depth; NaN if a layer is too large a part of a third."""
    counts = counts_of(run)
    return shares_of_thirds(counts) if len(counts) >= LEAST_LAYERS else np.full(len(THIRDS), np.nan)


def counts_of(run: TruthNeurons) -> Int[np.ndarray, " layer"]:
    """The number of found neurons in each layer, over all sites."""
    return np.sum(list(run.neurons.by_layer(run.selection.space.n_layers).values()), axis=0)


def _weights(run: TruthNeurons) -> str:
    """The digest of the model's weights."""
    return run.provenance.settings["weights_sha256"]
