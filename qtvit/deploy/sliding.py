"""Segmentation of images of any size in bounded memory: in windows that blend into each other."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

BAND = 64
"""Rows of an image that are resized at a time."""


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

    Of the logits, only the parts that a later window overlaps are kept: for C classes, C·h·w numbers for each window
    of the batch, and C·(overlapping rows)·W of the image.

    Args:
        run: (B, 3, h, w) -> (B, C, h', w') logits, of the window's size or smaller: they are resized to it.
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
    padded_h, padded_w = image.shape[1:]
    size = min(window[0], padded_h), min(window[1], padded_w)

    def logits_of(windows: Tensor) -> Tensor:
        logits = run(windows)
        if logits.shape[:2] != (len(windows), num_classes):
            raise ValueError(f"expected logits of shape ({len(windows)}, {num_classes}, h, w), got {(*logits.shape,)}")
        return logits

    if size == (padded_h, padded_w):
        labels, scores = resized_labels(logits_of(image[None])[0], size)
    else:
        labels, scores = _blend(logits_of, image, num_classes, size, overlap, batch_size)
    return labels[:height, :width], scores[:height, :width]


def resized_labels(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The most probable classes, and their probabilities, of (C, h, w) logits after resizing to ``size`` (H, W).

    As ``F.interpolate(logits, size, mode="bilinear")`` has it, but in bands of rows, so that no (C, H, W) tensor is
    made. Types as those of `sliding_window`.
    """
    num_classes, height, _ = logits.shape
    labels = torch.empty(size, dtype=_label_type(num_classes), device=logits.device)
    scores = torch.empty(size, dtype=torch.float32, device=logits.device)
    source = ((torch.arange(size[0], device=logits.device) + 0.5) * (height / size[0]) - 0.5).clamp_min(0)
    above = source.floor().long()
    below = (above + 1).clamp_max(height - 1)
    part = (source - above)[:, None]
    for top in range(0, size[0], BAND):
        rows = slice(top, top + BAND)
        band = logits[:, above[rows]].float().lerp(logits[:, below[rows]].float(), part[rows])
        if band.shape[-1] != size[1]:
            band = F.interpolate(band[None], (band.shape[1], size[1]), mode="bilinear", align_corners=False)[0]
        labels[rows], scores[rows] = _most_probable(band)
    return labels, scores


def _blend(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    num_classes: int,
    size: tuple[int, int],
    overlap: float,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """As `sliding_window`, for an image larger than one window of ``size``.

    Windows come row by row, from left to right. Their weighted logits are summed up where they overlap: ``right`` are
    the sums that the next window goes on with; the first ``rows_below`` rows of ``below`` are those for the next row
    of windows, which overwrites what it has used. All else is finished.
    """
    height, width = image.shape[1:]
    tops, lefts = (_starts(*sides, overlap) for sides in zip((height, width), size, strict=True))
    weights_y, weights_x = _weights(tops, size[0]).to(image.device), _weights(lefts, size[1]).to(image.device)
    steps_y, steps_x = _steps(tops, size[0]), _steps(lefts, size[1])
    labels = torch.empty((height, width), dtype=_label_type(num_classes), device=image.device)
    scores = torch.empty((height, width), dtype=torch.float32, device=image.device)
    below = torch.empty((num_classes, size[0] - min(steps_y), width), device=image.device)
    rows_below = 0
    for top, step_y, weight_y in zip(tops, steps_y, weights_y, strict=True):
        right = torch.zeros((num_classes, size[0], 0), device=image.device)
        windows = _logits(run, image, top, lefts, size, batch_size)
        for logits, left, step_x, weight_x in zip(windows, lefts, steps_x, weights_x, strict=True):
            total = logits * (weight_y[:, None] * weight_x)
            seen = right.shape[2]
            total[:, :, :seen] += right
            total[:, :rows_below, seen:] += below[:, :rows_below, left + seen : left + size[1]]
            right = total[:, :, step_x:].clone()
            below[:, : size[0] - step_y, left : left + step_x] = total[:, step_y:, :step_x]
            for start in range(0, step_y, BAND):
                rows = slice(start, min(start + BAND, step_y))
                there = slice(top + rows.start, top + rows.stop), slice(left, left + step_x)
                labels[there], scores[there] = _most_probable(total[:, rows, :step_x])
        rows_below = size[0] - step_y
    return labels, scores


def _logits(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    top: int,
    lefts: list[int],
    size: tuple[int, int],
    batch_size: int,
) -> Iterator[Tensor]:
    """The fp32 logits of each window of a row of windows, of the window's size."""
    height, width = size
    for first in range(0, len(lefts), batch_size):
        windows = [image[:, top : top + height, left : left + width] for left in lefts[first : first + batch_size]]
        for logits in run(torch.stack(windows)):
            resized = logits[None].float()
            if logits.shape[1:] != size:
                resized = F.interpolate(resized, size, mode="bilinear", align_corners=False)
            yield resized[0]


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
    highest, labels = logits.max(0)
    return labels.to(_label_type(len(logits))), (highest - logits.logsumexp(0)).exp()


def _label_type(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int16
