"""``qtvit explain`` and its pictures."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import qtvit
from qtvit.checkpoints import ModelInfo, save_model
from qtvit.explain import attention, draw, look, sharpness
from qtvit.models import QTViT, build_model
from qtvit_cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Image.Image) -> Path:
    """The current folder, which has a picture in it."""
    monkeypatch.chdir(tmp_path)
    picture.save("photo.jpg")
    return tmp_path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, randomize: Callable[[nn.Module, int], nn.Module]) -> Path:
    """Run folders of two kernels, and one of a timm model."""
    root = tmp_path_factory.mktemp("runs")
    for name, model, args in [
        *((kernel, "qtvit_nano", {"kernel": kernel}) for kernel in ("relu", "cosine")),
        ("resnet", "test_resnet", {}),
    ]:
        args = {"num_classes": 2, **args}
        network = randomize(build_model(model, **args), 1)
        (root / name).mkdir()
        info = ModelInfo(model, args, ["cat", "dog"], {"size": [16, 16]})
        save_model(root / name / "best.safetensors", network.state_dict(), info)
    return root


def test_the_shipped_model_at_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # what it wrote before is replaced
        assert main(["explain", "nano-cifar10", "photo.jpg", "--at", "70,10", "--quiet"]) == 0
    assert sorted(os.listdir()) == ["photo-attention.npy", "photo-attention.png", "photo-focus.png", "photo.jpg"]
    rows = np.load("photo-attention.npy")
    assert rows.dtype == np.float32
    assert rows.shape == (1, 12, 8, 20)
    expected = qtvit.explain.attention("nano-cifar10", "photo.jpg", at=(70, 10)).weights
    np.testing.assert_allclose(rows, expected.numpy(), rtol=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "kernel", "layer", "tokens", "entropy", "support"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["nano-cifar10", "taylor2", f"stages.{stage}.{block}.attn"] for stage in (1, 2) for block in (1, 2)
    ]
    assert all(0 < float(line.split()[-2]) < 1 and line.endswith("%") for line in lines[1:5])
    assert lines[5:8] == [
        "written: photo-attention.png",
        "written: photo-attention.npy (float32, points x heads x height x width: 1 x 12 x 8 x 20)",
        "written: photo-focus.png",
    ]


def test_runs_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["explain", str(runs / "relu"), "photo.jpg", "--grid", "2x1", "--at", "99,39", "--layer", "0"]
    others = [str(runs / "cosine" / "best.safetensors"), str(runs / "relu")]
    assert main([*argv, "--head", "3", "--img-size", "20", "--output", "new/x", "--compare", *others]) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()[1:13:4]] == ["relu", "cosine", "relu (2)"]
    numbers = ["", "-2", "-3"]
    files = [*(f"x-attention{n}.npy" for n in numbers), "x-attention.png", "x-focus.png"]
    assert sorted(os.listdir("new")) == sorted(files)
    relu, cosine, again = (np.load(f"new/x-attention{n}.npy") for n in numbers)
    at = [(99, 39), (49.5, 9.5), (49.5, 29.5)]
    expected = attention(runs / "relu", "photo.jpg", at, 0, 20).weights
    assert expected.shape == (3, 6, 10, 25)
    np.testing.assert_allclose(relu, expected.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(relu, again)
    assert cosine.min() < 0 <= relu.min()
    with Image.open("new/x-attention.png") as image:
        assert image.width > image.height > 300


def test_the_centre_is_the_default_point(runs: Path) -> None:
    assert main(["explain", str(runs / "relu"), "photo.jpg", "--output", "x.png"]) == 0
    centre = attention(runs / "relu", "photo.jpg", (49.5, 19.5))
    assert centre.tokens == ((2, 5),)
    np.testing.assert_array_equal(np.load("x-attention.npy"), centre.weights.numpy())


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in place of files."""
    drawn: list[Figure] = []
    monkeypatch.setattr(draw, "_save", lambda figure, out: drawn.append(figure))
    return drawn


