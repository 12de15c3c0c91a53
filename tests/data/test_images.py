import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qtvit.data import find_images, open_image


@pytest.fixture
def picture() -> Image.Image:
    """A 7 x 5 picture (width x height) whose pixels all differ."""
    values = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
    return Image.fromarray(values)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_all_sources_of_a_picture_agree(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for source in (path, str(path), path.read_bytes(), picture, array, array / 255, tensor, tensor / 255):
        np.testing.assert_array_equal(np.asarray(open_image(source)), array)


def test_exif_rotation_is_applied(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    turned = open_image(encoded(picture, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(picture), -1))


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    opened = open_image(encoded(image, "PNG"))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (255, 0, 0)]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [open_image(encoded(image, "PNG")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes_become_rgb(picture: Image.Image, mode: str) -> None:
    image_format = "TIFF" if mode == "CMYK" else "PNG"
    opened = open_image(encoded(picture.convert(mode), image_format))
    assert (opened.mode, opened.size) == ("RGB", picture.size)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cat\.jpg: no such image file"):
        open_image(tmp_path / "cat.jpg")


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"cat\.jpg: not an image"):
        open_image(path)


def test_a_truncated_file_is_named(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    data = encoded(picture.resize((64, 64)), "PNG")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cat\.png: broken image"):
        open_image(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3)) + 2, "values from 2 to 2"),
        (np.zeros((4, 4, 3)) * np.nan, "values from nan"),
        (np.zeros((4, 4, 3), np.int32), "dtype int32"),
        (torch.zeros(5, 4, 3), r"expected \(C, H, W\)"),
    ],
)
def test_arrays_that_are_no_images(array: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_image(array)


def test_find_images_looks_below_and_sorts(picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.JPG", "a/c.png", "d.gif", "a/notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            picture.save(tmp_path / name)
    assert [p.name for p in find_images(tmp_path)] == ["c.png", "b.JPG", "d.gif"]
