"""The command line: parses, calls the pipeline, prints. `tn-lens --help`."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from tn_lens.cli import options
from tn_lens.cli.evaluate import evaluate
from tn_lens.cli.generate import generate
from tn_lens.cli.pages import compare, report, write_file
from tn_lens.cli.show import show
from tn_lens.cli.waiting import spinner
from tn_lens.core.errors import BadInput, WorkerLost
from tn_lens.core.settings import Settings

USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""The base class of typer's errors about arguments; some releases of typer contain a copy of click."""

STOPPED = 130
"""The exit code of a command that was stopped with Ctrl-C, the same as typer's."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version  # takes longer than the rest of the command

        typer.echo(f"tn-lens {version('truth-neurons')}")
        raise typer.Exit
    return wanted


@app.callback()
def top(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Find truth neurons in language models, test their effect, and show their distribution over layers."""


@app.command(epilog=options.SET_NAMES)
@options.with_settings()
def run(
    context: Any,
    model: Annotated[str, typer.Option(help="'toy', a hub id, or a folder.")],
    questions: Annotated[str, typer.Option(help=options.SETS_HELP)],
    out: Annotated[Path | None, typer.Option(help="Run folder; the run is resumed if the folder contains it.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    preset: options.Preset = None,
    drop_long: options.DropLong = False,
    force: Annotated[
        bool, typer.Option(help="Continue even if the manipulation check keeps too few questions.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Start over if the folder contains another run.")] = False,
    text: options.PlainText = None,
    dry_run: Annotated[bool, typer.Option(help="Print an estimate of the cost, and exit.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    **given: Any,
) -> None:
    """Find, test, ablate and plot the truth neurons of a model."""
    if out is None and not dry_run:
        raise BadInput("expected a run folder; give one with --out runs/NAME")
    settings = Settings(**given) if preset is None else Settings.preset(preset, **options.only_given(context, given))
    with spinner(f"loading {model}"):
        # imported here, since torch and transformers take seconds, also for --help and errors in the arguments
        from transformers.utils import logging as hf_logging

        from tn_lens.cli.console import print_run, print_warnings
        from tn_lens.evaluation.text import read_texts
        from tn_lens.models.loading import load_model
        from tn_lens.pipeline.dry_run import plan_run
        from tn_lens.pipeline.run import find_truth_neurons
        from tn_lens.questions.load import load_questions
        from tn_lens.questions.registry import name_and_source
        from tn_lens.runs.workers import workers

        hf_logging.disable_progress_bar()
        name, source = name_and_source(questions)
        together = workers()
        loading = {"revision": revision, "trust_remote_code": trust_remote_code, "backend": backend}
        with print_warnings():
            asked = load_questions(name, source=source)
            loaded = load_model(model, dtype=dtype, device=together.device(device), **loading)
    if dry_run:
        if together.is_first:
            plan = plan_run(loaded, asked, settings, drop_long=drop_long)
            typer.echo("\n".join((plan.summary(), *plan.check.explain())))
        return
    keeping: dict[str, Any] = {"out": out, "overwrite": overwrite, "command": ["tn-lens", *sys.argv[1:]]}
    keeping |= {"drop_long": drop_long, "force": force, "threads": threads, "texts": text and read_texts(text)}
    found = find_truth_neurons(loaded, asked, settings, **keeping)
    if together.is_first:
        print_run(found, out)


@app.command()
@options.with_settings("share_threshold", "alpha", "correction", "family", "seed", unset=True)
def select(
    folder: options.RunPath,
    t: Annotated[float | None, typer.Option(help="Adaptive threshold t; by default that of the run.")] = None,
    grid: Annotated[bool, typer.Option("--sweep", help="Also print and plot neuron counts over t and p.")] = False,
    splits: Annotated[int, typer.Option(help="Also compare this many splits into halves.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the neurons; the figure is put next to it.")] = None,
    **given: Any,
) -> None:
    """Select again from the stored scores of a run with other thresholds, tests and splits, without the model."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise BadInput(f"expected a file in a folder that exists for --out, got {str(out)!r}")
    if splits == 1 or splits < 0:
        raise BadInput(f"--splits compares splits and needs at least 2; got {splits}")
    from tn_lens.cli.console import frame_table
    from tn_lens.cli.tables import open_console
    from tn_lens.core.stored import dump_json
    from tn_lens.figures import plot_sweep
    from tn_lens.results.found import settings_of
    from tn_lens.runs.seals import read_manifest
    from tn_lens.selection.result import Selection
    from tn_lens.selection.select import select_neurons
    from tn_lens.selection.stability import stability, sweep
    from tn_lens.selection.stored import StoredScores

    scores = StoredScores.load(folder)
    changes = {name: value for name, value in {"adaptive_threshold": t, **given}.items() if value is not None}
    settings = replace(settings_of(read_manifest(folder / "manifest.json")["settings"]), **changes)
    threshold: Any = settings.adaptive_threshold
    if threshold == "auto":
        threshold = Selection.load(folder / "selection.json").adaptive_threshold
    rules = {"adaptive_threshold": threshold, **settings.of_selection()}
    selection = select_neurons(scores, seed=settings.seed, **rules)
    console = open_console()
    console.print(selection.summary())
    if settings.exclude:
        console.print("Note: the run left out its damage neurons; this selection includes them.")
    columns = ["site", "layer", "head", "index", "mean_difference", "cohens_d", "p_adjusted"]
    if selection.neurons:
        console.print(frame_table(selection.to_frame().head(20).filter(columns)))
    if splits:
        console.print(stability(scores, seeds=range(splits), **rules).summary())
    if grid:
        frame = sweep(scores, alpha=settings.alpha, correction=settings.correction, seed=settings.seed)
        wide = frame.pivot(index="t", columns="p", values="n_found").reset_index()
        console.print(frame_table(wide, title="number of neurons found with every t (rows) and p (columns)"))
        path = (out or folder / "sweep").with_suffix(".html")
        figure = plot_sweep(frame, chosen=(threshold, settings.share_threshold))
        write_file(path, figure.to_html(include_plotlyjs=True).encode())
        console.print(f"Figure: {path}", soft_wrap=True)
    if out is not None:
        record = {**rules, "seed": settings.seed, "run": folder.name, "neurons": selection.to_records()}
        write_file(out, dump_json(record))
        console.print(f"Neurons: {out}", soft_wrap=True)


for command in (show, report, compare, evaluate, generate):
    app.command(epilog=options.SET_NAMES if command is evaluate else None)(command)


def _spread_lists(command: Any, arguments: list[str]) -> list[str]:
    """Write `--on a b c` as `--on a --on b --on c`, the form in which the parser accepts several values."""
    commands = command.commands.values()
    lists = {flag for command in commands for p in command.params if getattr(p, "multiple", False) for flag in p.opts}
    spread: list[str] = []
    current: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            current = argument if argument in lists else None
        if current is None:
            spread.append(argument)
        elif argument != current:
            spread += [current, argument]
    return spread


def replace_unencodable() -> None:
    """Print "?" for characters that the terminal's encoding lacks (LANG=C, PYTHONIOENCODING=ascii, Windows), without an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Run the command line. Invalid input exits with a one-line message and code 2, a lost worker with code 1."""
    replace_unencodable()
    # warnings of the stages are printed as notes; warnings of libraries are not relevant to users
    warnings.simplefilter("ignore")
    for library, variable in {"transformers": "TRANSFORMERS_VERBOSITY", "huggingface_hub": "HF_HUB_VERBOSITY"}.items():
        logging.getLogger(library).setLevel(logging.ERROR)
        os.environ.setdefault(variable, "error")  # read when the library is imported
    message = ""
    try:
        command = typer.main.get_command(app)
        code = command(_spread_lists(command, sys.argv[1:]), standalone_mode=False) or 0
        _leave()
    except (BadInput, WorkerLost, USAGE_ERROR) as error:
        text = " ".join(getattr(error, "format_message", lambda: str(error))().replace("Value error, ", "").split())
        text = re.sub(r"Invalid value for '(--[\w-]+)': Input should be (.*?)(?:, unable.*)?$", _in_our_words, text)
        message = f"error: {text}" if text else ""  # without arguments the help has been shown already
        code = 1 if isinstance(error, WorkerLost) else 2
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        _is_reporter(f"{type(error).__name__}: {error}")
        raise
    if code == STOPPED:
        message = "stopped; what was computed is kept, run the same command again to continue"
    if code and _is_reporter(message.removeprefix("error: ")) and message:
        typer.echo(message, err=True)
    sys.exit(code)


def _in_our_words(found: re.Match[str]) -> str:
    """Typer's message about the type or the range of a value, with the value."""
    option, wanted = found.groups()
    wanted = wanted.removesuffix(", got a number with a fractional part").replace("a valid integer", "an integer")
    wanted = f"a value {wanted}" if wanted.startswith(("greater", "less")) else wanted
    given = sys.argv[1:]
    values = [after for flag, after in pairwise(given) if flag == option]
    values += [argument.partition("=")[2] for argument in given if argument.startswith(f"{option}=")]
    return (
        f"expected {wanted.replace('a valid number', 'a number')} for '{option}', got {values[-1] if values else ''!r}"
    )


def _is_reporter(message: str) -> bool:
    """Whether this process prints the final message of a command: only one of several workers does."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return True
    from tn_lens.runs.workers import workers

    try:
        return workers().fail(message)
    except BadInput:
        return True


def _leave() -> None:
    """Synchronize several workers before they exit."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        from tn_lens.runs.workers import workers

        workers().leave()
