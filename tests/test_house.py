"""Structure of the code: the order of imports, the linter, and the type checker."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import tn_lens

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tn_lens"


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py", PACKAGE / "toy" / "__init__.py")
    }


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the order of the packages in a checkout, imports for type checking included."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )


def test_imports_run_downwards() -> None:
    done = linted(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "line", ["from tn_lens.report.page import write_report", "if TYPE_CHECKING:\n    from tn_lens.report import page"]
)
def test_the_check_of_imports_can_fail(tmp_path: Path, line: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "tn_lens", ignore=shutil.ignore_patterns("__pycache__", "model"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module = tmp_path / "tn_lens" / "core" / "seeds.py"
    module.write_text(f"{module.read_text()}\nfrom typing import TYPE_CHECKING\n{line}\n")
    done = linted(tmp_path)
    assert done.returncode == 1
    assert "tn_lens.core is not allowed to import tn_lens.report" in done.stdout


def test_no_package_imports_itself_in_a_circle() -> None:
    graph = grimp.build_graph("tn_lens", exclude_type_checking_imports=False)
    order = TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules})
    # a package and a module inside it may import each other: `__init__` re-exports what its modules define
    order.prepare()


def test_few_entries_stand_side_by_side() -> None:
    ignored = {"__init__.py", "__main__.py", "__pycache__", "py.typed", "__init__.pyi"}
    assert len([path for path in PACKAGE.iterdir() if path.name not in ignored]) <= 16


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions of the package, by module and name."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", node


def test_functions_are_short_and_take_few_parameters() -> None:
    lines = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert max(lines.values()) <= 80, max(lines, key=lambda name: lines[name])
    for name, node in functions():
        if not name.startswith("cli."):
            assert len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) <= (
                15 if name == "attribution.attribute:attribute" else 12
            ), name


def test_the_pipeline_reads_on_one_screen() -> None:
    node = dict(functions())["pipeline.run:find_truth_neurons"]
    docstring = node.body[0]
    rest_of_docstring = (docstring.end_lineno or 0) - docstring.lineno  # all but its first line
    assert (node.end_lineno or 0) - node.lineno + 1 - rest_of_docstring <= 60


@pytest.mark.parametrize(("library", "only"), [("plotly", "figures")])
def test_one_module_imports_a_library(library: str, only: str) -> None:
    users = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            outside = node.module or "" if isinstance(node, ast.ImportFrom) and not node.level else ""
            if library in {one.split(".")[0] for one in (*names, outside)}:
                users.add(name.split(".")[0])
    assert users == {only}


def test_only_models_imports_transformer_lens() -> None:
    users = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(one.split(".")[0] == "transformer_lens" for one in names):
                users.add(name.split(".")[0])
    assert users == {"models"}


INSIDE = {"cfg", "blocks", "hook_dict", "unembed", "ln_final", "original_model", "run_with_hooks", "run_with_cache"}
"""Attributes that only one of the model classes has."""


def knows_the_kind(source: str) -> set[str]:
    """The names in a module that depend on the model class."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in INSIDE:
            found.add(node.attr)
        if isinstance(node, ast.Name) and node.id in ("HookedTransformer", "TransformerBridge", "Hooked", "Bridge"):
            found.add(node.id)
        if isinstance(node, ast.Compare):
            compared = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
            found |= {value for value in compared if value in ("hooked", "bridge")}
    return found


def test_only_models_knows_which_kind_a_model_is() -> None:
    """Stages use `backend_of`. Only the planted model depends on a model class, whose weights it sets."""
    knowing = {name: found for name, path in modules().items() if (found := knows_the_kind(path.read_text()))}
    assert {name.split(".")[0] for name in knowing} - {"toy"} == {"models"}, knowing
    assert set(knowing) - {name for name in knowing if name.startswith("models")} == {"toy.plant"}


@pytest.mark.parametrize("source", ["model.cfg.n_ctx", "model.blocks[0]", "isinstance(m, Bridge)", "kind == 'bridge'"])
def test_the_check_of_kinds_can_fail(source: str) -> None:
    assert knows_the_kind(source)


def test_public_names_are_documented_and_few() -> None:
    assert len(tn_lens.__all__) <= 54
    for name in tn_lens.__all__:
        assert (getattr(tn_lens, name).__doc__ or "").strip(), name


def test_no_module_is_too_long() -> None:
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("pyright",), ("ruff", "check", "."), ("ruff", "format", "--check", ".")])
def test_linters_are_content(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_environments_have_the_same_versions_but_for_transformer_lens() -> None:
    one, two = ((ROOT / name).read_text().splitlines()[1:] for name in ("constraints.txt", "constraints-tl4.txt"))
    different = [pair for pair in zip(one, two, strict=True) if pair[0] != pair[1]]
    assert different == [("transformer-lens==3.9.0", "transformer-lens==4.3.0")]


def test_the_wheel_holds_what_the_package_reads(tmp_path: Path) -> None:
    """The package contains templates, sentences, the toy model's weights and the type stubs."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("truth_neurons-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert str(path.relative_to(ROOT)) in names
    for needed in ("report/templates/report.html.j2", "report/sentences/evaluation.j2", "toy/model/model.safetensors"):
        assert f"tn_lens/{needed}" in names
    assert {"tn_lens/__init__.pyi", "tn_lens/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    assert sum(f.stat().st_size for f in (PACKAGE / "toy" / "model").iterdir()) < 2_000_000
