"""Whether an exported file computes what the network does that it was made of.

Shapes: B batch, H x W image.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtvit.console import progress
from qtvit.data import ImageSource, Preprocess, open_image

from .artifact import Artifact
from .runtimes import Runtime

FP32_TOLERANCE = 1e-4
"""Largest difference of a logit that an fp32 file may have, relative to the largest logit of the network."""
MIN_AGREEMENT = {"fp32": 1.0, "bf16": 0.99, "fp16": 0.99, "int8": 0.95}
"""Part of the images that have to get the same class as from the network, by precision; ties do not count."""
TIE = 0.02
"""An image is a tie if the network's two best logits are closer than this part of its largest logit."""
SAME_PIXELS = 0.999
"""Part of all pixels, ties too, that have to get the same class in fp32."""
MAX_DROP = 1.0
"""Points of accuracy that a file may lose on labelled images."""
LARGE_BATCH, SMALL_BATCH = 8, 3
"""Sizes of batches to try where any is allowed, besides 1."""
FEW = 8
"""Images for each further size and batch that is tried."""
DENSE_BATCH, DENSE_FEW = 2, 3
"""The same of networks that score every pixel, which take far more time and memory for an image."""
TURNS, WARMUP = 30, 5
"""How often a file is timed, and how often it runs before."""
AS_FAST = 1.05
"""A file that takes so many times as long as another, or less, is called as fast: medians scatter by as much."""


