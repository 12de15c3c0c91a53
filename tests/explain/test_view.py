"""Rows of attention weights: exact, where they are said to be, and of the image that is shown."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import qtvit
from qtvit.checkpoints import ModelInfo
from qtvit.explain import attention, focus, look
from qtvit.layers import LinearAttention
from qtvit.models import Architecture, QTViT, build_model
from qtvit.ops import KERNELS, reference_attention
from qtvit.tasks.classify.predict import ClassPredictor

POINTS = [(0, 0), (50, 20), (98.5, 39), (30, 35)]


def capture(network: QTViT, pixels: Tensor, name: str) -> dict[str, Tensor]:
    """What comes into an attention layer, and what comes into its projection."""
    caught = {}
    layer: Any = network.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: caught.update(layer=args[0]))
    layer.proj.register_forward_pre_hook(lambda _, args: caught.update(proj=args[0]))
    network(pixels)
    return caught


def shown(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The network's input at ``size`` (W, H), with ImageNet's mean and std."""
    resized = torch.tensor(list(image.resize(size, Image.Resampling.BICUBIC).tobytes())).reshape(size[1], size[0], 3)
    scaled = resized.permute(2, 0, 1)[None] / 255
    return (scaled - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_rows_are_those_of_the_reference(kernel: str, network: Callable[..., QTViT], picture: Image.Image) -> None:
    model = network(kernel=kernel)
    for index, name, size in ((0, "stages.1.1.attn", (8, 20)), (-1, "stages.2.1.attn", (4, 10))):
        result = attention(model, picture, POINTS, index)
        layer: Any = model.get_submodule(name)
        q, k, _ = (x.mT.double() for x in layer.tokens(capture(model, shown(picture, (40, 16)), name)["layer"]))
        heads, num_tokens = q.shape[1:3]
        identity = torch.eye(num_tokens, dtype=torch.float64).expand(1, heads, -1, -1)
        scalars = {scalar: value.double() for scalar, value in layer.scalars.items()}
        rows = reference_attention(q, k, identity, kernel, **scalars)[0]
        tokens = [row * size[1] + column for row, column in result.tokens]
        want = rows[:, tokens].transpose(0, 1).unflatten(-1, size).float()
        assert (result.layer, result.kernel) == (name, kernel)
        torch.testing.assert_close(result.weights, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        if KERNELS[kernel].normalized:
            sums = result.weights.sum((-1, -2))
            expected = (want.sum((-1, -2)) > 0.5).float()  # a rectified query may have no weights at all
            torch.testing.assert_close(sums, expected)
            assert expected.all() or kernel in ("relu", "focused")
            assert expected.any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shortcut", [False, True])
@torch.no_grad()
def test_rows_times_values_are_the_output_of_the_layer(
    kernel: str, shortcut: bool, network: Callable[..., QTViT], picture: Image.Image
) -> None:
    model = network(kernel=kernel, shortcut=shortcut)
    result = attention(model, picture, POINTS, "stages.2.1.attn")
    layer: Any = model.get_submodule("stages.2.1.attn")
    caught = capture(model, shown(picture, (40, 16)), "stages.2.1.attn")
    v = layer.tokens(caught["layer"])[2]  # (1, heads, D, N)
    core = caught["proj"].flatten(2).unflatten(1, v.shape[1:3])
    core = core - layer.shortcut(v) if shortcut else core
    tokens = [row * 10 + column for row, column in result.tokens]
    out = result.weights.flatten(2).transpose(0, 1) @ v[0].mT  # (heads, points, D)
    torch.testing.assert_close(out, core[0].mT[:, tokens], rtol=1e-4, atol=1e-5 * float(core.abs().max()))


def test_points_find_their_tokens(network: Callable[..., QTViT], picture: Image.Image) -> None:
    view = look(network(), picture)
    assert view.image.size == (40, 16)  # 0.4 of the image
    # Pixel x of the image is at 0.4 (x + 0.5) - 0.5 of what is shown: 5.75 at 2, half-way between the first two tokens.
    at = [(0, 0), (5.7, 5.7), (5.8, 5.8), (50, 20), (99, 39), (95, 5)]
    coarse = view.attention(at, -1)
    assert coarse.stride == 4
    assert coarse.tokens == ((0, 0), (0, 0), (1, 1), (2, 5), (3, 9), (0, 9))
    assert coarse.marks[3] == pytest.approx((19.7, 7.7))
    assert coarse.points[3] == (50, 20)
    fine = view.attention(at, 0)
    assert fine.stride == 2
    assert fine.tokens == ((0, 0), (1, 1), (1, 1), (4, 10), (7, 19), (1, 19))
    one = view.attention((50, 20))
    torch.testing.assert_close(one.weights, coarse.weights[3:4])


@pytest.mark.parametrize(("family", "layer", "stride"), [("nano", "stages.1.1.attn", 2), ("b", "stages.3.1.attn", 16)])
def test_tokens_are_centred_where_they_are_said_to_be(
    family: str,
    layer: str,
    stride: int,
    tiny_architectures: Mapping[str, Architecture],
    randomize: Callable[[nn.Module, int], nn.Module],
) -> None:
    """By the pixels that have an influence on a token of the first attention layer, before which all is local."""
    model = randomize(QTViT(tiny_architectures[family], num_classes=3, img_size=192), 0).eval()
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    row, column = 80 // stride, 112 // stride
    caught: list[Tensor] = []
    pixels = torch.rand(1, 3, 192, 192, requires_grad=True)
    model(pixels)
    (gradient,) = torch.autograd.grad(caught[0][0, :, row, column].square().sum(), pixels)
    _, ys, xs = gradient[0].nonzero(as_tuple=True)
    centre = (int(xs.min() + xs.max()) / 2, int(ys.min() + ys.max()) / 2)
    assert centre == (112, 80)
    view = look(model, Image.new("RGB", (192, 192)))
    result = view.attention([centre, (112 + 0.4 * stride, 80 - 0.4 * stride), (112 - 0.6 * stride, 80)], layer)
    assert result.stride == stride
    assert result.tokens == ((row, column), (row, column), (row, column - 1))


def test_an_image_is_shown_once_and_only_when_needed(network: Callable[..., QTViT], picture: Image.Image) -> None:
    model, shows = network(), []
    model.register_forward_pre_hook(lambda *_: shows.append(1))
    view = look(model, picture)
    assert [view.num_heads(), view.num_heads(0)] == [6, 4]
    assert not shows
    assert [view.attention((5, 5), layer).weights.shape[1] for layer in (-1, 0)] == [6, 4]
    view.focus()
    assert len(shows) == 1


def test_the_whole_image_is_shown(network: Callable[..., QTViT]) -> None:
    model = network()
    for size, img_size, expected in [
        ((101, 41), None, (39, 16)),
        ((41, 101), None, (16, 39)),
        ((8, 8), None, (16, 16)),
        ((100, 40), 24, (60, 24)),
        ((100, 40), (20, 30), (30, 20)),
        ((30, 1000), (20, 30), (30, 20)),
    ]:
        view = look(model, Image.new("RGB", size), img_size)
        assert (view.image.size, view.original_size) == (expected, size)
        corner = view.attention((size[0] - 1, size[1] - 1))
        height, width = corner.weights.shape[-2:]
        assert (height, width) == (-(-expected[1] // 4), -(-expected[0] // 4))
        assert corner.tokens == ((height - 1, width - 1),)


def test_a_predictor_brings_preprocessing_and_classes(network: Callable[..., QTViT], picture: Image.Image) -> None:
    model = network()
    preprocess = {"size": [12, 20], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    predictor = ClassPredictor(model, ModelInfo("qtvit_nano", {}, ["a", "b", "c"], preprocess), "cpu")
    seen = look(predictor, picture)
    assert seen.image.size == (30, 12)
    assert seen.prediction is not None
    with torch.no_grad():
        pixels = torch.tensor(list(seen.image.tobytes())).reshape(1, 12, 30, 3).permute(0, 3, 1, 2) / 255
        want = model((pixels - 0.5) / 0.2).softmax(-1)[0]
    assert seen.prediction.probability == pytest.approx(float(want.max()), abs=1e-5)
    assert seen.prediction.label == "abc"[int(want.argmax())]
    assert look(model, picture).prediction is None


def test_the_network_is_left_as_it_is(network: Callable[..., QTViT], picture: Image.Image) -> None:
    model = network().train()
    model.stages[1].eval()
    before = {name: (module.training, len(module._forward_pre_hooks)) for name, module in model.named_modules()}
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    result = attention(model, picture, (5, 5))
    assert {n: (m.training, len(m._forward_pre_hooks)) for n, m in model.named_modules()} == before
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())
    assert torch.equal(result.weights, attention(model.eval(), picture, (5, 5)).weights)
    assert not result.weights.requires_grad


def test_half_precision_and_compiled_networks(network: Callable[..., QTViT], picture: Image.Image) -> None:
    want = attention(network(), picture, POINTS).weights
    half = attention(network().bfloat16(), picture, POINTS).weights
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, want, rtol=0.2, atol=0.01)
    assert torch.equal(attention(torch.compile(network()), picture, POINTS).weights, want)


def test_by_name_and_from_the_package(picture: Image.Image) -> None:
    result = qtvit.explain.attention("nano-cifar10", picture, at=(50, 20))
    assert result.weights.shape == (1, 12, 8, 20)
    assert result.weights.sum((-1, -2)).tolist() == [pytest.approx([1] * 12)]
    assert result.prediction is not None
    assert [row.layer for row in focus("nano-cifar10", picture)] == [
        f"stages.{stage}.{block}.attn" for stage in (1, 2) for block in (1, 2)
    ]
    with pytest.raises(AttributeError, match="has no attribute 'explaim'"):
        qtvit.explaim  # noqa: B018


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((100, 5), r"point 100,5 is outside the image, which is 100 x 40 pixels \(x from 0 to 99, y from 0 to 39\)"),
        ([(5, 5), (5, 40)], "point 5,40 is outside"),
        ((-0.5, 5), "point -0.5,5 is outside"),
        ((float("nan"), 5), "point nan,5 is outside"),
        ((99.5, 5), "point 99.5,5 is outside"),
        ([], r"at is a point \(x, y\), two numbers, or a list of points, got \[\]$"),
        *(
            (at, "at is a point")
            for at in (
                *((1, 2, 3), [(1, 2), (3,)], ["ab"], "ab", ("1", "2"), 5, None, True, (True, True), [(1, 2), 3]),
                *({1: 2}, [[(1, 2)]], (None, 1), np.float64(3), torch.zeros(3), torch.zeros(2, device="meta")),
            )
        ),
    ],
)
def test_points_that_are_none(at: Any, message: str, network: Callable[..., QTViT], picture: Image.Image) -> None:
    with pytest.raises(ValueError, match=message):
        attention(network(), picture, at)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (2, r"there is no attention layer 2; they are 0 to 1: stages\.1\.1\.attn, stages\.2\.1\.attn$"),
        (-3, "there is no attention layer -3"),
        ("stages.1.1", r"'stages\.1\.1' has no attention; the layers that have: stages\.1\.1\.attn, stages\.2\.1"),
        ("stages.1.1.atn", r"unknown attention layer 'stages\.1\.1\.atn'; did you mean stages\.1\.1\.attn"),
        ("", "unknown attention layer ''; known: stages"),
        *((layer, r"layer is a number, or a name such as stages\.2\.1\.attn, got") for layer in (None, 1.0, True, [0])),
    ],
)
def test_layers_that_are_none(layer: Any, message: str, network: Callable[..., QTViT], picture: Image.Image) -> None:
    with pytest.raises(ValueError, match=message):
        attention(network(), picture, (5, 5), layer)


