import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtvit.tasks.segment.check import check_segmentation_data
from qtvit.tasks.segment.data import load_segmentation_data
from tests.tasks.segment.drawn import COLORS, draw_data, draw_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    draw_data(tmp_path / "d")
    (tmp_path / "d" / "classes.txt").write_text("road\ncar\nsky\n")
    return tmp_path / "d"


def change(path: Path, value: int, num_pixels: int) -> None:
    mask = np.array(Image.open(path))
    mask.reshape(-1)[:num_pixels] = value
    Image.fromarray(mask).save(path)


def as_jpeg(path: Path) -> None:
    Image.open(path).save(path, format="JPEG")


def no_third_class(root: Path, folder: str) -> None:
    for path in (root / folder).rglob("*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask)).save(path)


def colored(root: Path, *, known: int) -> None:
    shutil.rmtree(root)
    draw_data(root, colors=COLORS)
    lines = [f"c{i}: {' '.join(map(str, COLORS[i]))}" for i in (0, 1, 2, 255)][:known]
    (root / "classes.txt").write_text("\n".join(lines))


def with_palette(path: Path, shift: int) -> None:
    image = Image.fromarray(np.array(Image.open(path)))
    image.putpalette([(shift + i) % 256 for i in range(768)])
    image.save(path)


def test_a_good_folder(root: Path) -> None:
    report = check_segmentation_data(str(root), num_threads=2)
    assert report.problems == {}
    assert report.lines()[:4] == [
        "train: 3 images with masks",
        "  width: 211 to 211 px, median 211",
        "  height: 97 to 97 px, median 97",
        "  road: 57.87% of the labelled pixels, in 3 masks",
    ]
    assert report.lines()[-1] == "no problems found"


Fault = tuple[Callable[[Path], object], str, str, bool]
"""What is done to the folder, heading and entry of the report, and whether training stops at it too."""

FAULTS: dict[str, Fault] = {
    "no mask": (
        lambda d: (d / "train/masks/1.png").unlink(),
        "images without a mask",
        "d/train/images/1.png: no mask, such as d/train/masks/1.png",
        True,
    ),
    "no image": (
        lambda d: (d / "val/images/3.png").rename(d / "val/images/4.png"),
        "masks without an image",
        "d/val/masks/3.png: no image of this name in d/val/images",
        True,
    ),
    "no images": (
        lambda d: (d / "val/images/3.png").unlink(),
        "no images",
        "d/val/images: no images",
        True,
    ),
    "one name": (
        lambda d: shutil.copy(d / "train/images/0.png", d / "train/images/0.jpg"),
        "files of one name",
        "d/train/images/0.png: 0.jpg has the same name",
        True,
    ),
    "size": (
        lambda d: Image.new("L", (20, 10), 1).save(d / "train/masks/0.png"),
        "masks of another size than the image",
        "d/train/masks/0.png: 20 x 10 pixels, and the image d/train/images/0.png has 211 x 97",
        True,
    ),
    "value": (
        lambda d: (change(d / "train/masks/0.png", 9, 7), change(d / "train/masks/0.png", 3, 3)),
        "mask values that no class has",
        "d/train/masks/0.png: values that no class has: 9 (4 px), 3 (3 px); those of the 3 classes are 0 to 2, and 255 "
        "of none",
        True,
    ),
    "jpeg": (
        lambda d: as_jpeg(d / "train/masks/0.png"),
        "masks saved as JPEG",
        "d/train/masks/0.png: a mask saved as JPEG, whose lossy compression invents values; make the masks anew as PNG",
        True,
    ),
    "colour": (
        lambda d: colored(d, known=3),
        "colours that no class has",
        "d/train/masks/0.png: colours that no class has: 255 255 255 (150 px); those to ignore go under "
        "ignore_colors in classes.yaml",
        True,
    ),
    "no colours": (
        lambda d: (colored(d, known=3), (d / "classes.txt").write_text("a\nb\nc")),
        "colours that no class has",
        "d/train/masks/0.png: a colour mask, but there are no colours of the classes; its colours: 0 0 0 (11,717 px), "
        "0 90 200 (5,500 px), 200 0 0 (3,100 px), 255 255 255 (150 px)",
        True,
    ),
    "broken image": (
        lambda d: (d / "train/images/0.png").write_text("<html>"),
        "images that cannot be read",
        "d/train/images/0.png: not an image that can be read",
        True,
    ),
    "cut image": (
        lambda d: (d / "train/images/0.png").write_bytes((d / "train/images/0.png").read_bytes()[:9000]),
        "images that cannot be read",
        "d/train/images/0.png: broken image (image file is truncated)",
        False,
    ),
    "broken mask": (
        lambda d: (d / "val/masks/3.png").write_text("<html>"),
        "masks that cannot be read",
        "d/val/masks/3.png: not an image that can be read",
        True,
    ),
    "no mask mode": (
        lambda d: Image.new("CMYK", (211, 97)).save(d / "val/masks/3.png", format="TIFF"),
        "masks that cannot be read",
        "d/val/masks/3.png: a picture of mode CMYK, which is no mask; save masks as 8-bit grey or RGB PNG",
        True,
    ),
    "never seen": (
        lambda d: (d / "classes.txt").write_text("road\ncar\nsky\nbus\n"),
        "classes that no mask has",
        "d: class 3 (bus) is in no mask",
        False,
    ),
    "val only": (
        lambda d: no_third_class(d, "train/masks"),
        "classes of val that train lacks",
        "d: class 2 (sky) is in 1 mask of val and none of train",
        False,
    ),
    "leak": (
        lambda d: shutil.copy(d / "train/images/1.png", d / "val/images/3.png"),
        "images of val that are in train too",
        "d/val/images/3.png = d/train/images/1.png",
        False,
    ),
    "palettes": (
        lambda d: (with_palette(d / "train/masks/0.png", 0), with_palette(d / "val/masks/3.png", 5)),
        "palettes that differ",
        "d/val/masks/3.png: index 0 is the colour 5 6 7, and in d/train/masks/0.png 0 1 2; save the masks as RGB, or "
        "with one palette",
        False,
    ),
    "classes": (
        lambda d: (d / "classes.txt").write_text("road\nroad\n"),
        "classes",
        "d/classes.txt: two classes have the name road",
        True,
    ),
    "layout": (
        lambda d: shutil.rmtree(d / "val"),
        "folders",
        "d: has train/ but none of val/, valid/, validation/, test/",
        True,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_problem(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fault, title, entry, stops = FAULTS[name]
    monkeypatch.chdir(root.parent)
    fault(Path("d"))
    assert entry in check_segmentation_data("d").problems[title]
    if stops:
        with pytest.raises(ValueError, match="d") as error:
            load_segmentation_data("d")
        first, *more = str(error.value).split("; and ")
        assert first.startswith("d/") or first.startswith("d: ")
        assert all(text.endswith("`qtvit data check d --task segment` lists them") for text in more)
    else:
        load_segmentation_data("d")


def test_all_problems_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    for seed, name in enumerate(("5", "6", "7", "8", "9"), start=10):
        draw_pair(root, "train/images train/masks", name, seed)
    FAULTS["no mask"][0](root)
    FAULTS["size"][0](root)
    as_jpeg(root / "train/masks/5.png")
    change(root / "train/masks/6.png", 77, 5)
    (root / "train/images/7.png").write_text("<html>")
    shutil.copy(root / "train/images/8.png", root / "val/images/3.png")
    FAULTS["never seen"][0](root)
    report = check_segmentation_data("d")
    assert list(report.problems) == [
        "images without a mask",
        "masks of another size than the image",
        "masks saved as JPEG",
        "images that cannot be read",
        "mask values that no class has",
        "classes that no mask has",
        "images of val that are in train too",
    ]
    assert report.num_problems == 7
    (root / "train/masks/1.png").write_bytes((root / "train/masks/8.png").read_bytes())
    with pytest.raises(ValueError, match=r"and 3 more problems: `qtvit data check d --task segment` lists them"):
        load_segmentation_data("d")
