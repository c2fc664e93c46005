"""The command that continues texts with and without the neurons of a run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tn_lens.cli import options
from tn_lens.core.errors import BadInput


def generate(
    folder: options.RunPath,
    prompts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens of each text.")] = 30,
    chat: Annotated[bool, typer.Option("--chat", help="Send each text as a user turn of the chat template.")] = False,
    mode: Annotated[
        str | None, typer.Option(help="Intervention on the neurons, by name; by default that of the run.")
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Factor of --mode scale.")] = None,
    model: Annotated[str | None, typer.Option(help="'toy', a hub id, or a folder; by default that of the run.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    backend: options.Backend = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Continue texts by greedy decoding, unablated and with the found neurons ablated."""
    # imported here, since torch and transformers take seconds, also for --help and errors in the arguments
    from rich.table import Table

    from tn_lens.cli import retest
    from tn_lens.cli.console import open_console
    from tn_lens.core.tokens import visible
    from tn_lens.inference.generation import generate as continue_texts
    from tn_lens.pipeline.retest import check_same_model, run_of
    from tn_lens.results.found import settings_of
    from tn_lens.runs.workers import workers

    provenance, neurons = run_of(folder)
    settings = settings_of(provenance.settings)
    mode = mode or settings.intervention
    intervention = retest.intervention_of(mode, factor=factor, positions="all", seed=settings.seed)
    if not intervention.acts_on_any_text:
        raise BadInput(
            f"generate needs an intervention that takes no values from prompts, and {mode!r} does; give --mode zero, or --mode scale "
            "with --factor F"
        )
    loading: dict[str, Any] = {"dtype": dtype, "device": workers().device(device), "revision": revision}
    loaded = retest.load(model, provenance, trust_remote_code=trust_remote_code, backend=backend, **loading)
    check_same_model(loaded, provenance.settings, folder)
    asking: dict[str, Any] = {"intervention": intervention, "max_new_tokens": max_new_tokens, "chat": chat}
    written = continue_texts(loaded, prompts, neurons=neurons, **asking)
    table = Table("prompt", "unablated", intervention.description, show_lines=True)
    for row in written.itertuples(index=False):
        # control characters are replaced; line breaks are kept
        table.add_row(*("\n".join(map(visible, str(text).split("\n"))) for text in row))
    open_console().print(table)