def test_points_and_layers_as_arrays_give_them(network: Callable[..., QTViT], picture: Image.Image) -> None:
    view = look(network(), picture)
    listed = [(5.0, 6.0), (90.0, 30.0)]
    want = view.attention(listed, 1)
    assert want.points == tuple(listed)
    for at in (np.array(listed), torch.tensor(listed, requires_grad=True), [np.array(p) for p in listed]):
        result = view.attention(at, np.int64(1))  # type: ignore[arg-type]
        assert (result.points, result.layer) == (want.points, want.layer)
    assert view.attention(torch.tensor([5, 6])).points == ((5, 6),)  # type: ignore[arg-type]


def models_without_maps(network: Callable[..., QTViT]) -> dict[str, Any]:
    with torch.device("meta"):
        resnet, vit = timm.create_model("resnet18"), timm.create_model("vit_tiny_patch16_224")
        pruned = build_model("qtvit_4", num_classes=0)
        linear = timm.create_model("vit_tiny_patch16_224", attn_layer=LinearAttention)
        features = timm.create_model("qtvit_nano", features_only=True)
    pruned.prune_intermediate_layers([0])
    return {
        "ResNet has no attention layers of qtvit": resnet,
        "VisionTransformer has no attention layers of qtvit": vit,
        r"VisionTransformer has attention of qtvit, but maps are made only of qtvit's own networks \(QTViT\)": linear,
        "FeatureListNet has attention of qtvit, but maps are made only of": features,
        "Identity has no attention layers": nn.Identity(),
        "QTViT has no attention layers": pruned,
        "for images of 1 channels, and images are read as RGB": network(in_chans=1),
        "a model given as int; expected a predictor, a network, a path": 3,
    }


def test_models_without_maps(network: Callable[..., QTViT], picture: Image.Image) -> None:
    for message, model in models_without_maps(network).items():
        with pytest.raises(ValueError, match=message):
            attention(model, picture, (5, 5))
    with pytest.raises(FileNotFoundError, match="nowhere: no such run folder or model file"):
        attention("nowhere", picture, (5, 5))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such image file"):
        attention(network(), "nowhere.png", (5, 5))


def test_images_that_are_too_small(network: Callable[..., QTViT], picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="img_size 3x8 is below the network's minimum of 4 px"):
        look(network(), picture, 3)


@pytest.mark.parametrize("img_size", ["64", 64.0, True, (64,), (64, 64, 3), (64.0, 64), [None, 64]])
def test_sizes_that_are_none(img_size: Any, network: Callable[..., QTViT], picture: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"img_size is a side, or \(height, width\), in whole pixels, got"):
        attention(network(), picture, (5, 5), img_size=img_size)
