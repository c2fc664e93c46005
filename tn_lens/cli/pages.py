"""The commands that write pages from run folders, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tn_lens.cli.console import frame_table, open_console
from tn_lens.core.errors import BadInput


def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Write a run's report.html anew, with the evaluations that its folder holds."""
    from tn_lens.pipeline.run import report_of
    from tn_lens.runs.folder import RunFolder

    RunFolder(folder).write("report.html", report_of(folder))
    typer.echo(f"Report: {folder / 'report.html'}")


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders, at least two.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> None:
    """Put several runs beside each other in one page: where their neurons sit, how alike, and what they do."""
    from tn_lens.report.page import write_comparison
    from tn_lens.results.comparison import compare
    from tn_lens.results.run import load_run

    if out.is_dir() or out.suffix != ".html" or not out.resolve().parent.is_dir():
        raise BadInput(f"expected an .html file in a folder that exists for --out, got {str(out)!r}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise BadInput("expected different run folders; one was given twice")
    comparison = compare([load_run(folder) for folder in folders])
    try:
        out.write_bytes(write_comparison(comparison).encode(errors="xmlcharrefreplace"))
    except OSError as error:
        raise BadInput(f"cannot write {str(out)!r}: {error.strerror}; give another --out") from error
    console = open_console()
    for table in comparison.tables1():
        console.print(table)
    shown = comparison.to_frame().filter(["run", "layers", "neurons", "first_third", "middle_third", "last_third"])
    console.print(frame_table(shown, title="where the neurons sit"))
    for sentence in comparison.sentences():
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"\nPage: {out}", highlight=False, soft_wrap=True, markup=False)