def maps_of(figure: Figure) -> list[Axes]:
    """The axes with weights over an image."""
    return [axes for axes in figure.axes if len(axes.images) == 2]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in maps_of(figure)]


def test_all_heads_and_one(network: Callable[..., QTViT], picture: Image.Image, figures: list[Figure]) -> None:
    rows = look(network(), picture).attention([(5, 5), (90, 30)], 0)
    weights = rows.weights
    for head in ("mean", 3, "all"):
        draw.draw_attention({"x": rows}, Path("x.png"), head)
    mean, one, every = figures
    supports = [f"{float(sharpness(w.flatten())[1]):.0%}" for w in weights.mean(1)]
    assert titles(mean) == [f"{i}: support {s}" for i, s in enumerate(supports, start=1)]
    assert len(titles(one)) == 2
    assert [title.split(", ")[0] for title in titles(every)] == [f"{p}: head {h}" for p in (1, 2) for h in range(4)]
    assert "mean of 4 heads" in mean.texts[1].get_text()
    assert "head 3" in one.texts[1].get_text()
    boxes = [[axes.get_position().bounds for axes in maps_of(figure)] for figure in figures]
    assert boxes[0] == boxes[1]
    assert len({tuple(box) for box in boxes[2]}) == 8
    assert all(0 <= x < x + w <= 1 and 0 <= y < y + h <= 1 for page in boxes for x, y, w, h in page)
    for figure, drawn in zip(figures, (weights.mean(1), weights[:, 3], weights.flatten(0, 1)), strict=True):
        for axes, row in zip(maps_of(figure), drawn, strict=True):
            np.testing.assert_allclose(axes.images[1].get_array()[:-1, :-1], row * 160, rtol=1e-6)


def test_maps_lie_over_the_pixels_of_their_tokens(network: Callable[..., QTViT], figures: list[Figure]) -> None:
    view = look(network(), Image.new("RGB", (101, 41)))  # is shown at 39 x 16, 10 x 4 tokens of 4 pixels
    rows = view.attention((50, 20))
    draw.draw_attention({"x": rows}, Path("x.png"))
    (axes,) = maps_of(figures[0])
    grey, heat = axes.images
    assert grey.get_array().shape == (16, 39)
    assert list(heat.get_extent()) == [-2, 42, 18, -2]  # 11 x 5: the last are doubled
    assert heat.get_array().shape == (5, 11)
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 38.5), (15.5, -0.5))
    mark = axes.lines[-1].get_xydata()[0]
    assert mark == pytest.approx((50.5 * 39 / 101 - 0.5, 20.5 * 16 / 41 - 0.5))


def render(figure: Figure) -> tuple[Axes, np.ndarray]:
    """The only map of ``figure`` without its mark, and the pixels in it, (H, W, 3)."""
    (axes,) = maps_of(figure)
    for line in list(axes.lines):
        line.remove()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = axes.get_window_extent()
    pixels = np.asarray(canvas.buffer_rgba())[::-1]  # upwards, as the box is given
    inside = pixels[math.ceil(box.y0) : math.floor(box.y1), math.ceil(box.x0) : math.floor(box.x1), :3]
    return axes, inside[::-1].astype(int)


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (101, 41), (30, 30)])
def test_maps_reach_all_edges_of_the_image(
    size: tuple[int, int], network: Callable[..., QTViT], figures: list[Figure]
) -> None:
    rows = look(network(), Image.new("RGB", size)).attention((9, 9))
    draw.draw_attention({"x": replace(rows, weights=torch.ones_like(rows.weights))}, Path("x.png"))
    _, pixels = render(figures[0])
    assert pixels.std((0, 1)).max() == 0
    assert pixels.max() > 100


