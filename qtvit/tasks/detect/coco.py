"""COCO's annotation files: read into arrays, and what is wrong with them."""

import gc
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from qtvit.errors import some

from .masks import Segments

Problems = dict[str, list[str]]
"""What is wrong, as a heading and its entries."""

IN_FILES = "with annotation files"
IN_IMAGES = "with images in annotation files"
IN_CATEGORIES = "with categories"
IN_ANNOTATIONS = "with annotations"
OUTSIDE = "boxes or masks outside their image"
IN_MASKS = "with masks"

MIN_SIDE = 1.0
"""Pixels: a detector does not learn boxes that are narrower or lower, as torchvision's transforms drop them."""


@dataclass(frozen=True)
class CocoFile:
    """What an annotation file says, N images and M objects.

    Attributes:
        path: of the file.
        categories: names by id, in the order of the ids.
        file_names: of the images, as the file has them.
        image_ids: (N,).
        sizes: (N, 2) width and height in pixels.
        object_ids: (M,) ids of the annotations.
        image_of: (M,) positions of their images.
        category_ids: (M,).
        boxes: (M, 4) left, top, right and bottom in pixels.
        areas: (M,) in pixels, of the box if the file does not say it.
        crowd: (M,) whether it is a region with many objects.
        masked: (M,) whether the file gives a mask.
        segments: the masks.
        by_image: (M,) positions of the objects, image by image.
        first: (N + 1,) where in ``by_image`` each image begins.
    """

    path: Path
    categories: dict[int, str]
    file_names: list[str]
    image_ids: np.ndarray
    sizes: np.ndarray
    object_ids: np.ndarray
    image_of: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    masked: np.ndarray
    segments: Segments
    by_image: np.ndarray
    first: np.ndarray

    def objects_of(self, image: int) -> np.ndarray:
        """Positions of the objects of an image."""
        return self.by_image[self.first[image] : self.first[image + 1]]

    def clipped(self) -> np.ndarray:
        """``boxes`` as far as they are within their images."""
        return clip_boxes(self.boxes, self.sizes[self.image_of])

    def degenerate(self) -> np.ndarray:
        """(M,) whether less than `MIN_SIDE` of a box's width or height is within its image."""
        left, top, right, bottom = self.clipped().T
        return (right - left < MIN_SIDE) | (bottom - top < MIN_SIDE)

    def object_name(self, index: int) -> str:
        """The file and the annotation's id, for messages."""
        return f"{self.path}: annotation {self.object_ids[index]}"

    def box_name(self, index: int) -> str:
        """The bounding box as the file has it, for messages."""
        left, top, right, bottom = self.boxes[index].tolist()
        return f"bbox [{left:g}, {top:g}, {right - left:g}, {bottom - top:g}]"

    def size_name(self, index: int) -> str:
        """Id and size of the object's image, for messages."""
        image = self.image_of[index]
        width, height = self.sizes[image]
        return f"image {self.image_ids[image]} ({width} x {height})"


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M, 4) boxes with corners moved into their images of (M, 2) width and height."""
    return np.minimum(np.maximum(boxes, 0), np.concatenate([sizes, sizes], axis=1))


def mostly_outside(boxes: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Positions of the boxes with less than half of their area in their images."""
    area, inside = _area(boxes), _area(clip_boxes(boxes, sizes))
    return np.flatnonzero((area > 0) & (inside < area / 2)).tolist()


def read_coco(path: Path) -> tuple[CocoFile | None, Problems]:
    """Read and check an annotation file.

    Returns:
        What is right in it, None if it is no JSON or lacks a list; and what is wrong.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    problems: Problems = {
        heading: [] for heading in (IN_FILES, IN_CATEGORIES, IN_IMAGES, IN_ANNOTATIONS, OUTSIDE, IN_MASKS)
    }
    with _without_collector():
        try:
            content = _read_json(path)
        except ValueError as error:
            problems[IN_FILES].append(str(error))
            return None, problems
        categories = _read_categories(path, content["categories"], problems[IN_CATEGORIES].append)
        names, image_ids, sizes = _read_images(path, content["images"], problems[IN_IMAGES].append)
        reader = _ObjectReader(path, categories, image_ids, sizes, problems)
        for position, entry in enumerate(content["annotations"]):
            reader.add(position, entry)
        del content
    file = reader.file(names)
    if len(file.object_ids) == 0 and not any(problems.values()):
        problems[IN_ANNOTATIONS].append(f"{path}: no annotations")
    _check_extents(file, problems[OUTSIDE].append)
    for index in file.segments.broken_rle(file.sizes[file.image_of].prod(axis=1)):
        problems[IN_MASKS].append(f"{file.object_name(index)}: counts of the mask do not cover {file.size_name(index)}")
    return file, problems


def _read_json(path: Path) -> dict[str, list[Any]]:
    """The three lists of a file; ValueError if it has other content."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    try:
        with path.open("rb") as stream:
            content = json.load(stream)
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no JSON object with images, annotations, categories")
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise ValueError(f"{path}: lacks the key {key!r}; it has {some(list(content)) or 'none'}")
        if not isinstance(content[key], list):
            raise ValueError(f"{path}: {key!r} is no list")
    return content


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's cycle collector would look through millions of new lists again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_categories(path: Path, entries: list[Any], report: Callable[[str], None]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for position, entry in enumerate(entries):
        if fault := _fault(entry, {"id": int, "name": str}):
            report(f"{path}: {_entry_name('category', 'categories', position, entry)} {fault}")
        elif entry["id"] in categories:
            report(f"{path}: category {entry['id']} comes twice")
        else:
            categories[entry["id"]] = entry["name"]
    if not entries:
        report(f"{path}: no categories")
    return dict(sorted(categories.items()))


