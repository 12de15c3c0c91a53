"""Reading images of any kind that users may pass, as RGB."""

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
"""Suffixes of the files in a folder that count as images."""
MAX_PIXELS = 1_000_000_000
"""Pixels of the largest image that is opened; each takes 4 bytes of memory."""

ImageSource = str | Path | PackedImage | bytes | Image.Image | np.ndarray | Tensor
"""A file, an image in a shard, encoded bytes, a PIL image, an (H, W[, C]) array or a (C, H, W) tensor.

Arrays and tensors hold uint8, uint16, or floats from 0 to 1.
"""
ImageFile = Path | PackedImage
"""An image file, or one in a shard."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by EXIF orientation."""

_lock = threading.Lock()
_num_inside = 0
_limit_outside: int | None = None


def open_image(source: ImageSource) -> Image.Image:
    """Read an image as 8-bit RGB; all kinds of sources give the same pixels.

    EXIF rotation is applied, transparency is put over white, 16 bits are cut to the upper 8 as PIL does for colours,
    and of an animation the first frame is taken. Colour profiles are ignored, as in the training of all common models.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the shard that holds it cannot be read.
        ValueError: it is not an image, is damaged, or has more than `MAX_PIXELS`; the message names the file.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        return _to_rgb(_from_array(source), "image array")
    if isinstance(source, (Image.Image, bytes)):
        name = "image bytes" if isinstance(source, bytes) else "PIL image"
        image = _to_rgb(decode(source, name), name)
        return image.copy() if image is source else image
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
    """Name of the image file, for a packed image the original one; None for an image in memory."""
    return source.name if isinstance(source, ImageFile) else None


def relative_path(source: ImageFile, root: Path) -> str:
    """The image file's path below ``root``, with slashes; for a packed image, its path before it was packed."""
    return source.path if isinstance(source, PackedImage) else source.relative_to(root).as_posix()


def file_size(source: ImageFile) -> int:
    """Size of an image file in bytes; -1 if it does not exist, as at the end of a broken link."""
    if isinstance(source, PackedImage):
        return source.size
    try:
        return source.stat().st_size
    except OSError:
        return -1


def read_file(source: ImageFile) -> bytes:
    """The content of an image file.

    Raises:
        OSError: the file cannot be read; the message names it.
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
    """Let PIL open and crop images of any size; its own limit is below the size of today's phone photographs.

    The limit is a global variable of PIL: the first thread that enters lifts it, the last one that leaves restores it.
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
    """All image files below ``folder`` but hidden ones, sorted; OSError if a folder cannot be read."""
    return sorted(path for path in find_files(folder) if is_image(path.name))


def find_files(folder: Path) -> Iterator[Path]:
    """All files below ``folder`` but hidden ones, in no particular order; errors as `find_images`."""

    def fail(error: OSError) -> None:  # os.walk ignores errors by default
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(parent, name) for name in files if not is_hidden(name))


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a program's own, such as .DS_Store, ._1.jpg and __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def decode(source: str | Path | bytes | Image.Image, name: str) -> Image.Image:
    """Read an image in full, in its own mode and orientation; ``name`` is for the errors, which are `open_image`'s."""
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
    except Exception as error:  # PIL's decoders raise almost anything on broken data
        raise ValueError(f"{name}: broken image ({str(error) or type(error).__name__})") from error
    raise ValueError(
        f"{name}: {image.width} x {image.height} pixels; the limit is {MAX_PIXELS / 1e6:,.0f} million in all"
    )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Turn an image upright and convert it to RGB."""
    try:
        with _without_warnings():
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in `decode`: the EXIF data may be damaged
        orientation = None
    if orientation in _TURNS:  # PIL.ImageOps.exif_transpose would also copy upright images and rewrite the EXIF data
        image = image.transpose(_TURNS[orientation])
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
    """Silence PIL's warnings about flawed metadata. Python's filters are global, so one thread may do so at a time."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _grey_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Convert greys of 16 bits, 32 bits or floats; PIL would clip them at 255.

    32 bits and floats have no fixed range: white is taken to be the smallest of 1 (floats only), 255 and 65535 that is
    not exceeded.
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
    """The PIL image of an (H, W), (H, W, C) or (C, H, W) array with 1, 3 or 4 channels."""
    if isinstance(array, Tensor):
        layout = "(C, H, W)"
        tensor = array.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    else:
        layout, values = "(H, W, C)", array
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
    """Yield ``function`` of each image, in order, with a progress bar.

    Threads suffice, because PIL decodes without Python's lock. Each holds one image at a time.
    """
    with ThreadPool(num_threads) as pool:
        results = pool.imap(function, sources, chunksize=16)
        yield from console.progress(results, total=len(sources), desc="Checking images", unit="image")
