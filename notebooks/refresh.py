"""Execute the notebooks and store their outputs: `make notebooks`. The stored outputs are small and reproducible.

Plots are stored as data, without plotly's JavaScript. Progress bars and standard error are not stored.
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


def kernel_for(notebook: Any) -> NotebookClient:
    """A client that executes a notebook in a new kernel."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the last bits of the results depend on the number of threads
    return NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": HERE}})


def run(path: Path, client: NotebookClient | None = None) -> Any:
    """Execute a notebook, and return it with cleaned outputs.

    Args:
        path: the notebook.
        client: executes the notebook in a kernel that stays alive for others, which saves the imports. The variables of
            earlier notebooks are removed. By default, a new kernel is started.
    """
    notebook = nbformat.read(path, as_version=4)
    if client is None:
        kernel_for(notebook).execute()
    else:
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
        client.nb = notebook
        client.execute(cleanup_kc=False)
        del notebook.cells[0]
    return clean(notebook)


def clean(notebook: Any) -> Any:
    """Remove everything that differs from run to run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined([output for output in map(clean_output, cell.outputs) if output is not None])
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """Join consecutive pieces of printed text, whose boundaries depend on timing."""
    merged: list[Any] = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def clean_output(output: Any) -> Any:
    """Return the output without its large and varying parts; None for progress bars and standard error."""
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
    """Execute the notebooks named on the command line, or all."""
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(path), path)


if __name__ == "__main__":
    main()
