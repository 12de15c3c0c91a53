"""Images in tar shards, read by position through an index: the layout of WebDataset, with the access of a folder.

A packed folder holds ``train-000000.tar``, … (and ``val-000000.tar``, … if it has such a part) and `INDEX`. Sample
number ``KEY`` of a split is the members ``KEY.jpg``, the image file as it was, and ``KEY.cls``, its label in decimal.

The index is JSON, as any tool can read that: the class names and, for each split, its shards with their sizes and one
list per property of the samples (shard, offset and size of the image in bytes, label, path in the original folder).
Lists of numbers instead of one object per sample keep it small: the 1.28 million images of ImageNet take 75 MB and
load in a few seconds.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from qtvit.files import write_text

INDEX = "shards.json"
FORMAT, VERSION = "qtvit-shards", 1
COLUMNS = ("shard", "offset", "size", "label")
BLOCK = 512
"""Bytes of a tar header; what members begin at multiples of."""
MAX_OPEN = 128
"""Shards that a process keeps open."""


@dataclass(frozen=True, slots=True)
class PackedImage:
    """An image in a shard, as a source for `qtvit.data.open_image`.

    Attributes:
        shard: the tar file.
        offset, size: of the image file in it, in bytes.
        key: number of the sample in its split.
        path: of the image file in the split's folder before it was packed, with slashes.
    """

    shard: Path
    offset: int
    size: int
    key: int
    path: str

    @property
    def name(self) -> str:
        """The image file's name before it was packed."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.shard}: {member_name(self.key, self.path)} ({self.path})"

    def read(self) -> bytes:
        """The image file's content; safe in threads and after a fork, as no file position is shared.

        Raises:
            FileNotFoundError: the shard is gone.
            OSError: it cannot be read.
            ValueError: it is not the one that was packed.
        """
        try:
            data = _open_shard(self.shard).read(self.offset - BLOCK, BLOCK + self.size)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self}: no such shard") from None
        except OSError as error:
            raise OSError(f"{self}: cannot be read ({error.strerror})") from error
        if len(data) < BLOCK + self.size:
            raise ValueError(f"{self}: the shard is cut short; it has to have {self.offset + self.size} bytes or more")
        name = data[:100].rstrip(b"\0").decode(errors="replace")
        if name != member_name(self.key, self.path):
            raise ValueError(f"{self}: not at byte {self.offset} of this shard, which is not the one in {INDEX}")
        return data[BLOCK:]


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        name: of the file.
        num_bytes: of the file.
        num_images: in it.
    """

    name: str
    num_bytes: int
    num_images: int


@dataclass(frozen=True)
class PackedSplit:
    """The shards of a split and its N samples, in the order of the folder that they were in.

    Attributes:
        shards: of the split.
        shard, offset, size: (N,) where each image is: index of its shard, and bytes.
        label: (N,) classes.
        path: N paths, as in `PackedImage`.
    """

    shards: Sequence[Shard]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    path: Sequence[str]

    def damage(self, root: Path) -> list[FileNotFoundError | ValueError]:
        """The shards that are not in the folder ``root`` as they were written: missing, or of another size."""
        found: list[FileNotFoundError | ValueError] = []
        for shard in self.shards:
            file = root / shard.name
            if not file.is_file():
                found.append(FileNotFoundError(f"{file}: no such shard, but {INDEX} names it"))
            elif (size := file.stat().st_size) != shard.num_bytes:
                found.append(ValueError(f"{file}: {size} bytes instead of {shard.num_bytes}; copy or pack it again"))
        return found

    def sources(self, root: Path) -> list[PackedImage]:
        """The images, in shards in the folder ``root``."""
        _open_shard.cache_clear()  # another file may have taken the place of an open one
        files = [root / shard.name for shard in self.shards]
        columns = (self.shard.tolist(), self.offset.tolist(), self.size.tolist(), self.path)
        rows = enumerate(zip(*columns, strict=True))
        return [PackedImage(files[shard], offset, size, key, path) for key, (shard, offset, size, path) in rows]


@dataclass(frozen=True)
class ShardIndex:
    """What is in a packed folder.

    Attributes:
        classes: what the labels index.
        splits: "train", and "val" if the folder had one.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, PackedSplit]


def member_name(key: int, path: str) -> str:
    """Name of an image in its shard: the key has no dot, at which WebDataset would end it."""
    return f"{key:08d}{PurePosixPath(path).suffix.lower()}"


def is_packed(root: Path) -> bool:
    """Whether ``root`` is a folder that `qtvit.tasks.classify.pack.pack_folder` has written."""
    return (root / INDEX).is_file()


def read_index(root: Path) -> ShardIndex:
    """The index of a packed folder; errors as `parse_index`."""
    return parse_index((root / INDEX).read_bytes(), str(root / INDEX))


def parse_index(content: bytes, name: str) -> ShardIndex:
    """The index in ``content``.

    Raises:
        ValueError: it is none, of a later version, or contradicts itself; the message begins with ``name``.
    """
    try:
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise ValueError("of another format")
        version = index["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: not a complete index of packed images ({_reason(error)})") from error
    if version != VERSION:
        raise ValueError(f"{name}: an index of version {version}; this release of qtvit reads version {VERSION}")
    try:
        classes = tuple(index["classes"])
        splits = {"train": index["splits"]["train"], **index["splits"]}
        return ShardIndex(classes, {split: _split(found, len(classes)) for split, found in splits.items()})
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"{name}: a damaged index ({_reason(error)}); pack the images again") from error


def write_index(root: Path, index: ShardIndex) -> None:
    """Write the index of ``root``, whole or not at all."""
    splits = {
        split: {
            "shards": [asdict(shard) for shard in found.shards],
            **{name: getattr(found, name).tolist() for name in COLUMNS},
            "path": list(found.path),
        }
        for split, found in index.splits.items()
    }
    content = {"format": FORMAT, "version": VERSION, "classes": index.classes, "splits": splits}
    write_text(root / INDEX, json.dumps(content, separators=(",", ":")) + "\n")


def _split(found: Mapping[str, Any], num_classes: int) -> PackedSplit:
    """The split in a parsed index, checked."""
    shards = [Shard(**shard) for shard in found["shards"]]
    for shard in shards:
        if PurePosixPath(shard.name).name != shard.name:
            raise ValueError(f"shard {shard.name!r} is not in its folder")
    columns = {name: np.array(found[name], np.int64) for name in COLUMNS}
    split = PackedSplit(shards, **columns, path=found["path"])
    if {column.shape for column in columns.values()} != {(len(split.path),)}:
        raise ValueError("lists of different lengths")
    for column, what, limit in ((split.shard, "shards", len(shards)), (split.label, "labels", num_classes)):
        if ((column < 0) | (column >= limit)).any():
            raise ValueError(f"{what} that do not exist")
    num_images = np.bincount(split.shard, minlength=len(shards))
    if num_images.tolist() != [shard.num_images for shard in shards]:
        raise ValueError("images that are in other shards")
    num_bytes = np.array([shard.num_bytes for shard in shards])[split.shard]
    bad = (split.offset < BLOCK) | (split.offset % BLOCK != 0) | (split.size < 0)
    if (bad | (split.offset + split.size > num_bytes)).any():
        raise ValueError("offsets that are not in the shards")
    return split


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


class _OpenShard:
    """A file that is open for as long as somebody holds this object."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer if the file ends there."""
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # else it could not be opened
            os.close(self.descriptor)


_open_shard = functools.lru_cache(MAX_OPEN)(_OpenShard)