@dataclass(frozen=True)
class Case:
    """The file next to the network on images of one size, in batches of one size.

    Attributes:
        img_size: (H, W).
        batch_size: of all batches but the last.
        num_images: in all.
        max_diff, mean_diff: absolute difference of the logits; infinite if the file's are not finite.
        scale: the network's largest logit, absolutely.
        num_clear: images, or of a segmentation pixels, that are not ties.
        num_agreeing: those of them that get the same class.
        num_pixels: all pixels of a segmentation; 0 of a classifier.
        num_same: those of them that get the same class, ties too.
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
        """From the logits of the network and the file, each (B, num_classes), or (B, num_classes, H, W): of pixels."""
        num_images, dense = len(expected), expected.ndim == 4
        expected, found = (logits.movedim(1, -1).flatten(0, -2) for logits in (expected, found))
        diff = (found - expected).abs().nan_to_num(torch.inf, torch.inf)
        best = expected.topk(min(2, expected.shape[-1])).values
        scale = float(expected.abs().max())
        clear = best[:, 0] - best[:, -1] > TIE * scale
        same = expected.argmax(-1) == found.argmax(-1)
        return cls(
            img_size,
            batch_size,
            num_images,
            float(diff.max()),
            float(diff.mean()),
            scale,
            int(clear.sum()),
            int((clear & same).sum()),
            len(same) if dense else 0,
            int(same.sum()) if dense else 0,
        )

    @classmethod
    def merge(cls, cases: Sequence["Case"]) -> "Case":
        """Of parts of the same images, one case."""
        first, num_images = cases[0], sum(case.num_images for case in cases)
        return cls(
            first.img_size,
            first.batch_size,
            num_images,
            max(case.max_diff for case in cases),
            sum(case.mean_diff * case.num_images for case in cases) / num_images,
            max(case.scale for case in cases),
            *(
                sum(getattr(case, name) for case in cases)
                for name in ("num_clear", "num_agreeing", "num_pixels", "num_same")
            ),
        )

    @property
    def agreement(self) -> float:
        """The part of the images, or pixels, with a clear class that get the same one; 1 if there are none such."""
        return self.num_agreeing / self.num_clear if self.num_clear else 1.0

    def problem(self, precision: str) -> str | None:
        """What is wrong with it, if anything is."""
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
        """How many get the same class, in words."""
        if self.num_pixels:
            return f"{self.num_same / self.num_pixels:>7.2%} of the pixels"
        ties = self.num_images - self.num_clear
        return f"{self.agreement:>6.1%}" + (f" ({ties} tie{'s' * (ties > 1)})" if ties else "")


@dataclass(frozen=True)
class Gain:
    """A file next to others of the same network in the same runtime, by precision; its own first.

    Attributes:
        num_bytes: sizes.
        seconds: medians of the time for one image.
    """

    num_bytes: dict[str, int]
    seconds: dict[str, float]

    def lines(self) -> list[str]:
        """A table, and which of the others are as fast."""
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
    """What `check` found.

    Attributes:
        precision: of the file.
        cases: the first with all images at the file's own size.
        accuracy: ``score`` in percent of the network and of the file, on labelled images.
        max_drop: by how many points the latter may be lower.
        gain: what the precision brings, if that was measured.
        score: what the accuracy is.
    """

    precision: str
    cases: list[Case]
    accuracy: tuple[float, float] | None = None
    max_drop: float = MAX_DROP
    gain: Gain | None = None
    score: str = "top-1"

    def problem(self) -> str | None:
        """The first thing that is wrong with the file, if anything is."""
        problems = (case.problem(self.precision) for case in self.cases)
        if problem := next(filter(None, problems), None):
            return problem
        if self.accuracy and self.accuracy[0] - self.accuracy[1] > self.max_drop + 1e-9:
            network, found = self.accuracy
            return (
                f"its {self.score} is {found:.2f} %, {network - found:.2f} points below the network's; "
                f"allowed are {self.max_drop:g}"
            )
        return None

    def lines(self) -> list[str]:
        """A table of the cases, and the accuracies."""
        same = "class" if self.cases[0].num_pixels else "top-1"
        lines = [f"{'size':<10}{'batch':>6}{'images':>8}{'max diff':>11}{'mean diff':>11}  same {same}"]
        for case in self.cases:
            lines.append(
                f"{_size(case.img_size):<10}{case.batch_size:>6}{case.num_images:>8}{case.max_diff:>11.2g}"
                f"{case.mean_diff:>11.2g}  {case.agreement_text()}"
            )
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
    """Run both on ``images``: all at the file's size, a few at each other size and batch size that it allows.

    Args:
        network: what the file was made of, in fp32.
        exported: the file, in the runtime it is for.
        artifact: the file's description.
        images: to compare on.
        labels: their classes, to compare accuracies too.
        max_drop: see `Report`.
        preprocess: how images are made to fit the graph; None: as the file says.
        dense: whether every pixel is scored, which takes longer, so that fewer images have to do.
    """
    preprocess = preprocess or Preprocess(**artifact.info.preprocess)
    cases = []
    accuracy = None
    for img_size, batch_size, num_images in _plan(artifact, len(images), dense):
        at_size = dataclasses.replace(preprocess, size=img_size)
        expected, found, parts = [], [], []
        for batch in _batches(images[:num_images], at_size, batch_size):
            expected.append(network(batch).cpu())
            found.append(exported(batch).cpu())
            if expected[-1].ndim == 4:  # those of all images would not fit into memory
                parts.append(Case.compare(img_size, batch_size, expected.pop(), found.pop()))
        if expected:
            parts.append(Case.compare(img_size, batch_size, torch.cat(expected), torch.cat(found)))
        cases.append(Case.merge(parts))
        if labels is not None and accuracy is None:
            right = [torch.cat(logits).argmax(-1) == torch.tensor(labels) for logits in (expected, found)]
            accuracy = 100 * float(right[0].float().mean()), 100 * float(right[1].float().mean())
    return Report(artifact.precision, cases, accuracy, max_drop)


def time_in_turns(runtimes: Sequence[Runtime], pixels: Tensor) -> list[float]:
    """Seconds that each takes for ``pixels``: medians, taken in turns, so that what else goes on hits all of them."""
    samples: list[list[float]] = [[] for _ in runtimes]
    for turn in range(WARMUP + TURNS):
        for runtime, seconds in zip(runtimes, samples, strict=True):
            start = time.perf_counter()
            runtime(pixels)
            if turn >= WARMUP:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in samples]


def synthetic_images(num_images: int, img_size: tuple[int, int], seed: int = 0) -> list[ImageSource]:
    """Pictures with the statistics of photographs, whose amplitudes fall off with frequency: coloured 1/f noise.

    For networks without images at hand: unlike white noise, they excite all layers as photographs do.
    """
    height, width = img_size
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = torch.inf  # no constant part
    images: list[ImageSource] = []
    for _ in range(num_images):
        white = torch.fft.rfft2(torch.randn(4, height, width, generator=generator))
        noise = torch.fft.irfft2(white / frequency, s=(height, width))
        noise = noise[:3] / noise.std() + noise[3] / noise.std()  # colours have most of their structure in common
        level = 0.5 + 0.2 * torch.randn(1, generator=generator)
        images.append((level + 0.15 * noise).clamp(0, 1))
    return images


def _plan(artifact: Artifact, num_images: int, dense: bool) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Image size, batch size and number of images of each case."""
    height, width = artifact.img_size
    any_batch = "batch" in artifact.dynamic
    yield (height, width), (DENSE_BATCH if dense else LARGE_BATCH) if any_batch else 1, num_images
    few = min(DENSE_FEW if dense else FEW, num_images)
    if any_batch:
        yield (height, width), 1, few
        yield (height, width), SMALL_BATCH, few
    if "hw" in artifact.dynamic:
        for size in ((height * 3 // 2, width * 3 // 2), (height * 5 // 4 + 1, width * 2), (height * 2, width * 4 // 3)):
            yield size, SMALL_BATCH if any_batch else 1, few


def _batches(images: Sequence[ImageSource], preprocess: Preprocess, batch_size: int) -> Iterator[Tensor]:
    transform = preprocess.transform()
    for start in progress(range(0, len(images), batch_size), desc="Checking", unit="batch"):
        yield torch.stack([transform(open_image(image)) for image in images[start : start + batch_size]])


def _size(img_size: tuple[int, int]) -> str:
    return "x".join(map(str, img_size))