def _read_images(
    path: Path, entries: list[Any], report: Callable[[str], None]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """File names, ids and sizes."""
    names: dict[str, int] = {}
    ids: dict[int, tuple[int, int]] = {}
    for position, entry in enumerate(entries):
        if fault := _fault(entry, {"id": int, "file_name": str, "width": int, "height": int}):
            report(f"{path}: {_entry_name('image', 'images', position, entry)} {fault}")
            continue
        image, name = entry["id"], entry["file_name"]
        if min(entry["width"], entry["height"]) < 1:
            report(f"{path}: image {image} has a size of {entry['width']} x {entry['height']}")
        elif image in ids:
            report(f"{path}: image {image} comes twice ({name})")
        elif name in names:
            report(f"{path}: image {image} has the file name of image {names[name]}: {name}")
        else:
            ids[image] = entry["width"], entry["height"]
            names[name] = image
    if not entries:
        report(f"{path}: no images")
    sizes = np.array(list(ids.values()), np.int64).reshape(-1, 2)
    return list(names), np.array(list(ids), np.int64), sizes


class _ObjectReader:
    """Collects the columns of a `CocoFile` from the entries of its list of annotations."""

    def __init__(
        self, path: Path, categories: dict[int, str], image_ids: np.ndarray, sizes: np.ndarray, problems: Problems
    ) -> None:
        self.path = path
        self.categories = categories
        self.image_ids = image_ids
        self.sizes = sizes
        self.problems = problems
        self.position_of = {image: position for position, image in enumerate(image_ids.tolist())}
        self.size_of = [(height, width) for width, height in sizes.tolist()]
        self.known_ids: set[int] = set()
        self.object_ids, self.image_of, self.category_ids, self.crowd = array("q"), array("q"), array("q"), array("b")
        self.masked = array("b")
        self.boxes, self.areas = array("d"), array("d")
        self.values, self.ring_ends, self.object_rings = array("d"), array("q", [0]), array("q", [0])
        self.rle, self.object_rle = bytearray(), array("q", [0])

    def add(self, position: int, entry: Any) -> None:
        """Take one annotation over, or report what is wrong with it."""
        try:
            number, image_id, category, (left, top, width, height) = _FIELDS(entry)
            proper = type(number) is type(image_id) is type(category) is int and abs(number) < 2**63
            proper = proper and math.isfinite(left + top + width + height)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            proper = False
        if not proper:
            wrong = _fault(entry, {"id": int, "image_id": int, "category_id": int, "bbox": list}) or _box_fault(entry)
            name = _entry_name("annotation", "annotations", position, entry)
            self._report(f"{name} {wrong}")
            return
        image = self.position_of.get(image_id, -1)
        if number in self.known_ids:
            self._report(f"annotation {number} comes twice")
        elif image < 0:
            self._report_unknown(number, "image", image_id, IN_IMAGES)
        elif category not in self.categories:
            self._report_unknown(number, "category", category, IN_CATEGORIES)
        else:
            self._take(entry, image)
        self.known_ids.add(number)

    def _report(self, fault: str) -> None:
        self.problems[IN_ANNOTATIONS].append(f"{self.path}: {fault}")

    def _report_unknown(self, number: int, what: str, reference: int, heading: str) -> None:
        """Unless it may be to one of the entries that have been reported as broken."""
        if not self.problems[heading]:
            self._report(f"annotation {number} is of {what} {reference}, which is not in the file")

    def _take(self, entry: dict[str, Any], image: int) -> None:
        left, top, width, height = entry["bbox"]
        area = entry.get("area")
        self.object_ids.append(entry["id"])
        self.image_of.append(image)
        self.category_ids.append(entry["category_id"])
        self.crowd.append(bool(entry.get("iscrowd")))
        self.boxes.extend((left, top, left + width, top + height))
        self.areas.append(area if isinstance(area, (int, float)) else width * height)
        segmentation = entry.get("segmentation")
        self.masked.append(bool(segmentation))
        if segmentation and (mask_fault := self._add_mask(segmentation, *self.size_of[image])):
            self.problems[IN_MASKS].append(f"{self.path}: annotation {entry['id']}: {mask_fault}")
        self.object_rings.append(len(self.ring_ends) - 1)
        self.object_rle.append(len(self.rle))

    def _add_mask(self, mask: Any, height: int, width: int) -> str | None:
        """Take a segmentation over; returns what is wrong with it."""
        if isinstance(mask, list):
            return next((fault for ring in mask if (fault := self._add_ring(ring))), None)
        if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
            return "segmentation is neither a list of polygons nor RLE with size and counts"
        counts = mask["counts"]
        if mask["size"] != [height, width]:
            return f"mask of size {mask['size']}; its image is [{height}, {width}] (height, width)"
        if isinstance(counts, str) and counts.isascii():
            self.rle += counts.encode()
            return None
        if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
            return "counts of the mask are neither a string nor a list of numbers from 0"
        if sum(counts) != height * width:
            return f"counts of the mask add up to {sum(counts)}; its image has {height * width} pixels"
        from pycocotools.mask import frPyObjects

        self.rle += frPyObjects(mask, height, width)["counts"]
        return None

    def _add_ring(self, ring: Any) -> str | None:
        if not isinstance(ring, list):
            return "a polygon is no list of numbers x, y, x, y, …"
        if len(ring) < 6 or len(ring) % 2:
            return f"a polygon of {len(ring)} numbers; expected x and y of three points or more"
        try:
            values = array("d", ring)
        except (TypeError, OverflowError):
            return "a polygon is no list of numbers x, y, x, y, …"
        if not math.isfinite(sum(values)):
            return "a polygon with numbers that are not finite"
        self.values.extend(values)
        self.ring_ends.append(len(self.values))
        return None

    def file(self, names: list[str]) -> CocoFile:
        """All that was taken over."""
        image_of = np.array(self.image_of)
        by_image = np.argsort(image_of, kind="stable")
        return CocoFile(
            path=self.path,
            categories=self.categories,
            file_names=names,
            image_ids=self.image_ids,
            sizes=self.sizes,
            object_ids=np.array(self.object_ids),
            image_of=image_of,
            category_ids=np.array(self.category_ids),
            boxes=np.array(self.boxes).reshape(-1, 4),
            areas=np.array(self.areas),
            crowd=np.array(self.crowd, bool),
            masked=np.array(self.masked, bool),
            segments=Segments(
                np.array(self.values),
                np.array(self.ring_ends),
                np.array(self.object_rings),
                bytes(self.rle),
                np.array(self.object_rle),
            ),
            by_image=by_image,
            first=np.searchsorted(image_of, np.arange(len(names) + 1), sorter=by_image),
        )


def _fault(entry: Any, keys: Mapping[str, type]) -> str | None:
    """What is wrong with an entry that has to have ``keys`` of these types."""
    if type(entry) is not dict:
        return "is no JSON object"
    for key, kind in keys.items():
        if key not in entry:
            return f"lacks the key {key!r}"
        value = entry[key]
        if type(value) is not kind or (isinstance(value, int) and abs(value) >= 2**63):
            return f"has {key!r}: {json.dumps(value)[:60]}; expected {_KINDS[kind]}"
    return None


_FIELDS = itemgetter("id", "image_id", "category_id", "bbox")
_KINDS = {int: "a whole number", str: "a text", list: "[left, top, width, height]"}


def _box_fault(entry: dict[str, Any]) -> str:
    return f"has 'bbox': {json.dumps(entry['bbox'])[:60]}; expected four finite numbers [left, top, width, height]"


def _entry_name(what: str, key: str, position: int, entry: Any) -> str:
    """An entry of a list by its id, or by its position if it has none."""
    number = entry.get("id") if isinstance(entry, dict) else None
    return f"{key}[{position}]" if number is None else f"{what} {number}"


def _check_extents(file: CocoFile, report: Callable[[str], None]) -> None:
    """Report boxes and polygons of which less than half is within the image; other parts are cut off in training."""
    for index in mostly_outside(file.boxes, file.sizes[file.image_of]):
        report(f"{file.object_name(index)}: {file.box_name(index)} is outside of {file.size_name(index)}")
    extents, owners = file.segments.ring_extents()
    for ring in mostly_outside(extents, file.sizes[file.image_of[owners]]):
        extent = "x from {0:g} to {2:g}, y from {1:g} to {3:g}".format(*extents[ring])
        report(f"{file.object_name(owners[ring])}: a polygon, {extent}, is outside of {file.size_name(owners[ring])}")


def _area(boxes: np.ndarray) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
