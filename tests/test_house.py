"""The house is in order: imports run downwards, the linter and the type checker are content."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tn_lens

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tn_lens"

# From the bottom to the top; a module may import from its own group only what stands before it, and from any group below.
ORDER = [
    "errors",
    "wording",
    "distributed",
    "progress",
    "seeds",
    "neurons",
    "models.backend",
    "models.bridge_cache",
    "models.bridge_joining",
    "models.bridge",
    "models.hooked_attention",
    "models.hooked",
    "models.conversion",
    "models",
    "significance",
    "toy.world",
    "questions.question",
    "questions.toy",
    "questions.files",
    "questions.mmlu",
    "questions.triviaqa",
    "questions.load",
    "questions.adversarial",
    "questions",
    "loading",
    "prompts",
    "units",
    "toy.plant",
    "forward",
    "interventions",
    "answers",
    "manipulation",
    "attribution.quadrature",
    "attribution.target",
    "attribution.result",
    "attribution.integrate",
    "attribution.direct",
    "attribution.shared_prefix",
    "attribution.attribute",
    "attribution",
    "selection",
    "controls",
    "evaluation.arm",
    "evaluation.reading",
    "evaluation.reference",
    "evaluation.tables",
    "evaluation.result",
    "evaluation.stored",
    "evaluation.text",
    "evaluation.evaluate",
    "evaluation.dose",
    "evaluation",
    "figures.look",
    "figures.layers",
    "figures.accuracies",
    "figures.evaluation",
    "figures.selection",
    "figures.attribution",
    "figures.save",
    "figures",
    "settings",
    "seals",
    "storage",
    "scores",
    "reselection",
    "tuning",
    "diagnosis",
    "cards.words",
    "cards.card",
    "cards.make",
    "cards",
    "found",
    "runs",
    "prose",
    "compare",
    "report",
    "pipeline",
    "planning",
    "retest",
    "console",
    "cli_evaluate",
    "cli_show",
    "cli_pages",
    "cli",
    "toy.train",
    "toy.choose",
]


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py", PACKAGE / "toy" / "__init__.py")
    }


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, apart from those for type checking only."""
    here = list(path.relative_to(PACKAGE).parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in skipped:
            base = here[: len(here) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for name in node.names:
                inner = f"{target}.{name.name}".strip(".")
                found.add(inner if inner in modules() else target)
    return found


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(ORDER)


@pytest.mark.parametrize("name", [name for name in ORDER if name != "toy.choose"])
def test_imports_run_downwards(name: str) -> None:
    above = [target for target in imports(modules()[name]) if ORDER.index(target) >= ORDER.index(name)]
    assert not above, f"{name} imports {above}, which stand above it"


def test_the_check_of_imports_can_fail() -> None:
    assert "pipeline" in imports(PACKAGE / "cli.py")
    assert ORDER.index("pipeline") > ORDER.index("prompts")
    assert "questions.question" in imports(PACKAGE / "questions" / "toy.py")


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
"""What only a model of some kind has."""


def knows_the_kind(source: str) -> set[str]:
    """What in a module depends on the kind of a model."""
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
    """Stages ask `backend_of`; the planted model is written into the weights of one kind."""
    knowing = {name: found for name, path in modules().items() if (found := knows_the_kind(path.read_text()))}
    assert {name.split(".")[0] for name in knowing} - {"toy"} == {"models"}, knowing
    assert set(knowing) - {name for name in knowing if name.startswith("models")} == {"toy.plant"}


@pytest.mark.parametrize("source", ["model.cfg.n_ctx", "model.blocks[0]", "isinstance(m, Bridge)", "kind == 'bridge'"])
def test_the_check_of_kinds_can_fail(source: str) -> None:
    assert knows_the_kind(source)


def test_public_names_are_documented_and_few() -> None:
    assert len(tn_lens.__all__) <= 30
    for name in tn_lens.__all__:
        assert (getattr(tn_lens, name).__doc__ or "").strip(), name


def test_no_module_is_too_long() -> None:
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("arguments", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("pyright",)])
def test_linters_are_content(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if arguments == ("pyright",) and "0 errors" not in done.stdout and "error:" not in done.stdout:
        pytest.skip(f"pyright could not start (it fetches itself from the npm registry): {done.stderr[-200:]}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_environments_have_the_same_versions_but_for_transformer_lens() -> None:
    one, two = ((ROOT / name).read_text().splitlines()[1:] for name in ("constraints.txt", "constraints-tl4.txt"))
    different = [pair for pair in zip(one, two, strict=True) if pair[0] != pair[1]]
    assert different == [("transformer-lens==3.9.0", "transformer-lens==4.3.0")]


def test_the_report_template_travels_with_the_package() -> None:
    assert (PACKAGE / "templates" / "report.html.j2").is_file()
    assert sum(f.stat().st_size for f in (PACKAGE / "toy" / "model").iterdir()) < 2_000_000
