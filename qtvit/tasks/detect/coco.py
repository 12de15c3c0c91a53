"""COCO's annotation files: reading them into arrays, and finding what is wrong with them."""

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
"""Entries about what is wrong, by heading."""

IN_FILES = "with annotation files"
IN_IMAGES = "with images in annotation files"
IN_CATEGORIES = "with categories"
IN_ANNOTATIONS = "with annotations"
OUTSIDE = "boxes or masks outside their image"
IN_MASKS = "with masks"

MIN_SIDE = 1.0
"""Pixels; boxes that are narrower or lower are not learnt, because torchvision's transforms drop them."""


@dataclass(frozen=True)
class CocoFile:
    """The content of an annotation file with N images and M objects."""

    path: Path
    categories: dict[int, str]  # names by id, in the order of the ids
    file_names: list[str]  # N names, as in the file
    image_ids: np.ndarray  # (N,)
    sizes: np.ndarray  # (N, 2) width and height in pixels
    object_ids: np.ndarray  # (M,) ids of the annotations
    image_of: np.ndarray  # (M,) position of each object's image
    category_ids: np.ndarray  # (M,)
    boxes: np.ndarray  # (M, 4) left, top, right and bottom in pixels
    areas: np.ndarray  # (M,) in pixels; the area of the box where the file gives none
    crowd: np.ndarray  # (M,) whether the object is a region with many objects
    masked: np.ndarray  # (M,) whether the file gives a mask
    segments: Segments  # the masks
    by_image: np.ndarray  # (M,) positions of the objects, grouped by image
    first: np.ndarray  # (N + 1,) where each image begins in by_image

    def objects_of(self, image: int) -> np.ndarray:
        """Positions of the objects of an image."""
        return self.by_image[self.first[image] : self.first[image + 1]]

    def clipped(self) -> np.ndarray:
        """``boxes`` clipped to their images."""
        return clip_boxes(self.boxes, self.sizes[self.image_of])

    def degenerate(self) -> np.ndarray:
        """(M,) whether the part of a box within its image is narrower or lower than `MIN_SIDE`."""
        left, top, right, bottom = self.clipped().T
        return (right - left < MIN_SIDE) | (bottom - top < MIN_SIDE)

    def object_name(self, index: int) -> str:
        """The file and the annotation's id, for messages."""
        return f"{self.path}: annotation {self.object_ids[index]}"

    def box_name(self, index: int) -> str:
        """The box as the file gives it, for messages."""
        left, top, right, bottom = self.boxes[index].tolist()
        return f"bbox [{left:g}, {top:g}, {right - left:g}, {bottom - top:g}]"

    def size_name(self, index: int) -> str:
        """Id and size of the object's image, for messages."""
        image = self.image_of[index]
        return "image {} ({} x {})".format(self.image_ids[image], *self.sizes[image])


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(M, 4) boxes clipped to images of (M, 2) width and height."""
    return np.minimum(np.maximum(boxes, 0), np.concatenate([sizes, sizes], axis=1))


def mostly_outside(boxes: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Positions of the boxes with less than half of their area in their images."""

    def area(of: np.ndarray) -> np.ndarray:
        return (of[:, 2:] - of[:, :2]).clip(min=0).prod(1)

    whole = area(boxes)
    return np.flatnonzero((whole > 0) & (area(clip_boxes(boxes, sizes)) < whole / 2)).tolist()


