"""Ablations: every row of a table trained at the same budget, with several seeds, run by run.

The folder of an ablation has a run folder ROW-seedK for each, ``settings.json`` with what all of them share, and the
results. Whoever starts the same command again goes on with what is missing; processes that do so at the same time share
the work, as each claims a run by a lock.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from qtvit import console
from qtvit.checkpoints import own_args
from qtvit.data import DIGITS
from qtvit.device import processes
from qtvit.files import open_folder, write_text
from qtvit.models import build_model

from .ablation_report import write_results
from .ablation_tables import Table, get_table
from .classify import SUMMARY, absolute, run_training
from .config import DEFAULT_MODEL, RESUMABLE, TrainConfig, parse_config
from .table3 import table3_kernels

FAILED = "failed.json"
"""In a run folder, in the place of a summary: why there is none."""
SETTINGS = "settings.json"
SET_BY_ABLATION = {
    "seed": "--seeds N trains with each of the seeds from 0 to N - 1",
    "resume": "the same command goes on",
}
MAY_CHANGE = {"seed", "output", *RESUMABLE} - {"data"}


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
    config: TrainConfig
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

    def run_config(self, row: str, seed: int) -> TrainConfig:
        """How the row is trained with that seed."""
        model_args = {**self.config.model_args, **self.table.rows[row].model_args}
        return replace(self.config, seed=seed, output=str(self.run(row, seed)), model_args=model_args)


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
    config = parse_config(list(argv))
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
        FileNotFoundError, ValueError: as `run_training`; the folder is of another ablation.
        KeyboardInterrupt: the user pressed Ctrl-C; the message says how to go on.
    """
    with table3_kernels():
        _check_rows(ablation)
        open_folder(ablation.folder)
        _check_settings(ablation)
        runs = [(seed, row) for seed in range(ablation.seeds) for row in ablation.rows]
        try:
            for number, (seed, row) in enumerate(runs, start=1):
                with _claimed(ablation.folder / f".{row}-seed{seed}.lock") as is_ours:
                    if not is_ours or _is_done(ablation, row, seed):
                        continue
                    console.say(f"\n[{number}/{len(runs)}] {row}, seed {seed}")
                    _train(ablation, row, seed)
                _write(ablation)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped; the same command goes on:  {ablation.command}") from stop
        lines = _write(ablation)
    if missing := [f"{row}-seed{seed}" for seed, row in runs if not _outcome(ablation.run(row, seed))]:
        console.say(f"{len(missing)} of {len(runs)} runs are in the hands of other processes, such as {missing[0]}")
    return lines


def _check_rows(ablation: Ablation) -> None:
    """ValueError for a row whose model cannot be built, before hours of training."""
    config = ablation.config
    if config.checkpoint is None:
        for row in ablation.rows:
            with torch.device("meta"):
                build_model(config.model or DEFAULT_MODEL, **own_args(ablation.run_config(row, 0).model_args))


def _check_settings(ablation: Ablation) -> None:
    """ValueError if the folder was made with other settings; else they are written there."""
    path = ablation.folder / SETTINGS
    ours = json.loads(json.dumps({"table": ablation.name, **asdict(ablation.config)}))
    with FileLock(ablation.folder / ".results.lock"):
        if not path.exists():
            if any(item for item in ablation.folder.iterdir() if not item.name.startswith(".")):
                raise ValueError(f"{ablation.folder}: not empty, and no folder of an ablation; name another --output")
            write_text(path, json.dumps(ours, indent=2) + "\n")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    _check_same(ablation.folder, theirs, ours, ours.keys() - MAY_CHANGE)


def _check_same(folder: Path, theirs: dict[str, Any], ours: dict[str, Any], names: set[str]) -> None:
    theirs, ours = _flat(theirs), _flat(ours)
    for name in sorted(theirs.keys() | ours.keys()):
        if name.partition(".")[0] in names and theirs.get(name) != ours.get(name):
            option = "--" + name.replace("_", "-") if name != "table" else name
            raise ValueError(
                f"{folder} was made with {option} {theirs.get(name)!r}, not {ours.get(name)!r}; name another --output"
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
def _claimed(lock: Path) -> Iterator[bool]:
    """Whether no other process has this run; then it is ours within the context, or until this process ends."""
    claim = FileLock(lock)
    try:
        claim.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        claim.release()


def _is_done(ablation: Ablation, row: str, seed: int) -> bool:
    """Whether the run has an outcome; ValueError if what is there is another run."""
    run = ablation.run(row, seed)
    config = run / "config.yaml"
    if config.is_file():
        ours = json.loads(json.dumps(asdict(ablation.run_config(row, seed))))
        settled = {name for name, value in ours.items() if value is not None} - {"output", "img_size", *RESUMABLE}
        _check_same(run, yaml.safe_load(config.read_text(encoding="utf-8")), ours, settled | {"seed"})
    return _outcome(run) is not None


def _outcome(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or of one that failed the reason; None if there is none yet."""
    for name in (SUMMARY, FAILED):
        if (run / name).is_file():
            return json.loads((run / name).read_text(encoding="utf-8"))
    return None


def _train(ablation: Ablation, row: str, seed: int) -> None:
    """Train, or go on with, a run; if it cannot be trained, that is its outcome."""
    run, config = ablation.run(row, seed), ablation.run_config(row, seed)
    if config.compile:
        torch.compiler.reset()  # or the graphs of many models count as recompilations of one
    if run.is_dir() and all(item.name.startswith(".") for item in run.iterdir()):
        shutil.rmtree(run)  # killed before it had written anything
    if (run / "config.yaml").is_file():
        names = [name for name in RESUMABLE if name != "resume" and getattr(config, name) is not None]
        where = [f"--{name}={getattr(config, name)}" for name in names]
        config = parse_config([f"--resume={run}", *where])
    try:
        run_training(config)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())
        console.say(f"{row}, seed {seed} failed: {reason}")
        write_text(open_folder(run) / FAILED, json.dumps({"failed": reason}, indent=2) + "\n")


def _write(ablation: Ablation) -> list[str]:
    """Results of all runs of the table that are in the folder, whichever command asked for them."""
    outcomes: dict[str, dict[int, dict[str, Any]]] = {}
    with FileLock(ablation.folder / ".results.lock"):  # from the first look on, or what another process adds is lost
        for row in ablation.table.rows:
            numbers = (re.fullmatch(rf"{row}-seed(\d+)", path.name) for path in ablation.folder.glob(f"{row}-seed*"))
            for seed in sorted(int(number[1]) for number in numbers if number):
                if outcome := _outcome(ablation.run(row, seed)):
                    outcomes.setdefault(row, {})[seed] = outcome
        return write_results(ablation.folder, ablation.name, outcomes, asdict(ablation.config), ablation.command)
