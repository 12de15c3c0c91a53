"""Images with boxes and masks, in COCO's layout."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvf

from qtvit import console
from qtvit.data.folders import TRAIN_FOLDERS, VAL_FOLDERS, data_folder
from qtvit.data.images import open_image
from qtvit.data.problems import ProblemReport
from qtvit.data.split import choose_by_name

from .coco import IN_CATEGORIES, IN_MASKS, CocoFile, Problems, clip_boxes, read_coco
from .layout import find_annotations, find_images_folder

Target = dict[str, Any]
"""What a detector is to find in an image, n objects: ``boxes`` (n, 4) fp32 left, top, right, bottom in pixels;
``labels`` (n,) int64 from 1, as 0 is the background; ``masks`` (n, H, W) uint8 of 0 and 1, if the data have masks; and
the int ``image_id``.
"""

SPLIT_FOLDERS = {"train": TRAIN_FOLDERS, "val": VAL_FOLDERS}
MISSING_IMAGES = "image files that are missing"


@dataclass(frozen=True)
class DetectionSample:
    """An image and all that its annotation file says of it, n objects.

    Attributes:
        image: its file.
        image_id: in the annotation file.
        width, height: in pixels, as the annotation file has them.
        boxes: (n, 4) left, top, right, bottom in pixels, which may reach out of the image.
        labels: (n,) from 1, in the order of the classes.
        areas: (n,) in pixels.
        crowd: (n,) whether it is a region with many objects, which is neither learnt nor counted as missed.
        learnt: (n,) whether a detector is to learn it: no crowd, and not without area.
        object_ids: (n,) ids of the annotations.
        masks: (n,) of COCO's compressed RLE, None if the data are used without masks.
    """

    image: Path
    image_id: int
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    learnt: np.ndarray
    object_ids: np.ndarray
    masks: list[dict[str, Any]] | None


class DetectionSamples(Sequence[DetectionSample]):
    """Images of an annotation file, of which each `DetectionSample` is made when it is asked for.

    Args:
        file: where they are from.
        folder: that its file names are in.
        category_ids: in the order of the labels.
        has_masks: whether samples get masks.
        images: positions in the file of those that are taken; None: all.
    """

    def __init__(
        self,
        file: CocoFile,
        folder: Path,
        category_ids: Sequence[int],
        has_masks: bool,
        images: np.ndarray | None = None,
    ) -> None:
        self.file = file
        self.folder = folder
        self.category_ids = np.array(category_ids, np.int64)
        self.has_masks = has_masks
        self.images = np.arange(len(file.file_names)) if images is None else images
        self._learnt = ~(file.crowd | file.degenerate())

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> DetectionSample: ...
    @overload
    def __getitem__(self, index: slice) -> "DetectionSamples": ...
    def __getitem__(self, index: int | slice) -> "DetectionSample | DetectionSamples":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        file, image = self.file, self.images[index]
        objects = file.objects_of(image)
        width, height = file.sizes[image].tolist()
        return DetectionSample(
            image=self.path(index),
            image_id=int(file.image_ids[image]),
            width=width,
            height=height,
            boxes=file.boxes[objects],
            labels=1 + np.searchsorted(self.category_ids, file.category_ids[objects]),
            areas=file.areas[objects],
            crowd=file.crowd[objects],
            learnt=self._learnt[objects],
            object_ids=file.object_ids[objects],
            masks=[file.segments.encoded(i, height, width) for i in objects.tolist()] if self.has_masks else None,
        )

    def path(self, index: int) -> Path:
        """Of the image's file."""
        return self.folder / self.file.file_names[self.images[index]]

    def select(self, indices: Iterable[int]) -> "DetectionSamples":
        """Some of the samples; what they are made of is shared."""
        images = self.images[np.fromiter(indices, np.int64)]
        return DetectionSamples(self.file, self.folder, self.category_ids.tolist(), self.has_masks, images)

    def num_learnt(self) -> np.ndarray:
        """(len,) number of objects in each image that a detector is to learn."""
        return self._per_image(self._learnt)

    def num_degenerate(self) -> int:
        """How many objects a detector does not learn though they are no crowd, as their boxes have no area."""
        return int(self._per_image(~self._learnt & ~self.file.crowd).sum())

    def digest(self) -> str:
        """A hash of which images these are and of all annotations in their file, wherever that is."""
        file = self.file
        images = (self.images, file.image_ids, file.sizes)
        objects = (file.object_ids, file.image_of, file.category_ids, file.boxes, file.crowd)
        masks = (file.segments.values, file.segments.ring_ends, np.frombuffer(file.segments.rle, np.uint8))
        found = hashlib.sha256("\n".join(file.file_names).encode())
        for column in (*images, *objects, *(masks if self.has_masks else ())):
            found.update(column.tobytes())
        return found.hexdigest()

    def _per_image(self, chosen: np.ndarray) -> np.ndarray:
        return np.bincount(self.file.image_of[chosen], minlength=len(self.file.file_names))[self.images]


