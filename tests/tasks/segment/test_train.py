"""Segmentation from end to end at the command line: train, eval, predict, resume."""

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import default_collate

import qtvit
from qtvit.checkpoints import ModelInfo, load_model, save_model
from qtvit.models import ARCHITECTURES, Architecture, build_model
from qtvit.tasks.segment.config import SegmentConfig
from qtvit.tasks.segment.predict import SegmentPredictor
from qtvit.tasks.segment.train import SegmentJob, SegmentTask
from qtvit_cli import main
from tests.training.compare import same_end

from .masks import NAMES, draw_masks

pytestmark = pytest.mark.slow

TRAIN = (
    "train segment --model qtvit_nano --head light --crop-size 32 --data {data} --batch-size 4 --num-workers 0 "
    "--num-threads 1 --bn-images 8 --augment.scale [0.9,1.2] --output {output}"
)


@pytest.fixture(scope="module", autouse=True)
def _shrunken(tiny_architectures: dict[str, Architecture]) -> Any:
    """qtvit_nano is a smaller network in this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "qtvit_nano", tiny_architectures["nano"])
        yield


def train(data: Path, output: Path, *options: str) -> int:
    return main([*TRAIN.format(data=data, output=output).split(), *options])


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_masks(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture(scope="module")
def segmented(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training that is long enough to learn."""
    output = tmp_path_factory.mktemp("runs") / "first"
    assert train(boxes, output, "--epochs", "20", "--eval-every", "5", "--lr", "0.01", "--loss.dice", "1") == 0
    return output


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file of a classifier."""
    path = tmp_path_factory.mktemp("model") / "classifier.safetensors"
    model_args = {"num_classes": 2}
    model = build_model("qtvit_nano", **model_args)
    save_model(path, model.state_dict(), ModelInfo.of_weights("qtvit_nano", model_args))
    return path


def test_a_run_learns_and_reports(segmented: Path, boxes: Path) -> None:
    summary, scores = (json.loads((segmented / f"{name}.json").read_text()) for name in ("summary", "scores"))
    assert summary["miou"] == pytest.approx(scores["miou"], abs=0.01)
    assert summary["miou"] > 70
    model, info = load_model(segmented)
    assert (info.task, info.classes, info.task_args["head"]) == ("segment", list(NAMES), "light")
    assert info.metrics["miou"] == pytest.approx(scores["miou"], abs=0.5)
    without_aux = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("aux."))
    assert summary["num_params"] == without_aux < sum(p.numel() for p in model.parameters())
    for name in ("curves", "confusion", "predictions"):
        with Image.open(segmented / f"{name}.png") as picture:
            assert min(picture.size) > 200
    config = yaml.safe_load((segmented / "config.yaml").read_text())
    assert (config["task"], config["data"], config["img_size"]) == ("segment", str(boxes), 32)


def test_the_classes_are_shown_before_training(boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(boxes, tmp_path / "run", "--epochs", "1", "--head", "upernet", "--head-channels", "8") == 0
    said = capsys.readouterr().out
    assert said.index("3 classes, with their mask values: ground (0), red (1), blue (2)") < said.index("epoch 1/1")
    assert "8 images to train on, 3 held out" in said


@pytest.mark.parametrize("options", ["", "--window", "--flip --scales 0.5,1", "--img-size 0 --no-window"])
def test_scores_are_those_of_the_written_masks(
    options: str, segmented: Path, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mIoU, computed again with NumPy from the files alone."""
    argv = ["eval", str(segmented), "--data", str(boxes), "--save-masks", str(tmp_path / "masks"), *options.split()]
    assert main([*argv, "--output", str(tmp_path / "report"), "--json", str(tmp_path / "scores.json")]) == 0
    counts = np.zeros((3, 3), np.int64)
    for path in (boxes / "val" / "masks").iterdir():
        true, predicted = (np.asarray(Image.open(file)) for file in (path, tmp_path / "masks" / path.name))
        assert predicted.shape == true.shape
        for label in range(3):
            counts[label] += [((true == label) & (predicted == other)).sum() for other in range(3)]
    right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["miou"] == round(float((100 * right / union).round(4).mean()), 4)
    assert scores["aacc"] == round(100 * right.sum() / counts.sum(), 4)
    assert [row["num_pixels"] for row in scores["per_class"]] == counts.sum(1).tolist()
    with (tmp_path / "report" / "confusion.csv").open() as file:
        assert [[int(n) for n in row[1:]] for row in csv.reader(file) if row[0] != "true"] == counts.tolist()
    assert f"mIoU {(100 * right / union).mean():.2f} %" in capsys.readouterr().out


