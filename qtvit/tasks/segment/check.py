"""All that is wrong with a folder of images and masks, found before a training stumbles over it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from qtvit.data.folders import data_folder
from qtvit.data.images import any_size, for_each_image, open_image, read_file
from qtvit.data.problems import ProblemReport
from qtvit.errors import some

from .classes import ade20k_classes, find_class_file, found_classes, read_class_file
from .layout import SegmentationLayout, SegmentationSample, read_layout
from .masks import JPEG_MASK, MaskClasses, ValueCounts, count_values, index_colors, read_mask
from .palette import Color, format_color

NUM_PROBED = 64
"""Masks of a split whose values are looked at before training; all are where the classes have to be found."""

Problems = dict[str, list[str]]


@dataclass(frozen=True)
class _Facts:
    """What was found in the files of a sample.

    Attributes:
        counts: values of the mask; None if they were not looked at, or the mask cannot be read.
        colors: of the values, if the mask has a palette.
        size: (width, height) of the image, as far as it is known.
        digest: of the image file; empty if it was not read.
        problems: heading and entry.
    """

    counts: ValueCounts | None = None
    colors: Mapping[int, Color] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    digest: str = ""
    problems: tuple[tuple[str, str], ...] = ()


def check_segmentation_data(
    data: str, *, classes: str | None = None, ignore_index: int = 255, num_threads: int = 8
) -> ProblemReport:
    """Read every image and mask of a folder, and report all problems at once.

    Args:
        data, classes, ignore_index: as for `qtvit.tasks.segment.data.load_segmentation_data`.
        num_threads: that read files.

    Raises:
        FileNotFoundError, ValueError: there is no such folder.
    """
    root = data_folder(data, sample="draw one: qtvit data scenes DIR --task segment")
    problems: Problems = {}
    try:
        layout = read_layout(root)
    except ValueError as error:
        return ProblemReport(problems={"folders": [str(error)]})
    problems |= layout.problems
    facts = {split: _look(samples, num_threads, full=True) for split, samples in layout.splits.items()}
    _collect(problems, [found for split in facts.values() for found in split])
    try:
        meaning = resolve_classes(layout, classes, ignore_index, facts)
    except (ValueError, FileNotFoundError) as error:
        problems["classes"] = [str(error)]
        meaning = None
    summary = []
    for split, samples in layout.splits.items():
        summary += _summary(split, samples, facts[split], meaning)
    if meaning is not None:
        for split, samples in layout.splits.items():
            _check_values(problems, samples, facts[split], meaning)
        _check_presence(problems, root, facts, meaning)
    _check_palettes(problems, layout, facts)
    _check_leaks(problems, layout, facts)
    return ProblemReport(summary, {title: entries for title, entries in problems.items() if entries})


def check_before_training(layout: SegmentationLayout, meaning: MaskClasses, num_threads: int = 8) -> ProblemReport:
    """What can be found without reading all pixels: sizes, JPEG masks, and the values of `NUM_PROBED` masks."""
    problems: Problems = {}
    probed: list[_Facts] = []
    for samples in layout.splits.values():
        _collect(problems, _look(samples, num_threads, full=False))
        chosen = [samples[i] for i in np.linspace(0, len(samples) - 1, min(NUM_PROBED, len(samples))).astype(int)]
        facts = [_mask_facts(sample) for sample in chosen]
        _collect(problems, facts)
        _check_values(problems, chosen, facts, meaning)
        probed += facts
    _check_one_class(problems, layout, probed, meaning)
    return ProblemReport(problems={title: entries for title, entries in problems.items() if entries})


def resolve_classes(
    layout: SegmentationLayout,
    classes: str | None,
    ignore_index: int,
    facts: Mapping[str, Sequence[_Facts]] | None = None,
    num_threads: int = 8,
) -> MaskClasses:
    """The classes that a file lists, ADE20K's, or those that the masks have, which are read if ``facts`` are not given.

    Raises:
        FileNotFoundError, ValueError: as `find_class_file`, `read_class_file` and `found_classes`.
    """
    path = find_class_file(layout.root, classes)
    if path is not None:
        return read_class_file(path, ignore_index)
    if layout.ade20k:
        return ade20k_classes(layout.root, ignore_index)
    if facts is None:
        samples = [sample for split in layout.splits.values() for sample in split]
        facts = {"": list(for_each_image(_mask_facts, samples, num_threads))}
    counts = (found.counts for split in facts.values() for found in split if found.counts is not None)
    return found_classes(layout.root, counts, ignore_index)


def _look(samples: Sequence[SegmentationSample], num_threads: int, *, full: bool) -> list[_Facts]:
    return list(for_each_image(partial(_facts, full=full), samples, num_threads))


def _facts(sample: SegmentationSample, *, full: bool) -> _Facts:
    """Of both files; only their headers are read unless ``full``."""
    size, digest, problems = None, "", []
    try:
        if full:
            digest = hashlib.sha256(read_file(sample.image)).hexdigest()
            size = open_image(sample.image).size
        else:
            size = _upright_size(sample.image)
    except (ValueError, OSError) as error:
        problems.append(("images that cannot be read", str(error)))
    mask = _mask_facts(sample) if full else _Facts()
    problems += mask.problems
    mask_size = None
    if not mask.problems:
        try:
            if _is_jpeg(sample.mask):
                problems.append(("masks saved as JPEG", f"{sample.mask}: {JPEG_MASK}"))
            mask_size = _stored_size(sample.mask)
        except (ValueError, OSError) as error:
            problems.append(("masks that cannot be read", str(error)))
    if size and mask_size and size != mask_size and (mismatch := size_mismatch(sample, mask_size)):
        problems.append(("masks of another size than the image", mismatch))
    return _Facts(mask.counts, mask.colors, size, digest, tuple(problems))


def _mask_facts(sample: SegmentationSample) -> _Facts:
    """Of the mask alone, read in full."""
    try:
        counts = count_values(read_mask(sample.mask)).without_rare()
        return _Facts(counts, index_colors(sample.mask))
    except (ValueError, OSError) as error:
        title = "masks saved as JPEG" if JPEG_MASK in str(error) else "masks that cannot be read"
        return _Facts(problems=((title, str(error)),))


def size_mismatch(sample: SegmentationSample, mask_size: tuple[int, int]) -> str | None:
    """What is wrong with a mask of (width, height) ``mask_size``, if its image has another."""
    try:
        size = open_image(sample.image).size
        stored = _stored_size(sample.image)
    except (ValueError, OSError):
        return None
    if size == mask_size:
        return None
    turned = ", upright as its EXIF data say" if stored != size else ""
    return (
        f"{sample.mask}: {mask_size[0]} x {mask_size[1]} pixels, and the image {sample.image} has "
        f"{size[0]} x {size[1]}{turned}"
    )


def _stored_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header alone."""
    try:
        with any_size(), Image.open(path) as image:
            return image.size
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise ValueError(f"{path}: not an image that can be read") from error


