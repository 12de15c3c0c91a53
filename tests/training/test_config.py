from pathlib import Path

import pytest
import yaml

from qtvit import tasks
from qtvit.tasks.classify.config import ClassifyConfig
from qtvit.training.options import parse_config, recipe_names, save_config


def test_options_win_over_the_recipe_whatever_their_order() -> None:
    for argv in (["--lr", "3", "--recipe", "quickstart"], ["--recipe=quickstart", "--lr=3"]):
        config = parse_config(argv, ClassifyConfig)
        assert (config.lr, config.model, config.augment.hflip) == (3.0, "qtvit_nano", 0.0)


def test_hyphens_and_underscores_are_the_same() -> None:
    config = parse_config(
        ["--data", "d", "--batch-size", "5", "--num_workers", "0", "--optim.weight-decay", "0.5"], ClassifyConfig
    )
    assert (config.batch_size, config.num_workers, config.optim.weight_decay) == (5, 0, 0.5)


def test_model_args() -> None:
    argv = ["--data", "d", "--model-args.kernel", "taylor2_paper", "--model-args.drop_path_rate", "0.1"]
    assert parse_config(argv, ClassifyConfig).model_args == {"kernel": "taylor2_paper", "drop_path_rate": 0.1}


@pytest.mark.parametrize(("given", "shape"), [("224", (224, 224)), ("160x256", (160, 256)), (None, None)])
def test_image_shape(given: str | None, shape: tuple[int, int] | None) -> None:
    assert ClassifyConfig(data="d", img_size=given).image_shape() == shape


def test_the_saved_configuration_is_a_recipe(tmp_path: Path) -> None:
    config = parse_config(["--recipe", "quickstart", "--seed", "7"], ClassifyConfig)
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--recipe", str(tmp_path / "config.yaml")], ClassifyConfig) == config


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in tasks.TASKS for name in recipe_names(task)])
def test_shipped_recipes_parse(task: str, name: str) -> None:
    parse_config(["--recipe", name, "--data", "d", "--checkpoint", "RUN"], tasks.get(task).load("config"))


OFF = [
    "--optim.weight-decay 0",
    "--optim.warmup-epochs 0",
    "--optim.grad-clip null",
    "--optim.loss ce",
    "--optim.label-smoothing 0",
    "--optim.drop-path-ramp false",
    "--augment.mixup 0",
    "--augment.cutmix 0",
    "--augment.auto-augment null",
    "--augment.interpolation bicubic",
    "--augment.random-erasing 0",
    "--augment.train-sizes []",
    "--model-args.drop_path_rate 0",
    "--ema.mesa-ratio 0",
    "--ema.mesa-ratio 0 --ema.decay 0",
    "--bn-images 0",
]


@pytest.mark.parametrize("off", OFF)
def test_each_part_of_a_recipe_can_be_switched_off(off: str) -> None:
    recipe = ["--recipe", "imagenet/qtvit_4", "--data", "d"]
    config, whole = parse_config([*recipe, *off.split()], ClassifyConfig), parse_config(recipe, ClassifyConfig)
    assert config != whole
    flat = [
        {**vars(c), **{f"{g}.{k}": v for g in ("optim", "augment", "ema") for k, v in vars(getattr(c, g)).items()}}
        for c in (config, whole)
    ]
    changed = {name for name in flat[0] if flat[0][name] != flat[1][name]} - {"optim", "augment", "ema"}
    assert changed == {name[2:].replace("-", "_").split(".drop_path_rate")[0] for name in off.split()[::2]}


def test_a_recipe_lies_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("{epochs: 7, lr: 0.5, optim: {weight_decay: 0.3, loss: bce}}")
    (tmp_path / "mine.yaml").write_text("{base: low.yaml, lr: 0.1, optim: {loss: ce}, augment: {hflip: 0.2}}")
    config = parse_config(["--recipe", str(tmp_path / "mine.yaml"), "--data", "d", "--epochs", "9"], ClassifyConfig)
    assert (config.epochs, config.lr, config.augment.hflip) == (9, 0.1, 0.2)
    assert (config.optim.weight_decay, config.optim.loss) == (0.3, "ce")
    (tmp_path / "low.yaml").write_text("base: mine.yaml")
    with pytest.raises(ValueError, match=r"low\.yaml: its base mine\.yaml lies over it already"):
        parse_config(["--recipe", str(tmp_path / "mine.yaml"), "--data", "d"], ClassifyConfig)
    (tmp_path / "other.yaml").write_text("base: quickstart")
    assert parse_config(["--recipe", str(tmp_path / "other.yaml")], ClassifyConfig).data == "digits"


# Number: RandAugment n, m; mixing a; drop path, skipped; erasing; MESA start, ratio; crop. PAPER's table.
IMAGENET = {
    1: (1, 3, 0.1, 0.05, 0, 0.0, 0.0, 0.95),
    2: (1, 3, 0.1, 0.05, 0, 0.0, 0.0, 1.0),
    3: (2, 6, 0.3, 0.1, 0, 0.0, 0.0, 1.0),
    4: (2, 5, 0.2, 0.1, 2, 0.2, 2.0, 1.0),
    5: (2, 5, 0.4, 0.1, 3, 0.2, 2.75, 1.0),
    6: (2, 6, 0.6, 0.1, 3, 0.2, 3.5, 1.0),
}


