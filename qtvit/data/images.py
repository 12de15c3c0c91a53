"""Any picture a user may hand over, as an RGB image."""

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from qtvit import console

from .shards import PackedImage

S = TypeVar("S")
T = TypeVar("T")

IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jp2")
"""What counts as an image file in a folder."""

MAX_PIXELS = 1_000_000_000
"""Pixels of the largest picture that is opened. In memory each takes 4 bytes."""

ImageSource = str | Path | PackedImage | bytes | Image.Image | np.ndarray | Tensor
"""A file, one in a shard, encoded bytes, a PIL image, an (H, W[, C]) array or a (C, H, W) tensor.

Values of the last two are uint8, uint16, or floats from 0 to 1.
"""

ImageFile = Path | PackedImage
"""A file, or one in a shard."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by EXIF orientation."""

_lock = threading.Lock()
_num_inside = 0
_limit_outside: int | None = None


def open_image(source: ImageSource) -> Image.Image:
    """The picture as 8-bit RGB, the same whichever way it is handed over.

    Upright: EXIF rotation applied. Transparency over white, 16 bits cut to their upper 8 as PIL does for colours, the
    first frame of an animation. Colour profiles are ignored, as in the training of all common models.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read, if it is in a shard.
        ValueError: what is there is no readable image, or one of more than `MAX_PIXELS`; the message names the file.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        return _to_rgb(_from_array(source), "image array")
    if isinstance(source, Image.Image):
        image = _to_rgb(decode(source, "PIL image"), "PIL image")
        return image.copy() if image is source else image
    if isinstance(source, bytes):
        return _to_rgb(decode(source, "image bytes"), "image bytes")
    if isinstance(source, PackedImage):
        return _to_rgb(decode(source.read(), str(source)), str(source))
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"an image given as {type(source).__name__}; expected a path, bytes, PIL image, array or tensor"
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such image file")
    return _to_rgb(decode(source, str(source)), str(source))


def source_name(source: ImageSource) -> str | None:
    """Name of the file that an image is in, or was in before it was packed; None if it is in memory."""
    return source.name if isinstance(source, ImageFile) else None


def relative_path(source: ImageFile, root: Path) -> str:
    """Where an image is in the folder ``root`` of images, or was before it was packed; with slashes."""
    return source.path if isinstance(source, PackedImage) else source.relative_to(root).as_posix()


def file_size(source: ImageFile) -> int:
    """Bytes of an image file; -1 if it is not there, as a link may lead nowhere."""
    if isinstance(source, PackedImage):
        return source.size
    try:
        return source.stat().st_size
    except OSError:
        return -1


def read_file(source: ImageFile) -> bytes:
    """The bytes of an image file.

    Raises:
        OSError: it cannot be read; the message names it.
        ValueError: the shard is damaged.
    """
    if isinstance(source, PackedImage):
        return source.read()
    try:
        return source.read_bytes()
    except OSError as error:
        raise OSError(f"{source}: cannot be read ({error.strerror})") from error


@contextmanager
def any_size() -> Iterator[None]:
    """Within this context PIL opens and crops pictures of any size; its own limit is below what today's phones make.

    That limit is a global of PIL: it is lifted when the first thread comes in, and restored when the last one leaves.
    """
    global _num_inside, _limit_outside
    with _lock:
        if _num_inside == 0:
            _limit_outside, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0:
                Image.MAX_IMAGE_PIXELS = _limit_outside


def find_images(folder: Path) -> list[Path]:
    """All image files below ``folder``, sorted, without hidden ones.

    Raises:
        OSError: a folder that may not be read.
    """
    return sorted(path for path in find_files(folder) if is_image(path.name))


def find_files(folder: Path) -> Iterator[Path]:
    """All files below ``folder`` without hidden ones, in no order; errors as `find_images`."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(parent, name) for name in files if not is_hidden(name))


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is some program's own: .DS_Store, ._1.jpg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def _raise(error: OSError) -> None:
    raise error


def decode(source: str | Path | bytes | Image.Image, name: str) -> Image.Image:
    """The image read in full, as it is stored; errors as `open_image`."""
    try:
        if isinstance(source, Image.Image):
            source.load()
            return source
        with any_size():
            with _without_warnings():
                opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            with opened as image:
                if image.width * image.height <= MAX_PIXELS:
                    image.load()
                    return image
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that can be read") from None
    except Exception as error:  # on broken data, PIL's decoders raise almost anything
        raise ValueError(f"{name}: broken image ({str(error) or type(error).__name__})") from error
    raise ValueError(
        f"{name}: {image.width} x {image.height} pixels; the limit is {MAX_PIXELS / 1e6:,.0f} million in all"
    )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bits(image, name)
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PIL warns of every flaw in a picture's metadata. Python's filters are a global too, so one thread at a time."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF data say, if they can be read."""
    try:
        with _without_warnings():
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in decode
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _grey_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """From 16 bits, 32 bits or floats. PIL itself would clip to 255.

    The latter two have no set range: it is taken to be the smallest of 1 (floats only), 255 and 65535 that holds them.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"{name}: values from {low:g} to {high:g}; expected them within 0 to 1, 255 or 65535")
    if image.mode.startswith("I;16") or high > 255:
        values = values // 256
    elif image.mode == "F" and high <= 1:
        values = values * 255
    return Image.fromarray(values.round().astype(np.uint8))


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    """The image of 1, 3 or 4 channels in an array."""
    if isinstance(array, Tensor):
        layout = "(C, H, W)"
        tensor = array.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    else:
        layout = "(H, W, C)"
        values = array
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4) or values.size == 0:
        raise ValueError(f"an image of shape {(*array.shape,)}; expected {layout} with 1, 3 or 4 channels, or (H, W)")
    if np.issubdtype(values.dtype, np.floating):
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"a float image with values from {low:g} to {high:g}; expected 0 to 1")
        values = np.multiply(values, 255, dtype=np.float64).round()
    elif np.issubdtype(values.dtype, np.uint16):  # of either byte order
        values = values // 256
    elif values.dtype != np.uint8:
        raise ValueError(f"an image of dtype {array.dtype}; expected uint8, uint16, or floats from 0 to 1")
    values = np.ascontiguousarray(values, dtype=np.uint8)
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def for_each_image(function: Callable[[S], T], sources: Sequence[S], num_threads: int) -> Iterator[T]:
    """What ``function`` says of each image, in order, with a progress bar.

    Threads are enough, as PIL decodes without Python's lock. Each holds one image at a time.
    """
    with ThreadPool(num_threads) as pool:
        results = pool.imap(function, sources, chunksize=16)
        yield from console.progress(results, total=len(sources), desc="Checking images", unit="image")
