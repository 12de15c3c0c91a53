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
"""What a detector learns to find in an image with n objects: ``boxes`` (n, 4) fp32, left, top, right, bottom in pixels;
``labels`` (n,) int64 from 1 (0 is the background); ``masks`` (n, H, W) uint8 of 0 and 1, if the data have masks; and
the int ``image_id``.
"""

SPLIT_FOLDERS = {"train": TRAIN_FOLDERS, "val": VAL_FOLDERS}
MISSING_IMAGES = "image files that are missing"


@dataclass(frozen=True)
class DetectionSample:
    """An image and everything its annotation file says about it, n objects. As a string, the path of the image."""

    image: Path
    image_id: int  # in the annotation file
    width: int  # in pixels, according to the annotation file
    height: int
    boxes: np.ndarray  # (n, 4) left, top, right, bottom in pixels; they may reach out of the image
    labels: np.ndarray  # (n,) from 1, in the order of the classes
    areas: np.ndarray  # (n,) in pixels
    crowd: np.ndarray  # (n,) whether it is a crowd region, which is neither learnt nor counted as missed
    learnt: np.ndarray  # (n,) whether a detector learns the object: it is no crowd region and its box has an area
    object_ids: np.ndarray  # (n,) ids of the annotations
    masks: list[dict[str, Any]] | None  # n masks in COCO's compressed RLE; None if the data are used without masks

    def __str__(self) -> str:
        return str(self.image)


class DetectionSamples(Sequence[DetectionSample]):
    """The images of an annotation file; each `DetectionSample` is made when it is indexed.

    Args:
        file: the annotation file.
        folder: the folder that its file names are relative to.
        category_ids: ids of the categories, in the order of the labels.
        has_masks: whether the samples get masks.
        images: positions in ``file`` of the images to use; None for all.
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
        """The image file of a sample."""
        return self.folder / self.file.file_names[self.images[index]]

    def select(self, indices: Iterable[int]) -> "DetectionSamples":
        """The samples at ``indices``; they share the annotation file's arrays with these."""
        images = self.images[np.fromiter(indices, np.int64)]
        return DetectionSamples(self.file, self.folder, self.category_ids.tolist(), self.has_masks, images)

    def num_learnt(self) -> np.ndarray:
        """(len,) number of objects in each image that a detector learns."""
        return self._per_image(self._learnt)

    def num_degenerate(self) -> int:
        """Number of objects that are not learnt because their boxes have no area; crowd regions do not count."""
        return int(self._per_image(~self._learnt & ~self.file.crowd).sum())

    def digest(self) -> str:
        """A hash of the choice of images and of all annotations in their file, wherever that file is."""
        file = self.file
        columns = [self.images, file.image_ids, file.sizes]
        columns += [file.object_ids, file.image_of, file.category_ids, file.boxes, file.crowd]
        if self.has_masks:
            columns += [file.segments.values, file.segments.ring_ends, np.frombuffer(file.segments.rle, np.uint8)]
        found = hashlib.sha256("\n".join(file.file_names).encode())
        for column in columns:
            found.update(column.tobytes())
        return found.hexdigest()

    def _per_image(self, chosen: np.ndarray) -> np.ndarray:
        return np.bincount(self.file.image_of[chosen], minlength=len(self.file.file_names))[self.images]


