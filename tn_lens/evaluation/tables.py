"""Tables 1 and 2 of the paper from evaluations, with additional controls and the paper's numbers for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import say
from tn_lens.evaluation.condition import HEADINGS
from tn_lens.evaluation.reference import PAPER
from tn_lens.selection.significance import LEVEL

NOT_RUN = "not run"
"""Cell of a condition that was not run in one of several evaluations."""
SIZES: Mapping[str, str] = {"small": "3B", "medium": "7B to 8B", "large": "12B to 13B"}

Evaluation = Any
"""An `Evaluation`; its module imports this one, so the class cannot be imported here."""


@dataclass(frozen=True, eq=False)
class Table:
    """A table for a terminal, a notebook, Markdown, LaTeX or CSV."""

    frame: pd.DataFrame
    """The cells as text; the first column is the model."""
    caption: str

    def to_markdown(self) -> str:
        """The table in Markdown, followed by the caption."""
        return f"{self.frame.to_markdown(index=False)}\n\n{self.caption}\n"

    def to_latex(self) -> str:
        """The table in LaTeX; requires the booktabs package."""
        columns = "l" + "r" * (self.frame.shape[1] - 1)
        # pandas escapes the cells and the headings, but neither the caption nor a character outside of ASCII
        caption = "".join(f"\\{c}" if c in "&%$#_{}" else c for c in self.caption)
        table = self.frame.to_latex(index=False, escape=True, column_format=columns, caption=caption)
        return table.replace("±", r"$\pm$")

    def to_csv(self) -> str:
        """The table as CSV, without the caption."""
        return self.frame.to_csv(index=False)

    def files(self) -> dict[str, str]:
        """The table in every format, by file extension."""
        return {".md": self.to_markdown(), ".tex": self.to_latex(), ".csv": self.to_csv()}

    def save(self, path: str | Path) -> None:
        """Write the table as .md, .tex or .csv, depending on the file extension.

        Raises:
            BadInput: the file extension is not supported, or the file cannot be written.
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


def table1(evaluations: Sequence[Evaluation]) -> Table:
    """Accuracy unablated, with every control and with the found neurons ablated; one row per model (paper table 1).

    Raises:
        BadInput: there is no evaluation, or the evaluations are of several question sets.
    """
    names = sorted({e.name for e in evaluations})
    if len(names) != 1:
        raise BadInput(f"table 1 needs evaluations of one question set; got {', '.join(names) or 'no evaluation'}")
    conditions = _conditions(evaluations)
    rows: list[dict[str, str]] = []
    for e in evaluations:
        first, *averaged = _rows({"model": e.model_name or "model"}, e, conditions, _spread)
        rows += [first | {"neurons": str(e.n_neurons)}, *averaged]
        if e.name == "truthfulqa" and (paper := PAPER.get(e.model_name)):
            pairs = {"unablated": paper.baseline, "random": paper.random, "ablated": paper.suppressed}
            theirs = {name: f"{mean:.2f} ± {std:.2f}" for name, (mean, std) in pairs.items()}
            rows.append(_row_of_paper(conditions, theirs) | {"neurons": str(paper.n_neurons)})
    return Table(_frame(rows), say("tables.caption1", evaluations, LEVEL))


def table2(evaluations: Sequence[Evaluation]) -> Table:
    """Accuracy unablated and ablated, with every control; one row per model and question set (paper table 2).

    Raises:
        BadInput: there is no evaluation.
    """
    if not evaluations:
        raise BadInput("table 2 needs at least one evaluation; got none")
    conditions = _conditions(evaluations)
    rows: list[dict[str, str]] = []
    for e in sorted(evaluations, key=lambda e: e.model_name):
        rows += _rows({"model": e.model_name or "model", "questions": e.name}, e, conditions, _mean)
        if e.name in ("triviaqa", "mmlu") and (paper := PAPER.get(e.model_name)):
            before, after = getattr(paper, e.name)
            rows.append(_row_of_paper(conditions, {"unablated": f"{before:.2f}", "ablated": f"{after:.2f}"}))
    return Table(_frame(rows), say("tables.caption2", evaluations, any(map(is_below, evaluations))))


