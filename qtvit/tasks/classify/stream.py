"""Training images streamed from shards that are too far away to read by position: a web server, a bucket.

Shards are read from front to back by the ``webdataset`` package, and shuffled in two steps: their order, and the images
in a buffer. What is streamed follows from (seed, epoch, rank, worker), so an epoch can be repeated, but not entered in
the middle. Where the shards are on a disk, `load_labelled_images` shuffles perfectly, and resumes anywhere.
"""

import functools
import hashlib
import itertools
import random
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from qtvit import console
from qtvit.data.images import any_size, open_image
from qtvit.data.sampling import derived_seed, drawn_size, seed_everywhere
from qtvit.data.shards import INDEX, ShardIndex, parse_index
from qtvit.data.split import Sample
from qtvit.files import open_folder, replacing

from .data import LabelledImages


class ShardStream(IterableDataset[tuple[Tensor, int]]):
    """The images of a split of packed images, transformed, with their labels; for a DataLoader of ``batch_size``.

    In an epoch every process takes ``num_images // (batch_size * world_size)`` full batches. The shards are shuffled
    and dealt out to the processes, then to their workers. A worker whose shards hold more images than it has to give
    leaves the rest out; one whose shards hold fewer begins them again. Which these are changes with the epoch.

    The random numbers that the transforms draw follow from the seed, the epoch and the image alone.

    Args:
        root: path or URL of the packed folder: whatever ``webdataset`` opens, such as http, https, gs and hf.
        split: "train" or "val".
        transforms: of the RGB image, one for each image size; as with `EpochBatches`, each batch draws one of those
            after the first, if there are such.
        seed: of the order, and of what ``transforms`` draw.
        batch_size: per process.
        rank, world_size: this process and the number of processes.
        shuffle_buffer: image files among which a worker draws the next one; it keeps them in memory.

    Attributes:
        classes: what the labels index.
        num_images: of the split.

    Raises:
        OSError: the index cannot be read; iterating, a shard cannot be read.
        ValueError: the index is damaged, has no val part, or fewer shards than there are processes; iterating, a shard
            holds another number of images than it should, or an image is broken. No image is ever skipped.
    """

    def __init__(
        self,
        root: str,
        split: str,
        transforms: Sequence[Callable[[Image.Image], Tensor]],
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__()
        index = read_remote_index(root)
        if "val" not in index.splits:
            raise ValueError(f"{root}: packed from a folder without val/; a stream cannot hold images out")
        shards = index.splits[split].shards
        if len(shards) < world_size:
            raise ValueError(f"{root}: {len(shards)} {split} shards for {world_size} processes; pack smaller ones")
        self.num_in_shard = {f"{root.rstrip('/')}/{shard.name}": shard.num_images for shard in shards}
        self.classes = index.classes
        self.num_images = sum(self.num_in_shard.values())
        self.transforms = transforms
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle_buffer = shuffle_buffer
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # for workers that live on

    def __len__(self) -> int:
        """Images that each process takes in an epoch."""
        return self.num_batches * self.batch_size

    @property
    def num_batches(self) -> int:
        """Batches of each process in an epoch."""
        return self.num_images // (self.batch_size * self.world_size)

    def go_to(self, epoch: int) -> None:
        """Which epoch the next iteration streams."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._epoch)
        urls = list(self.num_in_shard)
        random.Random(derived_seed(self.seed, epoch)).shuffle(urls)
        urls = urls[self.rank :: self.world_size]
        num_busy = min(num_workers, len(urls))
        if worker >= num_busy:
            return
        numbers = range(worker, self.num_batches, num_busy)  # of the batches that the DataLoader takes from this worker
        if not numbers:
            return
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(urls[worker::num_busy]),
            self._read,
            webdataset.detshuffle(self.shuffle_buffer, seed=derived_seed(self.seed, epoch, self.rank, worker)),
        )
        samples = iter(pipeline.with_epoch(len(numbers) * self.batch_size))  # begun again, the buffer draws anew
        for number in numbers:
            size = drawn_size(self.seed, epoch, number, len(self.transforms) - 1)
            for sample in itertools.islice(samples, self.batch_size):
                yield self._item(sample, epoch, self.transforms[size])

    def _read(self, shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """The samples of the shards: key, URL, and the content of image and label by suffix."""
        for shard in shards:
            url, count = shard["url"], 0
            try:
                for sample in webdataset.tarfile_samples([shard], handler=webdataset.reraise_exception):
                    if "cls" in sample and len(_suffixes(sample)) == 2:
                        count += 1
                        yield sample
            except (OSError, tarfile.TarError) as error:
                raise OSError(f"{url}: cannot be read ({_reason(error)})") from error
            if count != self.num_in_shard[url]:
                raise ValueError(f"{url}: {count} images instead of {self.num_in_shard[url]}; copy or pack it again")

    def _item(
        self, sample: dict[str, Any], epoch: int, transform: Callable[[Image.Image], Tensor]
    ) -> tuple[Tensor, int]:
        key = sample["__key__"]
        (suffix,) = _suffixes(sample) - {"cls"}
        seed_everywhere(self.seed, epoch, int(key))
        try:
            with any_size():
                return transform(open_image(sample[suffix])), int(sample["cls"])
        except ValueError as error:
            reason = str(error).removeprefix("image bytes: ")
            raise ValueError(f"{sample['__url__']}: {key}.{suffix}: {reason}") from error


def remote_images(root: str) -> LabelledImages:
    """The packed images at a URL: those to train on by name, to be streamed; those held out in a copy on this machine.

    The copy is kept in torch.hub's folder.

    Raises:
        OSError, ValueError: as `ShardStream`; a shard of held-out images cannot be read, or is cut short.
    """
    index = read_remote_index(root)
    if "val" not in index.splits:
        raise ValueError(f"{root}: packed from a folder without val/; a stream cannot hold images out")
    name = root.rstrip("/").rpartition("/")[2]
    val = index.splits["val"]
    digest = hashlib.sha256("\n".join([root, *val.path, str(val.size.tolist()), str(val.label.tolist())]).encode())
    folder = Path(torch.hub.get_dir(), "qtvit", f"{name}-{digest.hexdigest()[:12]}")
    with FileLock(open_folder(folder) / ".lock"):  # processes that share the machine share the copy
        for shard in console.progress(val.shards, desc="Fetching held-out images", unit="shard"):
            copy = folder / shard.name
            if not copy.is_file() or copy.stat().st_size != shard.num_bytes:
                _fetch(f"{root.rstrip('/')}/{shard.name}", copy)
    if damage := val.damage(folder):
        raise damage[0]
    samples: dict[str, list[Sample]] = {
        split: list(zip(found.sources(folder), found.label.tolist(), strict=True))
        for split, found in index.splits.items()
    }
    return LabelledImages(name, index.classes, samples["train"], samples["val"], stream=root)


def _fetch(url: str, path: Path) -> None:
    try:
        with replacing(path) as temporary, webdataset.gopen(url) as source, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    except OSError as error:
        raise OSError(f"{url}: cannot be copied to {path} ({_reason(error)})") from error


@functools.lru_cache(maxsize=1)  # it is large
def read_remote_index(root: str) -> ShardIndex:
    """The index of packed images at a path or URL.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or ``webdataset`` does not know this kind of URL.
    """
    url = f"{root.rstrip('/')}/{INDEX}"
    try:
        with webdataset.gopen(url) as file:
            content = file.read()
    except OSError as error:
        raise OSError(f"{url}: cannot be read ({_reason(error)})") from error
    return parse_index(content, url)


def _suffixes(sample: dict[str, Any]) -> set[str]:
    return {name for name in sample if not name.startswith("__")}


def _reason(error: Exception) -> str:
    """Why reading failed; of a program that ``webdataset`` has called, its exit code."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0])
    return text[text.rfind("exit ") :].partition(" (")[0] if "exit " in text else text.partition(" @ ")[0]
