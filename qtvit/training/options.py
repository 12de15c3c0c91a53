"""Settings from the command line, YAML recipes and keyword arguments, checked strictly.

All are checked against the dataclasses of `qtvit.training.config`; a name that does not exist is an error.
"""

import json
import re
from argparse import HelpFormatter
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from qtvit.errors import unknown_name
from qtvit.files import write_text

from .config import TrainConfig, as_option

C = TypeVar("C", bound=TrainConfig)


def parse_config(argv: list[str], kind: type[C]) -> C:
    """The configuration of ``kind`` that ``--recipe NAME`` and the other options of ``argv`` describe; options win over
    the recipe.

    Raises:
        ValueError: an option or key that does not exist, or a value that it does not take; a recipe of another task.
        FileNotFoundError: a recipe file that does not exist.
    """
    parser = _Parser(prog=f"qtvit train {kind.task}", description=summary_of(kind), exit_on_error=False)
    parser.add_argument(
        "--recipe", action="config", help=f"what to start from: {', '.join(recipe_names(kind.task))}, or a YAML file"
    )
    parser.add_class_arguments(kind, as_group=False)
    argv = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in argv]
    options = ["recipe", "help", "print_config", *_dotted_names(kind)]
    given = [arg[2:].split("=")[0] for arg in argv if arg.startswith("--")]
    for name in given:
        if name not in options and not name.startswith("model_args."):
            raise unknown_name("option", as_option(name), map(as_option, options))
    if "resume" in given:
        argv = _resumed(argv, given, kind)
    try:
        values = parser.instantiate(parser.parse_args(_recipe_first(argv, kind)))
    except ArgumentError as error:
        message = re.sub(r'Parser key "(\S+)":', lambda key: f"{as_option(key[1])}:", " ".join(str(error).split()))
        message = re.sub(r"required: (\w)", r"required: --\1", message)
        raise ValueError(re.sub(r"<class '(\w+)'>|typing\.(Literal)", r"\1\2", message)) from error
    return kind(**{f.name: values[f.name] for f in fields(kind)})


def summary_of(kind: type[TrainConfig]) -> str:
    """The first line of its docstring."""
    return (kind.__doc__ or "").partition("\n")[0]


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration, a YAML file that ``--recipe`` takes."""
    content = {"task": config.task, **asdict(config)}
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def recipe_names(task: str | None = None) -> list[str]:
    """Names of the recipes of ``task``, or all, that come with qtvit; parts that several share (``_base``) are none."""
    root = Path(str(resources.files("qtvit") / "recipes"))
    return sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for path in root.rglob("[!_]*.yaml")
        if task in (None, yaml.safe_load(path.read_text(encoding="utf-8")).get("task"))
    )


def make_config(kind: type[C], **options: Any) -> C:
    """The configuration of the same options as keyword arguments: ``recipe``, the fields of ``kind``, and those of its
    parts as dictionaries, such as ``optim={"layer_decay": 0.8}``. Errors as `parse_config`.
    """
    argv = []
    for name, value in options.items():
        group = value if isinstance(value, dict) and name != "model_args" else {"": value}
        for key, item in group.items():
            if name == "img_size" and isinstance(item, (list, tuple)):
                item = "x".join(map(str, item))
            text = str(item) if isinstance(item, (str, Path)) else json.dumps(item, default=_plain)
            argv.append(f"--{name}{'.' if key else ''}{key}={text}")
    return parse_config(argv, kind)


def absolute(name: str | None) -> str | None:
    """The whole path, if ``name`` is one, and not a URL or the name of what comes with the package."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _resumed(argv: list[str], given: list[str], kind: type[TrainConfig]) -> list[str]:
    """``argv`` with the settings of the run that ``--resume`` names."""
    changed = [name for name in given if name not in ("help", "resume", *kind.movable)]
    if changed:
        raise ValueError(
            f"{as_option(changed[0])} cannot change when a run goes on ({', '.join(map(as_option, kind.movable))} "
            "can); --checkpoint RUN starts a new run from its weights"
        )
    run = Path(_take(argv, "--resume")[0] or "")
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run}: no config.yaml in this folder, so it is no run folder")
    return ["--recipe", str(run / "config.yaml"), *argv]


def _recipe_first(argv: list[str], kind: type[TrainConfig]) -> list[str]:
    """``argv`` with the content of its recipe in front, where jsonargparse lets everything else override it."""
    name, rest = _take(argv, "--recipe")
    return rest if name is None else ["--recipe", json.dumps(_read_recipe(_recipe_path(name), kind)), *rest]


def _take(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The last value of ``option`` in ``argv``, if it is there, and the rest."""
    value, rest = None, []
    remaining = iter(argv)
    for arg in remaining:
        name, equals, text = arg.partition("=")
        if name != option:
            rest.append(arg)
            continue
        value = text if equals else next(remaining, "--")
        if value.startswith("--"):
            raise ValueError(f"{option} needs a value")
    return value, rest


def _recipe_path(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe of ours, or the one that ``name`` is the path of, relative to the folder ``beside``."""
    if Path(name).suffix in (".yaml", ".yml"):
        return (beside or Path()) / name
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    return Path(str(resources.files("qtvit") / "recipes" / f"{name}.yaml"))


def _read_recipe(path: Path, kind: type[TrainConfig], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values in a recipe file, laid over those of the recipe that its key ``base`` names; ``above`` lie over it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping of names to values")
    base, task = content.pop("base", None), content.pop("task", kind.task)
    if task != kind.task:
        raise ValueError(f"{path}: is for `qtvit train {task}`, not {kind.task}")
    known = _dotted_names(kind)
    groups = {name.partition(".")[0] for name in known if "." in name} | {"model_args"}
    for key, value in content.items():
        if key in groups and not isinstance(value, dict):
            raise ValueError(f"{path}: {key} is a mapping of names to values, got {value!r}")
        group = value if isinstance(value, dict) and key != "model_args" else {}
        for name in (str(key), *(f"{key}.{name}" for name in group)):
            if name not in known:
                raise ValueError(f"{path}: {unknown_name('key', name, [*known, 'base'])}")
    if base is None:
        return content
    below = _recipe_path(str(base), path.parent)
    above = (*above, path.resolve())
    if below.resolve() in above:
        raise ValueError(f"{path}: its base {base} lies over it already")
    merged = _read_recipe(below, kind, above)
    for key, value in content.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
    return merged


def _dotted_names(config: type) -> list[str]:
    names = []
    for f in fields(config):
        group = f.default_factory
        names += [f.name, *(f"{f.name}.{g.name}" for g in fields(group))] if is_dataclass(group) else [f.name]
    return names


class _Parser(ArgumentParser):
    """jsonargparse's parser with hyphens in its help, as ``parse_config`` accepts them."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        return re.sub(r"--[\w.]+", lambda name: name[0].replace("_", "-"), super().format_help(formatter))
