"""Weights of others as models of ours: exactly, or refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtvit.checkpoints import ModelInfo, convert, load_model, save_model, save_released
from qtvit.models import ARCHITECTURES, build_model
from qtvit.models.foreign import released_name, source_of, timm_name
from qtvit_cli import main

pytestmark = pytest.mark.slow

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "released_state_dict_shapes.json").read_text())
Weights = dict[str, Tensor]
Randomize = Callable[[nn.Module, int], nn.Module]
NEW_PARTS = ("pos_embed", "scalars", "shortcut_norm")


@pytest.fixture
def nano(randomize: Randomize) -> Weights:
    return randomize(build_model("qtvit_nano", num_classes=7), 0).state_dict()


@pytest.fixture
def efficientvit(randomize: Randomize) -> Callable[[str], nn.Module]:
    """timm's, with random weights and statistics."""
    return lambda name: randomize(timm.create_model(name, num_classes=9), 0).eval()


def released(state_dict: Weights, name: str = "qtvit_nano") -> Weights:
    return {released_name(key, ARCHITECTURES[name]): value for key, value in state_dict.items()}


def without_new_parts(state_dict: Weights) -> Weights:
    return {key: value for key, value in state_dict.items() if not any(part in key for part in NEW_PARTS)}


def image(*size: int, chans: int = 3) -> Tensor:
    return torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SHAPES)
def test_every_released_tensor_has_its_place(name: str) -> None:
    """The six full-size models, each tensor filled with a number of its own."""
    shapes = SHAPES[name]["keys"]
    numbers = dict(zip(shapes, range(len(shapes)), strict=True))
    weights = {key: torch.tensor(float(numbers[key])).expand(shape) for key, shape in shapes.items()}
    with torch.device("meta"):
        model = build_model(name)
    model.load_state_dict(weights, assign=True)
    loaded = model.state_dict()
    assert len(loaded) == len(weights)
    for key, tensor in loaded.items():
        theirs = released_name(key, ARCHITECTURES[name])
        assert list(tensor.shape) == shapes[theirs]
        assert tensor.flatten()[0] == numbers[theirs]


@pytest.mark.parametrize("name", ["qtvit_nano", "qtvit_0"])
def test_to_the_release_and_back_is_the_identity(name: str, randomize: Randomize, tmp_path: Path) -> None:
    trained = randomize(build_model(name, num_classes=7), 0).state_dict()
    torch.save(trained, tmp_path / "ours.pt")
    ours = convert(tmp_path / "ours.pt")
    for file in ("theirs.pt", "theirs.safetensors"):
        save_released(tmp_path / file, ours.state_dict, ours.info)
        content = torch.load(tmp_path / file)["state_dict"] if file.endswith("pt") else load_file(tmp_path / file)
        assert source_of(content) == "release"
        assert content.keys() == released(trained, name).keys()
        back = convert(tmp_path / file)
        assert back.info.model == name
        assert back.info.source == f"{file}, the authors' release of QT-ViT"
        assert (back.transformed, back.added) == ({}, [])
        assert back.state_dict.keys() == trained.keys()
        assert all(torch.equal(value, trained[key]) for key, value in back.state_dict.items())