@pytest.mark.parametrize("token", [(1, 3), (2, 9), (0, 0), (3, 5)])
def test_a_token_is_brightest_at_its_centre(
    token: tuple[int, int], network: Callable[..., QTViT], figures: list[Figure]
) -> None:
    rows = look(network(), Image.new("RGB", (40, 16))).attention((9, 9))
    weights = torch.zeros_like(rows.weights)
    weights[..., token[0], token[1]] = 1
    draw.draw_attention({"x": replace(rows, weights=weights)}, Path("x.png"))
    _, pixels = render(figures[0])
    height, width = pixels.shape[:2]
    bright = np.argwhere(pixels.sum(-1) >= pixels.sum(-1).max() * 0.98)
    y, x = bright.mean(0) + 0.5
    if token[0] < 3 and token[1] < 9:  # the last reach to the edges of the image
        assert (x / width * 40 - 0.5, y / height * 16 - 0.5) == pytest.approx((4 * token[1], 4 * token[0]), abs=0.3)
    assert pixels.sum(-1).max() > 360  # of 402 at the end of the scale: it is not smoothed away


def test_colors_tell_the_sign(network: Callable[..., QTViT], picture: Image.Image, figures: list[Figure]) -> None:
    rows = look(network(kernel="relu"), picture).attention((50, 20))
    flat, signed, none = torch.full_like(rows.weights, 0.025), rows.weights.clone(), torch.zeros_like(rows.weights)
    signed[..., 0, 0] = -3.0
    drawn = {name: replace(rows, weights=w) for name, w in (("flat", flat), ("signed", signed), ("none", none))}
    draw.draw_attention(drawn, Path("x.png"))
    assert titles(figures[0])[0] == "support 100%"
    assert titles(figures[0])[1].endswith("% of |w|")
    assert titles(figures[0])[2] == "no weights"
    heats = [axes.images[1] for axes in maps_of(figures[0])]
    assert [heat.get_cmap().name for heat in heats] == ["inferno", "RdBu_r", "inferno"]
    assert heats[0].get_clim() == pytest.approx((0, 1))
    assert heats[1].get_clim() == pytest.approx((-120, 120))


def test_names_of_any_kind_are_drawn(network: Callable[..., QTViT], picture: Image.Image) -> None:
    view = look(network(), picture)
    names = ["$x^", "n" * 300, "日本語", ""]
    draw.draw_attention({name: view.attention((5, 5)) for name in names}, Path("x.png"))
    draw.draw_focus({name: view.focus() for name in names}, Path("y.png"))
    for path in ("x.png", "y.png"):
        with Image.open(path) as image:
            assert image.width > image.height > 300


def test_focus_of_different_networks(
    network: Callable[..., QTViT], picture: Image.Image, figures: list[Figure]
) -> None:
    rows = look(network(), picture).focus()
    draw.draw_focus({"a": rows, "b": [replace(row, kernel="relu") for row in rows]}, Path("x.png"))
    draw.draw_focus({"a": rows, "b": rows[:1]}, Path("x.png"))
    entropy, support = figures[0].axes
    assert [text.get_text() for text in entropy.get_legend().get_texts()] == ["a (taylor2)", "b (relu)"]
    assert [tick.get_text() for tick in support.get_xticklabels()] == ["stages.1.1.attn", "stages.2.1.attn"]
    assert list(entropy.lines[0].get_ydata()) == [row.entropy for row in rows]
    assert list(support.lines[1].get_ydata()) == [row.support for row in rows]
    assert [tick.get_text() for tick in figures[1].axes[0].get_xticklabels()] == ["0", "1"]


