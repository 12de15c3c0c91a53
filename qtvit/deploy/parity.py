"""Checks that an exported file computes the same as the network it was made from.

Shapes: B batch, H x W image.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtvit.console import progress
from qtvit.data import ImageSource, Preprocess, open_image

from .artifact import Artifact
from .runtimes import Runtime

FP32_TOLERANCE = 1e-4
"""Largest difference of a logit that an fp32 file may have, relative to the network's largest logit."""
MIN_AGREEMENT = {"fp32": 1.0, "bf16": 0.99, "fp16": 0.99, "int8": 0.95}
"""Fraction of images that must get the same class as from the network, by precision; ties do not count."""
TIE = 0.02
"""An image is a tie if the network's two largest logits are closer than this fraction of its largest logit."""
SAME_PIXELS = 0.999
"""Fraction of all pixels, ties included, that must get the same class in fp32."""
MAX_DROP = 1.0
"""Percentage points of accuracy that a file may lose on labelled images."""
LARGE_BATCH, SMALL_BATCH = 8, 3
"""Batch sizes that are tried, besides 1, where the file takes any."""
FEW = 8
"""Images for each further image or batch size."""
DENSE_BATCH, DENSE_FEW = 2, 3
"""In place of ``LARGE_BATCH, FEW`` for networks that score every pixel, which need more time and memory per image."""
TURNS, WARMUP = 30, 5
"""Number of timed runs of a file, and of untimed ones before them."""
AS_FAST = 1.05
"""A file that takes at most this many times as long as another counts as equally fast: medians scatter that much."""


@dataclass(frozen=True)
class Case:
    """Comparison of a file with its network on images of one size, in batches of one size.

    Attributes:
        img_size: (H, W).
        batch_size: of all batches but the last, which may be smaller.
        num_images: number of images.
        max_diff, mean_diff: absolute difference of the logits; infinite if the file's are not finite.
        scale: the network's largest absolute logit.
        num_clear: images (of a segmenter: pixels) that are not ties.
        num_agreeing: clear ones that get the same class.
        num_pixels: all pixels of a segmenter's images; 0 for a classifier.
        num_same: pixels, ties included, that get the same class.
    """

    img_size: tuple[int, int]
    batch_size: int
    num_images: int
    max_diff: float
    mean_diff: float
    scale: float
    num_clear: int
    num_agreeing: int
    num_pixels: int = 0
    num_same: int = 0

    @classmethod
    def compare(cls, img_size: tuple[int, int], batch_size: int, expected: Tensor, found: Tensor) -> "Case":
        """Compare the network's logits with the file's, each (B, num_classes) or (B, num_classes, H, W)."""
        num_images, dense = len(expected), expected.ndim == 4
        expected, found = (logits.movedim(1, -1).flatten(0, -2) for logits in (expected, found))
        diff = (found - expected).abs().nan_to_num(torch.inf, torch.inf)
        best = expected.topk(min(2, expected.shape[-1])).values
        scale = float(expected.abs().max())
        clear = best[:, 0] - best[:, -1] > TIE * scale
        same = expected.argmax(-1) == found.argmax(-1)
        counts = [int(clear.sum()), int((clear & same).sum()), *([len(same), int(same.sum())] if dense else [])]
        return cls(img_size, batch_size, num_images, float(diff.max()), float(diff.mean()), scale, *counts)

    @classmethod
    def merge(cls, cases: Sequence["Case"]) -> "Case":
        """One case from those of parts of the same images."""
        counts = ("num_images", "num_clear", "num_agreeing", "num_pixels", "num_same")
        sums: dict[str, Any] = {name: sum(getattr(case, name) for case in cases) for name in counts}
        return dataclasses.replace(
            cases[0],
            max_diff=max(case.max_diff for case in cases),
            mean_diff=sum(case.mean_diff * case.num_images for case in cases) / sums["num_images"],
            scale=max(case.scale for case in cases),
            **sums,
        )

    @property
    def agreement(self) -> float:
        """Fraction of the clear images or pixels that get the same class; 1 if all are ties."""
        return self.num_agreeing / self.num_clear if self.num_clear else 1.0

    def problem(self, precision: str) -> str | None:
        """What disqualifies a file of this precision; None if nothing does."""
        where = f"at {_size(self.img_size)} in batches of {self.batch_size}"
        if not self.max_diff < torch.inf:
            return f"its logits are not finite {where}"
        if precision == "fp32" and self.max_diff > FP32_TOLERANCE * self.scale:
            return (
                f"its logits differ by {self.max_diff:.2g} {where}, with a largest logit of {self.scale:.2g}; "
                f"allowed is {FP32_TOLERANCE:g} of that"
            )
        if precision == "fp32" and self.num_same < SAME_PIXELS * self.num_pixels:
            return (
                f"it gives the class of the network for {self.num_same} of {self.num_pixels} pixels {where}; "
                f"fp32 has to for {SAME_PIXELS:.1%}"
            )
        if self.agreement < MIN_AGREEMENT[precision]:
            what = "clear pixels" if self.num_pixels else "images"
            return (
                f"it gives the class of the network for {self.num_agreeing} of {self.num_clear} {what} {where}; "
                f"{precision} has to for {MIN_AGREEMENT[precision]:.0%}"
            )
        return None

    def agreement_text(self) -> str:
        """Column of the report: how many images or pixels get the same class."""
        if self.num_pixels:
            return f"{self.num_same / self.num_pixels:>7.2%} of the pixels"
        ties = self.num_images - self.num_clear
        return f"{self.agreement:>6.1%}" + (f" ({ties} tie{'s' * (ties > 1)})" if ties else "")


