import io
import os
import struct
import threading
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from qtvit.data import find_images, open_image
from qtvit.data.images import any_size


@pytest.fixture
def picture() -> Image.Image:
    """A 7 x 5 picture (width x height) whose pixels all differ."""
    values = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
    return Image.fromarray(values)


@pytest.fixture
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of files that these tests leave open
        yield


def smooth(mode: str) -> Image.Image:
    """A 48 x 32 picture in ``mode`` that survives lossy compression."""
    y, x = np.mgrid[:32, :48]
    image = Image.fromarray(np.stack([5 * x, 7 * y, 255 - 3 * x - 2 * y], -1).astype(np.uint8))
    grey = np.asarray(image.convert("L"))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, image.size, (grey * np.uint16(257)).astype(">u2" if mode[-1] == "B" else "<u2"))
    if mode == "I":
        return Image.fromarray(grey * np.int32(257))
    if mode == "F":
        return Image.fromarray(grey / np.float32(255))
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    if mode == "P":
        return image.quantize(256)
    return image.convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def files() -> list[tuple[str, str, dict[str, object], float]]:
    """Format, mode, options for the encoder, and how far off pixels may be (mean, in grey levels)."""
    exact = [("PNG", mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "I;16")]
    exact += [("TIFF", mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F")]
    exact += [("BMP", "1"), ("BMP", "L"), ("BMP", "RGB"), ("PPM", "L"), ("PPM", "I;16"), ("PPM", "RGB")]
    exact += [("JPEG2000", mode) for mode in ("L", "RGB", "RGBA", "I;16")] + [("GIF", "L"), ("GIF", "1")]
    lossy = [("JPEG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("AVIF", "RGB")]
    lossy += [("TIFF", "LAB")]
    quantized = [("PNG", "P"), ("GIF", "P"), ("TIFF", "P"), ("BMP", "P")]
    table = [(name, mode, {}, 0.0) for name, mode in exact] + [(name, mode, {}, 5.0) for name, mode in quantized]
    return table + [(name, mode, {} if name == "TIFF" else {"quality": 95}, 1.5) for name, mode in lossy]


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(("image_format", "mode", "options", "tolerance"), files())
def test_every_kind_of_file_from_every_source(
    image_format: str, mode: str, options: dict[str, object], tolerance: float, tmp_path: Path
) -> None:
    original = smooth("1" if mode == "1" else "L" if mode in ("L", "LA", "I", "F") or mode[:2] == "I;" else "RGB")
    data = encoded(smooth(mode), image_format, **options)
    read = pixels(data)
    assert np.abs(read - np.asarray(original.convert("RGB"))).mean() <= tolerance
    path = tmp_path / f"picture.{image_format}"
    path.write_bytes(data)
    for source in (path, str(path), Image.open(path), Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(pixels(source), read)
    opened = Image.open(path)
    if opened.mode in ("L", "RGB", "RGBA", "I;16", "I;16B", "F"):
        np.testing.assert_array_equal(pixels(np.asarray(opened)), read)


def same_pixels(values: np.ndarray) -> list[Any]:
    """The (H, W, C) uint8 picture in every form it can be handed over in."""
    tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
    sixteen = values * np.uint16(257)
    return [
        values,
        np.asfortranarray(values),
        values[:, ::-1][:, ::-1],
        tensor,
        tensor.contiguous(),
        sixteen,
        torch.from_numpy(sixteen).permute(2, 0, 1),
        *(values / np.array(255, dtype) for dtype in (np.float16, np.float32, np.float64)),
        *(tensor / torch.tensor(255, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64)),
        (tensor / 255).requires_grad_(),
    ]


def test_all_sources_of_a_picture_agree(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.asarray(picture)
    for source in (path, str(path), path.read_bytes(), picture, *same_pixels(array)):
        np.testing.assert_array_equal(pixels(source), array)
    black_and_white = torch.from_numpy(array > 99).permute(2, 0, 1)
    np.testing.assert_array_equal(pixels(black_and_white.bfloat16()), (array > 99) * 255)


def test_all_forms_of_a_grey_picture_agree(picture: Image.Image) -> None:
    grey = np.asarray(picture.convert("L"))
    want = np.repeat(grey[..., None], 3, -1)
    tensor = torch.from_numpy(grey.copy())
    for source in (*same_pixels(grey[..., None]), grey, grey / 255, grey * np.uint16(257), tensor, tensor / 255):
        np.testing.assert_array_equal(pixels(source), want)


def test_transparent_arrays_are_laid_over_white_like_files() -> None:
    values = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    want = [[[255, 255, 255], [255, 0, 0], [204, 204, 204]]]
    for source in (encoded(Image.fromarray(values), "PNG"), Image.fromarray(values), *same_pixels(values)):
        np.testing.assert_array_equal(pixels(source), want)


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palettes_with_transparency(transparency: object) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for name in ("PNG", "GIF") if transparency == 1 else ("PNG",):
        np.testing.assert_array_equal(
            pixels(encoded(image, name, transparency=transparency)), [[[255, 0, 0], [255, 255, 255]]]
        )


@pytest.mark.parametrize(("mode", "transparent"), [("RGB", (10, 20, 30)), ("L", 10)])
def test_a_colour_that_stands_for_transparency(mode: str, transparent: Any) -> None:
    data = encoded(Image.new(mode, (2, 2), transparent), "PNG", transparency=transparent)
    np.testing.assert_array_equal(pixels(data), np.full((2, 2, 3), 255))


def test_a_picture_that_was_given_is_left_as_it_is(picture: Image.Image) -> None:
    opened = open_image(picture)
    assert opened is not picture
    opened.putpixel((0, 0), (255, 255, 255))
    assert picture.getpixel((0, 0)) == (0, 2, 4)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation_is_applied(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth("RGB"), image_format, exif=exif)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), np.asarray(want))
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), np.asarray(want))
    assert open_image(data).size == ((32, 48) if 5 <= orientation <= 8 else (48, 32))


@pytest.mark.usefixtures("no_warnings")
def test_broken_exif_data_do_no_harm(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description that is stored at an offset"
    good = exif.tobytes()
    rng = np.random.default_rng(0)
    for end in range(6, len(good), 3):
        junk = bytes(rng.integers(0, 256, len(good) - end, dtype=np.uint8))
        for data in (good[:end], good[:end] + junk):
            assert sorted(open_image(encoded(picture, "JPEG", exif=data)).size) == [5, 7]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_of_many_frames_the_first_is_taken(image_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(pixels(data) - (255, 0, 0)).max() < 8


def test_16_bit_grey_is_scaled_not_clipped_however_dark_it_is() -> None:
    def row(*values: int) -> list[int]:
        return pixels(encoded(Image.fromarray(np.array([values], np.uint16)), "PNG"))[0, :, 0].tolist()

    assert row(0, 32768, 65535) == [0, 128, 255]
    assert row(0, 100, 255) == [0, 0, 0]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_set_range(dtype: type) -> None:
    def row(*values: float) -> list[int]:
        return pixels(Image.fromarray(np.array([values], dtype)))[0, :, 0].tolist()

    assert row(0, 100, 255) == [0, 100, 255]
    assert row(0, 32768, 65535) == [0, 128, 255]
    for low, high in [(-1, 5), (0, 65536)]:
        with pytest.raises(ValueError, match=f"PIL image: values from {low} to {high}; expected them within 0 to 1"):
            row(low, high)


def test_a_picture_of_one_pixel() -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        assert open_image(encoded(Image.new(mode, (1, 1)), "TIFF")).size == (1, 1)


@pytest.mark.usefixtures("no_warnings")
def test_large_pictures_open_and_pil_keeps_its_limit(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # the picture has 35
    for image_format in ("PNG", "JPEG", "TIFF", "WEBP", "GIF"):
        assert open_image(encoded(picture, image_format)).size == (7, 5)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr("qtvit.data.images.MAX_PIXELS", 34)
    with pytest.raises(ValueError, match="image bytes: 7 x 5 pixels; the limit is 0 million"):
        open_image(encoded(picture, "PNG"))
    assert Image.MAX_IMAGE_PIXELS == 10


def test_the_limit_is_restored_when_the_last_thread_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with any_size():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with any_size():
        thread.start()
        assert inside.wait(10)
    assert Image.MAX_IMAGE_PIXELS is None  # the other one is still inside
    leave.set()
    thread.join()
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_picture_beyond_the_limit_is_not_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"bomb\.png: 40000 x 40000 pixels; the limit is 1,000 million") as error:
        open_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000", "MPO"])
def test_damaged_files_give_a_picture_or_a_value_error(image_format: str) -> None:
    data = encoded(smooth("RGB"), image_format)
    rng = np.random.default_rng(0)
    for _ in range(25):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
        for source in (damaged.tobytes(), data[: rng.integers(0, len(data))]):
            with suppress(ValueError):
                assert open_image(source).mode == "RGB"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cat\.jpg: no such image file"):
        open_image(tmp_path / "cat.jpg")


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"cat\.jpg: not an image"):
        open_image(path)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_truncated_file_is_named(image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), image_format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cat\.jpg: (broken|not an) image"):
        open_image(path)
    if image_format == "JPEG":
        with pytest.raises(ValueError, match=r"PIL image: broken image \(image file is truncated"):
            open_image(Image.open(path))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3)) + 2, "values from 2 to 2"),
        (np.zeros((4, 4, 3)) * np.nan, "values from nan"),
        (np.zeros((4, 4, 3), np.int32), "dtype int32"),
        (np.zeros((4, 4), bool), "dtype bool"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"shape \(1, 4, 4, 3\)"),
        (torch.zeros(5, 4, 2), r"shape \(5, 4, 2\); expected \(C, H, W\)"),
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


def test_find_images_does_not_pass_over_what_it_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*secret"):
        find_images(tmp_path)
