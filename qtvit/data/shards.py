"""Images in tar shards with WebDataset's layout, and an index that lets them be read in any order.

A packed folder holds `INDEX`, ``train-000000.tar``, … and, if it has such a split, ``val-000000.tar``, … Sample ``KEY``
of a split is two members: ``KEY.jpg``, the unchanged image file, and ``KEY.cls``, its label in decimal.

The index is JSON, which any tool can read: the class names and, for each split, its shards with their sizes and one
list per property of the samples (shard, offset and size of the image in bytes, label, path in the original folder).
Lists instead of one object per sample keep it small: for the 1.28 million images of ImageNet it has 75 MB and loads in
a few seconds.
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
"""Size of a tar header in bytes; members begin at multiples of it."""
MAX_OPEN = 128
"""Number of shards that a process keeps open."""


@dataclass(frozen=True, slots=True)
class PackedImage:
    """An image in a shard, as a source for `qtvit.data.open_image`.

    Attributes:
        shard: the tar file.
        offset, size: where the image file is in the shard, in bytes.
        key: number of the sample in its split.
        path: the image file's path in the split's folder before it was packed, with slashes.
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
        """The image file's content; safe in threads and after a fork, because no file position is shared.

        Raises:
            OSError: the shard does not exist or cannot be read.
            ValueError: the shard is not the one that the index describes.
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
    """A tar file in the index."""

    name: str
    num_bytes: int
    num_images: int


@dataclass(frozen=True)
class PackedSplit:
    """The shards of a split and its N samples, in the order of the original folder.

    Attributes:
        shards: the tar files.
        shard: (N,) index of each image's tar file.
        offset, size, path: (N,) as in `PackedImage`.
        label: (N,) classes.
    """

    shards: Sequence[Shard]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    path: Sequence[str]

    def damage(self, root: Path) -> list[FileNotFoundError | ValueError]:
        """An error for each shard that is missing in the folder ``root`` or has another size than when written."""
        found: list[FileNotFoundError | ValueError] = []
        for shard in self.shards:
            file = root / shard.name
            if not file.is_file():
                found.append(FileNotFoundError(f"{file}: no such shard, but {INDEX} names it"))
            elif (size := file.stat().st_size) != shard.num_bytes:
                found.append(ValueError(f"{file}: {size} bytes instead of {shard.num_bytes}; copy or pack it again"))
        return found

    def sources(self, root: Path) -> list[PackedImage]:
        """The images of the split, whose shards are in the folder ``root``."""
        _open_shard.cache_clear()  # shards that are still open may have been replaced
        files = [root / shard.name for shard in self.shards]
        containers = (files[shard] for shard in self.shard.tolist())
        columns = (containers, self.offset.tolist(), self.size.tolist(), range(len(self.path)), self.path)
        return [PackedImage(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class ShardIndex:
    """The content of a packed folder.

    Attributes:
        classes: names; labels are positions in it.
        splits: "train", and "val" if the folder had one.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, PackedSplit]


def member_name(key: int, path: str) -> str:
    """Name of an image in its shard. WebDataset ends a key at the first dot, so it is a number, not the old name."""
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
        ValueError: it is not an index, has another version, or contradicts itself; the message begins with ``name``.
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
    """Write the index of ``root`` in one step."""
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
    """Read and check a split of the index."""
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
    """A file that stays open as long as this object is referenced, so that dropping it from the cache is safe."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on, or fewer if the file ends before."""
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # missing if the file could not be opened
            os.close(self.descriptor)


_open_shard = functools.lru_cache(MAX_OPEN)(_OpenShard)