ERRORS = [
    (["--at", "100,3"], "point 100,3 is outside the image, which is 100 x 40 pixels (x from 0 to 99, y from 0 to 39)"),
    (["--at", "1,2", "--at=-1,2"], "point -1,2 is outside"),
    (["--at", "-5,80"], "point -5,80 is outside the image, which is 100 x 40 pixels"),
    (["--at", "3,-.5", "--at", "-.5,3"], "point 3,-0.5 is outside"),
    (["--at", "-5,"], "a point is X,Y in pixels such as 120,80, got '-5,'"),
    (["--at", "-5"], "a point is X,Y in pixels such as 120,80, got '-5'"),
    (["--at", "3"], "a point is X,Y in pixels such as 120,80, got '3'"),
    (["--at", "1,2,3"], "a point is X,Y"),
    (["--at", "nan,3"], "a point is X,Y"),
    (["--at", "a,b"], "a point is X,Y"),
    (["--grid", "3"], "a grid is ROWSxCOLUMNS such as 3x4, got '3'"),
    (["--grid", "0x3"], "a grid is ROWSxCOLUMNS"),
    (["--grid", "20x20"], "400 maps are too many for one picture; the limit is 300"),
    (["--grid", "99999999x99999999"], "9999999800000001 maps are too many"),
    (["--grid", "13x2", "--head", "all"], "312 maps are too many for one picture; the limit is 300"),
    (["--layer", "4"], "there is no attention layer 4; they are 0 to 3: stages.1.1.attn, stages.1.2.attn, stages.2."),
    (["--layer", "-5"], "there is no attention layer -5"),
    (["--layer", "stages.0"], "'stages.0' has no attention; the layers that have: stages.1.1.attn, stages.1.2"),
    (["--layer", ""], "unknown attention layer ''; known: stages.1.1.attn"),
    (["--layer", "stages.1.3.attn"], "unknown attention layer 'stages.1.3.attn'; did you mean stages."),
    (["--head", "12"], "head must be mean, all or a number from 0 to 11, got 12"),
    (["--head", "-1"], "head must be mean, all or a number from 0 to 11, got -1"),
    (["--head", "max"], "head must be mean, all or a number from 0 to 11, got max"),
    (["--img-size", "2"], "img_size 2x5 is below the network's minimum of 4 px"),
    (["--img-size", "big"], "--img-size must be a side such as 224"),
    (["--device", "abacus"], "no such device: 'abacus'"),
    (["--compare", "nowhere"], "nowhere: no such run folder or model file"),
]


@pytest.mark.parametrize(
    ("options", "message"), ERRORS, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_mistakes_get_one_line_before_any_work(
    options: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QTViT, "forward", lambda *_: pytest.fail("the image was shown"))
    assert main(["explain", str(runs / "relu"), "photo.jpg", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qtvit: error: {message}")
    assert error.count("\n") == 1
    assert os.listdir() == ["photo.jpg"]


def test_heads_and_maps_that_cannot_be_drawn(network: Callable[..., QTViT], picture: Image.Image) -> None:
    rows = look(network(), picture).attention([(x, 5) for x in range(51)])
    for head in (6, -1, True, 1.0, None, "3"):
        with pytest.raises(ValueError, match=f"head must be mean, all or a number from 0 to 5, got {head}$"):
            draw.draw_attention({"x": rows}, Path("x.png"), head)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="306 maps are too many for one picture; the limit is 300"):
        draw.draw_attention({"x": rows}, Path("x.png"), "all")
    assert os.listdir() == ["photo.jpg"]


def test_models_and_images_that_cannot_be_explained(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, image, message in [
        ("resnet", "photo.jpg", f"{runs / 'resnet'}: ResNet has no attention layers of qtvit"),
        ("gone", "photo.jpg", f"{runs / 'gone'}: no such run folder or model file"),
        ("relu", "gone.jpg", "gone.jpg: no such image file"),
        ("relu", ".", ".: no such image file"),
    ]:
        assert main(["explain", str(runs / run), image]) == 2
        assert capsys.readouterr().err.startswith(f"qtvit: error: {message}")


def test_the_image_is_never_overwritten(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x-attention.png", "x-focus.png"):
        Image.new("RGB", (20, 20)).save(name)
        before = Path(name).read_bytes()
        assert main(["explain", str(runs / "relu"), name, "--output", "x"]) == 2
        assert f"--output x would overwrite {name}; name another one" in capsys.readouterr().err
        assert Path(name).read_bytes() == before


def test_an_output_that_is_a_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("new").mkdir()
    with pytest.raises(SystemExit):
        main(["explain", str(runs / "relu"), "photo.jpg", "--output", "new"])
    assert "new is a folder" in capsys.readouterr().err
