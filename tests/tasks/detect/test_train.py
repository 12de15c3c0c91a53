"""Detection from end to end at the command line: train, eval, predict, resume."""

import contextlib
import csv
import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import qtvit
from qtvit.checkpoints import load_model
from qtvit.tasks.detect.coco_eval import FIGURES
from qtvit.tasks.detect.data import load_detection_data
from qtvit.tasks.detect.model import Detector
from qtvit.tasks.detect.predict import DetectPredictor
from qtvit.tasks.detect.train import DetectTask
from qtvit.training.optim import batch_norms
from qtvit_cli import main
from tests.training.compare import same_end
from tests.training.test_distributed import read_metrics, torchrun

from .boxes import draw_boxes

pytestmark = pytest.mark.slow

TINY = (
    "train detect --data {data} --num-workers 0 --num-threads 1 --min-size [40] --max-size 80 --heads.fpn-chans 16 "
    "--heads.box-dim 64 --heads.rois-per-image 16 --augment.photometric 0 --augment.zoom [1,1] --output {output}"
)
LEARNT = f"{TINY} --checkpoint nano-cifar10 --batch-size 4 --bn-images 8 --epochs 24 --eval-every 8 --lr 0.004 --seed 2"
SHORT = f"{TINY} --model qtvit_nano --batch-size 4 --bn-images 4 --epochs 1"


def train(command: str, data: Path, output: Path, *options: str) -> int:
    return main([*command.format(data=data, output=output).split(), *options])


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_boxes(tmp_path_factory.mktemp("data") / "boxes")


