"""Imports point one way, and importing the package stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qtvit
import qtvit_cli
from qtvit import tasks

ROOT = Path(qtvit.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
COMMANDS = sorted(Path(qtvit_cli.__file__).parent.glob("*.py"))

# A module imports from its own package and from rows above, never sideways or down. "qtvit" is what users import.
LAYERS = [
    {"errors", "files", "device", "version", "console", "moved"},
    {"ops"},
    {"layers"},
    {"models"},
    {"checkpoints", "data"},
    {"deploy", "training"},
    {"tasks"},
    {"ablation", "bench", "doctor", "explain"},
    {"cli"},
    {"qtvit", "__main__"},
]
RANK = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
REGISTRY = "tasks"
"""Its ``__init__.py`` imports no task, so anything from the row of the model files on may import it."""
TASK_MODULES = ["config", "distill", "evaluate", "loss", "metric", "plots", "report", "stream", "train", "coco_eval"]
NEED_EXTRAS = [
    "ablation/*",
    "bench/plots.py",
    "doctor/draw.py",
    "explain/draw.py",
    "training/*",
    *(f"tasks/*/{name}.py" for name in TASK_MODULES),
]
CORE = {"qtvit", "qtvit_cli", "torch", "torchvision", "timm"}
CORE |= {"safetensors", "huggingface_hub", "yaml", "numpy", "PIL", "tqdm"}  # that come with these
HEAVY = ["lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "matplotlib", "sklearn", "tensorboard"]


def package_of(dotted: str) -> str:
    """The entry of LAYERS that a dotted name belongs to."""
    return next((part for part in dotted.split(".")[1:2] if part in RANK), "qtvit")


def imported_names(path: Path, top_level: bool = False) -> Iterator[str]:
    """Dotted names of ours that a module imports, anywhere in it, relative ones resolved; ``qtvit_cli`` is the cli."""
    package = ["qtvit", *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
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
        is_registry = name == "qtvit.tasks" and RANK[here] >= RANK["checkpoints"]
        assert there == here or RANK[there] < RANK[here] or is_registry, f"{here} may not import {name}"


TASKS = [name for name in tasks.TASKS if (ROOT / "tasks" / name).is_dir()]


@pytest.mark.parametrize("task", TASKS)
def test_tasks_do_not_import_each_other(task: str) -> None:
    for path in (ROOT / "tasks" / task).glob("*.py"):
        for name in imported_names(path):
            assert not name.startswith(tuple(f"qtvit.tasks.{other}" for other in TASKS if other != task)), path


def test_what_tasks_share_and_the_registry_import_no_task() -> None:
    for path in (ROOT / "tasks").glob("*.py"):
        assert not [name for name in imported_names(path) if name.startswith(tuple(f"qtvit.tasks.{t}" for t in TASKS))]


@pytest.mark.parametrize("path", [*MODULES, *COMMANDS], ids=lambda path: "/".join(path.parts[-3:]))
def test_no_task_is_told_by_its_name(path: Path) -> None:
    """Outside its own folder: what differs by task comes from the registry."""
    if path.is_relative_to(ROOT / "tasks"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            compared = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            assert not set(compared) & set(TASKS), f"{path}:{node.lineno}"


def test_imports_make_no_circles() -> None:
    """Of modules, at the top level of which the imports are; a package stands for its ``__init__.py``."""
    names = {path: ".".join(["qtvit", *path.relative_to(ROOT).with_suffix("").parts]) for path in MODULES}
    known = {name.removesuffix(".__init__"): name for name in names.values()}
    graph = {}
    for path, name in names.items():
        imported = set(imported_names(path, top_level=True))
        modules = {known.get(each) or known.get(each.rpartition(".")[0]) for each in imported} - {None, name}
        graph[name] = {each for each in modules if not each.endswith("__init__")}  # which import their own modules
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


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