def read_coco(path: Path) -> tuple[CocoFile | None, Problems]:
    """Read and check an annotation file.

    Returns:
        The valid content of the file, or None if it is not JSON or lacks a list; and the problems.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
    """
    headings = IN_FILES, IN_CATEGORIES, IN_IMAGES, IN_ANNOTATIONS, OUTSIDE, IN_MASKS
    problems: Problems = {heading: [] for heading in headings}
    with _without_collector():
        try:
            content = _read_json(path)
        except ValueError as error:
            problems[IN_FILES].append(str(error))
            return None, problems
        file = _read_content(path, content, problems)
        del content
    if len(file.object_ids) == 0 and not any(problems.values()):
        problems[IN_ANNOTATIONS].append(f"{path}: no annotations")
    report = problems[OUTSIDE].append  # what is only partly outside is clipped in training
    for index in mostly_outside(file.boxes, file.sizes[file.image_of]):
        report(f"{file.object_name(index)}: {file.box_name(index)} is outside of {file.size_name(index)}")
    extents, owners = file.segments.ring_extents()
    for ring in mostly_outside(extents, file.sizes[file.image_of[owners]]):
        extent = "x from {0:g} to {2:g}, y from {1:g} to {3:g}".format(*extents[ring])
        name, size = file.object_name(owners[ring]), file.size_name(owners[ring])
        report(f"{name}: a polygon, {extent}, is outside of {size}")
    for index in file.segments.broken_rle(file.sizes[file.image_of].prod(axis=1)):
        problems[IN_MASKS].append(f"{file.object_name(index)}: counts of the mask do not cover {file.size_name(index)}")
    return file, problems


def _read_content(path: Path, content: dict[str, list[Any]], problems: Problems) -> CocoFile:
    """The valid categories, images and annotations; the others are reported."""
    categories = _read_categories(path, content["categories"], problems[IN_CATEGORIES].append)
    names, image_ids, sizes = _read_images(path, content["images"], problems[IN_IMAGES].append)
    position_of = {image: position for position, image in enumerate(image_ids.tolist())}
    entries = _valid_objects(path, content["annotations"], categories, position_of, problems)
    image_of = np.array([position_of[entry["image_id"]] for entry in entries], np.int64)
    by_image = np.argsort(image_of, kind="stable")
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    given = zip((entry.get("area") for entry in entries), boxes[:, 2:].prod(1).tolist(), strict=True)
    areas = [area if isinstance(area, (int, float)) else box_area for area, box_area in given]
    boxes[:, 2:] += boxes[:, :2]  # from width and height to right and bottom
    return CocoFile(
        path=path,
        categories=categories,
        file_names=names,
        image_ids=image_ids,
        sizes=sizes,
        object_ids=np.array([entry["id"] for entry in entries], np.int64),
        image_of=image_of,
        category_ids=np.array([entry["category_id"] for entry in entries], np.int64),
        boxes=boxes,
        areas=np.array(areas, np.float64),
        crowd=np.array([bool(entry.get("iscrowd")) for entry in entries], bool),
        masked=np.array([bool(entry.get("segmentation")) for entry in entries], bool),
        segments=_read_masks(path, entries, sizes[image_of], problems[IN_MASKS].append),
        by_image=by_image,
        first=np.searchsorted(image_of, np.arange(len(names) + 1), sorter=by_image),
    )


def _read_json(path: Path) -> dict[str, list[Any]]:
    """The three lists of a file; ValueError if it has other content, other errors as `read_coco`."""
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
    """Pause Python's cycle collector, which would traverse millions of new lists again and again."""
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
    """File names, ids and sizes of the valid images."""
    names: dict[str, int] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for position, entry in enumerate(entries):
        if fault := _fault(entry, {"id": int, "file_name": str, "width": int, "height": int}):
            report(f"{path}: {_entry_name('image', 'images', position, entry)} {fault}")
            continue
        image, name, size = entry["id"], entry["file_name"], (entry["width"], entry["height"])
        if min(size) < 1:
            report(f"{path}: image {image} has a size of {size[0]} x {size[1]}")
        elif image in sizes:
            report(f"{path}: image {image} comes twice ({name})")
        elif name in names:
            report(f"{path}: image {image} has the file name of image {names[name]}: {name}")
        else:
            sizes[image], names[name] = size, image
    if not entries:
        report(f"{path}: no images")
    return list(names), np.array(list(sizes), np.int64), np.array(list(sizes.values()), np.int64).reshape(-1, 2)


