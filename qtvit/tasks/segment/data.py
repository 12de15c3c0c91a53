"""Images with a class for each pixel."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from qtvit.data.folders import data_folder
from qtvit.data.images import file_size, for_each_image, open_image
from qtvit.data.problems import ProblemReport
from qtvit.data.split import choose_by_name

from .check import check_before_training, resolve_classes, size_mismatch
from .layout import SegmentationSample, read_layout
from .masks import MaskClasses
from .palette import Color, format_color

SegmentationTransform = Callable[[Image.Image, Tensor], tuple[Tensor, Tensor]]
"""PIL RGB image and (H, W) int16 labels -> the network's input and (H, W) int64 labels."""


@dataclass(frozen=True)
class SegmentationData:
    """Images with masks in two splits."""

    name: str  # of the data's folder
    mask_classes: MaskClasses  # the classes, and their values in the masks
    train: list[SegmentationSample]
    val: list[SegmentationSample]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, which labels index."""
        return self.mask_classes.names

    @property
    def colors(self) -> tuple[Color, ...]:
        """The colour of each class."""
        return self.mask_classes.colors

    @property
    def ignore_index(self) -> int:
        """The label of pixels without a class."""
        return self.mask_classes.ignore_index

    def digest(self) -> str:
        """A hash of which images and masks are in which split and of what the masks mean, wherever the folder is."""
        meaning = self.mask_classes
        lines = [repr((meaning.names, meaning.values, meaning.ignored, meaning.ignore_index, meaning.by_color))]
        lines += [repr((meaning.colors, meaning.ignored_colors))] if meaning.by_color else []
        lines += [
            f"{part} {sample.name} {file_size(sample.image)} {file_size(sample.mask)}"
            for part, samples in (("train", self.train), ("val", self.val))
            for sample in samples
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def describe(self) -> list[str]:
        """The classes and splits in words, to be shown before training."""
        meaning = self.mask_classes
        values = ", ".join(
            f"{name} ({'colour ' + format_color(color) if meaning.by_color else value})"
            for name, value, color in zip(meaning.names, meaning.values, meaning.colors, strict=True)
        )
        ignored = f"; ignored mask values: {', '.join(map(str, meaning.ignored))}" if meaning.ignored else ""
        return [
            f"{len(meaning.names)} classes, with their mask values: {values}{ignored}",
            f"{len(self.train):,} images to train on, {len(self.val):,} held out",
        ]


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples read with `open_image` and `MaskClasses.read`, then transformed.

    Raises, when indexed:
        FileNotFoundError, ValueError: a file cannot be read, or the mask has values that are of no class or another
            size than the image; the message names the file.
    """

    def __init__(
        self, samples: Sequence[SegmentationSample], mask_classes: MaskClasses, transform: SegmentationTransform
    ) -> None:
        self.samples = samples
        self.mask_classes = mask_classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.read(index))

    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """The image without transform, and its (H, W) int16 labels."""
        sample = self.samples[index]
        image = open_image(sample.image)
        labels = self.mask_classes.read(sample.mask)
        height, width = labels.shape
        if image.size != (width, height):
            raise ValueError(size_mismatch(sample, (width, height)))
        return image, torch.from_numpy(np.ascontiguousarray(labels))


def load_segmentation_data(
    data: str, *, classes: str | None = None, ignore_index: int = 255, train_images: int | None = None
) -> SegmentationData:
    """Find the images and masks of a folder, and what the masks mean.

    Layouts and class files are shown in docs/segmentation.md. If there is no class file and the layout is not ADE20K's,
    all masks are read to find the classes.

    Args:
        data: the folder.
        classes: class file; None for classes.txt or classes.yaml in the folder, if there is one.
        ignore_index: label of pixels without a class and, unless the class file or the layout says otherwise, their
            value in index masks; -1 if there are none.
        train_images: number of training images to use, see `qtvit.data.split.choose_by_name`.

    Raises:
        FileNotFoundError: the folder or the class file does not exist.
        ValueError: there are problems with the data (the message has the first one, and the command that lists all), or
            ``train_images`` is not possible.
    """
    root = data_folder(data, sample="draw one: qtvit data scenes DIR --task segment")
    layout = read_layout(root)
    command = f"qtvit data check {data} --task segment"
    command += f" --classes {classes}" if classes is not None else ""
    command += f" --ignore-index {ignore_index}" if ignore_index != 255 else ""
    ProblemReport(problems=layout.problems).raise_if_any(command)
    meaning = resolve_classes(layout, classes, ignore_index)
    check_before_training(layout, meaning).raise_if_any(command)
    samples = layout.splits["train"]
    train = [samples[i] for i in choose_by_name([sample.name for sample in samples], train_images)]
    return SegmentationData(root.resolve().name, meaning, train, layout.splits["val"])


def count_pixels(data: SegmentationData, num_threads: int = 8) -> Tensor:
    """(C,) pixels of each class in the masks of ``data.train``, which are all read; errors as `MaskClasses.read`."""

    def count(sample: SegmentationSample) -> np.ndarray:
        labels = data.mask_classes.read(sample.mask)
        return np.bincount(labels[labels != data.ignore_index], minlength=len(data.classes))

    counts = for_each_image(count, data.train, num_threads)
    return torch.from_numpy(sum(counts, np.zeros(len(data.classes), np.int64)))
