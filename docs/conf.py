"""Configuration of the documentation site (`make docs`). The source is read and not imported, so torch is not required."""

from __future__ import annotations

import ast
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tn_lens"
FURTHER = (
    "evaluation.controls",
    "evaluation.damage",
    "evaluation.diagnosis",
    "evaluation.tables",
    "evaluation.tuning",
    "selection.significance",
    "selection.stability",
    "selection.stored",
    "attribution.methods",
    "attribution.quadrature",
    "attribution.target",
    "runs.context",
    "runs.folder",
    "questions.formats",
    "questions.registry",
    "neurons.sites",
    "neurons.space",
    "results.card",
    "results.comparison",
    "report.page",
    "core.registry",
    "core.settings",
    "core.stored",
    "toy.plant",
)
"""Modules of the reference from which the package exports no names; they follow the modules with exported names."""

MIRRORED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "tn_lens/toy/model/MODEL_CARD.md": "project/model_card.md",
}
"""Pages from elsewhere in the repository -> their place in the documentation."""

project = "tn_lens"
author = "The tn_lens authors"
project_copyright = author
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "autoapi.extension", "myst_parser"]

html_theme = "furo"
html_title = "tn_lens"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autoapi_dirs = [str(PACKAGE)]
autoapi_generate_api_docs = False
autoapi_add_toctree_entry = False
suppress_warnings = [
    "autoapi.python_import_resolution",  # some modules and functions have the same name
    "ref.python",  # axis names in annotations look like references to attributes
]
autoapi_python_class_content = "class"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "literal"  # names in docstrings are in single backticks
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns", "Yields"]  # these are sentences: text before a colon is not a type
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


def imported_names(tree: ast.Module) -> dict[str, list[str]]:
    """The names that a module imports from the package, also those for type checking only, by module."""
    names: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tn_lens."):
            names.setdefault(str(node.module).removeprefix("tn_lens."), []).extend(name.name for name in node.names)
    return names


def read_stages() -> list[tuple[str, list[str]]]:
    """The modules with names that the package exports, in the order of the pipeline, and those names."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    stages: dict[str, list[str]] = {}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            stages.setdefault(node.module, []).extend(name.name for name in node.names)
    return list(stages.items())


def module_tree(module: str) -> ast.Module:
    """The syntax tree of a module, or of the `__init__` of a package."""
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public_names(module: str) -> dict[str, str]:
    """The functions and classes of a module, or the exports of a package -> the module that defines them."""
    tree = module_tree(module)
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = {node.name: module for node in defined if not node.name.startswith("_")}
    for source, imported in imported_names(tree).items():
        if source.startswith(f"{module}."):  # a package exports names of the modules inside it
            known = public_names(source)
            names |= {name: known[name] for name in imported if name in known}
    return names


def kind_of(module: str, name: str) -> str:
    """The autoapi directive for a name: "function" or "class"."""
    node = next(n for n in module_tree(module).body if getattr(n, "name", None) == name)
    return "function" if isinstance(node, ast.FunctionDef) else "class"


def page_of(module: str, exported: list[str], documented: Container[str] = ()) -> str:
    """A page of the reference: first the names that the package exports, then the other names of the module.

    Names in `documented` are left out, because another page contains them.
    """
    title, _, rest = (ast.get_docstring(module_tree(module)) or module).partition("\n")
    names = public_names(module)
    lines = [f"# {module}", "", title, rest, ""]
    for name in sorted(names, key=lambda name: (name not in exported, list(names).index(name))):
        path = f"tn_lens.{names[name]}.{name}"
        if path in documented:
            continue
        kind = kind_of(names[name], name)
        heading = f"`tn_lens.{name}`" if name in exported else f"`tn_lens.{module}.{name}`"
        lines += [f"## {heading}", "", "```{eval-rst}", f".. autoapi{kind}:: {path}"]
        lines += ["   :members:"] if kind == "class" else []
        lines += ["```", ""]
    return "\n".join(lines)


def write_pages(app: Any) -> None:
    """Write a page of the reference for each module, and the pages from elsewhere except the README."""
    here = Path(app.srcdir)
    stages = read_stages()
    stages += [(module, []) for module in FURTHER if module not in dict(stages)]
    pages: dict[str, str] = {}
    documented: set[str] = set()
    for module, names in stages:
        page = page_of(module, names, documented)
        paths = re.findall(r"^\.\. autoapi\w+:: (\S+)$", page, re.MULTILINE)
        if paths:
            pages[f"reference/{len(pages) + 1:02d}_{module}.md"] = page
        documented.update(paths)
    pages |= {page: mirrored(source) for source, page in MIRRORED.items() if page != "index.md"}
    for folder in ("reference", "project"):
        (here / folder).mkdir(exist_ok=True)
        for old in (here / folder).glob("*.md"):
            old.unlink()
    for name, text in pages.items():
        (here / name).write_text(text, encoding="utf-8")


def home(app: Any, docname: str, source: list[str]) -> None:
    """Put the README on the home page, above the tables of contents."""
    if docname == "index":
        source[0] = mirrored("README.md") + source[0]


def mirrored(source: str) -> str:
    """A page from elsewhere, with its relative links adapted to its place in the documentation."""
    text = (ROOT / source).read_text(encoding="utf-8")
    depth = "../" * MIRRORED[source].count("/")

    def there(link: re.Match[str]) -> str:
        path, hash_, anchor = link[2].partition("#")
        target = (ROOT / source).parent.joinpath(path).resolve().relative_to(ROOT.resolve()).as_posix()
        place = MIRRORED.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}")
        return f"{link[1]}({depth}{place}{hash_}{anchor})"

    return re.sub(r"(\])\((?![a-z]+:|#)([^)\s]+)\)", there, text)


def as_markup(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escape bars and asterisks outside backticks: docstrings are plain text, not reStructuredText."""
    lines[:] = [re.sub(r"(`[^`]*`)|([|*])", lambda m: m[1] or "\\" + m[2], line) for line in lines]


def setup(app: Any) -> None:
    """Register the functions above."""
    unchanged: dict[str, list[str]] = {}

    def keep(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        unchanged[name] = list(lines)

    def restore(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        """Undo napoleon for attributes: it takes the text before a colon as a type."""
        if what in ("attribute", "property"):
            lines[:] = unchanged[name]

    app.connect("builder-inited", write_pages, priority=100)
    app.connect("source-read", home)
    for hook, priority in ((as_markup, 300), (keep, 400), (restore, 900)):
        app.connect("autodoc-process-docstring", hook, priority=priority)