@dataclass(frozen=True)
class Gain:
    """Size and speed of a file and of others of the same network and runtime, by precision; the file's own comes first.

    Attributes:
        num_bytes: file sizes.
        seconds: median time for one image.
    """

    num_bytes: dict[str, int]
    seconds: dict[str, float]

    def lines(self) -> list[str]:
        """A table, and a sentence about the others that are as fast."""
        own, *others = self.seconds
        lines = [f"{'precision':<10}{'size':>11}{'one image':>12}  next to {own} (medians of {TURNS} turns each)"]
        for name, seconds in self.seconds.items():
            size = f"{self.num_bytes[name] / 1e6:.1f} MB"
            lines.append(f"{name:<10}{size:>11}{1e3 * seconds:>9.2f} ms  {seconds / self.seconds[own]:.2f}")
        if fast := [name for name in others if self.seconds[name] <= AS_FAST * self.seconds[own]]:
            lines.append(f"on this machine, {' and '.join(fast)} {'is' if len(fast) == 1 else 'are'} as fast as {own}")
        return lines


@dataclass(frozen=True)
class Report:
    """Result of `check`.

    Attributes:
        precision: of the file.
        cases: the first is about all images, at the file's own size.
        accuracy: ``score`` of the network and of the file, in percent.
        max_drop: how many percentage points the file's may be lower.
        gain: size and speed next to other precisions, if measured.
        score: name of the accuracy.
    """

    precision: str
    cases: list[Case]
    accuracy: tuple[float, float] | None = None
    max_drop: float = MAX_DROP
    gain: Gain | None = None
    score: str = "top-1"

    def problem(self) -> str | None:
        """The first reason to reject the file; None if there is none."""
        for case in self.cases:
            if problem := case.problem(self.precision):
                return problem
        if self.accuracy and self.accuracy[0] - self.accuracy[1] > self.max_drop + 1e-9:
            network, found = self.accuracy
            return (
                f"its {self.score} is {found:.2f} %, {network - found:.2f} points below the network's; "
                f"allowed are {self.max_drop:g}"
            )
        return None

    def lines(self) -> list[str]:
        """A table of the cases, the accuracies and the gain."""
        same = "class" if self.cases[0].num_pixels else "top-1"
        lines = [f"{'size':<10}{'batch':>6}{'images':>8}{'max diff':>11}{'mean diff':>11}  same {same}"]
        for case in self.cases:
            about = f"{_size(case.img_size):<10}{case.batch_size:>6}{case.num_images:>8}"
            lines += [f"{about}{case.max_diff:>11.2g}{case.mean_diff:>11.2g}  {case.agreement_text()}"]
        lines.append(f"the network's largest logit is {self.cases[0].scale:.3g}")
        if self.accuracy:
            lines.append(f"{self.score}: {self.accuracy[1]:.2f} %, of the network {self.accuracy[0]:.2f} %")
        if self.gain:
            lines += self.gain.lines()
        return lines