def _upright_size(path: Path) -> tuple[int, int]:
    """(width, height) as `open_image` returns it, without reading all of a photo."""
    width, height = _stored_size(path)
    if not _is_jpeg(path):  # other formats keep EXIF data behind the pixels
        return width, height
    with any_size(), Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"\xff\xd8\xff"


def _collect(problems: Problems, facts: Sequence[_Facts]) -> None:
    for found in facts:
        for title, entry in found.problems:
            if entry not in (entries := problems.setdefault(title, [])):
                entries.append(entry)


def _check_values(
    problems: Problems, samples: Sequence[SegmentationSample], facts: Sequence[_Facts], meaning: MaskClasses
) -> None:
    for sample, found in zip(samples, facts, strict=True):
        if found.counts is None:
            continue
        if unknown := meaning.unknown(meaning.plain(found.counts)):
            title = "colours that no class has" if found.counts.color else "mask values that no class has"
            problems.setdefault(title, []).append(f"{sample.mask}: {unknown}")


def _pixels(facts: Sequence[_Facts], meaning: MaskClasses) -> np.ndarray:
    """(N, C) pixels of each class in each mask that could be read."""
    counts = [meaning.label_counts(meaning.plain(found.counts)) for found in facts if found.counts is not None]
    return np.stack(counts) if counts else np.zeros((0, len(meaning.names)), np.int64)


