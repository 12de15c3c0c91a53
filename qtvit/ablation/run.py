"""Ablations: every row of a table trained at the same budget, with several seeds, run by run.

The folder of an ablation has a run folder ROW-seedK for each, ``settings.json`` with what all of them share, and the
results. Whoever starts the same command again goes on with what is missing; processes that do so at the same time share
the work, as each claims a run by a lock.
"""

import gc
import json
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from qtvit import console
from qtvit.checkpoints import WEIGHT_SOURCES
from qtvit.data import DIGITS
from qtvit.device import processes, resolve_device
from qtvit.files import open_folder, write_text
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.tasks.classify.train import build_classifier, read_data
from qtvit.training.config import DEFAULT_MODEL
from qtvit.training.job import SUMMARY, check_counts, train
from qtvit.training.options import absolute, parse_config
from qtvit.training.run import check_device

from .report import write_results
from .table3 import table3_kernels
from .tables import Table, get_table

FAILED = "failed.json"
"""In a run folder, in the place of a summary: why there is none."""
SETTINGS = "settings.json"
CONFIG = "config.yaml"
RESULTS_LOCK = ".results.lock"
REASON_LENGTH = 300
"""Characters of the reason of a failure that is not ours to word; its traceback has the rest."""
SET_BY_ABLATION = {
    "seed": "--seeds N trains with each of the seeds from 0 to N - 1",
    "resume": "the same command goes on",
}
MAY_CHANGE = {"seed", "output", "resume", *ClassifyConfig.movable} - {"data"}


@dataclass(frozen=True)
class Ablation:
    """What to train.

    Attributes:
        name: of the table.
        config: what the runs share; their seed, output and part of their model_args are their own.
        folder: of the results, and of the run folders.
        seeds: every row is trained with 0 … seeds - 1.
        rows: names of those to train.
        command: that goes on with it.
    """

    name: str
    config: ClassifyConfig
    folder: Path
    seeds: int
    rows: Sequence[str]
    command: str

    @property
    def table(self) -> Table:
        return get_table(self.name)

    def run(self, row: str, seed: int) -> Path:
        """The run folder of a row and seed."""
        return self.folder / f"{row}-seed{seed}"

    def run_config(self, row: str, seed: int) -> ClassifyConfig:
        """How the row is trained with that seed."""
        model_args = {**self.config.model_args, **self.table.rows[row].model_args}
        return replace(self.config, seed=seed, output=str(self.run(row, seed)), model_args=model_args)

    def begun(self) -> list[tuple[str, int]]:
        """Row and seed of all runs of the table that are in the folder, whichever command asked for them."""
        found = []
        for row in self.table.rows:
            numbers = (re.fullmatch(rf"{row}-seed(\d+)", path.name) for path in self.folder.glob(f"{row}-seed*"))
            found += [(row, seed) for seed in sorted(int(number[1]) for number in numbers if number)]
        return [run for run in found if _is_used(self.run(*run))]


