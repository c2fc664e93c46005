"""How the documentation site is built: `make docs`. The package is read and not imported, so that nothing else is needed."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tn_lens"
BEHIND = (
    "diagnosis",
    "reselection",
    "tuning",
    "controls",
    "significance",
    "storage",
    "scores",
    "retest",
    "report",
    "toy.plant",
)
"""Modules of the reference that hold no public name of the package, after those that do."""

MIRRORED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "tn_lens/toy/model/MODEL_CARD.md": "project/model_card.md",
}
"""Pages that live elsewhere in the repository -> their place here."""

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
suppress_warnings = ["autoapi.python_import_resolution"]  # of a module and a function of one name
autoapi_python_class_content = "class"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "literal"  # docstrings put names into single backticks
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns", "Yields"]  # sentences, whose colon ends no type
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


def read_stages() -> list[tuple[str, list[str]]]:
    """The modules whose names the package exports, in the order of the pipeline, and those names."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    return [(str(node.module), [name.name for name in node.names]) for node in imports]


def module_tree(module: str) -> ast.Module:
    """A module's source, or that of a package's `__init__`."""
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public_names(module: str) -> dict[str, str]:
    """Functions and classes of a module, or what a package exports -> where they are defined."""
    tree = module_tree(module)
    if not (PACKAGE / module.replace(".", "/")).is_dir():
        defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        return {node.name: module for node in defined if not node.name.startswith("_")}
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            inner = f"{module}.{node.module}"
            known = public_names(inner)
            names |= {one.name: known[one.name] for one in node.names if one.name in known}
    return names


def kind_of(module: str, name: str) -> str:
    """The directive that documents it."""
    node = next(n for n in module_tree(module).body if getattr(n, "name", None) == name)
    return "function" if isinstance(node, ast.FunctionDef) else "class"


def page_of(module: str, exported: list[str]) -> str:
    """A page of the reference: what the package exports first, then what else is in the module."""
    title, _, rest = (ast.get_docstring(module_tree(module)) or module).partition("\n")
    names = public_names(module)
    lines = [f"# {module}", "", title, rest, ""]
    for name in sorted(names, key=lambda name: (name not in exported, list(names).index(name))):
        path = f"tn_lens.{names[name]}.{name}"
        kind = kind_of(names[name], name)
        said = f"`tn_lens.{name}`" if name in exported else f"`tn_lens.{module}.{name}`"
        lines += [f"## {said}", "", "```{eval-rst}", f".. autoapi{kind}:: {path}"]
        lines += ["   :members:"] if kind == "class" else []
        lines += ["```", ""]
    return "\n".join(lines)


def write_pages(app: Any) -> None:
    """A page of the reference for each stage, and the pages that live elsewhere; the README goes to the home page."""
    here = Path(app.srcdir)
    stages = read_stages() + [(module, []) for module in BEHIND]
    pages = {
        f"reference/{place:02d}_{module}.md": page_of(module, names) for place, (module, names) in enumerate(stages, 1)
    }
    pages |= {page: mirrored(source) for source, page in MIRRORED.items() if page != "index.md"}
    for folder in ("reference", "project"):
        (here / folder).mkdir(exist_ok=True)
        for old in (here / folder).glob("*.md"):
            old.unlink()
    for name, text in pages.items():
        (here / name).write_text(text, encoding="utf-8")


def home(app: Any, docname: str, source: list[str]) -> None:
    """The README is the home page, above the tables of contents."""
    if docname == "index":
        source[0] = mirrored("README.md") + source[0]


def mirrored(source: str) -> str:
    """A page from elsewhere, its relative links seen from where it stands here."""
    text = (ROOT / source).read_text(encoding="utf-8")
    depth = "../" * MIRRORED[source].count("/")

    def there(link: re.Match[str]) -> str:
        path, hash_, anchor = link[2].partition("#")
        target = (ROOT / source).parent.joinpath(path).resolve().relative_to(ROOT.resolve()).as_posix()
        place = MIRRORED.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}")
        return f"{link[1]}({depth}{place}{hash_}{anchor})"

    return re.sub(r"(\])\((?![a-z]+:|#)([^)\s]+)\)", there, text)


def as_markup(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with names in backticks: bars and stars mean themselves."""
    lines[:] = [re.sub(r"(`[^`]*`)|([|*])", lambda m: m[1] or "\\" + m[2], line) for line in lines]


def setup(app: Any) -> None:
    """Connect the above."""
    whole: dict[str, list[str]] = {}

    def keep(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        whole[name] = list(lines)

    def restore(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        """Of an attribute, napoleon would take what stands before a colon for its type."""
        if what in ("attribute", "property"):
            lines[:] = whole[name]

    app.connect("builder-inited", write_pages, priority=100)
    app.connect("source-read", home)
    for hook, priority in ((as_markup, 300), (keep, 400), (restore, 900)):
        app.connect("autodoc-process-docstring", hook, priority=priority)