@dataclass(frozen=True)
class DetectionData:
    """Images with boxes, and masks if there are such, in two splits.

    Attributes:
        name: of the data.
        classes: names, in the order of the categories' ids; label i is ``classes[i - 1]``.
        category_ids: original ids of the classes.
        train, val: the splits.
        has_masks: whether objects have masks.
        val_annotations: the annotation file of ``val``.
    """

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    train: DetectionSamples
    val: DetectionSamples
    has_masks: bool
    val_annotations: Path

    def digest(self) -> str:
        """A hash of classes, images and annotations, wherever the folder is."""
        parts = [*map(str, self.category_ids), *self.classes, self.train.digest(), self.val.digest()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_detection_data(
    data: str,
    *,
    train_annotations: str | Path | None = None,
    train_images_dir: str | Path | None = None,
    val_annotations: str | Path | None = None,
    val_images_dir: str | Path | None = None,
    train_images: int | None = None,
    use_masks: bool = True,
    drop_empty: bool = False,
) -> DetectionData:
    """Read annotation files in COCO's format; boxes that cannot be learnt are counted and said.

    Args:
        data: folder with ``annotations/instances_train*.json``, ``train*/`` and the same of val, or a similar layout.
        train_annotations, val_annotations: annotation files, if they are elsewhere.
        train_images_dir, val_images_dir: folders that the file names in these are in, likewise.
        train_images: number of training images to use; which ones follows from a hash of their names, and a larger
            choice holds a smaller one.
        use_masks: False for boxes alone. Data without any mask have boxes alone in any case.
        drop_empty: leave training images without objects out.

    Raises:
        FileNotFoundError: a folder or annotation file that is not there.
        ValueError: files are not found in ``data``, or something is wrong with what is in them: the first problem, and
            how many there are.
    """
    found = find_splits(data, train_annotations, train_images_dir, val_annotations, val_images_dir, use_masks)
    ProblemReport(problems=found.problems).raise_if_any("qtvit data check --task detect")
    train_file, val_file = found.files["train"], found.files["val"]
    categories = train_file.categories
    shared = tuple(categories), found.has_masks
    train = DetectionSamples(train_file, found.folders["train"], *shared)
    val = DetectionSamples(val_file, found.folders["val"], *shared)
    if drop_empty:
        train = train.select(np.flatnonzero(train.num_learnt()))
    if train_images is not None:
        train = train.select(choose_by_name([train.file.file_names[i] for i in train.images], train_images))
    if not train.num_learnt().any():
        raise ValueError(f"{train_file.path}: the images to train on have no objects")
    if dropped := train.num_degenerate():
        console.say(f"dropped {dropped} degenerate box{'es' * (dropped != 1)} of {train_file.path}: less than a pixel")
    return DetectionData(
        name=Path(data).resolve().name,
        classes=tuple(categories.values()),
        category_ids=tuple(categories),
        train=train,
        val=val,
        has_masks=found.has_masks,
        val_annotations=val_file.path,
    )


def load_held_out(
    data: str,
    categories: Mapping[int, str],
    *,
    annotations: str | Path | None = None,
    images_dir: str | Path | None = None,
    use_masks: bool = True,
) -> DetectionSamples:
    """The images of val alone, to score a detector on.

    Args:
        data: as of `load_detection_data`; nothing of train has to be there.
        categories: names by id of those that the detector knows.
        annotations: annotation file, if it is elsewhere.
        images_dir: folder that the file names in it are in, likewise.
        use_masks: False for boxes alone. Data where not all objects have a mask have boxes alone in any case.

    Raises:
        FileNotFoundError, ValueError: as `load_detection_data`; or a category that the detector does not know.
    """
    root = data_folder(data, sample="draw one: qtvit data scenes DIR --task detect")
    file, folder, problems = _read_split(root, "val", _annotations(root, "val", annotations), images_dir)
    if file is not None and not problems[IN_CATEGORIES]:
        problems[IN_CATEGORIES] += _category_faults(categories, "what the model was trained on", file)
    ProblemReport(problems=problems).raise_if_any("qtvit data check --task detect")
    assert file is not None
    assert folder is not None
    return DetectionSamples(file, folder, tuple(categories), use_masks and bool(file.masked.all()))


@dataclass(frozen=True)
class FoundSplits:
    """What is in the annotation files of "train" and "val", as far as it can be read, and what is wrong with it.

    Attributes:
        files: by split.
        folders: of the images, by split.
        has_masks: whether objects of train have masks.
        problems: headings with entries.
    """

    files: dict[str, CocoFile]
    folders: dict[str, Path]
    has_masks: bool
    problems: Problems


def find_splits(
    data: str,
    train_annotations: str | Path | None = None,
    train_images_dir: str | Path | None = None,
    val_annotations: str | Path | None = None,
    val_images_dir: str | Path | None = None,
    use_masks: bool = True,
) -> FoundSplits:
    """Read the annotation files and look for all images, without opening these; arguments and errors as
    `load_detection_data`, but for what is wrong in the files.
    """
    root = data_folder(data, sample="draw one: qtvit data scenes DIR --task detect")
    given = {"train": (train_annotations, train_images_dir), "val": (val_annotations, val_images_dir)}
    files: dict[str, CocoFile] = {}
    folders: dict[str, Path] = {}
    problems: Problems = {}
    paths = {split: _annotations(root, split, path) for split, (path, _) in given.items()}
    for split, path in paths.items():
        file, folder, found = _read_split(root, split, path, given[split][1])
        for heading, entries in found.items():
            problems.setdefault(heading, []).extend(entries)
        if file is not None:
            files[split] = file
        if folder is not None:
            folders[split] = folder
    if len(files) == 2 and not problems[IN_CATEGORIES]:
        problems[IN_CATEGORIES] += _category_faults(files["train"].categories, str(files["train"].path), files["val"])
    has_masks = use_masks and "train" in files and bool(files["train"].masked.any())
    if has_masks:
        for file in files.values():
            problems[IN_MASKS] += _maskless(file)
    return FoundSplits(files, folders, has_masks, problems)


def _annotations(root: Path, split: str, given: str | Path | None) -> Path:
    return find_annotations(root, split, SPLIT_FOLDERS[split]) if given is None else Path(given)


def _read_split(
    root: Path, split: str, path: Path, images_dir: str | Path | None
) -> tuple[CocoFile | None, Path | None, Problems]:
    """The annotation file, if it can be read, the folder of its images, if it names some, and what is wrong."""
    file, problems = read_coco(path)
    if file is None or not file.file_names:
        return file, None, problems
    given = None if images_dir is None else _given_folder(Path(images_dir))
    folder = given or find_images_folder(root, split, SPLIT_FOLDERS[split], file)
    problems.setdefault(MISSING_IMAGES, []).extend(_missing_images(file, folder))
    return file, folder, problems


def _given_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    return folder


def _missing_images(file: CocoFile, folder: Path) -> list[str]:
    """Reads the listings of folders, as asking for each of a million files takes minutes on a network's disk."""
    listings: dict[str, set[str]] = {}
    missing = []
    for image, file_name in zip(file.image_ids.tolist(), file.file_names, strict=True):
        parent, name = os.path.split(file_name)
        if parent not in listings:
            path = folder / parent
            listings[parent] = set(os.listdir(path)) if path.is_dir() else set()
        if name not in listings[parent]:
            missing.append(f"{file.path}: image {image}: {folder / file_name} is missing")
    return missing


def _category_faults(known: Mapping[int, str], where: str, val: CocoFile) -> list[str]:
    faults = []
    for number, name in val.categories.items():
        if number not in known:
            faults.append(f"{val.path}: category {number} ({name}) is not in {where}")
        elif known[number] != name:
            faults.append(f"{val.path}: category {number} is {name}, but in {where} {known[number]}")
    return faults


def _maskless(file: CocoFile) -> list[str]:
    without = np.flatnonzero(~file.masked)
    return [
        f"{file.object_name(index)}: no segmentation, though others of train have one" for index in without.tolist()
    ]


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images as fp32 (3, H, W) from 0 to 1 with a `Target` each, without resizing or normalising.

    Targets are what is to be learnt: without crowd regions and boxes without area, and cut off at the image's edges.

    Args:
        samples: to read.
        transform: of torchvision's v2 kind, takes and returns a uint8 ``tv_tensors.Image`` and a `Target` of them.
    """

    def __init__(
        self, samples: DetectionSamples, transform: Callable[[Any, Target], tuple[Any, Target]] | None = None
    ) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        sample = self.samples[index]
        image = tv_tensors.Image(tvf.pil_to_tensor(read_image(sample, self.samples.file.path)))
        target = learnt_target(sample)
        if self.transform is not None:
            image, target = self.transform(image, target)
        pure = {key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in target.items()}
        return tvf.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True), pure


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images and targets as two lists, since both differ in size."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def read_image(sample: DetectionSample, annotations: Path) -> Image.Image:
    """The picture, upright.

    Raises:
        FileNotFoundError, ValueError: as `open_image`.
        ValueError: it does not have the size that the annotations are for; ``annotations`` is their file.
    """
    image = open_image(sample.image)
    if image.size != (sample.width, sample.height):
        raise ValueError(size_fault(sample, annotations, image.size))
    return image


def size_fault(sample: DetectionSample, annotations: Path, size: tuple[int, int]) -> str:
    """What to say of an image of another (width, height) than its annotations are for."""
    with Image.open(sample.image) as image:
        turned = image.size == (sample.width, sample.height)
    reason = "; its EXIF data turn it, and the annotations are for the picture as it is stored" if turned else ""
    expected = f"{sample.width} x {sample.height} for image {sample.image_id}"
    return f"{sample.image}: {size[0]} x {size[1]} pixels, but {annotations} says {expected}{reason}"


def learnt_target(sample: DetectionSample) -> Target:
    """What a detector is to learn of a sample, as tv_tensors."""
    canvas = (sample.height, sample.width)
    kept = np.flatnonzero(sample.learnt)
    sizes = np.broadcast_to([sample.width, sample.height], (len(kept), 2))
    boxes = torch.from_numpy(clip_boxes(sample.boxes[kept], sizes)).float()
    target: Target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas),
        "labels": torch.from_numpy(sample.labels[kept]),
        "image_id": sample.image_id,
    }
    if sample.masks is not None:
        from pycocotools import mask

        rles = [sample.masks[i] for i in kept]
        pixels = mask.decode(rles).transpose(2, 0, 1) if rles else np.zeros((0, *canvas), np.uint8)
        target["masks"] = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(pixels)))
    return target
