"""Segmentation of images of any size in bounded memory: in windows that blend into each other."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

BAND = 16
"""Rows of a window that are looked at together: few, so that they stay in the processor's cache."""


@torch.inference_mode()
def sliding_window(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    num_classes: int,
    window: tuple[int, int],
    *,
    overlap: float = 0.25,
    batch_size: int = 1,
    fixed_size: bool = False,
) -> tuple[Tensor, Tensor]:
    """The class of every pixel, from a network that sees one window of the image at a time.

    Windows are spread evenly, the first and the last at the image's borders. Where they overlap, their logits are
    averaged; the weight of a window falls linearly to its edges, and weights sum to 1 at each pixel. If one window
    covers the image, the result is that of the network on the whole image.

    Of the logits, only those that a later window overlaps are kept: for C classes, a batch of windows as ``run``
    returns it, C·(overlapping rows)·W numbers and C·h·(overlapping columns). No tensor has C·H·W.

    Args:
        run: (B, 3, h, w) -> (B, C, h', w') logits on the image's device. If they are not of the window's size, they
            are resized to it; those as small as the network makes them take the least memory.
        image: (3, H, W) or (B, 3, H, W), normalised.
        num_classes: C.
        window: (h, w) of the windows; smaller ones are used for smaller images, but see ``fixed_size``.
        overlap: the part of a window that its neighbour sees too, at least; below 1.
        batch_size: windows that ``run`` gets at once.
        fixed_size: whether ``run`` takes no other size than ``window``. Smaller images are then padded with 0 at the
            right and bottom.

    Returns:
        Classes, uint8 or (above 256 classes) int16, and their probabilities, fp32: (H, W) or (B, H, W) each.

    Raises:
        ValueError: the overlap, window or batch size is not possible; ``run`` returns another number of classes.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"the overlap of windows must be from 0 to below 1, got {overlap}")
    if min(window) < 1:
        raise ValueError(f"a window must have 1 x 1 pixels or more, got {window[0]} x {window[1]}")
    if batch_size < 1:
        raise ValueError(f"the batch size must be 1 or more, got {batch_size}")
    if image.ndim == 4:
        results = [
            sliding_window(run, one, num_classes, window, overlap=overlap, batch_size=batch_size, fixed_size=fixed_size)
            for one in image
        ]
        return torch.stack([labels for labels, _ in results]), torch.stack([scores for _, scores in results])
    height, width = image.shape[1:]
    if fixed_size:
        image = F.pad(image, (0, max(window[1] - width, 0), 0, max(window[0] - height, 0)))
    size = min(window[0], image.shape[1]), min(window[1], image.shape[2])
    labels, scores = _blend(run, image, num_classes, size, overlap, batch_size)
    return labels[:height, :width], scores[:height, :width]


def resized_labels(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The most probable classes, and their probabilities, of (C, h, w) logits after resizing to ``size`` (H, W).

    As ``F.interpolate(logits, size, mode="bilinear")`` has it, but in bands of rows, so that no (C, H, W) tensor is
    made. Types as those of `sliding_window`.
    """
    labels, scores = _results(len(logits), size, logits.device)
    for top, bottom in _bands(0, size[0]):
        labels[top:bottom], scores[top:bottom] = _most_probable(_resized_rows(logits, size, top, bottom))
    return labels, scores


