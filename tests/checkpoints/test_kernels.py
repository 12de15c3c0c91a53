"""Weights that were trained with another attention kernel: loaded as what they are, or refused in plain words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo, identify_model, load_model, save_model
from qtvit.models import ARCHITECTURES, build_model
from qtvit.models.foreign import released_name
from qtvit.ops import KERNELS
from qtvit_cli import main

Weights = dict[str, Tensor]


@pytest.fixture
def weights(randomize: Callable[[nn.Module, int], nn.Module]) -> Callable[[str], Weights]:
    """The state dict of a qtvit_nano with that kernel."""
    return lambda kernel: randomize(build_model("qtvit_nano", num_classes=2, kernel=kernel), 0).state_dict()


def error_of(path: Path, **model_args: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        load_model(path, **model_args)
    assert "\n" not in str(error.value)
    return str(error.value)


def save(path: Path, weights: Weights, kernel: str | None) -> None:
    """A model file that is described as having that kernel (None: the default)."""
    args = {"num_classes": 2} if kernel is None else {"num_classes": 2, "kernel": kernel}
    save_model(path, weights, ModelInfo("qtvit_nano", args, ["a", "b"], {"size": [32, 32]}))


@pytest.mark.parametrize("kernel", ["taylor2", "taylor2_paper", "taylor2_paper_beta", "relu", "softmax"])
def test_undescribed_weights_tell_their_kernel_or_say_that_they_cannot(
    kernel: str, weights: Callable[[str], Weights], tmp_path: Path
) -> None:
    trained = weights(kernel)
    torch.save(trained, tmp_path / "x.pth")
    alike = [name for name, spec in KERNELS.items() if spec.scalars.keys() == KERNELS[kernel].scalars.keys()]
    if len(alike) > 1:
        message = error_of(tmp_path / "x.pth")
        assert "x.pth: weights of a model with another kernel than taylor2 (of its scalars, c is missing)" in message
        assert f"kernels with such weights: {', '.join(alike)}; load_model(path, kernel=…)" in message
        model, info = load_model(tmp_path / "x.pth", kernel=kernel)
    else:
        model, info = load_model(tmp_path / "x.pth")
    assert model.kernel == info.model_args.get("kernel", "taylor2") == kernel
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_names_of_the_release_tell_the_kernel_too(weights: Callable[[str], Weights]) -> None:
    for kernel in ("taylor2", "taylor2_paper"):
        released = {released_name(k, ARCHITECTURES["qtvit_nano"]): v for k, v in weights(kernel).items()}
        assert identify_model(released)[1].get("kernel", "taylor2") == kernel
        first = min(KERNELS[kernel].scalars)
        with pytest.raises(ValueError, match=f"another kernel than relu .*, {first} is not of this kernel"):
            identify_model(released, "relu")


def test_undescribed_weights_of_another_kernel_than_was_asked_for(
    weights: Callable[[str], Weights], tmp_path: Path
) -> None:
    torch.save(weights("taylor2"), tmp_path / "x.pth")
    message = error_of(tmp_path / "x.pth", kernel="relu")
    assert "x.pth: weights of a model with another kernel than relu (of its scalars, c is not of this k" in message
    assert message.endswith("kernels with such weights: taylor2")
    assert "unknown kernel 'rellu'; did you mean relu" in error_of(tmp_path / "x.pth", kernel="rellu")


def test_scalars_that_no_kernel_has(weights: Callable[[str], Weights], tmp_path: Path) -> None:
    renamed = {name.replace("scalars.c", "scalars.zeta"): value for name, value in weights("taylor2").items()}
    torch.save(renamed, tmp_path / "x.pth")
    message = error_of(tmp_path / "x.pth")
    assert "another kernel than taylor2 (of its scalars, c is missing, zeta is not of this kernel)" in message
    assert message.endswith("none of this version")


@pytest.mark.parametrize(("trained", "asked"), [("relu", "elu"), ("relu", "taylor2"), (None, "relu")])
def test_described_weights_are_of_one_kernel(
    trained: str | None, asked: str, weights: Callable[[str], Weights], tmp_path: Path
) -> None:
    path = tmp_path / "best.safetensors"
    save(path, weights(trained or "taylor2"), trained)
    assert (
        error_of(path, kernel=asked)
        == f"{path}: its qtvit_nano was trained with kernel {trained or 'taylor2'}, not {asked}"
    )
    assert load_model(tmp_path, kernel=trained or "taylor2")[0].kernel == (trained or "taylor2")
    assert load_model(tmp_path)[0].kernel == (trained or "taylor2")


def test_a_description_that_names_another_kernel_than_the_weights_have(
    weights: Callable[[str], Weights], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "best.safetensors"
    save(path, weights("relu"), None)
    message = error_of(path)
    assert message.startswith(
        f"{path}: weights of a model with another kernel than taylor2 (of its scalars, c is missi"
    )
    assert main(["predict", str(path), "x.jpg"]) == 2
    assert capsys.readouterr().err == f"qtvit: error: {message}\n"