def _conditions(evaluations: Sequence[Evaluation]) -> list[str]:
    """The conditions of any of the evaluations, the unablated model first and the found neurons last."""
    names = dict.fromkeys(name for e in evaluations for name in e.conditions)
    return [name for name in names if name != "ablated"] + ["ablated"]


def _rows(
    head: Mapping[str, str], evaluation: Evaluation, conditions: Sequence[str], cell: Callable[[Evaluation, str], str]
) -> list[dict[str, str]]:
    """The row of an evaluation, and below it the order-averaged row if there are several orders."""
    kinds = [(head, cell)]
    if evaluation.n_orders > 1:
        kinds.append(({"model": "  order-averaged"}, _averaged))
    return [
        {**first, **{name: text(evaluation, name) if name in evaluation.conditions else NOT_RUN for name in conditions}}
        for first, text in kinds
    ]


def _row_of_paper(conditions: Sequence[str], theirs: Mapping[str, str]) -> dict[str, str]:
    """A row with the paper's numbers, which exist for some conditions only."""
    return {"model": "  in the paper", **{name: theirs.get(name, "-") for name in conditions}}


def _frame(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """The cells as text; cells that are missing in the additional rows of an evaluation are empty."""
    return pd.DataFrame(rows).fillna("").rename(columns=HEADINGS)


def group_means(accuracies: Mapping[str, tuple[float, float]] | Sequence[Evaluation]) -> pd.DataFrame:
    """Means over the models of each size, as in section 3.3 of the paper.

    Args:
        accuracies: model -> accuracy unablated and ablated, in percent, for models of the paper; or evaluations of them.

    Returns:
        Per size: models, mean accuracies (percent), reduction in points and relative to the unablated mean (percent).

    Raises:
        BadInput: a model is not one of the paper's.
    """
    if not isinstance(accuracies, Mapping):
        accuracies = {
            e.model_name: (100 * e.conditions["unablated"].accuracy, 100 * e.conditions["ablated"].accuracy)
            for e in accuracies
        }
    if unknown := set(accuracies) - set(PAPER):
        raise BadInput(f"expected models of the paper ({', '.join(PAPER)}); got {sorted(unknown)[0]!r}")
    rows = []
    for size, parameters in SIZES.items():
        pairs = [pair for model, pair in accuracies.items() if PAPER[model].size == size]
        if pairs:
            rows.append(mean_row(f"{size} ({parameters})", len(pairs), pairs))
    return pd.DataFrame(rows)


def mean_row(size: str, n_models: int, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """One row of `group_means`, from accuracies unablated and ablated in percent."""
    before, after = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    return {
        "size": size,
        "models": n_models,
        "unablated": before,
        "ablated": after,
        "reduction_points": before - after,
        "relative_reduction": 100 * (before - after) / before if before else float("nan"),
    }


def is_below(evaluation: Evaluation) -> bool:
    """Whether the 95 % interval of the difference to the unablated model lies below zero."""
    return evaluation.compare("ablated", "unablated").high < 0


def _spread(evaluation: Evaluation, name: str) -> str:
    result = evaluation.conditions[name]
    star = " *" if name == "ablated" and evaluation.welch_p < LEVEL else ""
    spread = f" ± {100 * result.accuracy_std:.2f}" if evaluation.n_repetitions > 1 else ""
    return f"{100 * result.accuracy:.2f}{spread}{star}"


def _averaged(evaluation: Evaluation, name: str) -> str:
    result = evaluation.conditions[name]
    return f"{100 * result.order_averaged_accuracy:.2f}" if result.is_complete else "-"


def _mean(evaluation: Evaluation, name: str) -> str:
    star = " *" if name == "ablated" and is_below(evaluation) else ""
    return f"{100 * evaluation.conditions[name].accuracy:.2f}{star}"