def plan_ablation(
    name: str,
    argv: Sequence[str],
    *,
    seeds: int = 3,
    rows: Sequence[str] | None = None,
    output: str | None = None,
    command: str = "",
) -> Ablation:
    """The ablation of the table ``name``; ``argv`` are options of ``qtvit train classify``.

    The weights are scored once, at the end: the best of many epochs on the held-out images would favour rows whose
    scores vary. ``--eval-every`` in ``argv`` sets it otherwise.

    Raises:
        FileNotFoundError, ValueError: as `parse_config`; no such table or row; options that the table or the ablation
            sets itself; more than one process by torchrun.
    """
    table = get_table(name)
    given = {re.sub("-", "_", arg[2:].partition("=")[0]) for arg in argv if arg.startswith("--")}
    for option, instead in SET_BY_ABLATION.items():
        if option in given:
            raise ValueError(f"--{option} is not an option of an ablation: {instead}")
    if processes()[1] > 1:
        raise ValueError("an ablation trains in one process; start the command several times, and they share the runs")
    config = parse_config(list(argv), ClassifyConfig)
    if config.early_stopping is not None:
        raise ValueError(
            f"--early-stopping {config.early_stopping} is not an option of an ablation, whose rows train for the same "
            "number of epochs (null takes it out of a recipe)"
        )
    varied = {arg for row in table.rows.values() for arg in row.model_args}
    if both := varied & config.model_args.keys():
        raise ValueError(f"--model-args.{min(both)} is what the rows of {name} differ in")
    if "eval_every" not in given and config.eval_every == 1:
        config = replace(config, eval_every=config.epochs)
    data = config.data if config.data == DIGITS else absolute(config.data) or config.data
    model = config.model or Path(config.checkpoint or DEFAULT_MODEL).stem
    folder = Path(output or Path("runs") / re.sub(r"[^\w.-]+", "-", f"ablate-{name}-{model}-{Path(data).name}"))
    config = replace(config, data=data, checkpoint=absolute(config.checkpoint))
    return Ablation(name, config, folder, seeds, table.select(rows), command)


def run_ablation(ablation: Ablation) -> list[str]:
    """Train what is not trained yet, and write ``results.json``, ``.md`` and ``.png`` after every run.

    Returns:
        Lines of the table of results.

    Raises:
        FileNotFoundError, ValueError: as `train`; the folder is of another ablation, or a file in it is damaged;
            a row cannot be built, or not from the checkpoint.
        KeyboardInterrupt: the user pressed Ctrl-C; the message says how to go on.
    """
    with table3_kernels():
        _check_folder(ablation)
        runs = [(row, seed) for seed in range(ablation.seeds) for row in ablation.rows]
        if missing := _without_outcome(ablation, runs):
            _check_runs(ablation, missing)
        open_folder(ablation.folder)
        try:
            for number, (row, seed) in enumerate(runs, start=1):
                with _claimed(ablation.folder, row, seed) as claim:
                    if claim is None or _outcome(ablation.run(row, seed)):
                        continue
                    _settle(ablation, claim)
                    console.say(f"\n[{number}/{len(runs)}] {row}, seed {seed}")
                    _train(ablation, row, seed)
                _write(ablation)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped; the same command goes on:  {ablation.command}") from stop
        lines = _write(ablation)
    if missing := _without_outcome(ablation, runs):
        name = ablation.run(*missing[0]).name
        console.say(f"{len(missing)} of {len(runs)} runs are in the hands of other processes, such as {name}")
    return lines


def _check_folder(ablation: Ablation) -> None:
    """ValueError if the folder has runs of other settings, or other things; or if one of its files is damaged."""
    begun, path = ablation.begun(), ablation.folder / SETTINGS
    if path.is_file():
        _check_settings(ablation, in_use=_has_runs(ablation.folder))
    elif not begun and _is_used(ablation.folder):
        raise ValueError(f"{ablation.folder}: not empty, and no folder of an ablation; name another --output")
    for row, seed in begun:
        config = ablation.run(row, seed) / CONFIG
        if config.is_file():
            ours = _as_read(ablation.run_config(row, seed))
            settled = {name for name, value in ours.items() if value is not None} - {
                "output",
                "img_size",
                "resume",
                *ClassifyConfig.movable,
            }
            remedy = "restore it, or remove its folder, and the same command trains this run again"
            _check_same(config, _read(config, yaml.safe_load, remedy), ours, settled | {"seed"}, remedy)


def _check_settings(ablation: Ablation, *, in_use: bool) -> None:
    """ValueError if the folder's settings are damaged, or, where they are ``in_use``, other than ours."""
    path, ours = ablation.folder / SETTINGS, _settings(ablation)
    remedy = "remove it, or name another --output, and the same command goes on"
    theirs = _read(path, json.loads, remedy)
    if "table" not in theirs:
        raise _damaged(path, "table is missing", remedy)
    if in_use:
        _check_same(path, theirs, ours, ours.keys() - MAY_CHANGE, remedy)


