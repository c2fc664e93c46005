"""Tables and text in the terminal."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.table import Table
from rich.text import Text

from tn_lens.cli.tables import open_console, table_of
from tn_lens.core.sentences import say
from tn_lens.evaluation.condition import condition_label
from tn_lens.results.found import TruthNeurons
from tn_lens.runs.workers import workers
from tn_lens.selection.significance import LEVEL


@contextmanager
def print_warnings() -> Iterator[None]:
    """Print this package's warnings in the `with` block as notes on stderr, on one of several workers."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.filterwarnings("always", category=UserWarning, module="tn_lens")
        try:
            yield
        finally:  # a file that is not the known one may not be readable either
            for warning in raised if workers().is_first else ():
                print(f"Note: {warning.message}", file=sys.stderr)


def frame_table(frame: pd.DataFrame, title: str | None = None) -> Table:
    """A data frame as a table."""
    return table_of(list(frame.columns), list(frame.itertuples(index=False)), title)


def print_run(found: TruthNeurons, out: Path | None) -> None:
    """Print the stages of a run in sentences, its table and its warnings."""
    console = open_console()
    console.print(f"\n{found.check.summary()}")
    if found.tuning:
        console.print(found.tuning.summary())
    console.print(f"{found.selection.summary()}\n")
    console.print(_conditions_table(found))
    console.print(found.diagnosis.summary())
    for warning in found.warnings():
        console.print(Text.assemble(("Note:", "yellow"), " ", warning))
    if out is not None:
        console.print(f"\nReport: {out / 'report.html'}", soft_wrap=True)


def _conditions_table(found: TruthNeurons) -> Table:
    """The paper's table 1 for one run, with order-averaged accuracy, answer mass and letter bias."""
    evaluation = found.evaluation
    table = Table(
        "condition",
        title=f"{found.model_name} on {evaluation.name} ({say('run.evaluated_on', found)})",
        title_justify="left",
        caption=say("evaluation.welch_legend", evaluation.welch_p),
        caption_justify="left",
    )
    first = evaluation.prompts.first_label
    # completions have no order and no labels
    labelled = ["order-averaged (%)", f'fraction of "{first}"'] if first else []
    for heading in ("accuracy (%)", *labelled[:1], "answer mass", *labelled[1:]):
        table.add_column(heading, justify="right")
    for name, result in evaluation.conditions.items():
        star = " *" if name == "ablated" and evaluation.welch_p < LEVEL else ""
        table.add_row(
            condition_label(name, evaluation.intervention),
            f"{100 * result.accuracy:.2f} ± {100 * result.accuracy_std:.2f}{star}",
            *([f"{100 * result.order_averaged_accuracy:.2f}"] if first else []),
            f"{result.answer_mass:.3f}",
            *([f"{result.share_a:.2f}"] if first else []),
        )
    return table
