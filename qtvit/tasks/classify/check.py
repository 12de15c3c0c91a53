"""Finding everything that is wrong with a folder of labelled images, before a training fails on it."""

import hashlib
from collections import Counter
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
    """Image files with the same content: their names, and the sorted names of the splits and classes they are in."""

    images: list[str]
    splits: list[str]
    classes: list[str]

    def __str__(self) -> str:
        return " = ".join(self.images[:NUM_SHOWN]) + " = …" * (len(self.images) > NUM_SHOWN)


@dataclass(frozen=True)
class SplitSummary:
    """Numbers and sizes of the images of a split.

    Attributes:
        num_images: number of image files, broken ones included.
        class_counts: the same for each class.
        width, height: smallest, median and largest, in pixels; None if no image can be read.
    """

    num_images: int
    class_counts: dict[str, int]
    width: tuple[int, float, int] | None
    height: tuple[int, float, int] | None

    def lines(self, split: str) -> list[str]:
        """The summary as text; ``split`` is the name of the split."""
        counts = list(self.class_counts.values())
        lines = [f"{split}: {self.num_images:,} images in {len(counts)} class{'es' * (len(counts) != 1)}"]
        if counts:
            lines.append(f"  images per class: {min(counts)} to {max(counts)}, median {np.median(counts):g}")
        for what, numbers in (("width", self.width), ("height", self.height)):
            if numbers is not None:
                lines.append(f"  {what}: {numbers[0]} to {numbers[2]} px, median {numbers[1]:g}")
        return lines


@dataclass(frozen=True)
class DataReport:
    """Result of `check_data`.

    Attributes:
        splits: "train", and "val" if the data have a val part.
        min_side: as given to `check_data`.
        folders: problems of folders or shards, a sentence each.
        broken: images that cannot be read, with the reason.
        tiny: images with a side below ``min_side``, with width and height.
        conflicts: images that are in several classes.
        leaks: images that are in both train and val.
        duplicates: images that are several times in one class of one split.
        other_files: number of files in class folders that are not images, by suffix; these are not problems.
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
        """Number of entries in all lists of problems."""
        return len([*self.folders, *self.broken, *self.tiny, *self.conflicts, *self.leaks, *self.duplicates])

    def lines(self) -> list[str]:
        """The report as text, with at most `NUM_SHOWN` entries of each list."""
        lines = [line for split, summary in self.splits.items() for line in summary.lines(split)]
        lines += problem_lines(
            {
                "with class folders or shards": self.folders,
                "images that cannot be read": self.broken,
                f"images with a side below {self.min_side} px": self.tiny,
                "images in several classes": [*map(str, self.conflicts)],
                "images of val that are in train too": [*map(str, self.leaks)],
                "images several times in one class": [*map(str, self.duplicates)],
            }
        )
        if self.other_files:
            counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.other_files.items())
            lines.append(f"ignored, as no images by their names: {counts}")
        return [*lines, verdict(self.num_problems)]


@dataclass
class _Scan:
    """All image files of a folder with their ``places`` (split and class), and what is found without reading them."""

    sources: list[ImageFile] = field(default_factory=list)
    places: list[tuple[str, str]] = field(default_factory=list)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    other_files: Counter[str] = field(default_factory=Counter)

    def add_folder(self, split: str, root: Path) -> None:
        """Add the images in the class folders of ``root``."""
        self.classes[split] = class_folders(root)
        for name in self.classes[split]:
            files = sorted(find_files(root / name))
            images = [path for path in files if is_image(path.name)]
            self.sources += images
            self.places += [(split, name)] * len(images)
            self.other_files.update(path.suffix.lower() for path in files if not is_image(path.name))
            if not images:
                self.folders.append(f"{root / name}: no images in this class folder")
        if loose := sorted(path.name for path in root.iterdir() if path.is_file() and is_image(path.name)):
            self.folders.append(f"{root}: images that are in no class folder: {some(loose)}")
        if len(self.classes[split]) < 2:
            self.folders.append(f"{root}: {'one class only' if self.classes[split] else 'no class folders'}")

    def find_lone_images(self, root: Path) -> None:
        """Report classes with a single image, in data of which a part will be held out."""
        lone = [name for (_, name), count in Counter(self.places).items() if count == 1]
        self.folders += [f"{root}: one image only in class {name}, so none can be held out" for name in lone]

    def duplicates(self, members: list[int]) -> Duplicates:
        """The images at these positions, which have the same content."""
        splits, classes = zip(*(self.places[i] for i in members), strict=True)
        return Duplicates([str(self.sources[i]) for i in members], sorted({*splits}), sorted({*classes}))

    def summary(self, split: str, sizes: np.ndarray) -> SplitSummary:
        """Summarise a split; ``sizes`` has the (width, height) of all images, 0 for those that cannot be read."""
        inside = np.array([place[0] == split for place in self.places], bool)
        known = sizes[inside & (sizes[:, 0] > 0)]
        counts = Counter(self.places)
        width, height = ((int(x.min()), float(np.median(x)), int(x.max())) if len(x) else None for x in known.T)
        class_counts = {name: counts[split, name] for name in self.classes[split]}
        return SplitSummary(int(inside.sum()), class_counts, width, height)


def check_data(data: str, *, num_threads: int = 8, min_side: int = 32) -> DataReport:
    """Read every image of a folder as for `load_labelled_images`, and report all problems at once.

    ``num_threads`` threads read the images. Images with a side below ``min_side`` pixels are reported too.

    Raises:
        FileNotFoundError, ValueError: the folder does not exist, or its index cannot be read.
        OSError: a folder may not be read.
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
    groups = [scan.duplicates(members) for members in equal.values()]
    return DataReport(
        splits={split: scan.summary(split, sizes) for split in scan.classes},
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
    """Hash of the file and (width, height) of the image, or the reason why it cannot be read."""
    try:
        content = read_file(source)
        return hashlib.blake2b(content, digest_size=16).digest(), open_image(content).size
    except (OSError, ValueError) as error:
        return str(error).replace("image bytes: ", f"{source}: ", 1)


def _scan_packed(root: Path) -> _Scan:
    scan = _Scan()
    index = read_index(root)
    for name, split in index.splits.items():
        scan.folders += [str(error) for error in split.damage(root)]
        scan.classes[name] = index.classes
        scan.sources += split.sources(root)
        places = [(name, label) for label in index.classes]
        scan.places += [places[label] for label in split.label.tolist()]
    if "val" not in index.splits:
        scan.find_lone_images(root)
    return scan


def _scan_plain(root: Path) -> _Scan:
    scan = _Scan()
    train_root, val_root = find_train_folder(root), find_val_folder(root)
    if train_root is not None:
        scan.add_folder("train", train_root)
    elif val_root is not None:
        scan.folders.append(f"{root}: has {val_root.name}/ but no train/")
    else:
        scan.add_folder("train", root)
        scan.find_lone_images(root)
    if val_root is not None:
        scan.add_folder("val", val_root)
    elif train_root is not None:
        val_folders = ", ".join(f"{name}/" for name in VAL_FOLDERS)
        scan.folders.append(f"{root}: has {train_root.name}/ but none of {val_folders}")
    if train_root is not None and val_root is not None:
        train, val = set(scan.classes["train"]), set(scan.classes["val"])
        scan.folders += [f"{val_root}: no folder {name}, which {train_root} has" for name in sorted(train - val)]
        scan.folders += [f"{train_root}: no folder {name}, which {val_root} has" for name in sorted(val - train)]
    return scan