def _check_runs(ablation: Ablation, runs: Sequence[tuple[str, int]]) -> None:
    """FileNotFoundError or ValueError for what would end the first of ``runs``, or a later one after hours.

    Those that have begun need no weights to start from.
    """
    config = replace(ablation.run_config(*runs[0]), on_bad_image="stop")  # or all images would be read
    check_device(config, resolve_device(config.device))
    data = read_data(config)
    check_counts(config, len(data.train), len(data.val))
    for row in dict.fromkeys(row for row, seed in runs if not _is_used(ablation.run(row, seed))):
        config = ablation.run_config(row, 0)
        has_weights = config.checkpoint is not None or config.model_args.keys() & set(WEIGHT_SOURCES)
        try:
            with console.quiet(), nullcontext() if has_weights else torch.device("meta"):
                build_classifier(config, data)
        except (ValueError, RuntimeError) as error:  # the latter by timm's own loading
            hint = "" if config.checkpoint is None else "; without --checkpoint, rows start from random weights"
            raise ValueError(f"row {row} of {ablation.name}: {' '.join(str(error).split())}{hint}") from error


def _settle(ablation: Ablation, claim: Path) -> None:
    """For who has a ``claim``: ValueError if the folder's settings are other than ours; if it has none, write them.

    Those of a command that ended before it had trained anything are as none, unless it is still at it.
    """
    path = ablation.folder / SETTINGS
    with FileLock(ablation.folder / RESULTS_LOCK):
        others = [lock for lock in ablation.folder.glob(".*-seed*.lock") if lock != claim and _is_held(lock)]
        if path.is_file() and (others or _has_runs(ablation.folder)):
            _check_settings(ablation, in_use=True)
        else:
            write_text(path, json.dumps(_settings(ablation), indent=2) + "\n")


def _settings(ablation: Ablation) -> dict[str, Any]:
    """What is in `SETTINGS`."""
    return {"table": ablation.name, **_as_read(ablation.config)}


def _as_read(config: ClassifyConfig) -> dict[str, Any]:
    """``config`` as it is read from a file."""
    return json.loads(json.dumps(asdict(config)))


def _read(path: Path, parse: Callable[[str], Any], remedy: str) -> dict[str, Any]:
    """The mapping in a file; ValueError with the ``remedy`` if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        content = parse(text)
        if not isinstance(content, dict):
            raise ValueError("no mapping of names to values")
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) if path.stat().st_size else "it is empty"
        raise _damaged(path, reason, remedy) from error
    return content


def _damaged(path: Path, reason: str, remedy: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}); {remedy}")


def _check_same(path: Path, theirs: dict[str, Any], ours: dict[str, Any], names: set[str], remedy: str) -> None:
    """ValueError if what the file says of ``names`` is not what we say.

    An option that is missing there may be younger than the file, and has its default, as when a run goes on.
    """
    written, ours = _flat(theirs), _flat(ours)
    theirs = {**_flat(_as_read(ClassifyConfig(data=""))), **written}
    for name in sorted(theirs.keys() | ours.keys()):
        top = name.partition(".")[0]
        if top in names and theirs.get(name) != ours.get(name):
            if name not in written and top != "model_args":
                raise _damaged(path, f"{name} is missing", remedy)
            option = "--" + name.replace("_", "-") if name != "table" else name
            raise ValueError(
                f"{path.parent} was made with {option} {theirs.get(name)!r}, not {ours.get(name)!r}; "
                "name another --output"
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(
            {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat


@contextmanager
def _claimed(folder: Path, row: str, seed: int) -> Iterator[Path | None]:
    """The run's lock file, which is ours within the context or until this process ends; None if another has it."""
    claim = FileLock(folder / f".{row}-seed{seed}.lock")
    try:
        with FileLock(folder / RESULTS_LOCK):  # or `_is_held` of another process, which tries, is in the way
            claim.acquire(timeout=0)
    except Timeout:
        yield None
        return
    try:
        yield Path(claim.lock_file)
    finally:
        claim.release()


