"""The command line: parses, calls the pipeline, prints. `tn-lens --help`."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from tn_lens.cli.console import frame_table, open_console
from tn_lens.cli.evaluate import evaluate, wrong_answers
from tn_lens.cli.pages import compare, report
from tn_lens.cli.show import show
from tn_lens.core.errors import BadInput, WorkerLost

if TYPE_CHECKING:
    from tn_lens.results.found import TruthNeurons

USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""The base of everything that typer raises about arguments; some releases carry click within them."""

STOPPED = 130
"""The exit code of a command that was stopped by hand, which is also how typer reports it."""

Correction = Literal["bonferroni", "holm", "benjamini-hochberg", "none"]
Family = Literal["candidates", "all"]
"""Words that selecting and selecting again share."""

LISTS = ("--on", "--arms")
"""Options that take several values."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tn-lens {version('tn_lens')}")
        raise typer.Exit
    return wanted


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version, and stop.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Find truth neurons in language models, show that they matter, and show where they sit."""


@app.command()
def run(
    model: Annotated[str, typer.Option(help="'toy', a hub id, or a folder.")],
    questions: Annotated[str, typer.Option(help="A .csv or .jsonl file, truthfulqa, triviaqa, mmlu, or toy.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; resumed if it holds this run.")] = None,
    t: Annotated[
        str | None,
        typer.Option(help="Adaptive threshold, or 'auto' to tune it; by default the paper's for its models, else 0.2."),
    ] = None,
    p: Annotated[float, typer.Option(help="Share threshold.")] = 0.4,
    alpha: Annotated[float, typer.Option(help="Level of the held-out t-test.")] = 0.05,
    correction: Annotated[Correction, typer.Option(help="For multiple comparisons.")] = "bonferroni",
    family: Annotated[Family, typer.Option(help="What the correction counts.")] = "candidates",
    order: Annotated[Literal["random", "both", "given"] | None, typer.Option(help="Order of the answers.")] = None,
    n_steps: Annotated[int, typer.Option(help="Interpolation steps, m.")] = 20,
    method: Annotated[
        Literal["riemann_right", "riemann_middle", "riemann_trapezoid", "gauss_legendre", "graded"],
        typer.Option(help="Quadrature rule; 'graded' for post-norm models."),
    ] = "riemann_right",
    baseline: Annotated[Literal["zero", "mean"], typer.Option(help="Where the path begins.")] = "zero",
    positions: Annotated[Literal["last", "all"], typer.Option(help="Positions to interpolate.")] = "last",
    target: Annotated[
        Literal["probability_difference", "normalized_difference", "log_ratio"],
        typer.Option(help="What is attributed; the paper's is the first."),
    ] = "probability_difference",
    engine: Annotated[
        Literal["auto", "shared_prefix", "direct"], typer.Option(help="How the model is run; the scores are the same.")
    ] = "auto",
    max_memory: Annotated[
        float | None,
        typer.Option(help="GiB that a pass of attribution may take above the weights; 2 by default, 8 on CUDA."),
    ] = None,
    separate: Annotated[bool, typer.Option(help="Store Attr_t beside D.")] = False,
    repetitions: Annotated[int, typer.Option(help="Repetitions of the evaluation.")] = 10,
    seed: Annotated[int, typer.Option(help="Of orders, halves and random neurons.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use only so many questions.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    backend: Annotated[
        Literal["hooked", "bridge"] | None,
        typer.Option(
            help="TransformerLens' own model, or Hugging Face's within TransformerLens; the numbers are the same."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of torch, for every worker; the run folder's own by default, or torch's.")
    ] = None,
    drop_long: Annotated[bool, typer.Option(help="Leave out questions beyond the context window.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Start over where the folder holds another run.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what the run would cost, and stop.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the checkpoint's own code run.")] = False,
) -> None:
    """Find, test, suppress and plot the truth neurons of a model."""
    from transformers.utils import logging as hf_logging

    from tn_lens.models import loading
    from tn_lens.pipeline import dry_run as planning
    from tn_lens.pipeline import run as pipeline
    from tn_lens.questions import load_questions
    from tn_lens.runs.workers import workers

    if out is None and not dry_run:
        raise BadInput("expected a run folder; give one with --out runs/NAME")
    hf_logging.disable_progress_bar()
    asked = load_questions(questions)
    settings = {
        "t": t if t in (None, "auto") else _number(t),
        "p": p,
        "alpha": alpha,
        "correction": correction,
        "family": family,
        "order": order,
        "n_steps": n_steps,
        "method": method,
        "baseline": baseline,
        "positions": positions,
        "target": target,
        "separate": separate,
        "engine": engine,
        "max_memory": None if max_memory is None else _bytes(max_memory),
        "n_repetitions": repetitions,
        "seed": seed,
        "limit": limit,
    }
    together = workers()
    device = together.device(device)
    loaded = loading.load_model(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code, backend=backend
    )
    if dry_run:
        if not together.is_first:
            return
        typer.echo(planning.plan_run(loaded, asked, drop_long=drop_long, **settings).summary())
        return
    found = pipeline.find_truth_neurons(
        loaded, asked, out=out, overwrite=overwrite, drop_long=drop_long, threads=threads, **settings
    )
    if not together.is_first:
        return
    console = open_console()
    console.print(f"\n{found.check.summary()}", highlight=False)
    if found.tuning:
        console.print(found.tuning.summary(), highlight=False)
    console.print(f"{found.selection.summary()}\n", highlight=False)
    console.print(_table(found))
    console.print(f"{found.diagnosis.summary()}", highlight=False)
    for warning in found.warnings():
        console.print(f"[yellow]Note:[/] {escape(warning)}", highlight=False)
    console.print(f"\nReport: {out / 'report.html'}" if out else "", highlight=False, soft_wrap=True)


@app.command()
def select(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    t: Annotated[float | None, typer.Option(help="Adaptive threshold; the run's by default, like all below.")] = None,
    p: Annotated[float | None, typer.Option(help="Share threshold.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Level of the held-out t-test.")] = None,
    correction: Annotated[Correction | None, typer.Option(help="For multiple comparisons.")] = None,
    family: Annotated[Family | None, typer.Option(help="What the correction counts.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split into halves.")] = None,
    grid: Annotated[bool, typer.Option("--sweep", help="Also a table over t and p, and its figure.")] = False,
    splits: Annotated[int, typer.Option(help="Also compare so many splits into halves.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the neurons (JSON); with --sweep the figure beside it.")
    ] = None,
) -> None:
    """Select again from a run's stored scores: other thresholds, tests and splits, without the model."""
    import json

    from tn_lens.figures import plot_sweep
    from tn_lens.results.run import selection_settings
    from tn_lens.runs.seals import without_nan
    from tn_lens.selection.select import select_neurons
    from tn_lens.selection.stability import stability, sweep
    from tn_lens.selection.stored import StoredScores

    stored = StoredScores.load(folder)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise BadInput(f"expected a file in a folder that exists for --out, got {str(out)!r}")
    if splits == 1 or splits < 0:
        raise BadInput(f"--splits compares splits and needs at least 2; got {splits}")
    given = {"t": t, "p": p, "alpha": alpha, "correction": correction, "family": family, "seed": seed}
    settings = selection_settings(folder) | {name: value for name, value in given.items() if value is not None}
    selection = select_neurons(stored, **settings)
    console = open_console()
    console.print(selection.summary(), highlight=False)
    shown = selection.to_frame().head(20)
    if len(shown):
        columns = ["site", "layer", "head", "index", "mean_difference", "cohens_d", "p_adjusted"]
        console.print(frame_table(shown.filter(columns)))
    if splits:
        apart = {name: value for name, value in settings.items() if name != "seed"}
        console.print(stability(stored, seeds=range(splits), **apart).summary(), highlight=False)
    if grid:
        frame = sweep(stored, **{name: settings[name] for name in ("alpha", "correction", "seed")})
        wide = frame.pivot(index="t", columns="p", values="n_found").reset_index()
        console.print(frame_table(wide, title="neurons found, t down, p across"))
        path = (out or folder / "sweep").with_suffix(".html")
        _write(path, plot_sweep(frame, chosen=(settings["t"], settings["p"])).to_html(include_plotlyjs=True))
        console.print(f"Figure: {path}", highlight=False, soft_wrap=True)
    if out is not None:
        record = {**settings, "run": folder.name, "neurons": selection.to_records()}
        _write(out, json.dumps(without_nan(record), indent=1) + "\n")
        console.print(f"Neurons: {out}", highlight=False, soft_wrap=True)


def _spread_lists(arguments: list[str]) -> list[str]:
    """`--on a b c` as `--on a --on b --on c`, which is how lists are given to the parser."""
    spread: list[str] = []
    current: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            current = argument if argument in LISTS else None
            if current is None:
                spread.append(argument)
        elif current is not None:
            spread += [current, argument]
        else:
            spread.append(argument)
    return spread


app.command()(show)
app.command()(report)
app.command()(compare)
app.command()(evaluate)
app.command("wrong-answers")(wrong_answers)


def _number(given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise BadInput(f"expected a number in (0, 1] or 'auto' for '--t', got {given!r}") from None


def _bytes(gib: float) -> int:
    if not 0 < gib < math.inf:
        raise BadInput(f"expected more than 0 GiB for '--max-memory', got {gib:g}")
    return max(1, round(gib * 2**30))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {str(path)!r}: {error.strerror}; give another --out") from error


def _table(found: TruthNeurons) -> Table:
    """Like the paper's table 1, with what it lacks beside it."""
    from tn_lens.evaluation import ARM_NAMES
    from tn_lens.selection.significance import LEVEL, welch_legend

    evaluation = found.evaluation
    table = Table(title=f"{found.model_name} on {evaluation.name} ({found.evaluated_on})", title_justify="left")
    table.add_column("condition")
    for name in ("accuracy (%)", "order-averaged (%)", "answer mass", 'share of "A"'):
        table.add_column(name, justify="right")
    for name, arm in evaluation.arms.items():
        star = " *" if name == "suppressed" and evaluation.welch_p < LEVEL else ""
        table.add_row(
            ARM_NAMES[name],
            f"{100 * arm.accuracy:.2f} ± {100 * arm.accuracy_std:.2f}{star}",
            f"{100 * arm.order_averaged_accuracy:.2f}",
            f"{arm.answer_mass:.3f}",
            f"{arm.share_a:.2f}",
        )
    table.caption = welch_legend(evaluation.welch_p)
    table.caption_justify = "left"
    return table


def main() -> None:
    """Run the command line; bad input ends with one sentence and exit code 2, a lost worker with 1."""
    warnings.simplefilter("ignore")  # the stages' warnings come back as notes; a library's are not the user's business
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    said = ""
    try:
        code = app(_spread_lists(sys.argv[1:]), standalone_mode=False) or 0
        _leave()
    except (BadInput, WorkerLost, USAGE_ERROR) as error:
        found = " ".join(getattr(error, "format_message", lambda: str(error))().split())
        said = f"error: {found}" if found else ""  # without arguments the help has been shown already
        code = 1 if isinstance(error, WorkerLost) else 2
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        _speaks(f"{type(error).__name__}: {error}")
        raise
    if code == STOPPED:
        said = "stopped; what was computed is kept, run the same command again to go on"
    if code and _speaks(said.removeprefix("error: ")) and said:
        typer.echo(said, err=True)
    sys.exit(code)


def _speaks(sentence: str) -> bool:
    """Whether this process is the one that says how a command ended: of several workers only one does."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return True
    from tn_lens.runs.workers import workers

    try:
        return workers().fail(sentence)
    except BadInput:
        return True


def _leave() -> None:
    """Several workers end together."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        from tn_lens.runs.workers import workers

        workers().leave()
