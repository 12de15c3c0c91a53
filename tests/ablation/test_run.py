"""``qtvit ablate``: its runs, what stops and resumes them, its statistics."""

import itertools
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image

from qtvit.ablation import run as ablation
from qtvit.ablation.run import Ablation, plan_ablation, run_ablation
from qtvit.checkpoints import load_model
from qtvit.models.build import ModelCost
from qtvit.tasks.classify import train as classify
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.training import callbacks, job
from qtvit.training.callbacks import History
from qtvit_cli import main

pytestmark = pytest.mark.slow

OPTIONS = (
    "--data digits --model qtvit_nano --img-size 16 --epochs 2 --train-images 16 --batch-size 8 --bn-images 8 "
    "--num-threads 1"
)
SOME = f"{OPTIONS} --rows relu"
COMMAND = f"ablate table2 {OPTIONS} --seeds 2 --rows relu --output"
RUNS = ["taylor2-seed0", "relu-seed0", "taylor2-seed1", "relu-seed1"]
ONE_RUN = f"ablate table2 {OPTIONS} --seeds 1 --rows taylor2 --output"


@pytest.fixture(scope="module", autouse=True)
def _quick_reports() -> Iterator[None]:
    """Runs score a tenth of the digits, draw no pictures and do not count their model's cost."""

    def load(*args: Any, **options: Any) -> Any:
        data = load_labelled_images(*args, **options)
        return classify.replace(data, val=data.val[::10])

    load_labelled_images = classify.load_labelled_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "write_report", lambda *args: None)
        patch.setattr(job, "plot_curves", lambda *args: None)
        patch.setattr(classify, "load_labelled_images", load)
        patch.setattr(classify, "model_cost", lambda *args: ModelCost(440_000, 41_000_000))
        yield


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the run folders that are trained in, in turn."""
    names: list[str] = []

    def run_training(config: ClassifyConfig) -> Any:
        names.append(Path(config.resume or config.output or "").name)
        return job.train(config)

    monkeypatch.setattr(ablation, "train", run_training)
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "ablation"
    assert main([*COMMAND.split(), str(folder)]) == 0
    return folder


@pytest.fixture
def plan(copy: Path) -> Ablation:
    """That of the finished ablation in ``copy``."""
    return plan_ablation("table2", OPTIONS.split(), seeds=2, rows=["relu"], output=str(copy))


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_the_results(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["taylor2", "relu"]
    for row in results["rows"]:
        tops = [json.loads((finished / f"{row['name']}-seed{k}" / "summary.json").read_text())["top1"] for k in (0, 1)]
        assert row["scores"] == {"0": tops[0], "1": tops[1]}
        assert row["images_per_second"] > 0
    assert (results["rows"][1]["paper"], results["rows"][1]["paper_difference"]) == (79.4, -0.2)
    assert results["runs"]["relu"]["0"]["num_params"] == results["rows"][1]["num_params"] == 440_000
    assert results["settings"]["eval_every"] == results["settings"]["epochs"] == 2
    assert re.search(r"ablate table2 --seeds 2 --rows relu --output \S+ --data digits", results["command"])
    text = (finished / "results.md").read_text()
    assert results["command"] in text
    assert re.search(r"\| relu \| 2 \| .* ± .* \| [+-]\d+\.\d\d \[[+-].*\] \| .* \| 79\.4 \| -0\.2 \|", text)
    with Image.open(finished / "results.png") as picture:
        assert min(picture.size) > 200


def test_every_run_is_an_ordinary_one_with_its_seed_and_kernel(finished: Path) -> None:
    for name in RUNS:
        text = (finished / name / "config.yaml").read_text()
        assert f"kernel: {name.split('-')[0]}\n" in text
        assert f"seed: {name[-1]}\n" in text
        assert len((finished / name / "metrics.csv").read_text().splitlines()) == 3
        assert (finished / name / "best.safetensors").is_file()


def test_the_same_command_trains_nothing_again_and_more_seeds_are_added(
    copy: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (*copy.glob("results.*"), copy / "relu-seed1" / "summary.json"):
        path.unlink()
    assert main([*COMMAND.split(), str(copy)]) == 0
    assert trained == ["relu-seed1"]  # its report was missing
    lines = capsys.readouterr().out.splitlines()
    table = lines[-4:-1]
    assert [line.split()[0] for line in table] == ["row", "taylor2", "relu"]
    assert "(default)" in table[1]
    assert (copy / "results.json").is_file()
    shutil.rmtree(copy / "taylor2-seed1")
    assert main([*COMMAND.replace("--rows relu", "--rows taylor2").split(), str(copy)]) == 0
    assert trained[1:] == ["taylor2-seed1"]
    assert json.loads((copy / "results.json").read_text())["rows"][1]["name"] == "relu"  # whoever asked for it


def test_an_interrupted_ablation_goes_on(
    copy: Path,
    finished: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in RUNS[2:]:
        shutil.rmtree(copy / name)
    (copy / RUNS[3]).mkdir()
    (copy / RUNS[3] / ".lock").touch()  # killed as it began
    step, calls = classify.Classifier.training_step, itertools.count(1)

    def interrupted(*args: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(classify.Classifier, "training_step", interrupted)
    assert main([*COMMAND.split(), str(copy)]) == 130
    captured = capsys.readouterr()
    assert "stopped; the same command goes on:" in captured.err
    assert f"ablate table2 --seeds 2 --rows relu --output {copy} --data digits" in captured.err
    assert main([*COMMAND.split(), str(copy)]) == 0
    assert trained == [RUNS[2], RUNS[2], RUNS[3]]
    assert (copy / RUNS[2] / "metrics.csv").read_bytes() == (finished / RUNS[2] / "metrics.csv").read_bytes()


def test_runs_of_other_processes_are_left_to_them(
    copy: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / RUNS[3])
    with FileLock(copy / f".{RUNS[3]}.lock"):
        assert main([*COMMAND.split(), str(copy)]) == 0
    assert trained == []
    assert "1 of 4 runs are in the hands of other processes, such as relu-seed1" in capsys.readouterr().out
    assert json.loads((copy / "results.json").read_text())["rows"][1]["scores"].keys() == {"0"}


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, trained: list[str]) -> Iterator[Any]:
    """Makes a run, by its name, raise an error in its first step, or have a loss that is NaN."""
    loss, failing = classify.classification_loss, {}

    def failing_loss(logits: Any, *args: Any) -> Any:
        error = failing.get(trained[-1])
        if isinstance(error, Exception):
            raise error
        return loss(logits, *args) * (error or 1)

    monkeypatch.setattr(classify, "classification_loss", failing_loss)
    yield failing.update
    failing.clear()


def test_runs_that_fail_are_recorded_and_the_others_go_on(
    copy: Path, trained: list[str], fail: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in RUNS[1:]:
        shutil.rmtree(copy / name)
    no_memory = "[enforce fail at alloc_cpu.cpp:127]\nDefaultCPUAllocator: can't allocate memory"
    fail({RUNS[1]: float("nan"), RUNS[2]: RuntimeError(no_memory + " …" * 300), RUNS[3]: MemoryError()})
    assert main([*COMMAND.split(), str(copy)]) == 0
    said = capsys.readouterr().out
    assert main([*COMMAND.split(), str(copy)]) == 0
    assert trained == RUNS[1:]  # they would fail again
    results = json.loads((copy / "results.json").read_text())
    failed = {(row["name"], seed): reason for row in results["rows"] for seed, reason in row["failed"].items()}
    assert failed["relu", "0"].startswith("the loss is nan in epoch 1, batch 1; first bad layer")
    assert failed["taylor2", "1"].startswith(f"RuntimeError: {' '.join(no_memory.split())}")
    assert len(failed["taylor2", "1"]) == 300
    assert failed["relu", "1"] == "MemoryError: "
    for (row, seed), reason in failed.items():
        assert f"{row}, seed {seed} failed: {reason}" in said
        assert f"- {row}, seed {seed} failed: {reason}" in (copy / "results.md").read_text()
        assert results["runs"][row][seed].keys() == {"failed"}
        details = json.loads((copy / f"{row}-seed{seed}" / "failed.json").read_text())["traceback"]
        assert details[0] == "Traceback (most recent call last):"
        assert any("in run_training" in line for line in details)

    fail({RUNS[3]: None})
    (copy / RUNS[3] / "failed.json").unlink()
    assert main([*COMMAND.split(), str(copy)]) == 0
    assert trained[3:] == [RUNS[3]]
    assert json.loads((copy / "results.json").read_text())["rows"][1]["scores"].keys() == {"1"}


@pytest.mark.parametrize(("error", "recorded"), [(torch.AcceleratorError("CUDA error"), True), (TypeError(), False)])
def test_what_ends_the_ablation(error: Exception, recorded: bool, copy: Path, trained: list[str], fail: Any) -> None:
    """A device that failed, and our own mistakes."""
    shutil.rmtree(copy / RUNS[1])
    shutil.rmtree(copy / RUNS[2])
    fail({RUNS[1]: error})
    with pytest.raises(type(error)):
        main([*COMMAND.split(), str(copy)])
    assert trained == [RUNS[1]]
    assert (copy / RUNS[1] / "failed.json").is_file() == recorded
    assert main([*COMMAND.split(), str(copy)]) == 0 if recorded else True
    assert trained[1:] == ([RUNS[2]] if recorded else [])


def test_a_command_that_found_no_data_does_not_hold_the_folder(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*ONE_RUN.split(), str(tmp_path / "ablation")]
    assert main([*argv, "--data", "digit", "--lr", "0.1"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, trained) == ("", [])
    assert "digit: no such folder" in captured.err
    assert not (tmp_path / "ablation").exists()
    assert main(argv) == 0
    assert trained == [RUNS[0]]


def test_a_command_that_ended_before_it_had_trained_does_not_hold_the_folder(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for path in tmp_path.glob("photos/*/*.png"):
        path.write_bytes(b"")
    folder = tmp_path / "ablation"
    argv = [*ONE_RUN.split(), str(folder)]
    assert main([*argv, "--data", str(tmp_path / "photos"), "--num-workers", "0"]) == 2
    assert "photos" in json.loads((folder / "settings.json").read_text())["data"]
    assert not (folder / RUNS[0]).exists()
    with FileLock(folder / f".{RUNS[1]}.lock"):  # another process is about to train
        assert main(argv) == 2
    assert "was made with --data" in capsys.readouterr().err
    assert main(argv) == 0
    assert json.loads((folder / "settings.json").read_text())["data"] == "digits"
    assert main([*argv, "--lr", "0.5"]) == 2
    assert "was made with --lr 0.001, not 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "table2 --rows relu --checkpoint nano-cifar10",
            "row relu of table2: .* with kernel taylor2, not relu.*; without --checkpoint",
        ),
        ("ape --checkpoint nano-cifar10", "row without of ape: .* do not fit qtvit_nano: .*; without --checkpoint"),
        ("shortcut --checkpoint nano-cifar10", "row without of shortcut: .* do not fit qtvit_nano"),
        ("ape --model-args.checkpoint_path weights.pth", "row without of ape: .*pos_embed"),
        ("table7 --checkpoint nowhere", "nowhere: no such run folder or model file"),
    ],
)
def test_rows_that_cannot_start_from_the_weights(
    argv: str, message: str, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, _ = load_model("nano-cifar10")
    torch.save(weights.state_dict(), "weights.pth")
    assert main(f"ablate {argv} {OPTIONS} --output ablation".split()) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"qtvit: error: {message}.*\n", captured.err)
    assert (captured.out, trained, Path("ablation").exists()) == ("", [], False)


def test_rows_that_can_start_from_the_weights(tmp_path: Path, trained: list[str], fail: Any) -> None:
    fail({name: float("nan") for name in ("without-seed0", "with-seed0")})
    argv = f"ablate table7 --checkpoint nano-cifar10 {OPTIONS} --seeds 1 --output {tmp_path}/ablation"
    assert main(argv.split()) == 0
    assert trained == ["without-seed0", "with-seed0"]


DAMAGES = {"empty": b"", "cut short": None, "a list": b"[1, 2]", "no text": b"\xff\xfe\x00", "not valid": b'{"a": ['}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("settings.json", "remove it, or name another --output"),
        ("relu-seed0/summary.json", "remove it, and the same command writes it again"),
        ("relu-seed0/failed.json", "remove it, and the same command tries this run again"),
        ("relu-seed0/config.yaml", "restore it, or remove its folder"),
    ],
)
def test_a_damaged_file(name: str, remedy: str, damage: str, copy: Path, plan: Ablation) -> None:
    path = copy / name
    if path.name == "failed.json":
        (path.parent / "summary.json").rename(path)
    content = DAMAGES[damage]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 5] if content is None else content)
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.+\); {remedy}"):
        run_ablation(plan)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("settings.json", "table", None),
        ("settings.json", "epochs", None),
        ("relu-seed0/summary.json", "top1", None),
        ("relu-seed0/summary.json", "num_macs", "many"),
        ("relu-seed0/failed.json", "failed", None),
        ("relu-seed0/config.yaml", "epochs", None),
    ],
)
def test_a_file_that_lacks_a_key(name: str, key: str, value: Any, copy: Path, plan: Ablation) -> None:
    path = copy / name
    if path.name == "failed.json":
        (path.parent / "summary.json").rename(path)
    content = yaml.safe_load(path.read_text())
    content.pop(key, None)
    path.write_text(json.dumps(content if value is None else {**content, key: value}))
    with pytest.raises(ValueError, match=rf"{path} is damaged \({key} is {value or 'missing'}\)"):
        run_ablation(plan)


def test_options_that_are_younger_than_the_files_have_their_defaults(copy: Path, plan: Ablation) -> None:
    for path in (copy / "settings.json", *copy.glob("*/config.yaml")):
        content = yaml.safe_load(path.read_text())
        del content["freeze_bn"], content["ema"]
        path.write_text(json.dumps(content))
    assert len(run_ablation(plan)) == 3


def test_what_messages_say_of_damaged_files_works(copy: Path, plan: Ablation, trained: list[str]) -> None:
    """All results are still there, or made again."""
    before = json.loads((copy / "results.json").read_text())["rows"]
    (copy / "settings.json").unlink()
    (copy / "relu-seed0" / "summary.json").unlink()
    shutil.rmtree(copy / "relu-seed1")
    for path in copy.glob("results.*"):
        path.write_bytes(b"{")
    run_ablation(plan)
    assert trained == ["relu-seed0", "relu-seed1"]
    assert json.loads((copy / "settings.json").read_text())["table"] == "table2"
    after = json.loads((copy / "results.json").read_text())["rows"]
    assert [row["scores"] for row in after] == [row["scores"] for row in before]
    (copy / "relu-seed0" / "config.yaml").unlink()
    (copy / "relu-seed0" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"relu-seed0 has no config\.yaml to go on with; remove it"):
        run_ablation(plan)


def test_the_results_of_a_finished_ablation_need_no_data(
    copy: Path, plan: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "read_data", None)
    (copy / "results.json").unlink()
    run_ablation(plan)
    assert (copy / "results.json").is_file()


def test_the_speed_is_that_of_the_median_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 9 seconds, 2, 1, 3 and 1, of which two make a step."""
    times = iter([0, 100, 109, 200, 202, 300, 301, 400, 403, 500, 501, 600, 603, 700, 701, 800, 801])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(next(times)))
    trainer: Any = SimpleNamespace(global_step=5)
    history = History(tmp_path / "metrics.csv")
    assert history.seconds_per_batch == 0
    history.on_train_start(trainer, None)  # type: ignore[arg-type]
    for batch in range(6):
        history.on_train_batch_start(trainer, None, None, batch)  # type: ignore[arg-type]
        trainer.global_step += batch % 2
        history.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert list(history.step_seconds) == [5.5, 2, 2]
    assert history.seconds_per_batch == 2


