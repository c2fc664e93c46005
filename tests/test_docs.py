"""The documentation: links, the reference, the examples of the guides, and the imports of the notebooks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

import tn_lens
from tn_lens.attribution.methods import METHODS
from tn_lens.core.registry import Registry
from tn_lens.evaluation.controls import CONTROLS
from tn_lens.inference.interventions import INTERVENTIONS
from tn_lens.neurons.sites import SITES
from tn_lens.questions.formats import FORMATS
from tn_lens.questions.registry import QUESTION_SETS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *(ROOT / "tn_lens").rglob("*.md")]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = EXAMPLE.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))
"""The examples of the guide to extensions: one for each registry."""
REGISTRIES: tuple[Registry[Any], ...] = (METHODS, QUESTION_SETS, FORMATS, INTERVENTIONS, CONTROLS, SITES)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_page_about_a_trained_model_has_the_stored_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    real_model = importlib.import_module("real_model")
    results = json.loads(real_model.RESULTS.read_text())
    assert real_model.PAGE.read_text(encoding="utf-8") == real_model.markdown(results)
    (found,) = (row for row in results["runs"] if (row["found_on"], row["baseline"]) == ("common_facts", "zero"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for condition, label in (("unablated", "| nothing |  |"), ("ablated", "| **the found neurons** | 9 |")):
        accuracy, mass = found["accuracy"][condition], found["answer_mass"][condition]
        assert f"{label} {100 * accuracy:.1f} | {mass:.3f} |" in readme


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", CODE.sub(lambda code: code[0] if "\n" not in code[0] else "", text), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    """The relative links of a page whose target does not exist."""
    text = page.read_text(encoding="utf-8")
    dead = []
    for link in LINK.findall(CODE.sub("", text)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page if not path else (page.parent / path)
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    assert not dead_links(page)


def test_dead_links_are_seen(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# One, `two` & three\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-two--three) [c](gone.md) [d](other.md#no-heading) [e](#none) ![f](gone.png) "
        "`[g](gone.md)` [h](https://example.org/#x)\n"
    )
    assert dead_links(page) == ["gone.md", "other.md#no-heading", "#none", "gone.png"]


@pytest.fixture(scope="module")
def conf() -> Any:
    """The configuration of the site. `make docs`, which `make test` runs, builds the site and treats warnings as errors."""
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference(conf: Any) -> None:
    stages = conf.read_stages()
    # the figures are a module, and have a guide of their own
    assert {name for _, names in stages for name in names} == set(tn_lens.__all__) - {"figures"}
    for module, names in stages:
        page = conf.page_of(module, names)
        for name in names:
            thing = getattr(tn_lens, name)
            kind = "class" if isinstance(thing, type) else "function"
            assert f".. autoapi{kind}:: {thing.__module__}.{name}\n" in page
    assert ".. autoapiclass:: tn_lens.results.card.Card\n   :members:" in conf.page_of("results.card", [])
    assert ".. autoapifunction:: tn_lens.results.make_cards.make_cards\n" in conf.page_of("results.make_cards", [])
    assert "_by_question" not in conf.page_of("results.make_cards", [])


def test_mirrored_pages_have_their_links_moved(conf: Any) -> None:
    assert "](statistics.md)" in conf.mirrored("README.md")
    assert "](project/model_card.md)" in conf.mirrored("README.md")
    assert "](../notebooks/01_quickstart.ipynb)" in conf.mirrored("README.md")
    for source in conf.MIRRORED:
        assert (ROOT / source).is_file()


def test_every_figure_is_in_the_guide_and_in_the_gallery() -> None:
    guide, gallery = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("figures.md", "gallery.py"))
    plots = [name for name in dir(tn_lens.figures) if name.startswith("plot_")]
    assert len(plots) >= 11
    assert [name for name in plots if f"| `{name}` |" not in guide] == []
    assert [name for name in plots if f"figures.{name}(" not in gallery] == []


def test_the_call_in_the_guide_to_figures_draws(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)\.show\(\)\n```", guide, re.DOTALL)
    place = tmp_path / "neurons.json"
    tn_lens.NeuronSet([tn_lens.Neuron("mlp", 1, None, 3)]).save(place)
    assert "runs/demo/neurons.json" in code
    figure = eval(code.replace("runs/demo/neurons.json", str(place)), {"tn": tn_lens})
    assert "layer 1, the last of 2" in figure.finding


def test_docstrings_keep_their_bars_and_stars(conf: Any) -> None:
    lines = ["mean |gap| of `a | b` and t * max(D)"]
    conf.as_markup(None, "function", "f", None, None, lines)
    assert lines == [r"mean \|gap\| of `a | b` and t \* max(D)"]


@pytest.fixture
def _fresh_registries() -> Iterator[None]:
    """Remove the entries that a test registers, since a name can be registered only once per process."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_the_guide_to_extensions_has_an_example_for_each_registry() -> None:
    assert len(EXAMPLES) == len(REGISTRIES)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_registries")
@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_guide_to_extensions_run(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [len(registry) for registry in REGISTRIES]
    exec(example, {"__name__": "example"})
    assert sum(map(len, REGISTRIES)) == sum(sizes) + 1, "the example registers one entry"
    assert capsys.readouterr().out.strip()


def package_imports(source: str) -> set[str]:
    """The modules of tn_lens that a piece of code imports, or imports names from."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    return {module for module in modules if module.split(".")[0] == "tn_lens"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_the_public_names_only(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "tn_lens" in package_imports(source)
    assert package_imports(source) <= {"tn_lens", "tn_lens.figures"}
    used = {node.attr for node in ast.walk(ast.parse(source)) if _is_attribute_of(node, "tn")}
    assert used <= set(tn_lens.__all__)


def _is_attribute_of(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name


def test_imports_from_other_modules_are_detected() -> None:
    source = "import numpy as np\nimport tn_lens as tn\nfrom tn_lens import figures\nfrom tn_lens.toy import plant\n"
    assert package_imports(source) == {"tn_lens", "tn_lens.toy"}
