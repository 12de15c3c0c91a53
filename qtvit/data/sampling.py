"""Which samples a training step sees, and with which random numbers.

Both follow from (seed, epoch, step, sample) alone. They do not depend on how many processes load the images or how
often training was interrupted, so a resumed run goes on exactly where it stopped.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

T = TypeVar("T")

Key = tuple[int, int, int]
"""Epoch and index of a sample, and the number of the image size that its batch has."""


class EpochBatches(Sampler[list[Key]]):
    """Batches of a new random order in every epoch; samples that do not fill the last batch are left out.

    Args:
        num_samples: of the data set.
        batch_size: samples per batch and process.
        seed: of the order.
        num_sizes: how many image sizes there are besides size 0, which is for evaluation; each batch draws one, the
            same in all processes. With none, all batches have size 0.
        rank, world_size: this process and the number of processes, which share each step's ``batch_size *
            world_size`` samples.
    """

    any_batch = True
    """Whether an epoch can be entered at any batch."""

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        num_sizes: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.num_sizes = num_sizes
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()
        return (self._keys(order, batch) for batch in range(self.first_batch, len(self)))

    def keys(self, batch: int) -> list[Key]:
        """The samples of one batch of the current epoch."""
        return self._keys(self._order(), batch)

    def go_to(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration yields: the batches of ``epoch`` from ``first_batch`` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def _keys(self, order: list[int], batch: int) -> list[Key]:
        size = drawn_size(self.seed, self.epoch, batch, self.num_sizes)
        start = (batch * self.world_size + self.rank) * self.batch_size
        return [(self.epoch, index, size) for index in order[start : start + self.batch_size]]


class StreamBatches:
    """In the place of `EpochBatches` for a stream, which is entered at its beginning and gives what comes.

    Args:
        num_batches: of an epoch.
        start: makes the stream begin an epoch.
    """

    any_batch = False

    def __init__(self, num_batches: int, start: Callable[[int], None]) -> None:
        self.num_batches = num_batches
        self.start = start
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_batches

    def go_to(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration is that of ``epoch``; ``first_batch`` has to be 0."""
        assert first_batch == 0
        self.epoch = epoch
        self.start(epoch)

    def keys(self, batch: int) -> list[Key]:
        """Which samples a batch has is not known: none."""
        return []


class FirstBatches(Iterable[T]):
    """The first ``num_batches`` of ``loader``, each time anew."""

    def __init__(self, loader: Iterable[T], num_batches: int) -> None:
        self.loader = loader
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[T]:
        return itertools.islice(self.loader, self.num_batches)


class SeededDataset(Dataset[T]):
    """One of ``datasets``, the same samples in several sizes, with `Key` as index: the random numbers that an item
    draws follow from ``seed``, the epoch and the index.
    """

    def __init__(self, datasets: Sequence[Dataset[T]], seed: int) -> None:
        self.datasets = datasets
        self.seed = seed

    def __getitem__(self, key: Key) -> T:
        epoch, index, size = key
        _seed_cpu(derived_seed(self.seed, epoch, index))
        return self.datasets[size][index]


def fixed_keys(indices: Sequence[int]) -> list[Key]:
    """Keys of samples that are the same every time, in the evaluation's size and with the augmentation of epoch 0."""
    return [(0, index, 0) for index in indices]


def drawn_size(seed: int, epoch: int, batch: int, num_sizes: int) -> int:
    """The number of the image size of a batch: one of 1 … ``num_sizes``, or 0 if that is 0."""
    return 1 + derived_seed(seed, epoch, batch) % num_sizes if num_sizes else 0


def even_batches(num_samples: int, batch_size: int, *, rank: int, world_size: int) -> list[list[int]]:
    """Every ``world_size``-th sample, in batches of at most ``batch_size`` (but see below) and of nearly equal size.

    All processes get the same number of batches, and no sample comes twice. With fewer than two samples a batch that
    may take one batch of two.
    """
    fewest = num_samples // world_size
    num_batches = min(math.ceil(math.ceil(num_samples / world_size) / batch_size), fewest)
    return [part.tolist() for part in np.array_split(np.arange(rank, num_samples, world_size), num_batches)]


def derived_seed(*numbers: int) -> int:
    """A 64-bit seed that depends on every one of ``numbers``."""
    text = repr([int(number) for number in numbers])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_everywhere(*numbers: int) -> None:
    """Set the random number generators of Python, NumPy and torch to a state that ``numbers`` determine."""
    seed = derived_seed(*numbers)
    _seed_cpu(seed)
    torch.manual_seed(seed)


def _seed_cpu(seed: int) -> None:
    """Seed the generators that images are augmented with; those of GPUs are left alone, as that takes longer."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