def check(
    network: Runtime,
    exported: Runtime,
    artifact: Artifact,
    images: Sequence[ImageSource],
    labels: Sequence[int] | None = None,
    max_drop: float = MAX_DROP,
    preprocess: Preprocess | None = None,
    dense: bool = False,
) -> Report:
    """Run an fp32 network and the file exported from it on the same images.

    All ``images`` are used at the file's size, and a few at other image and batch sizes that the file allows.

    Args:
        labels: classes of the images; adds the accuracies to the report.
        preprocess: how images become the graph's input; None: as the file's description says.
        dense: whether the logits are per pixel; fewer images are then used, in smaller batches.
    """
    preprocess = preprocess or Preprocess(**artifact.info.preprocess)
    cases, accuracy = [], None
    for img_size, batch_size, num_images in _plan(artifact, len(images), dense):
        transform = dataclasses.replace(preprocess, size=img_size).transform()
        expected, found, parts = [], [], []
        for start in progress(range(0, num_images, batch_size), desc="Checking", unit="batch"):
            sources = images[start : min(start + batch_size, num_images)]
            batch = torch.stack([transform(open_image(source)) for source in sources])
            expected.append(network(batch).cpu())
            found.append(exported(batch).cpu())
            if expected[-1].ndim == 4:  # the pixels of all images would not fit into memory
                parts.append(Case.compare(img_size, batch_size, expected.pop(), found.pop()))
        if expected:
            parts.append(Case.compare(img_size, batch_size, torch.cat(expected), torch.cat(found)))
        cases.append(Case.merge(parts))
        if labels is not None and accuracy is None:
            right = [torch.cat(logits).argmax(-1) == torch.tensor(labels) for logits in (expected, found)]
            accuracy = 100 * float(right[0].float().mean()), 100 * float(right[1].float().mean())
    return Report(artifact.precision, cases, accuracy, max_drop)


def time_in_turns(runtimes: Sequence[Runtime], pixels: Tensor) -> list[float]:
    """Median seconds that each runtime takes for ``pixels``; they take turns, so that disturbances hit all alike."""
    samples: list[list[float]] = [[] for _ in runtimes]
    for turn in range(WARMUP + TURNS):
        for runtime, seconds in zip(runtimes, samples, strict=True):
            start = time.perf_counter()
            runtime(pixels)
            if turn >= WARMUP:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in samples]


def synthetic_images(num_images: int, img_size: tuple[int, int], seed: int = 0) -> list[ImageSource]:
    """Coloured 1/f noise, (3, H, W) in 0..1: like those of photographs, its amplitudes fall off with frequency.

    For checks without images at hand: unlike white noise, it excites all layers as photographs do.
    """
    height, width = img_size
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = torch.inf  # removes the mean, which is drawn separately
    images: list[ImageSource] = []
    for _ in range(num_images):
        white = torch.fft.rfft2(torch.randn(4, height, width, generator=generator))
        noise = torch.fft.irfft2(white / frequency, s=(height, width))
        noise = noise[:3] / noise.std() + noise[3] / noise.std()  # a photograph's colour channels are largely alike
        level = 0.5 + 0.2 * torch.randn(1, generator=generator)
        images.append((level + 0.15 * noise).clamp(0, 1))
    return images


def _plan(artifact: Artifact, num_images: int, dense: bool) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Image size (H, W), batch size and number of images of each case."""
    height, width = artifact.img_size
    large, few = (DENSE_BATCH, DENSE_FEW) if dense else (LARGE_BATCH, FEW)
    large, small = (large, SMALL_BATCH) if "batch" in artifact.dynamic else (1, 1)
    few = min(few, num_images)
    yield (height, width), large, num_images
    if "batch" in artifact.dynamic:
        yield (height, width), 1, few
        yield (height, width), small, few
    if "hw" in artifact.dynamic:
        for size in ((height * 3 // 2, width * 3 // 2), (height * 5 // 4 + 1, width * 2), (height * 2, width * 4 // 3)):
            yield size, small, few


def _size(img_size: tuple[int, int]) -> str:
    return "x".join(map(str, img_size))
