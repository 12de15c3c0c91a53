"""Finds everything that is wrong with a folder of images and masks, before a training stumbles over it."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
"""Masks of each split whose values are checked before training. Where classes have to be found, all masks are read."""

AS_JPEG = "masks saved as JPEG"
NO_MASK = "masks that cannot be read"
NOWHERE = "classes that no mask has"


@dataclass(frozen=True)
class _Facts:
    """What was found in the files of a sample."""

    counts: ValueCounts | None = None  # values of the mask; None if they were not read
    colors: Mapping[int, Color] = field(default_factory=dict)  # of the values, if the mask has a palette
    size: tuple[int, int] | None = None  # (width, height) of the image; None if it was not read
    digest: str = ""  # hash of the image file; empty if it was not read
    problems: tuple[tuple[str, str], ...] = ()  # headings and entries


class _Problems(defaultdict[str, list[str]]):
    """Entries about what is wrong, by heading."""

    def collect(self, facts: Iterable[_Facts]) -> None:
        """Add the problems of samples, each once."""
        for title, entry in (problem for found in facts for problem in found.problems):
            if entry not in self[title]:
                self[title].append(entry)

    def check_values(
        self, samples: Sequence[SegmentationSample], facts: Sequence[_Facts], meaning: MaskClasses
    ) -> None:
        """Add the masks with values that are of no class."""
        for sample, found in zip(samples, facts, strict=True):
            if found.counts is not None and (unknown := meaning.unknown(meaning.plain(found.counts))):
                title = "colours that no class has" if found.counts.color else "mask values that no class has"
                self[title].append(f"{sample.mask}: {unknown}")


def check_segmentation_data(
    data: str, *, classes: str | None = None, ignore_index: int = 255, num_threads: int = 8
) -> ProblemReport:
    """Read every image and mask of a folder, and report all problems at once.

    Args:
        data, classes, ignore_index: as for `qtvit.tasks.segment.data.load_segmentation_data`.
        num_threads: number of threads that read files.

    Raises:
        FileNotFoundError, ValueError: there is no such folder.
    """
    root = data_folder(data, sample="draw one: qtvit data scenes DIR --task segment")
    try:
        layout = read_layout(root)
    except ValueError as error:
        return ProblemReport(problems={"folders": [str(error)]})
    problems = _Problems(list, layout.problems)
    look = partial(_facts, full=True)
    facts = {split: list(for_each_image(look, samples, num_threads)) for split, samples in layout.splits.items()}
    for found in facts.values():
        problems.collect(found)
    meaning = None
    try:
        meaning = resolve_classes(layout, classes, ignore_index, facts)
    except (ValueError, FileNotFoundError) as error:
        problems["classes"] = [str(error)]
    summary = [line for split, found in facts.items() for line in _summary(split, found, meaning)]
    if meaning is not None:
        for split, samples in layout.splits.items():
            problems.check_values(samples, facts[split], meaning)
        _check_presence(problems, root, facts, meaning)
    _check_palettes(problems, layout, facts)
    _check_leaks(problems, layout, facts)
    return ProblemReport(summary, {title: entries for title, entries in problems.items() if entries})


def check_before_training(layout: SegmentationLayout, meaning: MaskClasses, num_threads: int = 8) -> ProblemReport:
    """Report what is found without reading all pixels: sizes, JPEG masks, and the values of `NUM_PROBED` masks."""
    problems = _Problems(list)
    probed: list[_Facts] = []
    for samples in layout.splits.values():
        problems.collect(for_each_image(partial(_facts, full=False), samples, num_threads))
        chosen = [samples[i] for i in np.linspace(0, len(samples) - 1, min(NUM_PROBED, len(samples))).astype(int)]
        facts = [_mask_facts(sample) for sample in chosen]
        problems.collect(facts)
        problems.check_values(chosen, facts, meaning)
        probed += facts
    present = np.flatnonzero(_pixels(probed, meaning).sum(0))
    if len(present) < 2 and not any(problems.values()):  # a common mistake: masks of 0 and 255, of which 255 is ignored
        only = f"class {meaning.names[present[0]]} only" if len(present) else "no class at all"
        ignored = f" (ignored values: {some(meaning.ignored)})" if meaning.ignored else ""
        problems[NOWHERE].append(f"{layout.root}: the {len(probed)} masks looked at have {only}{ignored}")
    return ProblemReport(problems={title: entries for title, entries in problems.items() if entries})


def resolve_classes(
    layout: SegmentationLayout,
    classes: str | None,
    ignore_index: int,
    facts: Mapping[str, Sequence[_Facts]] | None = None,
    num_threads: int = 8,
) -> MaskClasses:
    """The classes that a file lists, else ADE20K's, else those that the masks have; these are read without ``facts``.

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


