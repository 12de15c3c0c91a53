"""Segmentation of images of any size in bounded memory: in windows that blend into each other."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

BAND = 16
"""Rows of a window that are processed together: few, so that they stay in the processor's cache."""


@torch.inference_mode()
def sliding_window(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    num_classes: int,
    window: tuple[int, int],
    *,
    overlap: float = 0.25,
    fixed_size: bool = False,
) -> tuple[Tensor, Tensor]:
    """The class of every pixel, from a network that sees one window of the image at a time.

    Windows are spread evenly, the first and the last at the image's borders. Where they overlap, their logits are
    averaged; the weight of a window falls linearly to its edges, and weights sum to 1 at each pixel. If one window
    covers the image, the result is that of the network on the whole image.

    Logits are kept only where a later window overlaps: for C classes, the largest tensors are the logits of a window as
    ``run`` returns them, C·(overlapping rows)·W numbers and C·h·(overlapping columns). No tensor has C·H·W numbers.

    Args:
        run: (B, 3, h, w) -> (B, C, h', w') logits on the image's device. Logits of another size than the window's are
            resized to it; returning them as small as the network makes them takes the least memory.
        image: (3, H, W), normalised.
        num_classes: C.
        window: (h, w) of the windows; smaller images get smaller windows, but see ``fixed_size``.
        overlap: smallest part of a window that its neighbour sees too; below 1.
        fixed_size: whether ``run`` takes no other size than ``window``. Smaller images are then padded with 0 at the
            right and bottom.

    Returns:
        Classes, uint8 or (above 256 classes) int16, and their probabilities, fp32: (H, W) each.

    Raises:
        ValueError: the overlap or the window is not possible; ``run`` returns another number of classes.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"the overlap of windows must be from 0 to below 1, got {overlap}")
    if min(window) < 1:
        raise ValueError(f"a window must have 1 x 1 pixels or more, got {window[0]} x {window[1]}")
    height, width = image.shape[1:]
    if fixed_size:
        image = F.pad(image, (0, max(window[1] - width, 0), 0, max(window[0] - height, 0)))
    size = min(window[0], image.shape[1]), min(window[1], image.shape[2])
    blend = _Blend(image, num_classes, size, overlap)
    for y in blend.tops:
        for x in blend.lefts:
            blend.add(run(image[None, :, y : y + size[0], x : x + size[1]]), y, x)
    return blend.labels[:height, :width], blend.scores[:height, :width]


class _Blend:
    """Sums of the weighted logits of windows, which are added row by row, from left to right.

    ``beside`` holds the sums that the next window continues, ``below`` those for the next row of windows; both are
    overwritten once they have been used. All other sums are complete: only their classes and probabilities are kept, in
    ``labels`` and ``scores``. Windows of ``size`` (h, w) start in rows ``tops`` and columns ``lefts`` of the image (3,
    H, W), which is not smaller than a window; neighbours overlap by ``overlap`` of a window or more.
    """

    def __init__(self, image: Tensor, num_classes: int, size: tuple[int, int], overlap: float) -> None:
        height, width = image.shape[1:]
        self.num_classes = num_classes
        self.size = size
        self.tops, self.lefts = _starts(height, size[0], overlap), _starts(width, size[1], overlap)
        self.weights_y = _weights(self.tops, size[0], image.device)
        self.weights_x = _weights(self.lefts, size[1], image.device)
        self.steps_y, self.steps_x = _steps(self.tops, size[0]), _steps(self.lefts, size[1])
        self.labels = image.new_empty((height, width), dtype=torch.uint8 if num_classes <= 256 else torch.int16)
        self.scores = torch.empty((height, width), device=image.device)
        rows_below, columns_beside = size[0] - min(self.steps_y.values()), size[1] - min(self.steps_x.values())
        self.beside = torch.empty((num_classes, size[0], columns_beside), device=image.device)
        self.below = torch.empty((num_classes, rows_below, width), device=image.device)
        self.num_beside = self.num_below = 0

    def add(self, logits: Tensor, y: int, x: int) -> None:
        """Add the (1, C, h', w') logits of the next window, which starts in row ``y`` and column ``x``."""
        if logits.shape[:2] != (1, self.num_classes):
            raise ValueError(f"expected logits of shape (1, {self.num_classes}, h, w), got {(*logits.shape,)}")
        step = self.steps_y[y]
        for start, end in ((0, step), (step, self.size[0])):
            for top in range(start, end, BAND):
                self._add_rows(logits[0], y, x, top, min(top + BAND, end))
        self.num_beside = self.size[1] - self.steps_x[x]
        if x == self.lefts[-1]:
            self.num_below = self.size[0] - step

    def _add_rows(self, logits: Tensor, y: int, x: int, top: int, bottom: int) -> None:
        """Add rows ``top`` to ``bottom`` of the window at (``y``, ``x``)."""
        step_y, step_x, width = self.steps_y[y], self.steps_x[x], self.size[1]
        sums = _resized_rows(logits, self.size, top, bottom)
        sums = sums * (self.weights_y[y][top:bottom, None] * self.weights_x[x])
        sums[:, :, : self.num_beside] += self.beside[:, top:bottom, : self.num_beside]
        num_used = max(min(bottom, self.num_below) - top, 0)
        unseen = slice(x + self.num_beside, x + width)
        sums[:, :num_used, self.num_beside :] += self.below[:, top : top + num_used, unseen]
        self.beside[:, top:bottom, : width - step_x] = sums[:, :, step_x:]
        complete, here = sums[:, :, :step_x], slice(x, x + step_x)
        if bottom <= step_y:
            rows = slice(y + top, y + bottom)
            self.labels[rows, here] = complete.argmax(0)
            self.scores[rows, here] = (complete.amax(0) - complete.logsumexp(0)).exp()
        else:
            self.below[:, top - step_y : bottom - step_y, here] = complete


def _resized_rows(logits: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows ``top`` to ``bottom`` of (C, h, w) logits resized bilinearly to ``size``, in fp32."""
    height = logits.shape[1]
    if logits.shape[1:] == size:
        return logits[:, top:bottom].float()
    rows = torch.arange(top, bottom, device=logits.device)
    source = ((rows + 0.5) * (height / size[0]) - 0.5).clamp_min(0)
    above = source.floor().long()
    below = (above + 1).clamp_max(height - 1)
    band = logits[:, above].float().lerp(logits[:, below].float(), (source - above)[:, None])
    return F.interpolate(band[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where windows of ``size`` pixels start, so that they cover ``length`` pixels with at least that overlap."""
    stride = max(size - math.ceil(size * overlap), 1)
    last = length - size
    num_windows = math.ceil(last / stride) + 1
    return [round(i * last / max(num_windows - 1, 1)) for i in range(num_windows)]


def _steps(starts: list[int], size: int) -> dict[int, int]:
    """By start, the pixels of a window that no later one sees: those before the next start, or all of the last one."""
    return {start: after - start for start, after in pairwise([*starts, starts[-1] + size])}


def _weights(starts: list[int], size: int, device: torch.device) -> dict[int, Tensor]:
    """By start, the weights of a window's pixels along one side; they sum to 1 at each pixel of the image."""
    tent = torch.minimum(torch.arange(size), torch.arange(size - 1, -1, -1)) + 0.5
    total = torch.zeros(starts[-1] + size)
    for start in starts:
        total[start : start + size] += tent
    return {start: (tent / total[start : start + size]).to(device) for start in starts}
