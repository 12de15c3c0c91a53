"""Scores of every pixel of an image of any size, a few rows at a time: whole, or in windows whose overlaps are blended.

Of an image of 4000 x 3000 pixels, the scores of 150 classes are 7 GB; rows are given to whoever asks as soon as they
are complete, so that memory holds those of one row of windows.

Shapes: C classes, h x w the network's input, H x W the image.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Scorer = Callable[[Tensor], Tensor]
"""Normalised pixels (1, 3, h, w) to scores (1, C, h, w)."""

MAX_STRIDE = 2 / 3
"""Largest step from one window to the next, as part of its side."""
CHUNK = 2**22
"""Numbers in the rows that are worked on at once."""

Band = tuple[int, Tensor]
"""The first row and (C, n, w) scores of n rows."""


def whole_image(network: Scorer, pixels: Tensor) -> Iterator[Band]:
    """The scores of (3, h, w) pixels in one piece."""
    yield 0, network(pixels.unsqueeze(0))[0]


def sliding_windows(network: Scorer, pixels: Tensor, window: tuple[int, int], *, fixed: bool = False) -> Iterator[Band]:
    """The scores of (3, h, w) pixels from overlapping windows, in bands from top to bottom.

    A window's weight falls towards its edges, and the weights add up to 1 at every pixel, so that there are no seams.
    An image that fits into one window is seen whole.

    Args:
        network: what scores a window.
        pixels: of the image, normalised.
        window: (H, W) of the windows; those of a smaller image are as small.
        fixed: the network takes no other size: smaller images are padded with zeros.
    """
    height, width = pixels.shape[-2:]
    size = [min(side, full) for side, full in zip(window, (height, width), strict=True)]
    padding = [window[1] - size[1], window[0] - size[0]] if fixed else [0, 0]
    tops, row_weights = _window_weights(height, size[0], pixels.device)
    lefts, column_weights = _window_weights(width, size[1], pixels.device)
    total: Tensor | None = None
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = pixels[:, top : top + size[0], left : left + size[1]]
            scores = network(F.pad(part, (0, padding[0], 0, padding[1])).unsqueeze(0))[0, :, : size[0], : size[1]]
            if len(tops) == len(lefts) == 1:
                yield 0, scores
                return
            if total is None:
                total = scores.new_zeros(len(scores), size[0], width)
            scores = scores * row_weights[i].unsqueeze(1).to(scores.device)
            total[:, :, left : left + size[1]] += scores * column_weights[j].to(scores.device)
        assert total is not None
        done = tops[i + 1] - top if i + 1 < len(tops) else size[0]
        yield top, total[:, :done]
        kept = size[0] - done
        for row in range(kept):  # in place, as the whole is large
            total[:, row] = total[:, row + done]
        total[:, kept:] = 0


def _window_weights(full: int, side: int, device: torch.device) -> tuple[list[int], list[Tensor]]:
    """Where windows of ``side`` begin on an axis of ``full`` pixels, and the (side,) weights of each."""
    num = 1 + math.ceil((full - side) / max(int(MAX_STRIDE * side), 1))
    starts = [round(i * (full - side) / max(num - 1, 1)) for i in range(num)]
    position = torch.arange(side, device=device)
    tent = torch.minimum(position + 1, side - position).float()
    total = torch.zeros(full, device=device)
    for start in starts:
        total[start : start + side] += tent
    return starts, [tent / total[start : start + side] for start in starts]


def resized_rows(bands: Iterator[Band], height: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Bilinear interpolation (without aligned corners) of the scores of an image to ``size``, a few rows at a time.

    Args:
        bands: (C, n, w) scores from top to bottom.
        height: h, the rows in all bands.
        size: (H, W).

    Yields:
        (C, n, W) scores of the next rows; how many there are follows from ``size`` and C alone.
    """
    full_height, full_width = size
    source = ((torch.arange(full_height) + 0.5) * (height / full_height) - 0.5).clamp(0, height - 1)
    upper = source.floor().long()
    lower = (upper + 1).clamp(max=height - 1)
    weight = source - upper
    done = 0
    before: Band | None = None
    for top, band in bands:
        num_rows = max(CHUNK // (len(band) * full_width), 1)
        end = top + band.shape[1]
        while done < full_height:
            rows = slice(done, min(done + num_rows, full_height))
            if int(lower[rows][-1]) >= end:
                break
            above, below = (_take(before, (top, band), part[rows]) for part in (upper, lower))
            if full_height != height:
                above = above.lerp(below, weight[rows].unsqueeze(1).to(above))
            if full_width != above.shape[-1]:
                target = (above.shape[1], full_width)
                above = F.interpolate(above.unsqueeze(0), target, mode="bilinear", align_corners=False)[0]
            yield above
            done = rows.stop
        if done < full_height:
            first = int(upper[done])
            kept = _take(before, (top, band), torch.arange(first, end))
            before = (first, kept)


def _take(before: Band | None, band: Band, rows: Tensor) -> Tensor:
    """Rows of the image, by their numbers in ascending order, from a band and from what was kept of those before it."""
    top, scores = band
    split = int((rows < top).sum())
    parts = [scores[:, (rows[split:] - top).to(scores.device)]] if split < len(rows) else []
    if split:
        assert before is not None
        parts.insert(0, before[1][:, (rows[:split] - before[0]).to(scores.device)])
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def label_map(
    network: Scorer,
    views: Sequence[Tensor],
    size: tuple[int, int],
    *,
    window: tuple[int, int] | None = None,
    flip: bool = False,
    fixed: bool = False,
) -> Tensor:
    """The best class of every pixel: (H, W) int16.

    Args:
        network: what scores an image or a window.
        views: the image's normalised pixels, (3, h, w), at one or several scales; of several, the probabilities are
            averaged.
        size: (H, W) of the image.
        window: size of sliding windows; None to see images whole.
        flip: average with the mirrored image.
        fixed: the network takes images of the size of ``window`` alone.
    """
    streams = [
        resized_rows(_bands(network, pixels, window, mirrored, fixed), pixels.shape[1], size)
        for pixels in views
        for mirrored in ((False, True) if flip else (False,))
    ]
    labels = []
    for rows in zip(*streams, strict=True):
        scores = rows[0] if len(rows) == 1 else torch.stack([part.softmax(0) for part in rows]).mean(0)
        labels.append(scores.argmax(0).to(torch.int16))
    return torch.cat(labels)


def _bands(
    network: Scorer, pixels: Tensor, window: tuple[int, int] | None, mirrored: bool, fixed: bool
) -> Iterator[Band]:
    pixels = pixels.flip(-1) if mirrored else pixels
    bands = (
        whole_image(network, pixels) if window is None else sliding_windows(network, pixels, window, fixed=fixed)
    )
    return ((top, scores.flip(-1)) for top, scores in bands) if mirrored else bands