@dataclass(frozen=True)
class DetectionData:
    """Two splits of images with boxes, and with masks if the data have them."""

    name: str  # of the data's folder
    classes: tuple[str, ...]  # names, in the order of the categories' ids; label i is classes[i - 1]
    category_ids: tuple[int, ...]  # ids of the classes in the annotation files
    train: DetectionSamples
    val: DetectionSamples
    has_masks: bool
    val_annotations: Path  # the annotation file of val

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
    """Read annotation files in COCO's format. Boxes without area cannot be learnt; how many there are is printed.

    Args:
        data: folder with ``annotations/instances_train*.json``, ``train*/`` and the same for val, or a similar layout.
        train_annotations, val_annotations: annotation files, if they are elsewhere.
        train_images_dir, val_images_dir: folders that their file names are relative to, if they are elsewhere.
        train_images: number of training images to use. A hash of their names decides which, so that a larger choice
            contains every smaller one.
        use_masks: False to use boxes alone. Data without any mask are used with boxes alone in any case.
        drop_empty: leave out training images without objects.

    Raises:
        FileNotFoundError: a folder or annotation file does not exist.
        ValueError: files are not found in ``data``, or their content is wrong; the message has the first problem and
            the number of further ones.
    """
    files, folders, has_masks, problems = find_splits(
        data, train_annotations, train_images_dir, val_annotations, val_images_dir, use_masks
    )
    ProblemReport(problems=problems).raise_if_any("qtvit data check --task detect")
    categories = files["train"].categories
    train, val = (DetectionSamples(files[s], folders[s], tuple(categories), has_masks) for s in ("train", "val"))
    if drop_empty:
        train = train.select(np.flatnonzero(train.num_learnt()))
    if train_images is not None:
        train = train.select(choose_by_name([train.file.file_names[i] for i in train.images], train_images))
    if not train.num_learnt().any():
        raise ValueError(f"{train.file.path}: the images to train on have no objects")
    if dropped := train.num_degenerate():
        console.say(f"dropped {dropped} degenerate box{'es' * (dropped != 1)} of {train.file.path}: less than a pixel")
    name, classes = Path(data).resolve().name, tuple(categories.values())
    return DetectionData(name, classes, tuple(categories), train, val, has_masks, val.file.path)


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
        data: as for `load_detection_data`; the files of train are not needed.
        categories: names by id of the categories that the detector knows.
        annotations, images_dir: as ``val_annotations`` and ``val_images_dir`` of `load_detection_data`.
        use_masks: False to use boxes alone. Data in which an object lacks a mask are used with boxes alone in any case.

    Raises:
        FileNotFoundError, ValueError: as `load_detection_data`; or there is a category that the detector does not know.
    """
    root = data_folder(data, sample="draw one: qtvit data scenes DIR --task detect")
    file, folder, problems = _read_split(root, "val", _annotations(root, "val", annotations), images_dir)
    if file is not None and not problems[IN_CATEGORIES]:
        problems[IN_CATEGORIES] += _category_faults(categories, "what the model was trained on", file)
    ProblemReport(problems=problems).raise_if_any("qtvit data check --task detect")
    assert file is not None
    assert folder is not None
    return DetectionSamples(file, folder, tuple(categories), use_masks and bool(file.masked.all()))


def find_splits(
    data: str,
    train_annotations: str | Path | None = None,
    train_images_dir: str | Path | None = None,
    val_annotations: str | Path | None = None,
    val_images_dir: str | Path | None = None,
    use_masks: bool = True,
) -> tuple[dict[str, CocoFile], dict[str, Path], bool, Problems]:
    """Read the annotation files and look for all images, without opening the images.

    Arguments and errors are those of `load_detection_data`, but what is wrong in the files is returned, not raised.

    Returns:
        By split, the annotation files and the folders of images, as far as they can be read; whether objects of train
        have masks that are wanted; and the problems.
    """
    root = data_folder(data, sample="draw one: qtvit data scenes DIR --task detect")
    given = {"train": (train_annotations, train_images_dir), "val": (val_annotations, val_images_dir)}
    paths = {split: _annotations(root, split, path) for split, (path, _) in given.items()}
    files: dict[str, CocoFile] = {}
    folders: dict[str, Path] = {}
    problems: Problems = {}
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
        problems[IN_MASKS] += [
            f"{file.object_name(index)}: no segmentation, though others of train have one"
            for file in files.values()
            for index in np.flatnonzero(~file.masked).tolist()
        ]
    return files, folders, has_masks, problems


def _annotations(root: Path, split: str, given: str | Path | None) -> Path:
    return find_annotations(root, split, SPLIT_FOLDERS[split]) if given is None else Path(given)


def _read_split(
    root: Path, split: str, path: Path, images_dir: str | Path | None
) -> tuple[CocoFile | None, Path | None, Problems]:
    """The annotation file and the folder of its images, each None if there is nothing to use, and the problems."""
    file, problems = read_coco(path)
    if file is None or not file.file_names:
        return file, None, problems
    folder = find_images_folder(root, split, SPLIT_FOLDERS[split], file) if images_dir is None else Path(images_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    problems.setdefault(MISSING_IMAGES, []).extend(_missing_images(file, folder))
    return file, folder, problems


def _missing_images(file: CocoFile, folder: Path) -> list[str]:
    """Compare with listings of the folders: on a network disk, asking for each of a million files takes minutes."""
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
    """Categories of val that are not among the ``known`` names by id, which are from ``where``."""
    faults = []
    for number, name in val.categories.items():
        if number not in known:
            faults.append(f"{val.path}: category {number} ({name}) is not in {where}")
        elif known[number] != name:
            faults.append(f"{val.path}: category {number} is {name}, but in {where} {known[number]}")
    return faults


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images as fp32 (3, H, W) from 0 to 1, each with a `Target`; not resized or normalised.

    Targets hold what is to be learnt: no crowd regions, no boxes without area, and boxes clipped to the image.

    Args:
        samples: the images to read.
        transform: takes and returns a uint8 ``tv_tensors.Image`` and a `Target` of tv_tensors, as torchvision's v2.
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
    """Images and targets as two lists, because both differ in size."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def read_image(sample: DetectionSample, annotations: Path) -> Image.Image:
    """The image, upright; ``annotations`` is the annotation file that it belongs to.

    Raises:
        FileNotFoundError, ValueError: as `open_image`.
        ValueError: the image does not have the size that the annotations are for.
    """
    image = open_image(sample.image)
    if image.size != (sample.width, sample.height):
        raise ValueError(size_fault(sample, annotations, image.size))
    return image


def size_fault(sample: DetectionSample, annotations: Path, size: tuple[int, int]) -> str:
    """The message about an image whose ``size`` (width, height) is not the one that its annotations are for."""
    with Image.open(sample.image) as image:
        turned = image.size == (sample.width, sample.height)
    reason = "; its EXIF data turn it, and the annotations are for the picture as it is stored" if turned else ""
    expected = f"{sample.width} x {sample.height} for image {sample.image_id}"
    return f"{sample.image}: {size[0]} x {size[1]} pixels, but {annotations} says {expected}{reason}"


def learnt_target(sample: DetectionSample) -> Target:
    """The `Target` of a sample, as tv_tensors."""
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
