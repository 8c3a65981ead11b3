"""Imports point one way: between the packages, and between the layers of `clicktrain`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CLONE = Path(__file__).parent.parent

ALLOWED = {
    "clicktrain": set(),
    "baselines": {"clicktrain"},
    "bench": {"clicktrain", "baselines"},
    "reproductions": {"clicktrain", "baselines"},
}

# Modules and subpackages of clicktrain, lowest first; each may import its own layer and those below it.
LAYERS = (
    {"distributed", "errors", "files", "memory", "processor", "provenance", "toml", "_torchvision"},
    {"data", "mixup", "models", "patterns", "schedule"},
    {"kernels", "timing"},  # timing calibrates itself with a compute kernel, autotuning needs timing
    {"assignment", "blocked", "budget", "importance"},
    {"layers", "pool", "regularizer"},
    {"conversion", "deploy", "flops", "preparation", "recording"},
    {"official", "selection"},
    {"algorithm", "method"},
    {"config", "planning", "presets", "training"},
    {"cli", "__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

ONLY_WHERE_USED = (
    "baselines",
    "bench",
    "cupy",
    "fvcore",
    "matplotlib",
    "pydantic",
    "rich",
    "safetensors",
    "torchvision",
    "typer",
)


def _sources(package: str) -> list[Path]:
    return sorted((CLONE / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Yield the full names that a module imports, those for type checking only left out."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent == CLONE / "bench" / "suite":
                continue  # a package of its own to asv, so that it cannot say bench.suite
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_is_below_them(package: str) -> None:
    forbidden = set(ALLOWED) - ALLOWED[package] - {package} | {"tests"}
    found = {
        f"{path.relative_to(CLONE)} imports {name}"
        for path in _sources(package)
        for name in _imports(path)
        if name.split(".")[0] in forbidden
    }
    assert found == set()


def test_layers_of_the_library_import_only_what_is_below_them() -> None:
    found = set()
    for path in _sources("clicktrain"):
        module = path.relative_to(CLONE / "clicktrain").parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        assert module in RANK, f"clicktrain/{module} has no place in LAYERS"
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "clicktrain" and len(parts) > 1 and RANK.get(parts[1], 0) > RANK[module]:
                found.add(f"{path.relative_to(CLONE)} imports {name}")
    assert found == set()


def test_the_import_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b, c as d\nfrom e.f import g as h, i\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hidden\n"
        "def late():\n    import j\n"
    )
    assert list(_imports(path)) == ["a.b", "c", "e.f.g", "e.f.i", "typing.TYPE_CHECKING", "j"]


def test_importing_the_library_takes_torch_and_numpy_only() -> None:
    script = f"import sys, clicktrain; print(*[name for name in {ONLY_WHERE_USED!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=CLONE, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