def _check_presence(
    problems: Problems, root: Path, facts: Mapping[str, Sequence[_Facts]], meaning: MaskClasses
) -> None:
    train, val = ((_pixels(facts[split], meaning) > 0).sum(0).tolist() for split in ("train", "val"))
    for label, name in enumerate(meaning.names):
        if train[label] == 0 and val[label] == 0:
            problems.setdefault("classes that no mask has", []).append(f"{root}: class {label} ({name}) is in no mask")
        elif train[label] == 0:
            masks = f"{val[label]} mask{'s' * (val[label] != 1)}"
            problems.setdefault("classes of val that train lacks", []).append(
                f"{root}: class {label} ({name}) is in {masks} of val and none of train"
            )


def _check_one_class(
    problems: Problems, layout: SegmentationLayout, facts: Sequence[_Facts], meaning: MaskClasses
) -> None:
    """A common mistake: masks of 0 and 255, of which 255 is ignored."""
    present = np.flatnonzero(_pixels(facts, meaning).sum(0))
    if len(present) < 2 and not any(problems.values()):
        only = f"class {meaning.names[present[0]]} only" if len(present) else "no class at all"
        ignored = f" (ignored values: {some(meaning.ignored)})" if meaning.ignored else ""
        problems["classes that no mask has"] = [f"{layout.root}: the {len(facts)} masks looked at have {only}{ignored}"]


def _check_palettes(problems: Problems, layout: SegmentationLayout, facts: Mapping[str, Sequence[_Facts]]) -> None:
    """A program that saves colours with a palette numbers them anew in each file: such indices are no classes."""
    first: dict[int, tuple[Color, Path]] = {}
    for split, samples in layout.splits.items():
        for sample, found in zip(samples, facts[split], strict=True):
            used = found.counts.pixels if found.counts else ()
            for index, color in ((i, found.colors[i]) for i in used if i in found.colors):
                known, path = first.setdefault(index, (color, sample.mask))
                if known != color:
                    problems.setdefault("palettes that differ", []).append(
                        f"{sample.mask}: index {index} is the colour {format_color(color)}, and in {path} "
                        f"{format_color(known)}; save the masks as RGB, or with one palette"
                    )
                    break


def _check_leaks(problems: Problems, layout: SegmentationLayout, facts: Mapping[str, Sequence[_Facts]]) -> None:
    train = {
        found.digest: sample.image
        for sample, found in zip(layout.splits["train"], facts["train"], strict=True)
        if found.digest
    }
    for sample, found in zip(layout.splits["val"], facts["val"], strict=True):
        if found.digest in train:
            problems.setdefault("images of val that are in train too", []).append(
                f"{sample.image} = {train[found.digest]}"
            )


def _summary(
    split: str, samples: Sequence[SegmentationSample], facts: Sequence[_Facts], meaning: MaskClasses | None
) -> list[str]:
    lines = [f"{split}: {len(samples):,} images with masks"]
    sizes = np.array([found.size for found in facts if found.size])
    for what, numbers in zip(("width", "height"), sizes.T, strict=False):
        lines.append(f"  {what}: {numbers.min()} to {numbers.max()} px, median {np.median(numbers):g}")
    if meaning is not None:
        pixels = _pixels(facts, meaning)
        total = max(int(pixels.sum()), 1)
        for name, here in zip(meaning.names, pixels.T, strict=True):
            if here.any():
                lines.append(
                    f"  {name}: {here.sum() / total:.2%} of the labelled pixels, in {(here > 0).sum():,} masks"
                )
    return lines