def _facts(sample: SegmentationSample, *, full: bool) -> _Facts:
    """The facts of image and mask; unless ``full``, only the headers of both files are read."""
    size, digest, problems = None, "", []
    try:
        if full:
            digest = hashlib.sha256(read_file(sample.image)).hexdigest()
        size = open_image(sample.image).size if full else _upright_size(sample.image)
    except (ValueError, OSError) as error:
        problems.append(("images that cannot be read", str(error)))
    mask = _mask_facts(sample) if full else _Facts()
    problems += mask.problems
    if not mask.problems:
        try:
            if _is_jpeg(sample.mask):
                problems.append((AS_JPEG, f"{sample.mask}: {JPEG_MASK}"))
            mask_size = _stored_size(sample.mask)
            if size and size != mask_size and (mismatch := size_mismatch(sample, mask_size)):
                problems.append(("masks of another size than the image", mismatch))
        except (ValueError, OSError) as error:
            problems.append((NO_MASK, str(error)))
    return _Facts(mask.counts, mask.colors, size, digest, tuple(problems))


def _mask_facts(sample: SegmentationSample) -> _Facts:
    """The facts of the mask alone, which is read in full."""
    try:
        return _Facts(count_values(read_mask(sample.mask)).without_rare(), index_colors(sample.mask))
    except (ValueError, OSError) as error:
        return _Facts(problems=((AS_JPEG if JPEG_MASK in str(error) else NO_MASK, str(error)),))


def size_mismatch(sample: SegmentationSample, mask_size: tuple[int, int]) -> str | None:
    """The message about a mask of (width, height) ``mask_size`` whose image has another size; None if it has the same.

    It is also None if the image cannot be read.
    """
    try:
        width, height = size = open_image(sample.image).size
        turned = ", upright as its EXIF data say" if _stored_size(sample.image) != size else ""
    except (ValueError, OSError):
        return None
    expected = f"the image {sample.image} has {width} x {height}{turned}"
    return None if size == mask_size else f"{sample.mask}: {mask_size[0]} x {mask_size[1]} pixels, and {expected}"


def _stored_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header alone."""
    try:
        with any_size(), Image.open(path) as image:
            return image.size
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise ValueError(f"{path}: not an image that can be read") from error


def _upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of what `open_image` returns; for a JPEG, only the header is read."""
    if not _is_jpeg(path):  # other formats keep EXIF data behind the pixels
        return _stored_size(path)
    width, height = _stored_size(path)
    with any_size(), Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"\xff\xd8\xff"


def _pixels(facts: Sequence[_Facts], meaning: MaskClasses) -> np.ndarray:
    """(N, C) pixels of each class in each mask that could be read."""
    counts = [meaning.label_counts(meaning.plain(found.counts)) for found in facts if found.counts is not None]
    return np.stack(counts) if counts else np.zeros((0, len(meaning.names)), np.int64)


def _check_presence(
    problems: _Problems, root: Path, facts: Mapping[str, Sequence[_Facts]], meaning: MaskClasses
) -> None:
    """Report classes that are in no mask, or in masks of val only."""
    train, val = ((_pixels(facts[split], meaning) > 0).sum(0).tolist() for split in ("train", "val"))
    for label, name in enumerate(meaning.names):
        if train[label] == 0 and val[label] == 0:
            problems[NOWHERE].append(f"{root}: class {label} ({name}) is in no mask")
        elif train[label] == 0:
            masks = f"{val[label]} mask{'s' * (val[label] != 1)}"
            problems["classes of val that train lacks"].append(
                f"{root}: class {label} ({name}) is in {masks} of val and none of train"
            )


def _check_palettes(problems: _Problems, layout: SegmentationLayout, facts: Mapping[str, Sequence[_Facts]]) -> None:
    """Report masks in which an index has another colour than in the masks before.

    A program that saves colours with a palette may number them anew in each file: such indices are no classes.
    """
    first: dict[int, tuple[Color, Path]] = {}
    for split, samples in layout.splits.items():
        for sample, found in zip(samples, facts[split], strict=True):
            used = found.counts.pixels if found.counts else ()
            for index, color in ((i, found.colors[i]) for i in used if i in found.colors):
                known, path = first.setdefault(index, (color, sample.mask))
                if known != color:
                    problems["palettes that differ"].append(
                        f"{sample.mask}: index {index} is the colour {format_color(color)}, and in {path} "
                        f"{format_color(known)}; save the masks as RGB, or with one palette"
                    )
                    break


def _check_leaks(problems: _Problems, layout: SegmentationLayout, facts: Mapping[str, Sequence[_Facts]]) -> None:
    """Report images that are in both splits."""
    train, val = (zip(layout.splits[split], facts[split], strict=True) for split in ("train", "val"))
    images = {found.digest: sample.image for sample, found in train if found.digest}
    for sample, found in val:
        if found.digest in images:
            problems["images of val that are in train too"].append(f"{sample.image} = {images[found.digest]}")


def _summary(split: str, facts: Sequence[_Facts], meaning: MaskClasses | None) -> list[str]:
    lines = [f"{split}: {len(facts):,} images with masks"]
    sizes = np.array([found.size for found in facts if found.size])
    for what, numbers in zip(("width", "height"), sizes.T, strict=False):
        lines.append(f"  {what}: {numbers.min()} to {numbers.max()} px, median {np.median(numbers):g}")
    if meaning is not None:
        pixels = _pixels(facts, meaning)
        total = max(int(pixels.sum()), 1)
        for name, here in zip(meaning.names, pixels.T, strict=True):
            if here.any():
                share = f"{here.sum() / total:.2%} of the labelled pixels"
                lines.append(f"  {name}: {share}, in {(here > 0).sum():,} masks")
    return lines
