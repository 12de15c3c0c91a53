"""``qtvit ablate``: its runs, what stops and resumes them, its statistics."""

import itertools
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from qtvit.models.build import ModelCost
from qtvit.ops import KERNELS
from qtvit.training import ablation, classify
from qtvit.training.ablation import plan_ablation
from qtvit.training.ablation_report import paired_difference, summarize, write_results
from qtvit.training.ablation_tables import TABLES, get_table
from qtvit.training.config import TrainConfig
from qtvit_cli import main

OPTIONS = (
    "--data digits --model qtvit_nano --img-size 16 --epochs 2 --train-images 16 --batch-size 8 --bn-images 8 "
    "--num-threads 1"
)
SOME = f"{OPTIONS} --rows relu"
COMMAND = f"ablate table2 {OPTIONS} --seeds 2 --rows relu --output"
RUNS = ["taylor2-seed0", "relu-seed0", "taylor2-seed1", "relu-seed1"]


@pytest.fixture(scope="module", autouse=True)
def _quick_reports() -> Iterator[None]:
    """Runs score a tenth of the digits, draw no pictures and do not count their model's cost."""

    def load(*args: Any, **options: Any) -> Any:
        data = load_labelled_images(*args, **options)
        return classify.replace(data, val=data.val[::10])

    load_labelled_images = classify.load_labelled_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "write_report", lambda *args: None)
        patch.setattr(classify, "plot_curves", lambda *args: None)
        patch.setattr(classify, "load_labelled_images", load)
        patch.setattr(classify, "model_cost", lambda *args: ModelCost(440_000, 41_000_000))
        yield


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the run folders that are trained in, in turn."""
    names: list[str] = []

    def run_training(config: TrainConfig) -> Any:
        names.append(Path(config.resume or config.output or "").name)
        return classify.run_training(config)

    monkeypatch.setattr(ablation, "run_training", run_training)
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "ablation"
    assert main([*COMMAND.split(), str(folder)]) == 0
    return folder


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


def test_a_row_that_fails_is_recorded_and_the_others_go_on(
    copy: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / RUNS[1])
    shutil.rmtree(copy / RUNS[2])
    loss = classify.classification_loss

    def nan_for_relu(logits: Any, *args: Any) -> Any:
        return loss(logits, *args) * (float("nan") if trained[-1] == RUNS[1] else 1)

    monkeypatch.setattr(classify, "classification_loss", nan_for_relu)
    assert main([*COMMAND.split(), str(copy)]) == 0
    assert "relu, seed 0 failed: the loss is nan in epoch 1, batch 1" in capsys.readouterr().out
    assert main([*COMMAND.split(), str(copy)]) == 0
    assert trained == [RUNS[1], RUNS[2]]  # it would fail again
    relu = json.loads((copy / "results.json").read_text())["rows"][1]
    assert relu["scores"].keys() == {"1"}
    assert relu["failed"]["0"].startswith("the loss is nan")
    assert "- relu, seed 0 failed: the loss is nan" in (copy / "results.md").read_text()


def test_mistakes(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    at = f"--output {finished}"
    for argv, message in [
        (f"ablate tabel2 {OPTIONS}", "unknown table 'tabel2'; did you mean table2"),
        (f"ablate table2 {OPTIONS} --rows relu,sofmax", "unknown row 'sofmax'; did you mean softmax?"),
        (f"ablate table2 {OPTIONS} --epoch 3", "unknown option '--epoch'; did you mean --epochs"),
        (f"ablate table2 {OPTIONS} --seed 3", "--seed is not an option of an ablation: --seeds N trains"),
        (f"ablate table2 {OPTIONS} --resume={finished}", "--resume is not an option of an ablation"),
        (
            f"ablate table2 {OPTIONS} --model-args.kernel relu",
            "--model-args.kernel is what the rows of table2 differ in",
        ),
        (f"ablate table2 {SOME} {at} --lr 0.5", "was made with --lr 0.001, not 0.5; name another --output"),
        (f"ablate table2 {SOME} {at} --optim.loss bce", "was made with --optim.loss 'ce', not 'bce'"),
        (f"ablate table2 {SOME} {at} --model-args.drop_rate 0.1", "--model-args.drop-rate None, not 0.1"),
        (f"ablate ape {OPTIONS} {at}", "was made with table 'table2', not 'ape'"),
        (f"ablate table2 {SOME} --output {tmp_path}/full", "not empty, and no folder of an ablation"),
        (f"ablate table2 {SOME} --model resnet18", "model resnet18 cannot be built with {'kernel': 'taylor2'}"),
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


def test_the_tables_are_those_of_the_paper() -> None:
    assert list(TABLES) == ["table2", "table3", "table7", "ape", "shortcut"]
    assert list(TABLES["table2"].rows) == list(KERNELS)
    paper = {name: row.paper for name, row in TABLES["table3"].rows.items()}
    assert paper["random"] == 61.8
    assert paper["full"] == 79.7
    assert all(table.default in table.rows for table in TABLES.values())
    assert TABLES["table7"].rows["with"].model_args == {"softmax_residual": 0.02}
    assert get_table("table3").select(["pool2"]) == ["self", "pool2"]


def test_the_difference_by_hand() -> None:
    difference = paired_difference({0: 71.0, 1: 74.0, 2: 72.0, 3: 60.0}, {0: 70.0, 1: 72.0, 2: 69.0})
    assert difference is not None
    assert (difference.mean, difference.seeds) == (2.0, [0, 1, 2])
    # Standard deviation 1 of three differences; the 97.5 % quantile of t with 2 degrees of freedom is 4.302653.
    assert difference.low == pytest.approx(2 - 4.302653 / 3**0.5)
    assert difference.high == pytest.approx(2 + 4.302653 / 3**0.5)
    one = paired_difference({0: 71.0}, {0: 70.0, 1: 72.0})
    assert one is not None
    assert (one.mean, one.low, one.high) == (1.0, None, None)
    assert paired_difference({0: 71.0}, {1: 70.0}) is None


def outcome(top1: float, speed: float = 100) -> dict[str, Any]:
    return {"top1": top1, "num_params": 9, "num_macs": 8, "train_images_per_second": speed}


def test_a_line_of_the_table_by_hand() -> None:
    outcomes = {
        "relu": {0: outcome(51, 10), 1: outcome(57, 30), 2: {"failed": "nan"}},
        "taylor2": {0: outcome(50), 2: outcome(90)},
    }
    taylor2, relu = summarize(TABLES["table2"], outcomes)
    assert (relu.mean, relu.sd) == (54.0, pytest.approx(18**0.5))
    assert (relu.images_per_second, relu.num_params, relu.num_macs) == (20, 9, 8)
    assert relu.difference == paired_difference({0: 51.0}, {0: 50.0})
    assert relu.failed == {2: "nan"}
    assert (taylor2.is_default, taylor2.difference, taylor2.paper_difference) == (True, None, None)


@pytest.mark.parametrize("outcomes", [{"taylor2": {0: {"failed": "nan"}}, "relu": {0: outcome(5)}}, {}])
def test_results_without_a_default_score(outcomes: Any, tmp_path: Path) -> None:
    settings = {"eval_every": 1, "epochs": 3, "model": None, "data": "digits"}
    lines = write_results(tmp_path, "table2", outcomes, settings, "qtvit ablate")
    assert lines[0].startswith("row")
    assert "chosen on the held-out images" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 1000