def _blend(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    num_classes: int,
    size: tuple[int, int],
    overlap: float,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """As `sliding_window`, for an image that is not smaller than a window of ``size``.

    Windows come row by row, from left to right, and each in bands of rows. Weighted logits are summed up where windows
    overlap: ``beside`` are the sums that the next window goes on with, ``below`` those for the next row of windows.
    Both are overwritten where they have been used. All other sums are finished.
    """
    height, width = size
    tops, lefts = (_starts(length, side, overlap) for length, side in zip(image.shape[1:], size, strict=True))
    weights_y, weights_x = (_weights(*along).to(image.device) for along in ((tops, height), (lefts, width)))
    steps_y, steps_x = _steps(tops, height), _steps(lefts, width)
    labels, scores = _results(num_classes, (image.shape[1], image.shape[2]), image.device)
    beside = torch.empty((num_classes, height, width - min(steps_x)), device=image.device)
    below = torch.empty((num_classes, height - min(steps_y), image.shape[2]), device=image.device)
    num_below = 0
    for y, step_y, weight_y in zip(tops, steps_y, weights_y, strict=True):
        num_beside = 0
        windows = _logits(run, image, num_classes, y, lefts, size, batch_size)
        for logits, x, step_x, weight_x in zip(windows, lefts, steps_x, weights_x, strict=True):
            here = slice(x, x + step_x)
            for top, bottom in (*_bands(0, step_y), *_bands(step_y, height)):
                sums = _resized_rows(logits, size, top, bottom) * (weight_y[top:bottom, None] * weight_x)
                sums[:, :, :num_beside] += beside[:, top:bottom, :num_beside]
                num_used = max(min(bottom, num_below) - top, 0)
                sums[:, :num_used, num_beside:] += below[:, top : top + num_used, x + num_beside : x + width]
                beside[:, top:bottom, : width - step_x] = sums[:, :, step_x:]
                finished = sums[:, :, :step_x]
                if bottom <= step_y:
                    rows = slice(y + top, y + bottom)
                    labels[rows, here], scores[rows, here] = _most_probable(finished)
                else:
                    below[:, top - step_y : bottom - step_y, here] = finished
            num_beside = width - step_x
        num_below = height - step_y
    return labels, scores


def _logits(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    num_classes: int,
    top: int,
    lefts: list[int],
    size: tuple[int, int],
    batch_size: int,
) -> Iterator[Tensor]:
    """The (C, h', w') logits of each window of a row of windows."""
    height, width = size
    for first in range(0, len(lefts), batch_size):
        windows = [image[:, top : top + height, left : left + width] for left in lefts[first : first + batch_size]]
        logits = run(torch.stack(windows))
        if logits.shape[:2] != (len(windows), num_classes):
            raise ValueError(f"expected logits of shape ({len(windows)}, {num_classes}, h, w), got {(*logits.shape,)}")
        yield from logits


def _resized_rows(logits: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows ``top`` to ``bottom`` of (C, h, w) logits that are resized to ``size`` bilinearly, in fp32."""
    height = logits.shape[1]
    if logits.shape[1:] == size:
        return logits[:, top:bottom].float()
    rows = torch.arange(top, bottom, device=logits.device)
    source = ((rows + 0.5) * (height / size[0]) - 0.5).clamp_min(0)
    above = source.floor().long()
    below = (above + 1).clamp_max(height - 1)
    band = logits[:, above].float().lerp(logits[:, below].float(), (source - above)[:, None])
    return F.interpolate(band[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]


def _bands(top: int, bottom: int) -> list[tuple[int, int]]:
    return [(row, min(row + BAND, bottom)) for row in range(top, bottom, BAND)]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where windows of ``size`` pixels start, to cover ``length`` of them with at least that overlap."""
    stride = max(size - math.ceil(size * overlap), 1)
    last = length - size
    num_windows = math.ceil(last / stride) + 1
    return [round(i * last / max(num_windows - 1, 1)) for i in range(num_windows)]


def _steps(starts: list[int], size: int) -> list[int]:
    """How many pixels of each window no later one starts before: to the next one's start, or all of the last one."""
    return [after - start for start, after in pairwise([*starts, starts[-1] + size])]


def _weights(starts: list[int], size: int) -> Tensor:
    """(N, size) weights of the pixels of N windows along one side: they sum to 1 at each pixel of the image."""
    tent = torch.minimum(torch.arange(size), torch.arange(size - 1, -1, -1)) + 0.5
    total = torch.zeros(starts[-1] + size)
    for start in starts:
        total[start : start + size] += tent
    return torch.stack([tent / total[start : start + size] for start in starts])


def _most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class and probability of each pixel of (C, H, W) logits."""
    return logits.argmax(0), (logits.amax(0) - logits.logsumexp(0)).exp()


def _results(num_classes: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where to write classes and probabilities."""
    labels = torch.empty(size, dtype=torch.uint8 if num_classes <= 256 else torch.int16, device=device)
    return labels, torch.empty(size, device=device)
