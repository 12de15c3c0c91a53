"""Training images streamed from shards that cannot be read by position: on a web server, in a bucket.

The ``webdataset`` package reads each shard from front to back. Shuffling has two steps: the order of the shards, and a
buffer of images. The stream follows from (seed, epoch, rank, worker), so an epoch can be repeated but not entered in
the middle. For shards on a disk, `load_labelled_images` shuffles perfectly and resumes anywhere.
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
from qtvit.files import open_folder, replacing

from .data import LabelledImages

Transform = Callable[[Image.Image], Tensor]


class ShardStream(IterableDataset[tuple[Tensor, int]]):
    """The transformed images and labels of a split of a packed folder, for a DataLoader with the same ``batch_size``.

    Every process takes ``num_images // (batch_size * world_size)`` full batches in an epoch. The shards are shuffled,
    dealt out to the processes, and then to their workers. A worker whose shards hold more images than it has to yield
    leaves the rest out; one whose shards hold fewer starts them again. Which images these are changes with the epoch.

    Args:
        root: path or URL of the packed folder that ``webdataset`` can open, such as http, https, gs and hf.
        split: "train" or "val".
        transforms: transforms of an RGB image, one for each image size. As with `EpochBatches`, each batch draws one of
            those after the first; if there is only one, all batches use it.
        seed: determines the order, and with the epoch and the image alone the random numbers of the transforms.
        batch_size: images per batch and process.
        rank, world_size: index of this process, and number of processes.
        shuffle_buffer: number of image files in memory from which a worker draws the next one.

    Attributes:
        classes: class names; labels index them.
        num_images: number of images in the split.

    Raises:
        OSError: the index, or during iteration a shard, cannot be read.
        ValueError: the index is damaged, has no val part, or has fewer shards than there are processes. During
            iteration: a shard has another number of images than in the index, or an image is broken (none is skipped).
    """

    def __init__(
        self,
        root: str,
        split: str,
        transforms: Sequence[Transform],
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__()
        index = read_remote_index(root)
        shards = index.splits[split].shards
        if len(shards) < world_size:
            raise ValueError(f"{root}: {len(shards)} {split} shards for {world_size} processes; pack smaller ones")
        self.num_in_shard = {f"{root.rstrip('/')}/{shard.name}": shard.num_images for shard in shards}
        self.classes = index.classes
        self.num_images = sum(self.num_in_shard.values())
        self.transforms, self.seed, self.shuffle_buffer = transforms, seed, shuffle_buffer
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see changes

    def __len__(self) -> int:
        """Number of images that each process takes in an epoch."""
        return self.num_batches * self.batch_size

    @property
    def num_batches(self) -> int:
        """Number of batches that each process takes in an epoch."""
        return self.num_images // (self.batch_size * self.world_size)

    def go_to(self, epoch: int) -> None:
        """Let the next iteration stream this epoch."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._epoch)
        urls = list(self.num_in_shard)
        random.Random(derived_seed(self.seed, epoch)).shuffle(urls)
        urls = urls[self.rank :: self.world_size]
        num_busy = min(num_workers, len(urls))
        # The DataLoader takes its batches from the workers in turn; these are the numbers of this worker's.
        numbers = range(worker, self.num_batches, num_busy)
        if worker >= num_busy or not numbers:
            return
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(urls[worker::num_busy]),
            self._read,
            webdataset.detshuffle(self.shuffle_buffer, seed=derived_seed(self.seed, epoch, self.rank, worker)),
        )
        samples = iter(pipeline.with_epoch(len(numbers) * self.batch_size))  # repeats in another order
        for number in numbers:
            size = drawn_size(self.seed, epoch, number, len(self.transforms) - 1)
            for sample in itertools.islice(samples, self.batch_size):
                yield self._item(sample, epoch, self.transforms[size])

    def _read(self, shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield the samples of the shards, each with key, URL, and the contents of image and label by suffix."""
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

    def _item(self, sample: dict[str, Any], epoch: int, transform: Transform) -> tuple[Tensor, int]:
        key = sample["__key__"]
        (suffix,) = _suffixes(sample) - {"cls"}
        seed_everywhere(self.seed, epoch, int(key))
        try:
            with any_size():
                return transform(open_image(sample[suffix])), int(sample["cls"])
        except ValueError as error:
            name = f"{sample['__url__']}: {key}.{suffix}"
            raise ValueError(f"{name}: {str(error).removeprefix('image bytes: ')}") from error


def remote_images(root: str) -> LabelledImages:
    """Read the packed images at a URL: training images to be streamed, and held-out ones in a copy on this machine.

    The copy is kept in torch.hub's folder; reports need it because they show single images.

    Raises:
        OSError, ValueError: as `ShardStream`, or a shard of held-out images cannot be read or is cut short.
    """
    index = read_remote_index(root)
    name = root.rstrip("/").rpartition("/")[2]
    val = index.splits["val"]
    content = "\n".join([root, *val.path, str(val.size.tolist()), str(val.label.tolist())])
    folder = Path(torch.hub.get_dir(), "qtvit", f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}")
    with FileLock(open_folder(folder) / ".lock"):  # processes that share the machine share the copy
        for shard in console.progress(val.shards, desc="Fetching held-out images", unit="shard"):
            copy = folder / shard.name
            if not copy.is_file() or copy.stat().st_size != shard.num_bytes:
                _fetch(f"{root.rstrip('/')}/{shard.name}", copy)
    if damage := val.damage(folder):
        raise damage[0]
    train, held_out = (
        [*zip(split.sources(folder), split.label.tolist(), strict=True)] for split in (index.splits["train"], val)
    )
    return LabelledImages(name, index.classes, [*train], [*held_out], stream=root)


def _fetch(url: str, path: Path) -> None:
    try:
        with replacing(path) as temporary, webdataset.gopen(url) as source, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    except OSError as error:
        raise OSError(f"{url}: cannot be copied to {path} ({_reason(error)})") from error


@functools.lru_cache(maxsize=1)  # an index of ImageNet has 75 MB and is needed several times
def read_remote_index(root: str) -> ShardIndex:
    """Read the index of packed images at a path or URL.

    Raises:
        OSError: the index cannot be read.
        ValueError: the index is damaged or has no val part, or ``webdataset`` does not know this kind of URL.
    """
    url = f"{root.rstrip('/')}/{INDEX}"
    try:
        with webdataset.gopen(url) as file:
            index = parse_index(file.read(), url)
    except OSError as error:
        raise OSError(f"{url}: cannot be read ({_reason(error)})") from error
    if "val" not in index.splits:
        raise ValueError(f"{root}: packed from a folder without val/; a stream cannot hold images out")
    return index


def _suffixes(sample: dict[str, Any]) -> set[str]:
    return {name for name in sample if not name.startswith("__")}


def _reason(error: Exception) -> str:
    """Why reading failed: the system's message, or the exit code of a program that ``webdataset`` called."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0])
    return text[text.rfind("exit ") :].partition(" (")[0] if "exit " in text else text.partition(" @ ")[0]
