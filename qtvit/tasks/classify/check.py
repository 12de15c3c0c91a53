"""All that is wrong with a folder of labelled images, found before a training stumbles over it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qtvit.data.folders import VAL_FOLDERS, data_folder, find_train_folder, find_val_folder
from qtvit.data.images import ImageFile, find_files, for_each_image, is_image, open_image, read_file
from qtvit.data.problems import NUM_SHOWN, problem_lines, verdict
from qtvit.data.shards import is_packed, read_index
from qtvit.errors import some

from .data import class_folders


@dataclass(frozen=True)
class Duplicates:
    """Image files of the same content.

    Attributes:
        images: their names.
        splits, classes: that they are in.
    """

    images: list[str]
    splits: list[str]
    classes: list[str]


@dataclass(frozen=True)
class SplitSummary:
    """The images of a split that can be read.

    Attributes:
        num_images: in the class folders, broken ones included.
        class_counts: the same by class.
        width, height: smallest, median and largest, in pixels; None if no image can be read.
    """

    num_images: int
    class_counts: dict[str, int]
    width: tuple[int, float, int] | None
    height: tuple[int, float, int] | None


@dataclass(frozen=True)
class DataReport:
    """What `check_data` has found.

    Attributes:
        splits: "train", and "val" if there is such a part.
        folders: what is wrong with folders or shards, a sentence each.
        broken: images that cannot be read, with the reason.
        tiny: images with a side below ``min_side``, with width and height.
        conflicts: the same image in several classes.
        leaks: the same image in train and val.
        duplicates: the same image several times in one class of one split.
        other_files: number of files in class folders that are no images, by suffix.
    """

    splits: dict[str, SplitSummary]
    min_side: int
    folders: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    conflicts: list[Duplicates] = field(default_factory=list)
    leaks: list[Duplicates] = field(default_factory=list)
    duplicates: list[Duplicates] = field(default_factory=list)
    other_files: dict[str, int] = field(default_factory=dict)

    @property
    def num_problems(self) -> int:
        """How many entries all lists have; other files are no problem."""
        groups = len(self.conflicts) + len(self.leaks) + len(self.duplicates)
        return len(self.folders) + len(self.broken) + len(self.tiny) + groups

    def lines(self) -> list[str]:
        """The report in words, `NUM_SHOWN` entries of each list."""
        lines = [line for split, summary in self.splits.items() for line in _summary_lines(split, summary)]
        lines += problem_lines(
            {
                "with class folders or shards": self.folders,
                "images that cannot be read": self.broken,
                f"images with a side below {self.min_side} px": self.tiny,
                "images in several classes": [_equal(group) for group in self.conflicts],
                "images of val that are in train too": [_equal(group) for group in self.leaks],
                "images several times in one class": [_equal(group) for group in self.duplicates],
            }
        )
        if self.other_files:
            counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.other_files.items())
            lines.append(f"ignored, as no images by their names: {counts}")
        return [*lines, verdict(self.num_problems)]


class _Scan:
    """The images of all splits with their classes, and what is wrong with their folders."""

    def __init__(self) -> None:
        self.sources: list[ImageFile] = []
        self.split_of: list[str] = []
        self.class_of: list[str] = []
        self.classes: dict[str, tuple[str, ...]] = {}
        self.folders: list[str] = []
        self.other_files: Counter[str] = Counter()

    def add(self, split: str, name: str, images: Iterable[ImageFile]) -> int:
        """Add the images of a class; returns how many these are."""
        before = len(self.sources)
        self.sources += images
        count = len(self.sources) - before
        self.split_of += [split] * count
        self.class_of += [name] * count
        return count


def check_data(data: str, *, num_threads: int = 8, min_side: int = 32) -> DataReport:
    """Read every image of a folder, plain or packed, and report all problems at once.

    Args:
        data: as for `load_labelled_images`, but no problem with what is in it stops the check.
        num_threads: that read images.
        min_side: of images in pixels; smaller ones are reported.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or its index cannot be read.
        OSError: a folder that may not be read.
    """
    root = data_folder(data)
    scan = _scan_packed(root) if is_packed(root) else _scan_plain(root)
    sizes = np.zeros((len(scan.sources), 2), np.int32)
    broken, tiny = [], []
    first: dict[bytes, int] = {}
    equal: dict[int, list[int]] = {}
    for i, found in enumerate(for_each_image(_inspect, scan.sources, num_threads)):
        if isinstance(found, str):
            broken.append(found)
            continue
        digest, (width, height) = found
        sizes[i] = width, height
        if min(width, height) < min_side:
            tiny.append(f"{scan.sources[i]}: {width} x {height}")
        if (known := first.setdefault(digest, i)) != i:
            equal.setdefault(known, [known]).append(i)
    groups = [_duplicates(scan, members) for members in equal.values()]
    return DataReport(
        splits={split: _summarize(scan, sizes, split) for split in scan.classes},
        min_side=min_side,
        folders=scan.folders,
        broken=broken,
        tiny=tiny,
        conflicts=[group for group in groups if len(group.classes) > 1],
        leaks=[group for group in groups if len(group.splits) > 1],
        duplicates=[group for group in groups if len(group.classes) == len(group.splits) == 1],
        other_files=dict(scan.other_files.most_common()),
    )


def _inspect(source: ImageFile) -> tuple[bytes, tuple[int, int]] | str:
    """Hash of the file and (width, height) of the image, or why it cannot be read."""
    try:
        content = read_file(source)
    except (OSError, ValueError) as error:
        return str(error)
    try:
        return hashlib.blake2b(content, digest_size=16).digest(), open_image(content).size
    except ValueError as error:
        return f"{source}: {str(error).removeprefix('image bytes: ')}"


def _scan_packed(root: Path) -> _Scan:
    scan = _Scan()
    index = read_index(root)
    for name, split in index.splits.items():
        scan.folders += [str(error) for error in split.damage(root)]
        scan.classes[name] = index.classes
        scan.sources += split.sources(root)
        scan.split_of += [name] * len(split.path)
        scan.class_of += [index.classes[label] for label in split.label.tolist()]
    if "val" not in index.splits:
        _find_lone_images(scan, root)
    return scan


def _scan_plain(root: Path) -> _Scan:
    scan = _Scan()
    train_root, val_root = find_train_folder(root), find_val_folder(root)
    if train_root is None and val_root is None:
        _scan_split(scan, "train", root)
        _find_lone_images(scan, root)
        return scan
    if train_root is None and val_root is not None:
        scan.folders.append(f"{root}: has {val_root.name}/ but no train/")
    if train_root is not None:
        _scan_split(scan, "train", train_root)
        if val_root is None:
            scan.folders.append(
                f"{root}: has {train_root.name}/ but none of {', '.join(f'{name}/' for name in VAL_FOLDERS)}"
            )
    if val_root is not None:
        _scan_split(scan, "val", val_root)
    if train_root is not None and val_root is not None:
        train, val = scan.classes["train"], scan.classes["val"]
        for here, there, missing in (
            (val_root, train_root, set(train) - set(val)),
            (train_root, val_root, set(val) - set(train)),
        ):
            scan.folders += [f"{here}: no folder {name}, which {there} has" for name in sorted(missing)]
    return scan


def _find_lone_images(scan: _Scan, root: Path) -> None:
    for name, count in Counter(scan.class_of).items():
        if count == 1:
            scan.folders.append(f"{root}: one image only in class {name}, so none can be held out")


def _scan_split(scan: _Scan, split: str, root: Path) -> None:
    """Add the images in the class folders of ``root``."""
    scan.classes[split] = class_folders(root)
    for name in scan.classes[split]:
        files = sorted(find_files(root / name))
        scan.other_files.update(path.suffix.lower() for path in files if not is_image(path.name))
        if scan.add(split, name, (path for path in files if is_image(path.name))) == 0:
            scan.folders.append(f"{root / name}: no images in this class folder")
    loose = sorted(path.name for path in root.iterdir() if path.is_file() and is_image(path.name))
    if loose:
        scan.folders.append(f"{root}: images that are in no class folder: {some(loose)}")
    if len(scan.classes[split]) < 2:
        scan.folders.append(f"{root}: {'one class only' if scan.classes[split] else 'no class folders'}")


def _duplicates(scan: _Scan, members: Sequence[int]) -> Duplicates:
    return Duplicates(
        images=[str(scan.sources[i]) for i in members],
        splits=sorted({scan.split_of[i] for i in members}),
        classes=sorted({scan.class_of[i] for i in members}),
    )


def _summarize(scan: _Scan, sizes: np.ndarray, split: str) -> SplitSummary:
    inside = np.array([name == split for name in scan.split_of], bool)
    known = sizes[inside & (sizes[:, 0] > 0)]
    counts = Counter(name for name, here in zip(scan.class_of, inside.tolist(), strict=True) if here)
    width, height = ((int(x.min()), float(np.median(x)), int(x.max())) if len(x) else None for x in known.T)
    return SplitSummary(int(inside.sum()), {name: counts[name] for name in scan.classes[split]}, width, height)


def _summary_lines(split: str, summary: SplitSummary) -> list[str]:
    counts = list(summary.class_counts.values())
    lines = [f"{split}: {summary.num_images:,} images in {len(counts)} class{'es' * (len(counts) != 1)}"]
    if counts:
        lines.append(f"  images per class: {min(counts)} to {max(counts)}, median {np.median(counts):g}")
    for what, numbers in (("width", summary.width), ("height", summary.height)):
        if numbers is not None:
            lines.append(f"  {what}: {numbers[0]} to {numbers[2]} px, median {numbers[1]:g}")
    return lines


def _equal(group: Duplicates) -> str:
    return " = ".join(group.images[:NUM_SHOWN]) + (" = …" if len(group.images) > NUM_SHOWN else "")
