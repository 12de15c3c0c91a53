"""Going on from trained weights, data that is not balanced, and the Python entry point."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import qtvit
from qtvit.checkpoints import load_model
from qtvit.models import build_model
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.tasks.classify.train import Classifier, class_weights
from qtvit.training.optim import freeze, parameter_groups
from qtvit.training.options import make_config, parse_config
from qtvit_cli import main
from tests.training.conftest import COLORS, draw

pytestmark = pytest.mark.slow

FAST = {"model": "qtvit_nano", "img_size": 16, "epochs": 1, "batch_size": 8, "num_workers": 0, "bn_images": 8}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_keyword_arguments_are_the_options() -> None:
    config = make_config(
        ClassifyConfig,
        data=Path("photos"),
        recipe="quickstart",
        lr=0.5,
        img_size="8x16",
        early_stopping=None,
        model_args={"kernel": "taylor2_paper", "drop_rate": 0.1},
        optim={"layer_decay": 0.8, "betas": (0.8, 0.9)},
    )
    assert (config.data, config.epochs, config.lr, config.img_size) == ("photos", 10, 0.5, "8x16")
    assert config.model_args == {"kernel": "taylor2_paper", "drop_rate": 0.1}
    assert (config.optim.layer_decay, config.optim.betas, config.optim.weight_decay) == (0.8, (0.8, 0.9), 0.05)
    with pytest.raises(ValueError, match="unknown option '--epohs'; did you mean --epochs"):
        make_config(ClassifyConfig, data="photos", epohs=3)


def test_values_of_numpy_and_tuples_are_taken() -> None:
    config = make_config(ClassifyConfig, data="d", img_size=(32, 48), lr=np.float32(0.5), epochs=np.int64(3))
    assert (config.image_shape(), config.lr, config.epochs) == ((32, 48), 0.5, 3)


def test_the_model_is_the_checkpoints(photos: Path, run: Path, tmp_path: Path) -> None:
    options = {name: value for name, value in FAST.items() if name not in ("model", "img_size")}
    summary = qtvit.train_classifier(data=photos, checkpoint=run, output=tmp_path / "run", **options)
    assert load_model(summary.run)[1].model == "qtvit_nano"


def test_the_python_entry_point_trains(photos: Path, tmp_path: Path) -> None:
    summary = qtvit.train_classifier(data=photos, output=tmp_path / "run", **FAST)
    assert summary.run == str(tmp_path / "run")
    assert len(qtvit.load(summary.run).predict(photos / "red" / "1.png").labels) == 3


@pytest.mark.parametrize(
    ("name", "what", "expected"),
    [
        ("qtvit_nano", "backbone", {"head"}),
        ("qtvit_nano", "stages=1", {"stages.1", "stages.2", "head"}),
        ("qtvit_0", "stages=3", {"stages.3", "stages.4", "head"}),
        ("resnet18", "backbone", {"fc"}),
        ("efficientvit_b0", "stages=2", {"stages.2", "stages.3", "head"}),
    ],
)
def test_what_freezing_leaves_in_training(name: str, what: str, expected: set[str]) -> None:
    model = build_model(name, num_classes=3)
    frozen = freeze(model, what)
    whole = {p for n, p in model.named_parameters() if any(n.startswith(f"{prefix}.") for prefix in expected)}
    assert {p for p in model.parameters() if p.requires_grad} == whole
    still = {p for module in frozen for p in module.parameters()}
    assert still == set(model.parameters()) - whole


@pytest.mark.parametrize("what", ["stages=3", "stages=9"])
def test_more_stages_than_there_are_cannot_be_frozen(what: str) -> None:
    model = build_model("qtvit_nano")
    if what == "stages=3":
        freeze(model, what)
        assert all(name.startswith("head.") for name in trainable(model))
    else:
        with pytest.raises(ValueError, match="--freeze stages=9: QTViT has 3 stages"):
            freeze(model, what)


def test_what_is_frozen_stays_as_it_is(photos: Path, run: Path, tmp_path: Path) -> None:
    """Parameters and BatchNorm statistics, also where these are estimated anew."""
    for name in ("blue", "red"):
        shutil.copytree(photos / name, tmp_path / "two" / name)
    output = tmp_path / "tuned"
    qtvit.train_classifier(data=tmp_path / "two", checkpoint=run, freeze="stages=2", output=output, **FAST)
    before, after = (load_model(folder)[0].state_dict() for folder in (run, output))
    same = {name for name, tensor in after.items() if tensor.shape == before[name].shape and tensor.equal(before[name])}
    assert {name for name in after if name.startswith(("stages.0.", "stages.1."))} <= same
    later = {name for name in after if name.startswith("stages.2.") and "num_batches" not in name}
    assert len(later & same) < len(later) / 4
    assert not any(name.startswith("head.fc") for name in same)


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model = build_model("qtvit_nano", num_classes=3)
    task = Classifier(model, 3, ClassifyConfig(data="d", freeze="backbone"))
    task.eval()
    task.train()
    assert not any(module.training for module in model.stages.modules())
    assert model.head.training
    assert all(module.training for module in model.head.modules())


def test_layer_decay_by_hand() -> None:
    """The head learns at lr; each block before it at 0.5 of the one behind."""
    model = build_model("qtvit_nano")
    rates = {p: group["lr"] for group in parameter_groups(model, 0.1, 0.05, 0.5) for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[model.head.fc.weight] == rates[model.head.in_conv.conv.weight] == 0.1
    blocks = [block for stage in model.stages for block in stage]
    for distance, block in enumerate(reversed(blocks), 1):
        assert {rates[p] for p in block.parameters()} == {0.1 * 0.5**distance}
    decay = {p: group["weight_decay"] for group in parameter_groups(model, 0.1, 0.05, 0.5) for p in group["params"]}
    plain = {p: group["weight_decay"] for group in parameter_groups(model, 0.1, 0.05) for p in group["params"]}
    assert decay == plain


def test_frozen_parameters_are_not_optimised() -> None:
    model = build_model("qtvit_nano")
    freeze(model, "backbone")
    for decay in (1.0, 0.5):
        groups = parameter_groups(model, 0.1, 0.05, decay)
        assert {p for group in groups for p in group["params"]} == set(model.head.parameters())


def test_class_weights_by_hand() -> None:
    weights = class_weights([0, 0, 0, 1, 2, 2], 3, "balanced")
    torch.testing.assert_close(weights, torch.tensor([6 / 9, 6 / 3, 6 / 6]))
    assert class_weights([0, 1], 2, None) is None


def test_balanced_weights_reach_the_loss(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = Classifier.training_step

    def spy(self: Classifier, *args: object) -> torch.Tensor:
        seen.append(self.class_weights)
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", spy)
    for i in range(4):
        draw(tmp_path / "few" / "green" / f"{i}.png", COLORS["green"], i)
    shutil.copytree(photos / "red", tmp_path / "few" / "red")
    qtvit.train_classifier(data=tmp_path / "few", output=tmp_path / "run", optim={"class_weights": "balanced"}, **FAST)
    torch.testing.assert_close(seen[0], torch.tensor([11 / (2 * 3), 11 / (2 * 8)]))


def test_early_stopping(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {**FAST, "epochs": 30, "lr": 1e-9, "output": tmp_path / "run"}
    qtvit.train_classifier(data=photos, early_stopping=2, **options)
    out = capsys.readouterr().out
    assert "epoch 3/30" in out
    assert "epoch 4/30" not in out
    assert "stopped early: no better top-1 in 2 evaluations" in out


def test_an_img_size_below_the_minimum(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"train classify --model qtvit_0 --data {photos} --batch-size 8 --img-size"
    assert main([*argv.split(), "16"]) == 2
    assert "--img-size 16x16 is below the network's minimum of 32 px, its largest stride" in capsys.readouterr().err
    assert main([*argv.split(), "2", "--model", "qtvit_nano"]) == 2
    assert "minimum of 4 px" in capsys.readouterr().err


def test_images_of_one_pixel_train(tmp_path: Path) -> None:
    from PIL import Image

    for name, color in COLORS.items():
        for i in range(4):
            (tmp_path / "dots" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1, 1), color).save(tmp_path / "dots" / name / f"{i}.png")
    summary = qtvit.train_classifier(data=tmp_path / "dots", output=tmp_path / "run", **FAST)
    assert qtvit.load(summary.run).predict(tmp_path / "dots" / "red" / "0.png").labels


def test_quiet_and_plain_output(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"train classify --model qtvit_nano --data {photos} --img-size 8 --epochs 1 --batch-size 8 --num-workers 0"
    assert main([*argv.split(), "--output", str(tmp_path / "loud")]) == 0
    captured = capsys.readouterr()
    assert "epoch 1/1" in captured.out
    assert captured.err == ""  # no bars without a terminal
    assert main([*argv.split(), "--output", str(tmp_path / "quiet"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "epoch" not in out
    assert "top-1" in out


def test_a_broken_image_is_skipped_on_request(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(photos, tmp_path / "broken")
    (tmp_path / "broken" / "red" / "3.png").write_text("not a picture")
    argv = ["--data", str(tmp_path / "broken"), "--on-bad-image", "skip", "--output", str(tmp_path / "run")]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    assert main(["train", "classify", *argv, *options]) == 0
    out = capsys.readouterr().out
    assert "skipping 1 of " in out
    assert "3.png" in out


def test_timm_models_follow_timms_rule_of_decay() -> None:
    model = timm.create_model("resnet18", num_classes=2)
    for decay in (1.0, 0.7):
        groups = parameter_groups(model, 0.1, 0.05, decay)
        exempt = {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        assert exempt == {p for p in model.parameters() if p.ndim == 1}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--freeze=all", "--freeze must be backbone, or stages=N, got 'all'"),
        ("--freeze=stages=0", "--freeze must be"),
        ("--early-stopping=0", "--early-stopping must be 1 or more"),
        ("--optim.layer-decay=0", "--optim.layer-decay must be above 0"),
        ("--optim.class-weights=equal", "--optim.class-weights"),
        ("--on-bad-image=maybe", "--on-bad-image"),
        ("--seed=-1", "--seed must be 0 or more"),
    ],
)
def test_values_that_are_not_accepted(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(["--data", "d", option], ClassifyConfig)


def test_the_saved_config_keeps_the_name_of_shipped_weights(photos: Path, tmp_path: Path) -> None:
    qtvit.train_classifier(data=str(photos), checkpoint="nano-cifar10", output="run", **{**FAST, "model": "qtvit_nano"})
    config = parse_config(["--recipe", str(tmp_path / "run" / "config.yaml")], ClassifyConfig)
    assert (config.checkpoint, config.data) == ("nano-cifar10", str(photos))
