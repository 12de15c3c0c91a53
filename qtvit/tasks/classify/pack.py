"""Packing a folder of labelled images into tar shards."""

import hashlib
import io
import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qtvit import console
from qtvit.data.folders import data_folder
from qtvit.data.images import file_size, read_file, relative_path
from qtvit.data.shards import BLOCK, INDEX, PackedSplit, Shard, ShardIndex, is_packed, member_name, write_index
from qtvit.files import open_folder, replacing

from .data import LabelledFile, read_folders


def pack_folder(folder: str, out: Path, shard_bytes: int = 256_000_000) -> ShardIndex:
    """Copy the images of ``folder`` into tar shards with an index in the folder ``out`` (see `qtvit.data.shards`).

    In the shards, training images are in a random order (by a hash of their paths), so that a stream has all classes at
    any time; the index has them in the order of the folder. The same folder gives the same bytes.

    Args:
        folder: a folder in one of the layouts of `load_labelled_images`; no images are held out from it.
        out: the folder to create; it may exist if it is empty.
        shard_bytes: approximate largest size of a shard; a larger image gets a shard of its own.

    Raises:
        FileNotFoundError, ValueError: as `load_labelled_images`, or ``out`` is not empty or lies in ``folder``.
        OSError: an image cannot be read, or ``out`` cannot be written to; what was written is removed.
    """
    root = data_folder(folder)
    if is_packed(root):
        raise ValueError(f"{root}: packed already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty; name another folder")
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is in {root}, where its files would be taken for images; name another folder")
    found, is_new = read_folders(root), not out.exists()
    open_folder(out)
    try:
        splits = {"train": _pack_split("train", found.train, found.train_root, out, shard_bytes)}
        if found.val_root is not None:
            splits["val"] = _pack_split("val", found.val, found.val_root, out, shard_bytes)
        index = ShardIndex(found.classes, splits)
        write_index(out, index)
    except BaseException:
        for file in (*out.glob("*.tar"), out / INDEX):
            file.unlink(missing_ok=True)
        if is_new:
            out.rmdir()
        raise
    return index


def _pack_split(split: str, samples: Sequence[LabelledFile], root: Path, out: Path, shard_bytes: int) -> PackedSplit:
    paths = [relative_path(source, root) for source, _ in samples]
    order = list(range(len(samples)))
    if split == "train":
        order.sort(key=lambda key: hashlib.sha256(os.fsencode(paths[key])).digest())
    places = np.zeros((3, len(samples)), np.int64)
    shards: list[Shard] = []
    keys = iter(console.progress(order, desc=f"Packing {split}", unit="image"))
    for num_images in _images_per_shard((file_size(samples[key][0]) for key in order), shard_bytes):
        file = out / f"{split}-{len(shards):06d}.tar"
        try:
            with replacing(file) as temporary:
                for key, place in _write_shard(temporary, itertools.islice(keys, num_images), samples, paths):
                    places[:, key] = len(shards), *place
        except OSError as error:
            if error.errno is None:  # raised by `read_file` or `replacing`, with a message that names the file
                raise
            raise OSError(f"{file}: cannot be written ({error.strerror})") from error
        shards.append(Shard(file.name, file.stat().st_size, num_images))
    shard, offset, size = places
    return PackedSplit(shards, shard, offset, size, np.array([label for _, label in samples], np.int64), paths)


def _images_per_shard(sizes: Iterable[int], shard_bytes: int) -> Iterator[int]:
    """Yield the number of images of each shard; ``sizes`` are those of the images in bytes."""
    num_images = num_bytes = 0
    for size in sizes:
        size += -size % BLOCK + 3 * BLOCK  # padding, two headers and the label
        if num_images and num_bytes + size > shard_bytes:
            yield num_images
            num_images = num_bytes = 0
        num_images += 1
        num_bytes += size
    yield num_images


def _write_shard(
    file: Path, keys: Iterable[int], samples: Sequence[LabelledFile], paths: Sequence[str]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Write the samples with these ``keys``; yields each key with the offset and size of its image."""
    with file.open("wb") as target:
        with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key in keys:
                source, label = samples[key]
                image = read_file(source)
                yield key, (tar.offset + BLOCK, len(image))
                for name, content in ((member_name(key, paths[key]), image), (f"{key:08d}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(name)  # without owner and time, for the same bytes every time
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        target.flush()
        os.fsync(target.fileno())
