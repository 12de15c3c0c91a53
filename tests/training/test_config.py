from pathlib import Path

import pytest
import yaml

from qtvit.training.config import TrainConfig, parse_config, recipe_names, save_config


def test_options_win_over_the_recipe_whatever_their_order() -> None:
    for argv in (["--lr", "3", "--recipe", "quickstart"], ["--recipe=quickstart", "--lr=3"]):
        config = parse_config(argv)
        assert (config.lr, config.model, config.augment.hflip) == (3.0, "qtvit_nano", 0.0)


def test_hyphens_and_underscores_are_the_same() -> None:
    config = parse_config(["--data", "d", "--batch-size", "5", "--num_workers", "0", "--optim.weight-decay", "0.5"])
    assert (config.batch_size, config.num_workers, config.optim.weight_decay) == (5, 0, 0.5)


def test_model_args() -> None:
    argv = ["--data", "d", "--model-args.kernel", "taylor2_paper", "--model-args.drop_path_rate", "0.1"]
    assert parse_config(argv).model_args == {"kernel": "taylor2_paper", "drop_path_rate": 0.1}


@pytest.mark.parametrize(("given", "shape"), [("224", (224, 224)), ("160x256", (160, 256)), (None, None)])
def test_image_shape(given: str | None, shape: tuple[int, int] | None) -> None:
    assert TrainConfig(data="d", img_size=given).image_shape() == shape


def test_the_saved_configuration_is_a_recipe(tmp_path: Path) -> None:
    config = parse_config(["--recipe", "quickstart", "--seed", "7"])
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--recipe", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_parse_and_say_their_command(name: str) -> None:
    parse_config(["--recipe", name, "--data", "d"])


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
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")) as error:
        parse_config(["--data", "d", *argv])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimm": {}}, "unknown key 'optimm'; did you mean optim"),
        ({"optim": {"weight_decai": 1}}, "unknown key 'optim.weight_decai'; did you mean optim.weight_decay"),
        ({"lr": "abc"}, "lr: Expected a float"),
        ([1], "a recipe is a mapping"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        parse_config(["--data", "d", "--recipe", str(path)])


def test_a_missing_or_unreadable_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such recipe file"):
        parse_config(["--recipe", "nowhere.yaml"])
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_config(["--recipe", str(tmp_path / "bad.yaml")])