def _is_held(lock: Path) -> bool:
    """Whether someone has the lock."""
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _is_used(folder: Path) -> bool:
    """Whether there is anything in the folder; a run that was killed as it began leaves a hidden lock file alone."""
    return folder.is_dir() and any(not item.name.startswith(".") for item in folder.iterdir())


def _has_runs(folder: Path) -> bool:
    """Whether runs have begun in the folder, of any table."""
    return any(_is_used(run) for run in folder.glob("*-seed*"))


def _without_outcome(ablation: Ablation, runs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return [run for run in runs if _outcome(ablation.run(*run)) is None]


def _outcome(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or of one that failed the reason; None if there is none yet.

    Raises:
        ValueError: the file is damaged.
    """
    if (path := run / SUMMARY).is_file():
        remedy = "remove it, and the same command writes it again"
        summary = _read(path, json.loads, remedy)
        for name in ("top1", "num_params", "num_macs", "train_images_per_second"):
            value = summary.get(name, "missing")
            unmeasured = value is None and name == "train_images_per_second"
            if not unmeasured and not isinstance(value, (int, float)):
                raise _damaged(path, f"{name} is {value}", remedy)
        return summary
    if (path := run / FAILED).is_file():
        remedy = "remove it, and the same command tries this run again"
        failure = _read(path, json.loads, remedy)
        if "failed" not in failure:
            raise _damaged(path, "failed is missing", remedy)
        return {"failed": failure["failed"]}
    return None


def _train(ablation: Ablation, row: str, seed: int) -> None:
    """Train, or go on with, a run; if it cannot be trained, that is its outcome.

    Raises:
        FileNotFoundError, ValueError: what the user has to change.
        torch.AcceleratorError: the device failed, which a process does not recover from.
    """
    run, config = ablation.run(row, seed), ablation.run_config(row, seed)
    if config.compile:
        torch.compiler.reset()  # or the graphs of many models count as recompilations of one
    if (run / CONFIG).is_file():
        names = [name for name in ClassifyConfig.movable if getattr(config, name) is not None]
        where = [f"--{name}={getattr(config, name)}" for name in names]
        config = parse_config([f"--resume={run}", *where], ClassifyConfig)
    elif _is_used(run):
        raise ValueError(f"{run} has no {CONFIG} to go on with; remove it, and the same command trains this run again")
    elif run.is_dir():
        shutil.rmtree(run)
    try:
        train(config)
    except (FloatingPointError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, FloatingPointError):  # which is ours, and says all
            reason = f"{type(error).__name__}: {reason}"[:REASON_LENGTH]
        content = {"failed": reason, "traceback": "".join(traceback.format_exception(error)).splitlines()}
        path = open_folder(run) / FAILED
        write_text(path, json.dumps(content, indent=2) + "\n")
        console.say(f"{row}, seed {seed} failed: {reason} (traceback: {path})")
        if isinstance(error, torch.AcceleratorError):
            raise
    gc.collect()  # or a model that ran out of memory may leave the next one without


def _write(ablation: Ablation) -> list[str]:
    """Results of all runs of the table that are in the folder."""
    outcomes: dict[str, dict[int, dict[str, Any]]] = {}
    with FileLock(ablation.folder / RESULTS_LOCK):  # from the first look on, or what another process adds is lost
        for row, seed in ablation.begun():
            if outcome := _outcome(ablation.run(row, seed)):
                outcomes.setdefault(row, {})[seed] = outcome
        return write_results(ablation.folder, ablation.name, outcomes, asdict(ablation.config), ablation.command)
