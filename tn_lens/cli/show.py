"""The command that shows the neurons of a run, and their cards."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from tn_lens.cli.options import RunPath
from tn_lens.core.errors import BadInput
from tn_lens.core.sentences import count


def show(
    folder: RunPath,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NEURON]...", help="Names such as 'mlp 3:17' or 'attn 2.h1:5'.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Number of rows in the table.")] = 20,
    cards: Annotated[int, typer.Option(min=0, help="Number of cards, strongest neurons first.")] = 3,
) -> None:
    """Show the found neurons of a run and their cards, without the model."""
    from rich.panel import Panel

    from tn_lens.cli.tables import open_console, table_of
    from tn_lens.results.listing import read_listing

    wanted = _split_names(names or [])
    listing = read_listing(folder)
    # the classes of the results take seconds to import
    if listing is None or not set(wanted) <= set(listing.cards):
        from tn_lens.neurons import Neuron
        from tn_lens.results.found import load_run

        found = load_run(folder)
        listing = found.listing({})
        neurons = [Neuron.from_name(name) for name in wanted]
        for neuron in neurons:
            if neuron not in found.neurons:
                raise BadInput(
                    f"{neuron} is not among the {count(len(found.neurons), 'neuron')} of {folder}; omit the name to list them"
                )
            if str(neuron) not in listing.cards:
                raise BadInput(
                    f"{neuron} was found, but {folder} has cards only for the strongest "
                    f"{count(len(listing.cards), 'neuron')}; make its card with tn_lens.neuron_card"
                )
        wanted = [str(neuron) for neuron in neurons]
    console = open_console()
    if not wanted:
        console.print(listing.title)
        rows = listing.rows[:top]
        if rows:
            console.print(table_of(list(rows[0]), [list(row.values()) for row in rows]))
        if n_more := len(listing.rows) - len(rows):
            verb = "is" if n_more == 1 else "are"
            console.print(f"{n_more} more {verb} in neurons.json; use --top {len(listing.rows)} to show all.")
    for name in wanted or list(listing.cards)[:cards]:
        console.print(Panel(listing.cards[name], title=name, title_align="left"))


def _split_names(words: list[str]) -> list[str]:
    """Names of neurons; the shell splits them at the space unless they are quoted."""
    # a name begins with the letters of its site
    return [name.strip() for name in re.split(r"(?:^|\s)(?=[a-z])", " ".join(words)) if name.strip()]