@pytest.fixture(scope="module")
def detector(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training that is long enough to learn."""
    output = tmp_path_factory.mktemp("runs") / "first"
    assert train(LEARNT, boxes, output) == 0
    return output


def test_a_run_learns_and_reports(detector: Path) -> None:
    summary, scores = (json.loads((detector / f"{name}.json").read_text()) for name in ("summary", "scores"))
    assert summary["box_ap50"] == scores["box_ap50"] > 80
    assert summary["mask_ap50"] == scores["mask_ap50"] > 80
    assert scores["box_ap"] == pytest.approx(max(row["val/box_ap"] for row in evaluations(detector)))
    model, info = load_model(detector)
    assert isinstance(model, Detector)
    assert summary["num_params"] == sum(p.numel() for p in model.parameters())
    assert (info.task, info.classes) == ("detect", ["blue", "red"])
    assert info.task_args["category_ids"] == [3, 7]
    assert info.metrics["box_ap"] == pytest.approx(scores["box_ap"])
    with (detector / "per_category.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["category_id"], row["label"], row["num_objects"]) for row in rows] == [
        ("3", "blue", "2"),
        ("7", "red", "4"),
    ]
    for name in ("curves", "precision_recall", "predictions"):
        with Image.open(detector / f"{name}.png") as picture:
            assert min(picture.size) > 200
    config = yaml.safe_load((detector / "config.yaml").read_text())
    assert (config["masks"], config["min_size"], config["heads"]["anchor_scale"]) == (True, [40], 8.0)


def evaluations(run: Path) -> list[dict[str, Any]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value} for row in rows if row["val/box_ap"]]


def test_every_part_of_the_loss_is_logged(detector: Path) -> None:
    last = evaluations(detector)[-1]
    parts = [last[f"train/{name}"] for name in ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")]
    assert last["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert min(parts) > 0


def test_eval_writes_results_that_pycocotools_scores_alike(
    detector: Path, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the annotation with id 0, which pycocotools takes for none: its file counts from 1 here."""
    moved = shutil.copytree(boxes, tmp_path / "moved")
    path = moved / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["id"] += 1
    path.write_text(json.dumps(content))
    argv = ["eval", str(detector), "--data", str(moved), "--num-workers", "0", "--json", "all.json"]
    assert main([*argv, "--output", "report"]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "all.json").read_text())
    assert scores == json.loads((tmp_path / "report" / "scores.json").read_text())
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = COCO(path)
            evaluation = COCOeval(theirs, theirs.loadRes(f"report/results-{name}.json"), name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        expected = [None if value < 0 else 100 * value for value in evaluation.stats]
        assert [scores[f"{kind}_{figure}"] for figure in FIGURES] == pytest.approx(expected, abs=1e-4)
        assert expected[0] > 40
        assert f"{kind} AP {expected[0]:.2f} %" in printed
    assert f"{'AR small':<12}" in printed
    assert "red" in printed


def test_annotations_may_be_elsewhere(detector: Path, boxes: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(boxes, tmp_path / "moved")
    (moved / "annotations" / "instances_val.json").rename(tmp_path / "elsewhere.json")
    (moved / "val").rename(tmp_path / "pictures")
    shutil.rmtree(moved / "train")  # nothing of it is needed
    elsewhere = ["--val-annotations", "elsewhere.json", "--val-images-dir", "pictures", "--output", "report"]
    assert main(["eval", str(detector), "--data", str(moved), "--num-workers", "0", *elsewhere]) == 0
    ours, first = (json.loads(path.read_text()) for path in (tmp_path / "report/scores.json", detector / "scores.json"))
    assert ours["box_ap"] == first["box_ap"]


def test_predict_writes_objects_with_original_ids(
    detector: Path, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", str(detector), str(boxes / "val"), "--json", "found.json", "--quiet"]
    assert main([*argv, "--save", "drawn"]) == 0
    assert main([*argv[:3], "--save", "sheet.png", "--quiet"]) == 0
    printed = capsys.readouterr().out
    images = json.loads((tmp_path / "found.json").read_text())
    assert [Path(entry["image"]).name for entry in images] == [f"{i}.png" for i in range(5)]
    data = load_detection_data(str(boxes))
    sample, found = data.val[1], images[1]["objects"]
    assert {entry["category_id"] for entry in found} == {3, 7}
    assert {entry["label"]: entry["category_id"] for entry in found} == {"blue": 3, "red": 7}
    assert sample.masks is not None
    for i in range(2):  # the objects of the image, each where it is
        category_id = data.category_ids[sample.labels[i] - 1]
        best = max((entry for entry in found if entry["category_id"] == category_id), key=lambda entry: entry["score"])
        left, top, width, height = best["bbox"]
        assert [left, top, left + width, top + height] == pytest.approx(sample.boxes[i].tolist(), abs=6)
        assert mask.iou([best["segmentation"]], [sample.masks[i]], [0])[0, 0] > 0.5
        assert best["segmentation"]["size"] == [sample.height, sample.width]
        assert f"{best['label']} {best['score']:.0%}" in printed
    with Image.open(tmp_path / "drawn" / "1.png") as drawn, Image.open(boxes / "val" / "1.png") as picture:
        assert drawn.width == drawn.height * picture.width // picture.height > picture.width
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 320


def test_predictions_are_filtered(
    detector: Path, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = qtvit.load(detector, "cpu")
    assert isinstance(predictor, DetectPredictor)
    image = boxes / "val" / "1.png"
    everything = predictor.predict(image, score_threshold=0)
    assert set(everything.labels) == {"red", "blue"}
    assert list(everything.scores) == sorted(everything.scores, reverse=True)
    sure = predictor.predict(str(image), 0.3, classes=["red"])
    assert set(sure.labels) == {"red"}
    assert min(sure.scores) >= 0.3
    assert len(predictor.predict(image, 1.0)) == 0
    assert sure.masks is not None
    assert sure.masks.shape == (len(sure), 48 + 16, 48)
    argv = ["predict", str(detector), str(image), "--quiet"]
    assert main([*argv, "--score-threshold", "1", "--json", "none.json", "--save", "none"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert json.loads((tmp_path / "none.json").read_text())[0]["objects"] == []
    assert main([*argv, "--classes", "blue, red", "--score-threshold", "0.3"]) == 0
    assert "red" in capsys.readouterr().out
    assert main([*argv, "--classes", "blau"]) == 2
    assert "unknown class 'blau'; did you mean blue?" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"score_threshold must be from 0 to 1, got 1\.5"):
        predictor.predict(image, 1.5)


def test_what_is_found_does_not_depend_on_other_images(detector: Path, boxes: Path) -> None:
    predictor = DetectPredictor.load(detector, "cpu")
    images = [boxes / "val" / f"{i}.png" for i in (3, 1)]
    together, alone = predictor.predict(images, 0.0), predictor.predict(images[1], 0.0)
    assert torch.equal(together[1].boxes, alone.boxes)


def test_options_of_classifiers_are_refused(detector: Path, boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(boxes / "val" / "1.png")
    for argv, message in [
        (["predict", str(detector), image, "--top-k", "3"], "--top-k is not for a model that was trained to detect"),
        (["predict", str(detector), image, "--csv", "x.csv"], "--csv is not for"),
        (["eval", str(detector), "--data", str(boxes), "--batch-size", "3"], "--batch-size is not for"),
        (
            ["predict", "nano-cifar10", image, "--score-threshold", "0.3"],
            "--score-threshold is not for a model",
        ),
        (["eval", "nano-cifar10", "--data", "digits", "--val-annotations", "x"], "--val-annotations is not for"),
    ]:
        assert main(argv) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1


def test_commands_for_classifiers_say_so(detector: Path, boxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, image = str(detector), str(boxes / "val" / "1.png")
    for argv in (
        ["explain", run, image],
        ["doctor", run, "--data", str(boxes / "val")],
        ["push", run, "me/model", "--folder", "out"],
        ["train", "classify", "--data", "digits", "--checkpoint", run],
        ["bench", "latency", run],
    ):
        assert main(argv) == 2, argv
        captured = capsys.readouterr().err
        assert "was trained to detect, and a model to classify is needed" in captured
        assert captured.count("\n") == 1


RESUMED = (
    f"{SHORT} --epochs 2 --ema.decay 0.5 --min-size [32,40] --augment.zoom [0.7,1.4] --augment.photometric 0.5 "
    "--train-images 8 --model-args.drop_path_rate 0.2"
)


@pytest.fixture(scope="module")
def uninterrupted(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(RESUMED, boxes, output) == 0
    return output


@pytest.mark.parametrize(("what", "call"), [("training_step", 2), ("validation_step", 7)])
def test_an_interrupted_run_goes_on_to_the_same_end(
    what: str, call: int, boxes: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    step = getattr(DetectTask, what)

    def stepping(*args: object) -> object:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(DetectTask, what, stepping)
    assert train(RESUMED, boxes, tmp_path / "run") == 130
    assert main(["train", "detect", "--resume", str(tmp_path / "run")]) == 0
    same_end(tmp_path / "run", uninterrupted)
    row = evaluations(tmp_path / "run")[-1]
    assert {"val/box_ap", "val/raw_box_ap", "val/mask_ap", "val/raw_mask_ap75"} <= set(row)


def test_boxes_alone_train_faster_rcnn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw_boxes(tmp_path / "data", num_train=4, num_val=2, masks=False)
    assert train(SHORT, data, tmp_path / "run", "--heads.cascade", "true") == 0
    assert "boxes of 2 categories in 4 training and 2 held-out images" in capsys.readouterr().out
    model, info = load_model(tmp_path / "run")
    assert not any("mask" in name for name in model.state_dict())
    assert (info.task_args["masks"], info.task_args["cascade"]) == (False, True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mask_ap"] is None
    assert "val/mask_ap" not in read_metrics(tmp_path / "run")[0]
    assert main(["eval", str(tmp_path / "run"), "--data", str(data), "--output", "report", "--num-workers", "0"]) == 0
    assert not (tmp_path / "report" / "results-segm.json").exists()
    assert train(SHORT, data, tmp_path / "other", "--masks", "true") == 2
    assert "--masks true: no object of" in capsys.readouterr().err


def test_masks_can_be_left_out_and_statistics_frozen(boxes: Path, detector: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(detector), "--train-images", "4", "--masks", "false", "--freeze-bn", "true"]
    assert train(SHORT, boxes, tmp_path / "run", *options, "--freeze", "stages=1", "--optim.layer-decay", "0.7") == 0
    (before, _), (after, info) = load_model(detector), load_model(tmp_path / "run")
    assert info.task_args["masks"] is False
    ours, theirs = after.state_dict(), before.state_dict()
    assert not any("mask" in name for name in ours)
    norms = [f"{name}.running_{what}" for name in batch_norms(after) for what in ("mean", "var")]
    assert norms
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert same.issuperset(norms)
    frozen = [name for name in ours if name.startswith(("backbone.body.stem", "backbone.body.stages.0"))]
    assert frozen
    assert same.issuperset(frozen)
    assert "backbone.fpn.inner_blocks.0.0.weight" not in same


def test_statistics_are_estimated(boxes: Path, detector: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(detector), "--lr", "1e-30", "--train-images", "4"]
    assert train(SHORT, boxes, tmp_path / "run", *options) == 0
    (before, _), (after, _) = load_model(detector), load_model(tmp_path / "run")
    ours, theirs = after.state_dict(), before.state_dict()
    for name in batch_norms(after):
        assert not torch.equal(ours[f"{name}.running_mean"], theirs[f"{name}.running_mean"])
        assert torch.equal(ours[f"{name}.weight"], theirs[f"{name}.weight"])


def test_a_detector_goes_on_with_other_categories(
    boxes: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(boxes, tmp_path / "data")
    for split in ("train", "val"):
        path = data / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 50, "name": "green"})
        path.write_text(json.dumps(content))
    options = ["--checkpoint", str(detector), "--lr", "1e-30", "--bn-images", "0", "--freeze-bn", "true"]
    command = SHORT.replace("--heads.fpn-chans 16 --heads.box-dim 64 ", "")  # as the checkpoint has them
    assert train(command, data, tmp_path / "run", *options, "--train-images", "4") == 0
    printed = capsys.readouterr().out
    assert f"{detector} finds other categories (blue, red): the last layers start anew for blue, red, green" in printed
    (before, _), (after, info) = load_model(detector), load_model(tmp_path / "run")
    assert info.task_args["category_ids"] == [3, 7, 50]
    ours, theirs = after.state_dict(), before.state_dict()
    anew = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    layers = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
    assert anew == {f"roi_heads.{layer}.{what}" for layer in layers for what in ("weight", "bias")}
    assert "not in" not in printed


def test_two_processes_score_and_train_as_one(detector: Path, boxes: Path, tmp_path: Path) -> None:
    """Of unequal numbers of images, one of them without objects, so that a process has none in a step."""
    still = (
        f"{SHORT} --checkpoint {detector} --lr 1e-30 --freeze-bn true --bn-images 0 --ema.decay 0.5 --train-images 5"
    )
    assert train(still, boxes, tmp_path / "alone") == 0
    command = still.format(data=boxes, output="together").replace("--batch-size 4", "--batch-size 1")
    out, err = torchrun(tmp_path, (f"{command} --epochs 2 --accumulate 2", None))
    assert out.count("exit code 0") == 1, err
    one, [_, two] = read_metrics(tmp_path / "alone"), read_metrics(tmp_path / "together")
    scores = {name: value for name, value in one[0].items() if name.startswith("val/")}
    assert scores["val/box_ap50"] > 80
    assert {name: two[name] for name in scores} == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-size", "[0]"], "--min-size must be 1 or more"),
        (["--min-size", "[90]"], "--max-size 80 is less than --min-size 90"),
        (["--compile", "true"], "--compile must be false: every batch of a detector has another size"),
        (["--augment.zoom", "[2,1]"], "--augment.zoom must be 0 < min <= max"),
        (["--augment.hflip", "2"], "--augment.hflip must be a probability"),
        (["--heads.box-dim", "0"], "--heads.box-dim must be 1 or more"),
        (["--heads.anchor-scale", "0"], "--heads.anchor-scale must be more than 0"),
        (["--masks", "some"], "--masks: "),
        (["--img-size", "32"], "unknown option '--img-size'"),
        (["--batch-size", "13"], "--batch-size 13 is more than the 12 training images"),
        (["--train-images", "13"], "--train-images must be from 1 to 12"),
        (["--val-annotations", "nowhere.json"], "nowhere.json"),
        (["--model", "vit_tiny_patch16_224"], "feature maps"),
        (["--model-args.in_chans", "1"], "--model-args.in-chans must be left to the data"),
        (["--checkpoint", "nano-cifar10", "--model", "qtvit_1"], "holds qtvit_nano, not qtvit_1"),
        (["--checkpoint", "nano-cifar10", "--model-args.kernel", "elu"], "was trained with kernel taylor2, not elu"),
        (["--recipe", "imagenet/qtvit_1"], "is for `qtvit train classify`, not detect"),
    ],
)
def test_mistakes(
    options: list[str], message: str, boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(SHORT, boxes, tmp_path / "run", *options) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_used(
    boxes: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(boxes, tmp_path / "data")
    path = data / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": [a for a in content["annotations"] if a["iscrowd"]]}))
    assert train(SHORT, data, tmp_path / "run") == 2
    assert f"{path}: there are no objects in the held-out images to score it on" in capsys.readouterr().err
    content["categories"][0]["name"] = "crimson"
    path.write_text(json.dumps(content))
    assert main(["eval", str(detector), "--data", str(data)]) == 2
    assert "category 7 is crimson, but in what the model was trained on red" in capsys.readouterr().err


def test_the_same_in_python(boxes: Path, tmp_path: Path) -> None:
    summary = qtvit.train_detector(
        data=boxes,
        model="qtvit_nano",
        epochs=1,
        batch_size=4,
        train_images=4,
        min_size=[32],
        num_workers=0,
        bn_images=0,
        heads={"fpn_chans": 16, "box_dim": 32, "rois_per_image": 16},
        output=tmp_path / "run",
    )
    assert summary is not None
    assert summary.run == str(tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["min_size"], config["max_size"]) == ([32], 53)


def test_the_exported_file_finds_the_same(
    boxes: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(detector), "--data", str(boxes), "--output", "model.onnx"]) == 0
    said = capsys.readouterr()
    assert "images of 40x40 to 40x96 px" in said.out
    assert " 0 not found by the file, 0 found by it alone" in said.out
    assert "5 images of val" in said.out
    for model, report in ((detector, "network"), ("model.onnx", "file")):
        command = ["eval", str(model), "--data", str(boxes), "--output", report, "--num-workers", "0"]
        assert main(command) == 0
    ours, theirs = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("network", "file"))
    assert all(theirs[name] == pytest.approx(ours[name], abs=0.5) for name in ("box_ap", "box_ap50", "mask_ap"))
    network, file = qtvit.load(detector), qtvit.load("model.onnx")
    for size in ((97, 211), (33, 20), (150, 150)):
        picture = Image.open(boxes / "val" / "3.png").resize(size)
        ours, theirs = (predictor.predict(picture, score_threshold=0.3) for predictor in (network, file))
        assert theirs.labels == ours.labels
        assert theirs.category_ids == ours.category_ids
        torch.testing.assert_close(theirs.boxes, ours.boxes, rtol=1e-3, atol=1e-2)
        assert theirs.masks.shape == ours.masks.shape == (len(ours), size[1], size[0])
        assert (theirs.masks == ours.masks).float().mean() > 0.999
    assert len(file.predict(Image.new("RGB", (64, 48), (120, 120, 120)))) == 0
    with pytest.raises(ValueError, match=r"model.onnx: cannot be run on an image of 400 x 1 px"):
        file.predict(Image.new("RGB", (400, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "openvino"], "--format onnx --precision fp32, not openvino and fp32"),
        (["--precision", "fp16"], "--format onnx --precision fp32, not onnx and fp16"),
        (["--img-size", "64"], "--img-size: the file of a detector takes images of any size"),
        (["--dynamic", "batch,hw"], "--dynamic batch,hw: the file of a detector takes one image of any size"),
        (["--dynamic", "none"], "--dynamic none: the file of a detector takes one image of any size"),
    ],
)
def test_what_the_file_of_a_detector_does_not_have_is_said(
    detector: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["export", str(detector), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(detector.glob("model.*"))


def test_a_misspelt_model_is_named(boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(SHORT, boxes, tmp_path / "run", "--model", "qtvit_9") == 2
    assert "unknown model 'qtvit_9'; did you mean" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
