"""The command that shows the neurons of a run, and their cards."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from tn_lens.cli.options import RunPath
from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import count

COLUMNS = ("mean_difference", "ci_low", "ci_high", "cohens_d", "p_adjusted", "share", "case", "verdict")


def show(
    folder: RunPath,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NEURON]...", help="Names such as 'mlp 3:17' or 'attn 2.h1:5'.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Number of rows in the table.")] = 20,
    cards: Annotated[int, typer.Option(min=0, help="Number of cards, strongest neurons first.")] = 3,
) -> None:
    """Show the found neurons of a run and their cards, without the model."""
    import pandas as pd
    from rich.panel import Panel

    from tn_lens.cli.console import frame_table, open_console
    from tn_lens.neurons import Neuron
    from tn_lens.results.found import load_run

    found = load_run(folder)
    card_of = {card.neuron: card for card in found.cards}
    wanted = [Neuron.from_name(name) for name in _split_names(names or [])]
    for neuron in wanted:
        if neuron not in found.neurons:
            raise BadInput(
                f"{neuron} is not among the {count(len(found.neurons), 'neuron')} of {folder}; omit the name to list them"
            )
        if neuron not in card_of:
            raise BadInput(
                f"{neuron} was found, but {folder} has cards only for the strongest {count(len(card_of), 'neuron')}; "
                "make its card with tn_lens.neuron_card"
            )
    console = open_console()
    if not wanted:
        console.print(f"{found.model_name} on {found.questions_name}: {found.selection.summary()}")
        records = found.records()
        rows = [{"neuron": str(Neuron.from_dict(r))} | {name: r[name] for name in COLUMNS} for r in records[:top]]
        if rows:
            console.print(frame_table(pd.DataFrame(rows)))
        if len(records) > top:
            verb = "is" if len(records) - top == 1 else "are"
            console.print(f"{len(records) - top} more {verb} in neurons.json; use --top {len(records)} to show all.")
    for neuron in wanted or list(card_of)[:cards]:
        console.print(Panel(card_of[neuron].to_text(), title=str(neuron), title_align="left"))


def _split_names(words: list[str]) -> list[str]:
    """Names of neurons; the shell splits them at the space unless they are quoted."""
    # a name begins with the letters of its site
    return [name.strip() for name in re.split(r"(?:^|\s)(?=[a-z])", " ".join(words)) if name.strip()]
