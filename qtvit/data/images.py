"""Any picture a user may hand over, as an RGB image."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as tvf

IMAGE_SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jp2")
"""What counts as an image file in a folder."""

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A file, encoded bytes, a PIL image, an (H, W[, C]) array or a (C, H, W) tensor; uint8, or floats from 0 to 1."""


def open_image(source: ImageSource) -> Image.Image:
    """The picture as 8-bit RGB, upright: EXIF rotation applied, transparency over white, the first frame of an
    animation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is there is no readable image; the message names the file.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(source)
    if not isinstance(source, (str, Path, bytes)):
        raise ValueError(
            f"an image given as {type(source).__name__}; expected a path, bytes, PIL image, array or tensor"
        )
    name = "image bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name}: no such image file")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that can be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: broken image ({error})") from error


def find_images(folder: Path) -> list[Path]:
    """All image files below ``folder``, sorted, without hidden ones."""
    return sorted(p for p in folder.rglob("*") if _is_image(p, folder))


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(is_hidden(part) for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is some program's own: .DS_Store, ._1.jpg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: PIL would clip to 255 instead of scaling.
        array = np.asarray(image, dtype=np.float32)
        largest = 65535.0 if array.max(initial=0) > 255 else 255.0
        image = Image.fromarray((array.clip(0, largest) * (255.0 / largest)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_array(array: Any) -> Image.Image:
    tensor = array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif isinstance(array, np.ndarray) and tensor.ndim == 3:
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        layout = "(C, H, W)" if isinstance(array, Tensor) else "(H, W, C)"
        raise ValueError(f"an image of shape {(*array.shape,)}; expected {layout} with 1, 3 or 4 channels, or (H, W)")
    if tensor.is_floating_point():
        if not (tensor.min() >= 0 and tensor.max() <= 1):
            raise ValueError(f"a float image with values from {tensor.min():g} to {tensor.max():g}; expected 0 to 1")
        tensor = (tensor * 255).round().to(torch.uint8)
    elif tensor.dtype != torch.uint8:
        raise ValueError(f"an image of dtype {array.dtype}; expected uint8, or floats from 0 to 1")
    return _to_rgb(tvf.to_pil_image(tensor))