def test_mistakes(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    Path("stops.yaml").write_text("early_stopping: 3\n")
    at = f"--output {finished}"
    for argv, message in [
        (f"ablate tabel2 {OPTIONS}", "unknown table 'tabel2'; did you mean table2"),
        (f"ablate table2 {OPTIONS} --rows relu,sofmax", "unknown row 'sofmax'; did you mean softmax?"),
        (f"ablate table2 {OPTIONS} --epoch 3", "unknown option '--epoch'; did you mean --epochs"),
        (f"ablate table2 {OPTIONS} --seed 3", "--seed is not an option of an ablation: --seeds N trains"),
        (f"ablate table2 {OPTIONS} --resume={finished}", "--resume is not an option of an ablation"),
        (f"ablate table2 {OPTIONS} --early-stopping 2", "--early-stopping 2 is not an option of an ablation"),
        (f"ablate table2 {OPTIONS} --recipe stops.yaml", "--early-stopping 3 is not an option of an ablation"),
        (f"ablate table2 {OPTIONS} --rows relu,", "the name of a row is empty; known: taylor2, taylor2_paper, "),
        (f"ablate table2 {OPTIONS} --rows=", "the name of a row is empty; known: taylor2, taylor2_paper, "),
        (
            f"ablate table2 {OPTIONS} --model-args.kernel relu",
            "--model-args.kernel is what the rows of table2 differ in",
        ),
        (f"ablate table2 {SOME} {at} --lr 0.5", "was made with --lr 0.001, not 0.5; name another --output"),
        (f"ablate table2 {SOME} {at} --optim.loss bce", "was made with --optim.loss 'ce', not 'bce'"),
        (f"ablate table2 {SOME} {at} --model-args.drop_rate 0.1", "--model-args.drop-rate None, not 0.1"),
        (f"ablate ape {OPTIONS} {at}", "was made with table 'table2', not 'ape'"),
        (f"ablate table2 {SOME} --output {tmp_path}/full", "not empty, and no folder of an ablation"),
        (f"ablate table2 {SOME} --model resnet18", "row taylor2 of table2: model resnet18 cannot be built"),
        (f"ablate table2 {SOME} --train-images 5000", "--train-images must be from 10"),
    ]:
        assert main(argv.split()) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1


def test_a_run_of_other_settings_in_the_folder(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / RUNS[1])
    shutil.copytree(copy / RUNS[0], copy / RUNS[1])
    assert main([*COMMAND.split(), str(copy)]) == 2
    assert "relu-seed0 was made with --model-args.kernel 'taylor2', not 'relu'" in capsys.readouterr().err


def test_it_is_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(COMMAND.split()[:-1]) == 2
    assert "an ablation trains in one process" in capsys.readouterr().err


def test_scores_are_those_of_the_end_unless_asked_otherwise() -> None:
    for argv, every in (([], 7), (["--eval-every", "1"], 1), (["--eval-every=2"], 2)):
        plan = plan_ablation("table2", ["--data", "digits", "--epochs", "7", *argv])
        assert plan.config.eval_every == every
    assert plan.folder == Path("runs/ablate-table2-qtvit_1-digits")
    assert plan.run_config("relu", 2).seed == 2
