"""The paper's tables 1 and 2 from evaluations, with the controls it lacks and its own figures beside the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.evaluation.reference import PAPER
from tn_lens.selection.significance import LEVEL, welch_legend

if TYPE_CHECKING:
    from tn_lens.evaluation.result import Evaluation
    from tn_lens.evaluation.stored import StoredEvaluation

    Evaluated = Evaluation | StoredEvaluation

NOT_RUN = "not run"
"""In the cell of a condition that an evaluation left out, where another has it."""
HEADINGS: Mapping[str, str] = {
    "baseline": "baseline",
    "random": "random",
    "random_matched": "matched",
    "top_activation": "most active",
    "suppressed": "suppressed",
}
SIZES: Mapping[str, str] = {"small": "3B", "medium": "7B to 8B", "large": "12B to 13B"}


@dataclass(frozen=True, eq=False)
class Table:
    """A table that prints itself: in a terminal, a notebook, Markdown, LaTeX or CSV."""

    frame: pd.DataFrame
    """The cells as text, the first column the model."""
    caption: str

    def to_markdown(self) -> str:
        """For a README."""
        return f"{self.frame.to_markdown(index=False)}\n\n{self.caption}\n"

    def to_latex(self) -> str:
        """For a paper; needs the booktabs package."""
        plain = self.frame.rename(columns=_latex)
        plain = plain.map(_latex)
        body = plain.to_latex(index=False, escape=False, column_format="l" + "r" * (plain.shape[1] - 1))
        return f"\\begin{{table}}\n\\centering\n{body}\\caption{{{_latex(self.caption)}}}\n\\end{{table}}\n"

    def to_csv(self) -> str:
        """For a spreadsheet."""
        return self.frame.to_csv(index=False)

    def files(self) -> dict[str, str]:
        """File ending -> the table in that form."""
        return {".md": self.to_markdown(), ".tex": self.to_latex(), ".csv": self.to_csv()}

    def save(self, path: str | Path) -> None:
        """Write .md, .tex or .csv, by the ending.

        Raises:
            BadInput: another ending, or the file cannot be written.
        """
        path = Path(path)
        files = self.files()
        if path.suffix not in files:
            raise BadInput(f"expected a file that ends in .md, .tex or .csv, got {str(path)!r}")
        try:
            path.write_text(files[path.suffix], encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot write {str(path)!r}: {error.strerror}; give another path") from error

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable

        table = RichTable(caption=self.caption, caption_justify="left")
        for column in self.frame.columns:
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in self.frame.itertuples(index=False):
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return f"{self.frame.to_html(index=False)}<p>{escape(self.caption)}</p>"


def table1(evaluations: Sequence[Evaluated]) -> Table:
    """Accuracy untouched, with every control and with the found neurons suppressed; one row a model (paper table 1).

    Raises:
        BadInput: no evaluation, or evaluations of several question sets.
    """
    names = sorted({e.name for e in evaluations})
    if len(names) != 1:
        raise BadInput(f"table 1 is about one question set; got {', '.join(names) or 'no evaluation'}")
    arms = [arm for arm in HEADINGS if any(arm in e.arms for e in evaluations)]
    rows: list[dict[str, str]] = []
    for e in evaluations:
        cells = {HEADINGS[arm]: _spread(e, arm) for arm in arms}
        rows.append({"model": e.model_name or "model", **cells, "neurons": str(e.n_neurons)})
        if e.n_orders > 1:
            averaged = {HEADINGS[arm]: _averaged(e, arm) for arm in arms}
            rows.append({"model": "  order-averaged", **averaged, "neurons": ""})
        paper = PAPER.get(e.model_name) if e.name == "truthfulqa" else None
        if paper:
            theirs = {arm: getattr(paper, arm) for arm in ("baseline", "random", "suppressed")}
            cells = {
                HEADINGS[arm]: f"{theirs[arm][0]:.2f} ± {theirs[arm][1]:.2f}" if arm in theirs else "-" for arm in arms
            }
            rows.append({"model": "  in the paper", **cells, "neurons": str(paper.n_neurons)})
    n_repetitions = sorted({e.n_repetitions for e in evaluations})
    repeated = (
        "from one repetition"
        if n_repetitions == [1]
        else f"mean ± standard deviation over {' or '.join(map(str, n_repetitions))} repetitions"
    )
    return Table(
        pd.DataFrame(rows).fillna("-"),
        f"Accuracy (%) on {names[0]}, {repeated} that all conditions share. {_welch_legend(evaluations)}",
    )


def table2(evaluations: Sequence[Evaluated]) -> Table:
    """Accuracy before and after suppression, with every control; one row a model and question set (paper table 2).

    Raises:
        BadInput: no evaluation.
    """
    if not evaluations:
        raise BadInput("table 2 needs an evaluation; got none")
    arms = [arm for arm in HEADINGS if any(arm in e.arms for e in evaluations)]
    rows: list[dict[str, str]] = []
    for e in sorted(evaluations, key=lambda e: e.model_name):
        cells = {HEADINGS[arm]: _cell(e, arm) for arm in arms}
        rows.append({"model": e.model_name or "model", "questions": e.name, **cells})
        if e.n_orders > 1:
            averaged = {HEADINGS[arm]: _averaged(e, arm) for arm in arms}
            rows.append({"model": "  order-averaged", "questions": "", **averaged})
        paper = PAPER.get(e.model_name)
        if paper and e.name in ("triviaqa", "mmlu"):
            theirs = dict(zip(("baseline", "suppressed"), getattr(paper, e.name), strict=True))
            cells = {HEADINGS[arm]: f"{theirs[arm]:.2f}" if arm in theirs else "-" for arm in arms}
            rows.append({"model": "  in the paper", "questions": "", **cells})
    sets = dict.fromkeys(e.name for e in evaluations)
    way = "bootstrap over questions, order-averaged where every order was asked"
    legend = (
        f"* below the baseline: the 95 % interval of the difference ({way}) leaves out zero."
        if any(map(_is_below, evaluations))
        else f"Suppressed is nowhere below the baseline by the 95 % interval of the difference ({way})."
    )
    return Table(pd.DataFrame(rows), f"Accuracy (%) on {', '.join(sets)}. {legend}")


def group_means(accuracies: Mapping[str, tuple[float, float]] | Sequence[Evaluated]) -> pd.DataFrame:
    """Means over models of one size, as in section 3.3 of the paper.

    Args:
        accuracies: model -> accuracy untouched and suppressed, in percent, for models of the paper; or evaluations of them.

    Returns:
        Per size: models, mean accuracies (percent), reduction in points and relative to the untouched mean (percent).

    Raises:
        BadInput: a model has no size in the paper.
    """
    if not isinstance(accuracies, Mapping):
        accuracies = {
            e.model_name: (100 * e.arms["baseline"].accuracy, 100 * e.arms["suppressed"].accuracy) for e in accuracies
        }
    if strangers := set(accuracies) - set(PAPER):
        raise BadInput(f"the paper groups its own six models by size; {sorted(strangers)[0]!r} is none of them")
    rows = []
    for size, parameters in SIZES.items():
        own = {model: pair for model, pair in accuracies.items() if PAPER[model].size == size}
        if own:
            before, after = (sum(pair[i] for pair in own.values()) / len(own) for i in (0, 1))
            rows.append(
                {
                    "size": f"{size} ({parameters})",
                    "models": len(own),
                    "baseline": before,
                    "suppressed": after,
                    "reduction_points": before - after,
                    "relative_reduction": 100 * (before - after) / before if before else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def _welch_legend(evaluations: Sequence[Evaluated]) -> str:
    """What the star means where there is one, and what the test said where there is none."""
    test = "one-sided Welch test"
    if any(e.welch_p < LEVEL for e in evaluations):
        return f"* below the baseline, {test}, p < {LEVEL}."
    if all(np.isnan(e.welch_p) for e in evaluations):
        return f"{welch_legend(float('nan'))}."
    return f"Suppressed is not below the baseline ({test}, p at least {LEVEL})."


def _is_below(evaluation: Evaluated) -> bool:
    return "suppressed" in evaluation.arms and evaluation.compare("suppressed", "baseline").high < 0


def _spread(evaluation: Evaluated, name: str) -> str:
    if name not in evaluation.arms:
        return NOT_RUN
    arm = evaluation.arms[name]
    star = " *" if name == "suppressed" and evaluation.welch_p < LEVEL else ""
    spread = f" ± {100 * arm.accuracy_std:.2f}" if evaluation.n_repetitions > 1 else ""
    return f"{100 * arm.accuracy:.2f}{spread}{star}"


def _averaged(evaluation: Evaluated, name: str) -> str:
    if name not in evaluation.arms:
        return NOT_RUN
    if not evaluation.arms[name].is_complete:
        return "-"
    return f"{100 * evaluation.arms[name].order_averaged_accuracy:.2f}"


def _cell(evaluation: Evaluated, name: str) -> str:
    if name not in evaluation.arms:
        return NOT_RUN
    star = " *" if name == "suppressed" and _is_below(evaluation) else ""
    return f"{100 * evaluation.arms[name].accuracy:.2f}{star}"


def _latex(text: str) -> str:
    escaped = "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
    return escaped.replace("±", "$\\pm$")