@pytest.mark.parametrize("number", IMAGENET)
def test_imagenet_recipes_are_the_published_ones(number: int) -> None:
    n, m, alpha, drop_path, skip, erasing, mesa, crop = IMAGENET[number]
    config = parse_config(["--recipe", f"imagenet/qtvit_{number}", "--data", "d"], ClassifyConfig)
    optim, augment, ema = config.optim, config.augment, config.ema
    assert (config.model, config.crop_pct, config.img_size) == (f"qtvit_{number}", crop, 224)
    assert (config.epochs, config.batch_size, config.lr) == (320, 128, 0.00025 if number < 4 else 0.00015)
    assert (config.bn_images, config.bn_batch_size) == (16000, 100)
    assert config.model_args.get("drop_path_rate") == drop_path
    assert config.model_args.get("drop_path_skip", 0) == skip
    assert (optim.loss, optim.weight_decay, optim.betas, optim.warmup_epochs) == ("bce", 0.1, (0.9, 0.999), 20)
    assert (optim.grad_clip, optim.label_smoothing, optim.drop_path_ramp) == (2.0, 0.1, True)
    assert augment.auto_augment == f"rand-n{n}-m{m}-mstd1.0-inc1"
    assert (augment.mixup, augment.cutmix, augment.mix_alpha) == (0.5, 0.5, alpha)
    assert (augment.scale, augment.hflip, augment.interpolation) == ((0.08, 1.0), 0.5, "random")
    assert (augment.random_erasing, augment.color_jitter) == (erasing, 0.0)
    assert augment.train_sizes == [128, 160, 192, 224]
    assert (ema.decay, ema.warmup_steps, ema.mesa_ratio) == (0.9998, 4000, mesa)
    assert mesa == 0 or ema.mesa_start == 0.25


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lrr", "3"], "unknown option '--lrr'; did you mean --lr"),
        (["--optim.weight-decai", "3"], "did you mean --optim.weight-decay"),
        (["--lr", "abc"], "--lr: Expected a float. Got value: abc"),
        (["--lr", "-1"], "--lr must be more than 0, got -1.0"),
        (["--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["--epochs", "1.5"], "--epochs: Expected a int"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--precision", "fp8"], "--precision: Expected a Literal"),
        (["--img-size", "160,224"], "--img-size must be a side such as 224, or HEIGHTxWIDTH"),
        (["--img-size", "0"], "--img-size must be a side"),
        (["--val-fraction", "1"], "--val-fraction must be between 0 and 1"),
        (["--augment.hflip", "2"], "--augment.hflip must be a probability"),
        (["--augment.scale", "[0, 1]"], "--augment.scale must be 0 < min"),
        (["--optim.label-smoothing", "1"], "--optim.label-smoothing must be"),
        (["--recipe", "quikstart"], "unknown recipe 'quikstart'; did you mean quickstart"),
        (["--optim.loss", "mse"], "--optim.loss: Expected a Literal"),
        (["--optim.name", "sgd"], "--optim.name: Expected a Literal"),
        (["--optim.momentum", "1"], "--optim.momentum must be from 0 to below 1, got 1.0"),
        (
            ["--augment.mixup", "0.7", "--augment.cutmix", "0.5"],
            "--augment.cutmix must be at most 0.3 beside mixup 0.7",
        ),
        (["--augment.mix-alpha", "0"], "--augment.mix-alpha must be more than 0"),
        (["--augment.train-sizes", "[128, abc]"], "--augment.train-sizes must be a side"),
        (["--ema.decay", "1"], "--ema.decay must be from 0 to below 1"),
        (["--ema.mesa-ratio", "2"], "--ema.mesa-ratio must be 0 without an ema.decay"),
        (["--accumulate", "0"], "--accumulate must be 1 or more"),
        (["--checkpoint-every-steps", "0"], "--checkpoint-every-steps must be 1 or more, got 0"),
        (["--num-threads", "0"], "--num-threads must be 1 or more, got 0"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")) as error:
        parse_config(["--data", "d", *argv], ClassifyConfig)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimm": {}}, "unknown key 'optimm'; did you mean optim"),
        ({"optim": {"weight_decai": 1}}, "unknown key 'optim.weight_decai'; did you mean optim.weight_decay"),
        ({"lr": "abc"}, "lr: Expected a float"),
        ([1], "a recipe is a mapping"),
        ({"base": "mine.yaml"}, "mine.yaml: its base mine.yaml lies over it already"),
        ({"augment": None}, "augment is a mapping of names to values, got None"),
        ({"model_args": 3}, "model_args is a mapping of names to values, got 3"),
        ({"base": "quikstart"}, "unknown recipe 'quikstart'; did you mean quickstart"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        parse_config(["--data", "d", "--recipe", str(path)], ClassifyConfig)


def test_a_missing_or_unreadable_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such recipe file"):
        parse_config(["--recipe", "nowhere.yaml"], ClassifyConfig)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_config(["--recipe", str(tmp_path / "bad.yaml")], ClassifyConfig)
