"""Imports point one way, and importing the package stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qtvit
import qtvit_cli

ROOT = Path(qtvit.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
COMMANDS = sorted(Path(qtvit_cli.__file__).parent.glob("*.py"))

# A module imports from its own package and from rows above, never sideways or down. "qtvit" is what users import.
LAYERS = [
    {"errors", "files", "device", "version", "console"},
    {"ops"},
    {"layers"},
    {"models"},
    {"checkpoints", "data"},
    {"deploy"},
    {"training", "explain", "bench"},
    {"cli"},
    {"qtvit", "__main__"},
]
RANK = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
NEED_EXTRAS = [
    "bench/labels.py",
    "bench/plots.py",
    "data/stream.py",
    "deploy/doctor/draw.py",
    "explain/draw.py",
    "training/*",
]
CORE = {"qtvit", "qtvit_cli", "torch", "torchvision", "timm"}
CORE |= {"safetensors", "huggingface_hub", "yaml", "numpy", "PIL", "tqdm"}  # that come with these
HEAVY = ["lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "matplotlib", "sklearn", "tensorboard"]


def package_of(dotted: str) -> str:
    """The entry of LAYERS that a dotted name belongs to."""
    return next((part for part in dotted.split(".")[1:2] if part in RANK), "qtvit")


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of ours that a module imports, anywhere in it, relative ones resolved; ``qtvit_cli`` is the cli."""
    package = ["qtvit", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        names = [name.replace("qtvit_cli", "qtvit.cli", 1) for name in names]
        yield from (name for name in names if name.split(".")[0] == "qtvit")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0].removesuffix(".py").replace("__init__", "qtvit")
    assert here in RANK, f"{here} has no place in LAYERS"
    for name in imported_names(path):
        there = package_of(name)
        assert there == here or RANK[there] < RANK[here], f"{here} may not import {name}"


def test_importing_qtvit_is_light() -> None:
    script = f"import sys, qtvit; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_commands_import_nothing_but_the_standard_library_until_they_run(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).split(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_import_no_extras_but_where_they_are_needed(path: Path) -> None:
    if any(path.relative_to(ROOT).match(pattern) for pattern in NEED_EXTRAS):
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= CORE | sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).split(".")[0] in CORE | sys.stdlib_module_names