def test_predict_draws_and_writes(
    segmented: Path, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = boxes / "val" / "images"
    argv = ["predict", str(segmented), str(folder), "--save", str(tmp_path / "drawn"), "--json", "found.json"]
    assert main(argv) == 0
    found = json.loads(Path("found.json").read_text())
    assert [row["image"] for row in found] == [str(path) for path in sorted(folder.iterdir())]
    for row in found:
        assert sum(part["share"] for part in row["classes"]) == pytest.approx(1)
        name = Path(row["image"]).stem
        mask = np.asarray(Image.open(tmp_path / "drawn" / f"{name}_mask.png"))
        assert mask.shape == (row["height"], row["width"])
        shares = {part["label"]: part["share"] for part in row["classes"]}
        assert shares == {NAMES[label]: float((mask == label).mean()) for label in np.unique(mask)}
        with Image.open(tmp_path / "drawn" / f"{name}.png") as drawn:
            assert drawn.width == row["width"]
            assert drawn.height > row["height"]  # the legend
    said = capsys.readouterr().out
    assert "ground" in said
    assert f"\nmasks: {str(tmp_path)[:20]}" in said  # long paths are shortened
    assert main(["predict", str(segmented), str(folder), "--save", "sheet.png"]) == 0
    assert "masks: " not in capsys.readouterr().out
    assert Path("sheet.png").is_file()


def test_python(boxes: Path, segmented: Path, tmp_path: Path) -> None:
    predictor = qtvit.load(segmented)
    assert isinstance(predictor, SegmentPredictor)
    one, two = predictor.predict([np.zeros((97, 211, 3), np.uint8), boxes / "val" / "images" / "0.png"])
    assert one.labels.shape == (97, 211)
    assert two.color_image().size == two.index_image().size == (48, 40)
    options: dict[str, Any] = {"model": "qtvit_nano", "head": "light", "batch_size": 4, "num_workers": 0}
    summary = qtvit.train_segmenter(
        data=boxes, crop_size=16, epochs=1, bn_images=0, loss={"kind": "ohem"}, output=tmp_path / "run", **options
    )
    assert summary is not None
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_an_interrupted_run_goes_on_to_the_same_end(
    boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "--epochs",
        "3",
        "--loss.class-weights",
        "balanced",
        "--optim.name",
        "muon",
        "--ema.decay",
        "0.5",
        "--checkpoint-every-steps",
        "1",
    )
    assert train(boxes, tmp_path / "whole", *options) == 0
    step, calls = SegmentTask.training_step, []

    def stepping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(SegmentTask, "training_step", stepping)
    assert train(boxes, tmp_path / "run", *options) == 130
    assert main(["train", "segment", "--resume", str(tmp_path / "run")]) == 0
    same_end(tmp_path / "run", tmp_path / "whole")
    shutil.copytree(boxes, tmp_path / "changed")
    (tmp_path / "changed" / "classes.txt").write_text("ground\nblue\nred\n")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    assert main(["train", "segment", "--resume", str(tmp_path / "again"), "--data", str(tmp_path / "changed")]) == 2


def test_a_batch_is_learnt_by_heart(boxes: Path) -> None:
    config = SegmentConfig(
        str(boxes), "qtvit_nano", head="light", crop_size=32, img_size=0, batch_size=4, num_workers=0, drop_rate=0.0
    )
    job = SegmentJob(config, torch.device("cpu"), {})
    images, labels = default_collate([job.loaders.train.dataset[0, i, 0] for i in range(4)])
    optimizer = torch.optim.AdamW(job.task.model.parameters(), lr=0.01)
    for _ in range(40):
        loss = job.task.loss(job.task.model(images)["out"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_masks_in_colours(tmp_path: Path) -> None:
    """Colours are read as classes; masks are written as the indices of these."""
    colors = {0: (0, 0, 0), 1: (200, 0, 0), 2: (0, 90, 200), 255: (0, 0, 0)}
    data = draw_masks(tmp_path / "colours", colors=colors)
    assert train(data, tmp_path / "run", "--epochs", "1") == 0
    assert main(["eval", str(tmp_path / "run"), "--data", str(data), "--save-masks", "masks"]) == 0
    predictor = qtvit.load(tmp_path / "run")
    assert isinstance(predictor, SegmentPredictor)
    for path in (data / "val" / "images").iterdir():
        found = predictor.predict(path)
        with Image.open(Path("masks", path.name)) as mask:
            assert np.array_equal(np.asarray(mask), found.labels)
            assert np.array_equal(np.asarray(mask.convert("RGB")), np.asarray(found.color_image()))


def test_weights_of_a_classifier(classifier: Path, boxes: Path, tmp_path: Path) -> None:
    options = ("--lr", "1e-30", "--epochs", "1", "--bn-images", "0", "--freeze", "backbone")
    assert train(boxes, tmp_path / "run", "--checkpoint", str(classifier), *options) == 0
    given, network = (load_model(path)[0].state_dict() for path in (classifier, tmp_path / "run"))
    for name, value in given.items():
        if not name.startswith("head."):
            assert torch.equal(network[f"backbone.body.{name}"], value), name


def test_weights_of_a_segmenter(segmented: Path, boxes: Path, tmp_path: Path, capsys: Any) -> None:
    others = tmp_path / "others"
    shutil.copytree(boxes, others)
    (others / "classes.txt").write_text("ground\nred\nsea\n")
    options = ("--lr", "1e-30", "--epochs", "1", "--bn-images", "0", "--freeze-bn", "true")
    options += ("--checkpoint", str(segmented))
    assert train(boxes, tmp_path / "same", *options) == 0
    assert "anew" not in capsys.readouterr().out
    assert train(others, tmp_path / "other", *options) == 0
    said = capsys.readouterr().out
    assert "tells 3 other classes apart (ground, red, blue): its classifier starts anew for ground, red, sea" in said
    assert train(boxes, tmp_path / "upernet", *options, "--head", "upernet", "--head-channels", "8") == 0
    assert "so they start anew: head.pool, head.laterals, head.smooth, head.fuse" in capsys.readouterr().out
    source, same, other = (
        load_model(path)[0].state_dict() for path in (segmented, tmp_path / "same", tmp_path / "other")
    )
    for name, value in source.items():
        assert torch.equal(same[name], value), name
        assert torch.equal(other[name], value) == ("classifier.conv" not in name), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--head hourglass", "--head must be one of upernet, light, light_skip, got 'hourglass'"),
        ("--head-channels 0", "--head-channels must be 1 or more, got 0"),
        ("--crop-size 0", "--crop-size must be a side"),
        ("--img-size -1", "--img-size must be 0 or more"),
        ("--drop-rate 1", "--drop-rate must be from 0 to below 1"),
        ("--loss.dice -1", "--loss.dice must be 0 or more"),
        ("--loss.ohem-threshold 0", "--loss.ohem-threshold must be above 0, at most 1"),
        ("--loss.class-weights [0,0,0]", "--loss.class-weights must be numbers from 0 on, not all 0"),
        ("--loss.class-weights [1,2]", "--loss.class-weights has 2 numbers, and there are 3 classes"),
        ("--augment.scale [2,1]", "--augment.scale must be 0 < min <= max"),
        ("--augment.hflip 2", "--augment.hflip must be a probability"),
        ("--augment.cat-max-ratio 0", "--augment.cat-max-ratio must be above 0, at most 1"),
        ("--ignore-index 1", "ignore_index 1 is the label of class red"),
        ("--batch-size 9", "--batch-size 9 is more than the 8 training images"),
        ("--data nowhere", "nowhere"),
        ("--classes nowhere.txt", "nowhere.txt: no such file of classes"),
        ("--recipe quickstart", "is for `qtvit train classify`, not segment"),
        ("--head upernet --batch-size 1", "UPerNet is trained in batches of 2 images or more"),
    ],
)
def test_mistakes_in_training(
    options: str, message: str, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(boxes, tmp_path / "run", "--epochs", "1", *options.split()) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval {run} --data {boxes} --scales 1,x", "--scales must be numbers such as 0.5,1,1.5, got 1,x"),
        ("eval {run} --data {boxes} --scales 0", "scales must be numbers above 0, got 0.0"),
        ("eval {run} --data {boxes} --img-size -1", "img_size must be 0 or more, got -1"),
        ("eval {run} --data {boxes} --save-masks {boxes}", "exists already and is not empty"),
        ("eval {run} --data {boxes} --mask-classes {other}", "the classes of the data are not those of the model"),
        ("eval {classifier} --data {boxes} --flip", "--flip is not for a model that was trained to classify"),
        (
            "predict {classifier} {boxes}/val/images --window",
            "--window is not for a model that was trained to classify",
        ),
        ("explain {run} {boxes}/val/images/0.png", "was trained to segment, and a model to classify is needed"),
        ("train classify --data {boxes} --batch-size 4 --checkpoint {run}", "was trained to segment"),
    ],
)
def test_mistakes_with_a_model(
    command: str,
    message: str,
    segmented: Path,
    classifier: Path,
    boxes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("ground\nred\nsea\n")
    assert main(command.format(run=segmented, classifier=classifier, boxes=boxes, other=other).split()) == 2
    assert message in capsys.readouterr().err


def test_data_check(boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["data", "check", str(boxes), "--task", "segment"]
    assert main(check) == 0
    assert "red: " in capsys.readouterr().out
    (tmp_path / "two.txt").write_text("ground\nred\n")
    assert main([*check, "--classes", str(tmp_path / "two.txt")]) == 1
    assert "values that no class has: 2" in capsys.readouterr().out
    assert main([*check, "--ignore-index", "1"]) == 1
    assert "ignore_index 1 is the label of class red" in capsys.readouterr().out
    assert main(["data", "check", str(boxes), "--ignore-index", "1"]) == 2
    assert "--ignore-index is for --task segment, not classify" in capsys.readouterr().err
