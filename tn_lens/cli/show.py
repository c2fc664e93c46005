"""The command that shows the neurons of a run, and their cards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.panel import Panel
from rich.text import Text

from tn_lens.cli.console import frame_table, open_console
from tn_lens.core.errors import BadInput


def show(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NEURON]...", help="As in 'mlp 3:17' or 'attn 2.h1:5'.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Rows of the table.")] = 20,
    cards: Annotated[int, typer.Option(min=0, help="Cards of the strongest neurons.")] = 3,
) -> None:
    """Show the found neurons of a run and their cards, without the model."""
    import pandas as pd

    from tn_lens.neurons.neuron import Neuron
    from tn_lens.pipeline.retest import run_of
    from tn_lens.results import load_cards

    settings, found, _ = run_of(folder)
    known = {card.neuron: card for card in load_cards(folder)}
    wanted = [Neuron.from_name(name) for name in _names(names or [])]
    for neuron in wanted:
        if neuron not in found:
            raise BadInput(
                f"{neuron} is not among the {len(found)} neurons of {folder}; leave the name out to see which are"
            )
        if neuron not in known:
            raise BadInput(
                f"{neuron} was found, but only the strongest {len(known)} neurons of {folder} have cards; "
                "make its own with tn_lens.neuron_card"
            )
    console = open_console()
    if not wanted:
        payload = json.loads((folder / "neurons.json").read_text(encoding="utf-8"))
        records = payload["neurons"]
        console.print(
            f"{len(found)} truth neurons of {settings['model']} on {settings['questions']} (t = {payload['t']:.3g}, "
            f"p = {payload['p']:.3g})",
            highlight=False,
            markup=False,
        )
        columns = ["mean_difference", "ci_low", "ci_high", "cohens_d", "p_adjusted", "share", "case", "verdict"]
        rows = [{"neuron": str(Neuron.from_dict(r))} | {c: r[c] for c in columns} for r in records[:top]]
        if rows:
            console.print(frame_table(pd.DataFrame(rows)))
        if len(records) > top:
            console.print(f"{len(records) - top} more are in neurons.json; --top shows more.", highlight=False)
    for neuron in wanted or list(known)[:cards]:
        console.print(Panel(Text(known[neuron].to_text()), title=str(neuron), title_align="left"))


def _names(words: list[str]) -> list[str]:
    """Names of neurons, also where the shell took them apart at the space."""
    return [part.strip() for part in re.split(r"(?:^|\s)(?=mlp\b|attn\b)", " ".join(words)) if part.strip()]
