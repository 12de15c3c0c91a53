from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtvit.tasks.segment.masks import MaskClasses, count_values, read_mask
from qtvit.tasks.segment.palette import color_keys, default_palette, format_color, key_color, parse_color

SIZE = (97, 211)


def random_labels(num_classes: int, ignore_index: int) -> np.ndarray:
    return np.random.default_rng(0).choice([*range(num_classes), ignore_index], SIZE)


def test_the_palette() -> None:
    assert default_palette(5) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))  # VOC's first
    assert default_palette(16)[9] == (192, 0, 0)  # of VOC's chair
    assert len(set(default_palette(1000))) == 1000


def test_colours_as_numbers() -> None:
    colors = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    assert [key_color(key) for key in color_keys(colors).tolist()] == [tuple(color) for color in colors.tolist()]
    assert color_keys(np.array([1, 2, 3], np.uint8)) == 0x010203


def test_colours_as_text() -> None:
    assert parse_color(" 1  20 255") == (1, 20, 255)
    assert parse_color(format_color((0, 7, 9))) == (0, 7, 9)
    for text in ("1 2", "1 2 3 4", "1 2 256", "1,2,3", "red", "-1 2 3"):
        assert parse_color(text) is None


@pytest.mark.parametrize("num_classes", [2, 150, 600])
def test_palette_round_trip(tmp_path: Path, num_classes: int) -> None:
    names = tuple(map(str, range(num_classes)))
    classes = MaskClasses(
        names, tuple(range(num_classes)), ignored_colors=((255, 254, 253),), by_color=True, ignore_index=-1
    )
    labels = random_labels(num_classes, -1)
    classes.paint(labels).save(tmp_path / "color.png")
    assert read_mask(tmp_path / "color.png").shape == (*SIZE, 3)
    assert (classes.read(tmp_path / "color.png") == labels).all()


@pytest.mark.parametrize(
    ("values", "ignored", "mode"),
    [((3, 0, 7), (255,), "P"), ((1, 2, 3), (0, 255), "P"), ((0, 300), (9,), "I;16"), ((0, 1), (65535,), "I;16")],
)
def test_index_round_trip(tmp_path: Path, values: tuple[int, ...], ignored: tuple[int, ...], mode: str) -> None:
    names = tuple(map(str, values))
    classes = MaskClasses(names, values, ignored)
    labels = random_labels(len(values), 255)
    image = classes.index_image(labels)
    assert image.mode == mode
    image.save(tmp_path / "index.png")
    assert (classes.read(tmp_path / "index.png") == labels).all()
    assert set(np.unique(read_mask(tmp_path / "index.png"))) == {*values, ignored[0]}
    if mode == "P":
        drawn = np.asarray(image.convert("RGB"))
        assert tuple(drawn[labels == 1][0]) == classes.colors[1]


def test_colours_draw_and_do_not_read_without_by_color(tmp_path: Path) -> None:
    classes = MaskClasses(("a", "b"), (0, 1), (255,), ((9, 9, 9), (8, 8, 8)))
    painted = np.asarray(classes.paint(np.array([[0, 1, 255]])))
    assert painted.tolist() == [[[9, 9, 9], [8, 8, 8], [255, 255, 255]]]
    Image.fromarray(np.stack([np.array([[0, 1, 255]], np.uint8)] * 3, -1)).save(tmp_path / "grey.png")
    assert classes.read(tmp_path / "grey.png").tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("color", [(0, 0, 1), (9, 9, 10), (9, 10, 9), (200, 0, 0)])
def test_unknown_colours(tmp_path: Path, color: tuple[int, int, int]) -> None:
    classes = MaskClasses(("a", "b"), (0, 1), (), ((9, 9, 9), (10, 0, 0)), ((0, 0, 0),), by_color=True)
    pixels = np.full((*SIZE, 3), 9, np.uint8)
    pixels[3, 4:6] = color
    pixels[8] = (1, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="colours that no class has") as error:
        classes.read(tmp_path / "mask.png")
    shown = format_color(color)
    unknown = f"{tmp_path}/mask.png: colours that no class has: 1 0 0 (211 px), {shown} (2 px)"
    assert str(error.value) == f"{unknown}; those to ignore go under ignore_colors in classes.yaml"
    pixels[8] = (10, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=f"has: {shown} "):
        classes.read(tmp_path / "mask.png")


def test_noise_is_counted_in_short() -> None:
    mask = np.arange(5000, dtype=np.uint16).reshape(50, 100)
    mask[0] = 7
    counts = count_values(mask).without_rare()
    assert len(counts.pixels) == 1000
    assert str(counts).startswith("7 (100 px), 100 (1 px), 101 (1 px)")
    assert str(counts).endswith(" and 4,896 more")  # of 4901
    unknown = MaskClasses(("a", "b"), (7, 100)).unknown(counts)
    assert unknown is not None
    assert "and 4,894 more; those of" in unknown


def test_values_outside_of_16_bits(tmp_path: Path) -> None:
    classes = MaskClasses(("a", "b"), (0, 1), (255,))
    Image.fromarray(np.array([[0, 1, 70000, -5]], np.int32)).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match=r"mask\.tif") as error:
        classes.read(tmp_path / "mask.tif")
    assert "values that no class has: -5 (1 px), 70000 (1 px); those of the 2 classes are 0 to 1" in str(error.value)


def test_a_bilevel_mask(tmp_path: Path) -> None:
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[0, 1]]


def test_transparency_is_left_out(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[1, 2, 3, 0], [4, 5, 6, 255]]], np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_a_jpeg_by_another_name(tmp_path: Path) -> None:
    Image.new("L", SIZE).save(tmp_path / "mask.png", format="JPEG")
    with pytest.raises(ValueError, match=r"mask.png: a mask saved as JPEG, whose lossy compression invents values"):
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("index", [40_000, -32_768])
def test_the_ignore_index_fits(index: int) -> None:
    with pytest.raises(ValueError, match=f"ignore_index must be from -32767 to 32767, got {index}"):
        MaskClasses(("a", "b"), (0, 1), ignore_index=index)
