"""The documentation: no dead links, and every public name in the reference."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import tn_lens

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *(ROOT / "tn_lens").rglob("*.md")]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ +(.+?) *$", CODE.sub(lambda code: code[0] if "\n" not in code[0] else "", text), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere in the repository."""
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
    """How the site is made; `make docs`, which `make test` runs, makes it, and stops at warnings."""
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference(conf: Any) -> None:
    stages = conf.read_stages()
    assert {name for _, names in stages for name in names} == set(tn_lens.__all__)
    for module, names in stages:
        page = conf.page_of(module, names)
        for name in names:
            thing = getattr(tn_lens, name)
            kind = "class" if isinstance(thing, type) else "function"
            assert f".. autoapi{kind}:: {thing.__module__}.{name}\n" in page
    assert ".. autoapiclass:: tn_lens.cards.card.Card\n   :members:" in conf.page_of("cards", [])
    assert "_records" not in conf.page_of("cards", [])


def test_mirrored_pages_have_their_links_moved(conf: Any) -> None:
    assert "](statistics.md)" in conf.mirrored("README.md")
    assert "](project/model_card.md)" in conf.mirrored("README.md")
    assert "](../notebooks/01_quickstart.ipynb)" in conf.mirrored("README.md")
    for source in conf.MIRRORED:
        assert (ROOT / source).is_file()


def test_every_figure_is_in_the_guide_and_in_the_gallery() -> None:
    guide, gallery = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("figures.md", "gallery.py"))
    plots = [name for name in tn_lens.figures.__all__ if name.startswith("plot_")]
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
