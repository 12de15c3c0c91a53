"""Finds everything that is wrong with a data set in COCO's layout, before a training stumbles over it."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from qtvit.data.images import for_each_image, open_image, read_file
from qtvit.data.problems import ProblemReport
from qtvit.errors import some

from .coco import OUTSIDE, CocoFile, mostly_outside
from .data import DetectionSamples, find_splits, size_fault

TOLERANCE = 2.0
"""Pixels by which a box may reach out of its image without being reported, because labelling tools round."""

BROKEN = "images that cannot be read, or are not of the size in the annotation file"
DEGENERATE = "boxes of less than a pixel, which are not learnt"
LEAKS = "images of val that are in train too"


def check_detection_data(
    data: str,
    *,
    train_annotations: str | Path | None = None,
    train_images_dir: str | Path | None = None,
    val_annotations: str | Path | None = None,
    val_images_dir: str | Path | None = None,
    num_threads: int = 8,
) -> ProblemReport:
    """Read the annotation files and every image, and report all problems at once.

    Problems are whatever `load_detection_data` would stop at; images that cannot be read, or are not of the size that
    their annotations are for; boxes that are not learnt because they have no area, or that reach out of their image;
    and images that are in both splits. Arguments are those of `load_detection_data`, and the number of threads that
    read images.

    Raises:
        FileNotFoundError: a folder or annotation file does not exist.
        ValueError: the annotation files or image folders are not found in ``data``.
    """
    given = train_annotations, train_images_dir, val_annotations, val_images_dir
    files, folders, _, problems = find_splits(data, *given)
    problems |= {BROKEN: [], DEGENERATE: [], LEAKS: []}
    summary = []
    paths: dict[bytes, Path] = {}
    for split, file in files.items():
        summary += _summary_lines(split, file)
        degenerate = file.degenerate()
        reaching_out = (np.abs(file.boxes - file.clipped()).max(axis=1) > TOLERANCE) & ~degenerate
        outside = mostly_outside(file.boxes, file.sizes[file.image_of])  # read_coco has reported these
        for i in np.setdiff1d(np.flatnonzero(degenerate), outside):
            problems[DEGENERATE].append(f"{file.object_name(i)}: {file.box_name(i)}")
        for i in np.setdiff1d(np.flatnonzero(reaching_out), outside):
            problems[OUTSIDE].append(f"{file.object_name(i)}: {file.box_name(i)} reaches out of {file.size_name(i)}")
        if split not in folders:
            continue
        samples = DetectionSamples(file, folders[split], tuple(file.categories), has_masks=False)
        inspected = for_each_image(partial(_inspect, samples), range(len(samples)), num_threads)
        for index, (digest, fault) in enumerate(inspected):
            problems[BROKEN] += [fault] if fault else []
            if digest and split == "train":
                paths.setdefault(digest, samples.path(index))
            elif digest in paths:
                problems[LEAKS].append(f"{paths[digest]} = {samples.path(index)}")
    return ProblemReport(summary, {heading: entries for heading, entries in problems.items() if entries})


def _inspect(samples: DetectionSamples, index: int) -> tuple[bytes | None, str | None]:
    """Hash of an image's file and what is wrong with it; both None for a missing file, which `find_splits` reports."""
    sample = samples[index]
    if not sample.image.is_file():
        return None, None
    try:
        content = read_file(sample.image)
        size = open_image(content).size
    except OSError as error:
        return None, str(error)
    except ValueError as error:
        return None, f"{sample.image}: {str(error).removeprefix('image bytes: ')}"
    fault = None if size == (sample.width, sample.height) else size_fault(sample, samples.file.path, size)
    return hashlib.blake2b(content, digest_size=16).digest(), fault


def _summary_lines(split: str, file: CocoFile) -> list[str]:
    per_image = np.diff(file.first)
    crowd = int(file.crowd.sum())
    lines = [
        f"{split}: {len(per_image):,} images, {len(file.boxes):,} objects in {len(file.categories)} "
        f"categor{'y' if len(file.categories) == 1 else 'ies'}",
        f"  images without objects: {int((per_image == 0).sum()):,}; crowd regions: {crowd:,}; "
        f"objects with masks: {int(file.masked.sum()):,}",
    ]
    used = set(file.category_ids.tolist())
    if unused := [name for number, name in file.categories.items() if number not in used]:
        lines.append(f"  categories without objects: {some(unused)}")
    if len(per_image):
        lines.append(f"  objects per image: {per_image.min()} to {per_image.max()}, median {np.median(per_image):g}")
        for what, sides in (("width", file.sizes[:, 0]), ("height", file.sizes[:, 1])):
            lines.append(f"  {what}: {sides.min()} to {sides.max()} px, median {np.median(sides):g}")
    return lines
