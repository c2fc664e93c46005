"""The commands that write pages from run folders, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tn_lens.cli.options import RunPath
from tn_lens.core.errors import BadInput


def report(folder: RunPath) -> None:
    """Rewrite report.html of a run, with the evaluations on other question sets in its folder."""
    from tn_lens.pipeline.run import rewrite_report

    rewrite_report(folder)
    typer.echo(f"Report: {folder / 'report.html'}")


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders, at least two.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("compare.html"),
) -> None:
    """Compare several runs on one page: their neurons by layer, the overlap, and the effects of ablation."""
    if out.is_dir() or out.suffix != ".html" or not out.resolve().parent.is_dir():
        raise BadInput(f"expected an .html file in a folder that exists for --out, got {str(out)!r}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise BadInput("expected different run folders; one was given twice")
    from tn_lens.cli.console import frame_table
    from tn_lens.cli.tables import open_console
    from tn_lens.report.page import write_comparison
    from tn_lens.results.comparison import compare

    comparison = compare(folders)
    write_file(out, write_comparison(comparison).encode(errors="xmlcharrefreplace"))
    console = open_console()
    for table in comparison.tables1():
        console.print(table)
    columns = ["run", "layers", "neurons", "first_third", "middle_third", "last_third"]
    console.print(frame_table(comparison.to_frame().filter(columns), title="neurons by depth"))
    for sentence in comparison.sentences():
        console.print(f"- {sentence}")
    console.print(f"\nPage: {out}", soft_wrap=True)


def write_file(path: Path, content: bytes) -> None:
    """Write the file that is given with --out.

    Raises:
        BadInput: the file cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BadInput(f"cannot write {str(path)!r}: {error.strerror}; give another --out") from error
