"""Run the notebooks and keep their outputs: `make notebooks`. What is kept is small and the same every time.

Plots are kept as data, without plotly itself; progress bars and warnings on standard error are not kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
PLOT = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> Any:
    """The notebook with fresh outputs, cleaned."""
    os.environ["OMP_NUM_THREADS"] = "1"  # numbers differ in their last bits between numbers of threads
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    return clean(notebook)


def clean(notebook: Any) -> Any:
    """Drop what differs from run to run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined([kept for kept in map(clean_output, cell.outputs) if kept is not None])
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """Printed text in one piece: how it arrives is a matter of timing."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def clean_output(output: Any) -> Any:
    """An output without what is too large or too fleeting; None for progress bars and standard error."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type in ("display_data", "execute_result"):
        if WIDGET in output.data:
            return None
        if PLOT in output.data:
            output.data = {PLOT: {key: value for key, value in output.data[PLOT].items() if key in ("data", "layout")}}
        output.metadata = {}
    return output


def main() -> None:
    """Run those that are named, or all."""
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(path), path)


if __name__ == "__main__":
    main()
