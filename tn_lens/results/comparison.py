"""Several runs side by side: where their neurons sit, how alike that is, and what suppressing them does (paper 3.3, 3.5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tn_lens.core.errors import BadInput
from tn_lens.core.wording import plural
from tn_lens.evaluation import StoredEvaluation, Table, group_means, table1, table2
from tn_lens.evaluation.reference import PAPER
from tn_lens.figures import Figure, Theme, plot_accuracies, plot_layers, plot_overlap
from tn_lens.figures.accuracies import finding as accuracy_finding
from tn_lens.figures.layers import LEAST_LAYERS, THIRDS, fullest_place, shares_of_thirds
from tn_lens.figures.layers import finding as layer_finding
from tn_lens.neurons.neuron import SITES, NeuronSet
from tn_lens.results.run import Run
from tn_lens.selection.significance import LEVEL


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
    def n_models(self) -> int:
        """How many models the runs are of, by their weights."""
        return len({run.settings["weights_sha256"] for run in self.runs.values()})

    @property
    def noun(self) -> str:
        """What the runs are called where each is of a model of its own, and where not."""
        return "models" if self.n_models == len(self.runs) else "runs"

    @property
    def what(self) -> str:
        """What is compared, as in "2 runs of 1 model"."""
        n = len(self.runs)
        return f"{n} {self.noun}" + (
            "" if self.n_models == n else f" of {self.n_models} {plural('model', self.n_models)}"
        )

    @property
    def evaluations(self) -> list[StoredEvaluation]:
        """The runs' own evaluations, called as the runs are."""
        return [replace(run.evaluation, model_name=name) for name, run in self.runs.items()]

    @property
    def sets(self) -> list[str]:
        """The question sets that the runs report on."""
        return list(dict.fromkeys(run.evaluation.name for run in self.runs.values()))

    @property
    def has_one_set(self) -> bool:
        """Whether all runs report on the very same questions, so that their accuracies compare."""
        asked = [(run.evaluation, run.settings.get("questions_sha256")) for run in self.runs.values()]
        return len({(e.name, e.n_questions, sha) for e, sha in asked}) == 1

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
        """Figure 5 with all runs."""
        title = layer_finding({name: counts_of(run) for name, run in self.runs.items()}, self.noun)
        return plot_layers({name: run.selection for name, run in self.runs.items()}, title=title, theme=theme)

    def plot_overlap(self, theme: Theme = "light") -> Figure:
        """How alike the distributions over relative depth are."""
        title = f"Two {self.noun} share {_range(self._pairs(self.overlap))} of their distribution over depth"
        return plot_overlap(list(self.runs), self.overlap, title=title, theme=theme)

    def plot_accuracies(self, theme: Theme = "light") -> Figure:
        """Table 1 of all runs as a picture."""
        return plot_accuracies(self.evaluations, title=accuracy_finding(self.evaluations, self.noun), theme=theme)

    def _pairs(self, matrix: Float[np.ndarray, "run run"]) -> Float[np.ndarray, " pair"]:
        return matrix[np.triu_indices(len(self.runs), 1)]

    def tables1(self) -> list[Table]:
        """Table 1 of all models, one for each question set."""
        return [table1([e for e in self.evaluations if e.name == name]) for name in self.sets]

    def table2(self) -> Table | None:
        """Table 2, where a run was evaluated on other question sets."""
        return table2(self.others) if self.others else None

    def to_frame(self) -> pd.DataFrame:
        """One row a run: what was found, where, and what suppressing it does; accuracies in percent, shares in [0, 1].

        Models with fewer than six layers have no thirds to speak of (NaN), and no run has where every model is so shallow.
        """
        is_deep = max(self.depths.values()) >= LEAST_LAYERS
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
                    **(
                        {f"{third}_third": share for third, share in zip(THIRDS, thirds, strict=True)}
                        if is_deep
                        else {}
                    ),
                    "untouched": 100 * before.accuracy,
                    "suppressed": 100 * after.accuracy,
                    "order_averaged_untouched": 100 * before.order_averaged_accuracy,
                    "order_averaged_suppressed": 100 * after.order_averaged_accuracy,
                    "welch_p": run.evaluation.welch_p,
                }
            )
        return pd.DataFrame(rows)

    def means(self) -> pd.DataFrame:
        """Means over the models of one size, as in section 3.3 of the paper, for its six (percent).

        A last row is over all runs, where they report on the same questions.
        """
        evaluations = [run.evaluation for run in self.runs.values()]
        known = {e.model_name: e for e in evaluations if e.model_name in PAPER and e.name == "truthfulqa"}
        grouped = group_means(list(known.values())) if known else pd.DataFrame()
        if not self.has_one_set:
            return grouped
        pairs = [[100 * e.arms[arm].accuracy for arm in ("baseline", "suppressed")] for e in evaluations]
        before, after = (float(np.mean(of)) for of in zip(*pairs, strict=True))
        everything = {
            "size": "all" if self.noun == "models" else f"all {len(evaluations)} runs",
            "models": self.n_models,
            "baseline": before,
            "suppressed": after,
            "reduction_points": before - after,
            "relative_reduction": 100 * (before - after) / before if before else float("nan"),
        }
        return pd.concat([grouped, pd.DataFrame([everything])], ignore_index=True)

    def sentences(self) -> list[str]:
        """What the comparison shows, in words."""
        frame = self.to_frame()
        sizes, shares = (
            sorted({min(of), max(of)}) for of in (frame[name].tolist() for name in ("neurons", "share_of_all"))
        )
        found = f"between {sizes[0]:,} and {sizes[1]:,}" if len(sizes) > 1 else f"{sizes[0]:,}"
        of_all = " to ".join(f"{100 * share:.3g}" for share in shares)
        said = [f"{self.what} found {found} neurons each, {of_all} % of all."]
        said += self._where()
        said.append(
            f"Two {self.noun} share {_range(self._pairs(self.overlap))} of their distribution over relative depth."
        )
        same = self._pairs(self.jaccard)
        if np.isfinite(same).any():
            said.append(
                f"Two runs of one model share {_range(same[np.isfinite(same)])} of the neurons that either found (Jaccard)."
            )
        lower = sum(run.evaluation.welch_p < LEVEL for run in self.runs.values())
        lowers = f"Suppression lowers accuracy in {lower} of {len(self.runs)} (one-sided Welch test, p < {LEVEL})"
        if self.has_one_set:
            mean = self.means().iloc[-1]
            said.append(f"{lowers}, on average from {mean['baseline']:.1f} to {mean['suppressed']:.1f} %.")
        else:
            said.append(f"{lowers}.")
            about = (
                f"about different question sets ({', '.join(self.sets)})"
                if len(self.sets) > 1
                else f"about different questions of {self.sets[0]}"
            )
            said.append(f"The runs are {about}: their accuracies do not compare.")
        differing = [key for key in ("p", "order", "method", "target", "correction") if self._differs(key)]
        if differing:
            said.append(f"The runs differ in {', '.join(differing)} too, and not only in the model.")
        return said

    def _where(self) -> list[str]:
        """Where most neurons sit: the thirds of deep models, the layer of shallow ones that are equally so; or nothing."""
        found = [run for run in self.runs.values() if run.neurons]
        deep = [thirds for run in found if np.isfinite(thirds := thirds_of(run)).all()]
        if found and len(deep) == len(found):
            favourite = Counter(int(shares.argmax()) for shares in deep)
            return [
                "Most neurons sit in the "
                + ", in the ".join(f"{THIRDS[third]} third in {n}" for third, n in sorted(favourite.items()))
                + f" of the {len(found)} that found any; the paper sees most of them in the middle layers."
            ]
        place = fullest_place([counts_of(run) for run in found]) if found else None
        return (
            []
            if place is None
            else [f"Most neurons sit in {place[0]}, in {place[1]} of the {len(found)} that found any."]
        )

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
    low, high = (f"{100 * share:.0f}" for share in (low, high))
    return f"{low} %" if low == high else f"between {low} and {high} %"


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
    """The fraction of a run's neurons in each third of its model's depth; NaN where a layer is too much of a third."""
    counts = counts_of(run)
    return shares_of_thirds(counts) if len(counts) >= LEAST_LAYERS else np.full(len(THIRDS), np.nan)


def counts_of(run: Run) -> Int[np.ndarray, " layer"]:
    """How many neurons a run found in each layer, both sites together."""
    counts = run.neurons.by_layer(run.selection.space.n_layers)
    return np.sum([counts[site] for site in SITES], axis=0)