@torch.no_grad()
@pytest.mark.parametrize(("theirs", "ours"), [("efficientvit_b1", "qtvit_1"), ("efficientvit_l1", "qtvit_4")])
def test_efficientvit_gives_its_logits(
    theirs: str, ours: str, efficientvit: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    peer = efficientvit(theirs)
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    cfg, weights = ARCHITECTURES[ours], peer.state_dict()
    with torch.device("meta"):
        kept = [key for key in build_model(ours, num_classes=9).state_dict() if not any(p in key for p in NEW_PARTS)]
    save_file({released_name(key, cfg): weights[timm_name(key, cfg)] for key in kept}, tmp_path / "mit.safetensors")

    as_it_is, info = load_model(tmp_path / "timm.pth")
    attention = {"kernel": "relu", "ape": False, "shortcut": False, "attn_eps": 1e-5}
    assert (info.model, info.model_args) == (ours, {"num_classes": 9, **attention})
    converted = convert(tmp_path / "timm.pth", kernel="relu")
    assert converted.info.model_args == {"num_classes": 9, "kernel": "relu", "attn_eps": 1e-5}
    save_model(tmp_path / "converted.safetensors", converted.state_dict, converted.info)
    args = {"num_classes": 9, "kernel": "relu", "attn_eps": 1e-5}
    models = {
        "as it is": as_it_is,
        "by timm": timm.create_model(ours, **args, checkpoint_path=tmp_path / "timm.pth").eval(),
        "converted": load_model(tmp_path / "converted.safetensors")[0],
    }
    for size in [(64, 96), (97, 131), *([(224, 224)] if ours == "qtvit_1" else [])]:
        want = peer(image(*size))
        for how, model in models.items():
            torch.testing.assert_close(
                model(image(*size)), want, rtol=0, atol=1e-5, msg=lambda text, how=how: f"{how}: {text}"
            )
    mit, info = load_model(tmp_path / "mit.safetensors")
    assert info.model_args == {"num_classes": 9, "kernel": "relu", "ape": False, "shortcut": False}
    torch.testing.assert_close(mit(image(64, 96)), peer(image(64, 96)), rtol=0, atol=1e-4)  # 1e-15 in place of 1e-5


def test_efficientvit_starts_a_qtvit(efficientvit: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """Shared weights are taken over; positional maps are 0, shortcuts silent but not dead."""
    torch.save({"state_dict": efficientvit("efficientvit_b0").state_dict()}, tmp_path / "x.pt")
    conversion = convert(tmp_path / "x.pt")
    assert conversion.info.model_args == {"num_classes": 9}
    assert "kernel relu -> taylor2" in conversion.remarks[-1]
    assert all(any(part in name for part in NEW_PARTS) for name in conversion.added)
    theirs = torch.load(tmp_path / "x.pt")["state_dict"]
    assert sorted(conversion.mapped.values()) == sorted(theirs)
    for ours, name in conversion.mapped.items():
        assert torch.equal(conversion.state_dict[ours], theirs[name])
    model = timm.create_model("qtvit_0", num_classes=9, checkpoint_path=tmp_path / "x.pt")
    swapped, info = load_model(tmp_path / "x.pt", swap_kernel=True)
    assert info.model_args == {"num_classes": 9}
    for name, value in conversion.state_dict.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(swapped.state_dict()[name], value)
    attn = model.get_submodule("stages.3.1.attn")
    assert attn.shortcut(torch.randn(2, 16, 16, 5)).abs().max() == 0
    model.train()(image(64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if any(part in name for part in NEW_PARTS):
            assert parameter.grad.abs().max() > 0, name


def test_weights_of_one_kernel_start_a_model_of_another(randomize: Randomize, tmp_path: Path) -> None:
    trained = randomize(build_model("qtvit_nano", num_classes=7, kernel="relu"), 0).state_dict()
    torch.save(trained, tmp_path / "x.pt")
    model, info = load_model(tmp_path / "x.pt", swap_kernel=True)
    assert info.model_args == {"num_classes": 7}
    assert model.kernel == "taylor2"
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]) if name in trained else value == 1
    torch.save(model.state_dict(), tmp_path / "y.pt")
    back, info = load_model(tmp_path / "y.pt", swap_kernel=True, kernel="taylor2_paper", shortcut=False)
    assert info.model_args == {"num_classes": 7, "kernel": "taylor2_paper", "shortcut": False}
    assert {"alpha", "gamma"} == set(back.get_submodule("stages.1.1.attn").scalars)
    assert torch.equal(back.head.fc.weight, trained["head.fc.weight"])


def content(weights: Weights) -> dict[str, tuple[Any, str]]:
    """A file, and what the conversion remarks about it."""
    theirs = released(weights)
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in theirs.items()}
    prefixes = "prefixes of wrappers (module., _orig_mod., model.) taken off the names"
    return {
        "training.pt": (
            {"state_dict": theirs, "ema": {0.9998: averaged}, "optimizer": {"lr": 0.1}, "epoch": 3},
            "weights under 'state_dict' taken; left out: ema, optimizer, epoch ('ema' is a moving average: --ema takes "
            "that)",
        ),
        "timm.pth.tar": ({"model": weights, "epoch": 3}, "weights under 'model' taken; left out: epoch"),
        "parallel.bin": ({f"module.{key}": value for key, value in theirs.items()}, prefixes),
        "lightning.pth": ({"net": {f"model.{key}": value for key, value in weights.items()}}, prefixes),
        "compiled.pth": ({f"_orig_mod.{key}": value for key, value in weights.items()}, prefixes),
        "plain.pt": (weights, ""),
    }


@pytest.mark.parametrize("file", content({}))
def test_what_is_around_the_weights_is_told(file: str, nano: Weights, tmp_path: Path) -> None:
    torch.save(content(nano)[file][0], tmp_path / file)
    conversion = convert(tmp_path / file)
    assert "; ".join(conversion.remarks) == content(nano)[file][1]
    assert all(torch.equal(value, nano[key]) for key, value in conversion.state_dict.items())


@pytest.mark.parametrize(
    "container", [{"ema": {0.9998: ...}}, {"ema": ...}, {"state_dict_ema": ...}, {"model_ema": ...}]
)
def test_the_moving_average_is_taken(container: dict[str, Any], nano: Weights, tmp_path: Path) -> None:
    zeros = {key: torch.zeros_like(value) for key, value in nano.items()}
    ((name, inner),) = container.items()
    torch.save({"state_dict": nano, name: {0.9998: zeros} if isinstance(inner, dict) else zeros}, tmp_path / "x.pt")
    assert all((value == 0).all() for value in convert(tmp_path / "x.pt", ema=True).state_dict.values())
    torch.save({"state_dict": nano}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: holds no moving average of the weights \(none of ema, state_dict"):
        convert(tmp_path / "x.pt", ema=True)
    torch.save({"ema": {0.9: zeros, 0.99: zeros}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"moving averages of 2 decays \(0.9, 0.99\), not of one"):
        convert(tmp_path / "x.pt", ema=True)


def test_half_precision_is_accepted_and_said(nano: Weights, tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in nano.items()}
    torch.save(half, tmp_path / "x.pt")
    conversion = convert(tmp_path / "x.pt")
    num_floats = sum(value.is_floating_point() for value in nano.values())
    assert list(conversion.transformed.values()) == ["float16 -> float32"] * num_floats
    assert f"transformed   {num_floats}  {num_floats} float16 -> float32" in conversion.report()
    assert all(torch.equal(value, half[key].float()) for key, value in conversion.state_dict.items() if value.ndim)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_positional_maps_are_resized_as_at_run_time(size: tuple[int, int], nano: Weights, tmp_path: Path) -> None:
    """Whichever way the weights get into a model for another image size."""
    save_file(released(nano), tmp_path / "x.safetensors")
    trained = load_model(tmp_path / "x.safetensors")[0]
    conversion = convert(tmp_path / "x.safetensors", img_size=size)
    assert set(conversion.transformed.values()) == {
        f"map resized {side}x{side} -> {size[0] * side // 32}x{size[1] * side // 32}" for side in (16, 8)
    }
    assert (conversion.info.model_args["img_size"], conversion.info.preprocess["size"]) == ([*size], [*size])
    save_model(tmp_path / "y.safetensors", conversion.state_dict, conversion.info)
    want = trained(image(*size))
    models = {
        "loaded": load_model(tmp_path / "x.safetensors", img_size=size)[0],
        "converted": load_model(tmp_path / "y.safetensors")[0],
        "by timm": timm.create_model(
            "qtvit_nano", num_classes=7, img_size=size, checkpoint_path=tmp_path / "x.safetensors"
        ).eval(),
    }
    for how, model in models.items():
        assert model.get_submodule("stages.1.1.attn").pos_embed.shape[2:] == (size[0] // 2, size[1] // 2)
        torch.testing.assert_close(model(image(*size)), want, rtol=0, atol=1e-5, msg=lambda t, how=how: f"{how}: {t}")


def test_a_model_within_another_loads_its_weights_too(nano: Weights) -> None:
    nested = nn.ModuleDict({"backbone": build_model("qtvit_nano", num_classes=7), "neck": nn.Linear(2, 2)})
    weights = {f"backbone.{key}": value for key, value in released(nano).items()}
    nested.load_state_dict({**weights, **nested["neck"].state_dict(prefix="neck.")})
    assert all(torch.equal(value, nano[key]) for key, value in nested["backbone"].state_dict().items())


def test_loading_weights_of_another_kernel_says_so(nano: Weights, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="weights of a model with another kernel than relu"):
        build_model("qtvit_nano", num_classes=7, kernel="relu").load_state_dict(nano)
    save_file(nano, tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match="weights of a model with another kernel than softmax"):
        timm.create_model("qtvit_nano", num_classes=7, kernel="softmax", checkpoint_path=tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match="weights of a model with another kernel than relu"):
        timm.create_model("qtvit_nano", pretrained=True, kernel="relu")
    with pytest.raises(ValueError, match=r"model qtvit_nano cannot be built with .*: weights of a model with another"):
        build_model("qtvit_nano", pretrained=True, kernel="relu")


def off_by_one_class(weights: Weights) -> Weights:
    return {**weights, "head.fc.weight": torch.zeros(8, 128)}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda w: dict(list(w.items())[: len(w) // 2]), {}, "closest is qtvit_nano (missing 7"),
        (off_by_one_class, {}, "closest is qtvit_nano (of another shape 1: head.fc.bias (7,), not (8,))"),
        (lambda w: w, {"model": "qtvit_1"}, "not the weights of qtvit_1 (missing 276: stages.1"),
        (lambda w: w, {"kernel": "relu"}, "weights of a model with another kernel than relu"),
        (lambda w: w, {"kernel": "rellu"}, "unknown kernel 'rellu'; did you mean relu"),
        (
            lambda w: {k: v for k, v in w.items() if "scalars" not in k},
            {},
            "--kernel says which they were trained with",
        ),
        (lambda w: w, {"classes": ["a", "b"]}, "has 7 outputs, but 2 classes are named"),
        (lambda w: w, {"img_size": (1, 1)}, "--img-size 1x1 is below the network's minimum of 4 px"),
        (lambda w: {**w, **released(w)}, {}, "is there under two names, of which one is "),
        (lambda w: {**w, **{f"module.{k}": v for k, v in w.items()}}, {}, "with and without the prefix of a wrapper"),
        (lambda w: {**w, "head.fc.bias": torch.ones(7, dtype=torch.int8)}, {}, "head.fc.bias holds int8, not floating"),
        (lambda w: {**w, "head.fc.bias": torch.full((7,), 1e300, dtype=torch.float64)}, {}, "infinity in 1 tensors"),
        (
            lambda w: {**w, "head.fc.bias": torch.full((7,), torch.nan)},
            {},
            "NaN or infinity in 1 tensors: head.fc.bias",
        ),
    ],
)
def test_what_is_not_converted(
    change: Callable[[Weights], Weights], options: dict[str, Any], message: str, nano: Weights, tmp_path: Path
) -> None:
    torch.save(change(nano), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: ") as error:
        convert(tmp_path / "x.pt", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: dict(list(w.items())[:50]), "Missing key(s) in state_dict"),
        (lambda w: {**w, "surprise": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "surprise"'),
        (lambda w: {"a": torch.zeros(1)}, "Missing key(s) in state_dict"),
    ],
)
def test_a_described_file_that_is_damaged(
    change: Callable[[Weights], Weights], message: str, nano: Weights, tmp_path: Path
) -> None:
    info = ModelInfo("qtvit_nano", {"num_classes": 7}, list("abcdefg"), {"size": [32, 32]})
    save_model(tmp_path / "x.safetensors", change(nano), info)
    for read in (convert, load_model):
        with pytest.raises(ValueError, match=r"x\.safetensors: ") as error:
            read(tmp_path / "x.safetensors")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_the_kernel_of_weights_that_cannot_tell(randomize: Randomize, tmp_path: Path) -> None:
    trained = randomize(build_model("qtvit_nano", kernel="elu"), 0).state_dict()
    for weights in (trained, released(trained)):
        torch.save(weights, tmp_path / "x.pt")
        conversion = convert(tmp_path / "x.pt", kernel="elu")
        assert conversion.info.model_args == {"num_classes": 10, "kernel": "elu"}
    torch.save(released(without_new_parts(trained)), tmp_path / "mit.pt")
    with pytest.raises(ValueError, match="the weights of an EfficientViT, whose kernel is relu, not elu"):
        load_model(tmp_path / "mit.pt", kernel="elu")
    converted = convert(tmp_path / "mit.pt", kernel="elu")
    assert converted.info.source == "mit.pt, MIT's EfficientViT"
    assert converted.info.model_args == {"num_classes": 10, "kernel": "elu"}


def test_a_run_and_the_model_of_a_run(nano: Weights, tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    info = ModelInfo("qtvit_nano", {"num_classes": 7}, list("abcdefg"), {"size": [32, 32]}, metrics={"top1": 77.0})
    save_model(run / "best.safetensors", nano, info)
    conversion = convert(run)
    assert conversion.info.source == "my-run, a model of qtvit"
    assert (conversion.info.classes, conversion.info.metrics) == (list("abcdefg"), {"top1": 77.0})
    assert convert(run, img_size=(40, 40)).info.metrics == {}
    for name, message in (("qtvit_1", "described as qtvit_nano, not qtvit_1"), (None, "a model of timm's; there is")):
        if name is None:
            save_model(run / "best.safetensors", nano, replace(info, model="resnet18"))
        with pytest.raises(ValueError, match=message):
            convert(run, model=name)


def test_parts_of_weights_change_only_themselves(nano: Weights) -> None:
    """With ``strict=False``: whatever the names are, nothing is filled in that belongs to other weights."""
    model = build_model("qtvit_nano", num_classes=7)
    model.load_state_dict(nano)
    theirs = {"backbone.foo": torch.zeros(1), "stem.in_conv.conv.weight": torch.ones(16, 3, 3, 3)}
    for part in ({}, {"head.fc.bias": torch.ones(7)}, theirs):
        model.load_state_dict(part, strict=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, nano[name])}
    assert changed == {"head.fc.bias", "stages.0.0.conv.weight"}
    other = build_model("qtvit_nano", num_classes=7, kernel="relu")
    missing, unexpected = other.load_state_dict(nano, strict=False)
    assert missing == []
    assert all(name.endswith("scalars.c") for name in unexpected)
    assert len(unexpected) == 4


def test_a_model_that_was_changed_loads_its_own_weights(nano: Weights) -> None:
    model = build_model("qtvit_nano", num_classes=7)
    model.aux = nn.Linear(3, 3)
    model.head = nn.Linear(96, 3)
    weights = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert "stages.0.0.norm.weight" in model.no_weight_decay()


def test_a_model_without_storage_takes_efficientvit(nano: Weights) -> None:
    with torch.device("meta"):
        model = build_model("qtvit_nano", num_classes=7, img_size=48)
    half = {key: value.half() if value.is_floating_point() else value for key, value in nano.items()}
    model.load_state_dict(released(half), assign=True)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16, torch.int64}
    with torch.device("meta"):
        model = build_model("qtvit_nano", num_classes=7)
    model.load_state_dict(released(without_new_parts(half)), assign=True)
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert model.get_submodule("stages.1.1.attn").pos_embed.abs().max() == 0


def test_a_model_that_is_not_ours(tmp_path: Path) -> None:
    for name, hint in (("qtvit_9", "did you mean qtvit_"), ("resnet18", "known: qtvit_nano, qtvit_0")):
        with pytest.raises(ValueError, match=f"unknown model '{name}'; {hint}"):
            convert(tmp_path / "x.pt", model=name)


def test_what_the_authors_code_has_not(randomize: Randomize, tmp_path: Path) -> None:
    for args in ({"kernel": "relu"}, {"ape": False}, {"shortcut": False}):
        torch.save(build_model("qtvit_nano", **args).state_dict(), tmp_path / "x.pt")
        conversion = convert(tmp_path / "x.pt", kernel=args.get("kernel"))
        ((name, value),) = args.items()
        with pytest.raises(ValueError, match=f"the authors' code has {name}=.* alone, this model {name}={value}"):
            save_released(tmp_path / "new" / "y.pt", conversion.state_dict, conversion.info)
    assert not (tmp_path / "new").exists()


def test_the_command(nano: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, dst = tmp_path / "qtvit.pt", tmp_path / "new" / "model.safetensors"
    torch.save({"state_dict": {f"module.{key}": value for key, value in released(nano).items()}}, src)
    (tmp_path / "names.txt").write_text("a\nb\n\nc d\ne\nf\ng\nh\n")
    command = ["convert", str(src), str(dst), "--classes", str(tmp_path / "names.txt"), "-v"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "qtvit.pt, the authors' release of QT-ViT -> qtvit_nano (num_classes=7; 0.44 M parameters)" in out
    assert f"  mapped        {len(nano)}\n" in out
    assert "\n    head.fc.bias  7  <- head.op_list.3.linear.bias\n" in out
    model, info = load_model(dst)
    assert info.classes == ["a", "b", "c d", "e", "f", "g", "h"]
    assert info.source == "qtvit.pt, the authors' release of QT-ViT"
    assert all(torch.equal(value, nano[key]) for key, value in model.state_dict().items())

    assert main(command) == 2
    assert capsys.readouterr().err.endswith(
        "model.safetensors exists already; name another file, or replace it with --overwrite\n"
    )
    assert main([*command, "--overwrite"]) == 0
    assert "  missing         0\n  unexpected      0\n" in capsys.readouterr().out
    assert main(["convert", str(dst), str(tmp_path / "back.pt"), "--to", "released"]) == 0
    assert torch.load(tmp_path / "back.pt")["state_dict"].keys() == released(nano).keys()
    assert main(["convert", str(src), str(tmp_path / "x.pt")]) == 2
    assert "the file to write has to end in .safetensors" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "gone.pt"), str(tmp_path / "x.safetensors")]) == 2
    assert "gone.pt: no such" in capsys.readouterr().err