def _valid_objects(
    path: Path, entries: list[Any], categories: dict[int, str], position_of: dict[int, int], problems: Problems
) -> list[dict[str, Any]]:
    """The annotations without faults, apart from their masks; reports what is wrong with the others."""
    valid = []
    known_ids: set[int] = set()
    report = problems[IN_ANNOTATIONS].append
    for position, entry in enumerate(entries):
        try:
            number, image, category, (left, top, width, height) = _FIELDS(entry)
            proper = type(number) is type(image) is type(category) is int and abs(number) < 2**63
            proper = proper and math.isfinite(left + top + width + height)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            proper = False
        if not proper:
            fault = _fault(entry, {"id": int, "image_id": int, "category_id": int, "bbox": list}) or (
                f"has 'bbox': {json.dumps(entry['bbox'])[:60]}; expected four finite numbers [left, top, width, height]"
            )
            report(f"{path}: {_entry_name('annotation', 'annotations', position, entry)} {fault}")
            continue
        # A reference is no fault of its own if it may be to an entry that has been reported as broken.
        if number in known_ids:
            report(f"{path}: annotation {number} comes twice")
        elif image not in position_of:
            if not problems[IN_IMAGES]:
                report(f"{path}: annotation {number} is of image {image}, which is not in the file")
        elif category not in categories:
            if not problems[IN_CATEGORIES]:
                report(f"{path}: annotation {number} is of category {category}, which is not in the file")
        else:
            valid.append(entry)
        known_ids.add(number)
    return valid


def _read_masks(
    path: Path, entries: list[dict[str, Any]], sizes: np.ndarray, report: Callable[[str], None]
) -> Segments:
    """The masks of annotations in images of these (M, 2) ``sizes``; reports what is wrong with them."""
    values, ring_ends, object_rings = array("d"), array("q", [0]), array("q", [0])
    rle, object_rle = bytearray(), array("q", [0])
    for entry, (width, height) in zip(entries, sizes.tolist(), strict=True):
        mask = entry.get("segmentation") or []
        try:
            if not isinstance(mask, list):
                rle += _run_lengths(mask, height, width)
            else:
                for ring in mask:
                    values.extend(_corners(ring))
                    ring_ends.append(len(values))
        except ValueError as error:
            report(f"{path}: annotation {entry['id']}: {error}")
        object_rings.append(len(ring_ends) - 1)
        object_rle.append(len(rle))
    rings = np.array(values), np.array(ring_ends), np.array(object_rings)
    return Segments(*rings, bytes(rle), np.array(object_rle))


def _run_lengths(mask: Any, height: int, width: int) -> bytes:
    """The compressed RLE of a mask that is not polygons; ValueError if it is not valid."""
    if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
        raise ValueError("segmentation is neither a list of polygons nor RLE with size and counts")
    counts = mask["counts"]
    if mask["size"] != [height, width]:
        raise ValueError(f"mask of size {mask['size']}; its image is [{height}, {width}] (height, width)")
    if isinstance(counts, str) and counts.isascii():
        return counts.encode()
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("counts of the mask are neither a string nor a list of numbers from 0")
    if sum(counts) != height * width:
        raise ValueError(f"counts of the mask add up to {sum(counts)}; its image has {height * width} pixels")
    from pycocotools.mask import frPyObjects

    return frPyObjects(mask, height, width)["counts"]


def _corners(ring: Any) -> array:
    """The numbers of a polygon; ValueError if it is not valid."""
    if isinstance(ring, list) and (len(ring) < 6 or len(ring) % 2):
        raise ValueError(f"a polygon of {len(ring)} numbers; expected x and y of three points or more")
    try:
        values = array("d", ring) if isinstance(ring, list) else array("d")
    except (TypeError, OverflowError):
        values = array("d")
    if not values:
        raise ValueError("a polygon is no list of numbers x, y, x, y, …")
    if not math.isfinite(sum(values)):
        raise ValueError("a polygon with numbers that are not finite")
    return values


def _fault(entry: Any, keys: Mapping[str, type]) -> str | None:
    """What is wrong with an entry that must have these ``keys`` with values of these types."""
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


def _entry_name(what: str, key: str, position: int, entry: Any) -> str:
    """An entry of a list by its id, or by its position if it has none."""
    number = entry.get("id") if isinstance(entry, dict) else None
    return f"{key}[{position}]" if number is None else f"{what} {number}"
