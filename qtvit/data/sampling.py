"""Which samples each training step sees, and the random numbers that augment them.

Both are functions of (seed, epoch, step, sample) alone. So neither the number of loader processes nor an interruption
changes a run: a resumed run goes on exactly where it stopped.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

T = TypeVar("T")

Key = tuple[int, int, int]
"""Epoch, index of the sample, and number of the image size of its batch (0 is the size for evaluation)."""


@dataclass(eq=False)
class EpochBatches(Sampler[list[Key]]):
    """Batches in a new random order in every epoch; samples that do not fill the last batch are left out.

    Attributes:
        num_samples: size of the data set.
        batch_size: samples per batch and process.
        seed: determines the orders and the sizes.
        num_sizes: number of extra training resolutions; each batch draws one, the same in all processes. 0: the
            evaluation size only.
        rank, world_size: number of this process and of all processes, which share the ``batch_size * world_size``
            samples of each step.
    """

    num_samples: int
    batch_size: int
    seed: int
    num_sizes: int = field(default=0, kw_only=True)
    rank: int = field(default=0, kw_only=True)
    world_size: int = field(default=1, kw_only=True)
    epoch: int = field(default=0, init=False)
    first_batch: int = field(default=0, init=False)

    any_batch: ClassVar[bool] = True
    """Whether an epoch can be entered at any batch."""

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()
        return (self._keys(order, batch) for batch in range(self.first_batch, len(self)))

    def keys(self, batch: int) -> list[Key]:
        """The samples of one batch of the current epoch."""
        return self._keys(self._order(), batch)

    def go_to(self, epoch: int, first_batch: int = 0) -> None:
        """Let the next iteration yield the batches of ``epoch`` from ``first_batch`` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def _keys(self, order: list[int], batch: int) -> list[Key]:
        size = drawn_size(self.seed, self.epoch, batch, self.num_sizes)
        start = (batch * self.world_size + self.rank) * self.batch_size
        return [(self.epoch, index, size) for index in order[start : start + self.batch_size]]


@dataclass(eq=False)
class StreamBatches:
    """The counterpart of `EpochBatches` for a stream, which can only be read from the beginning of an epoch.

    Attributes:
        num_batches: batches per epoch.
        start: function that makes the stream begin an epoch.
    """

    num_batches: int
    start: Callable[[int], None]
    epoch: int = field(default=0, init=False)

    any_batch: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.num_batches

    def go_to(self, epoch: int, first_batch: int = 0) -> None:
        """Let the next iteration be that of ``epoch``; ``first_batch`` must be 0."""
        assert first_batch == 0
        self.epoch = epoch
        self.start(epoch)

    def keys(self, batch: int) -> list[Key]:
        """An empty list: it is not known which samples a batch of a stream has."""
        return []


@dataclass(eq=False)
class FirstBatches(Iterable[T]):
    """The first ``num_batches`` batches of ``loader``, which every iteration reads anew."""

    loader: Iterable[T]
    num_batches: int

    def __iter__(self) -> Iterator[T]:
        return itertools.islice(self.loader, self.num_batches)


@dataclass(eq=False)
class SeededDataset(Dataset[T]):
    """Data sets with the same samples, one for each image size, indexed by `Key`.

    The random numbers that augment an item follow from ``seed``, its epoch and its index.
    """

    datasets: Sequence[Dataset[T]]
    seed: int

    def __getitem__(self, key: Key) -> T:
        epoch, index, size = key
        _seed_cpu(derived_seed(self.seed, epoch, index))
        return self.datasets[size][index]


def fixed_keys(indices: Sequence[int]) -> list[Key]:
    """Keys of samples that are the same every time: in the evaluation size, with the augmentation of epoch 0."""
    return [(0, index, 0) for index in indices]


def drawn_size(seed: int, epoch: int, batch: int, num_sizes: int) -> int:
    """The number of a batch's image size: one of 1 … ``num_sizes``, or 0 if ``num_sizes`` is 0."""
    return 1 + derived_seed(seed, epoch, batch) % num_sizes if num_sizes else 0


def even_batches(num_samples: int, batch_size: int, *, rank: int, world_size: int) -> list[list[int]]:
    """Every ``world_size``-th sample, in batches of nearly equal size.

    All processes get the same number of batches, because DDP synchronises at each, and no sample comes twice. Batches
    have at most ``batch_size`` samples; only if that is 1, one of them may have two.
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
    """Seed the generators that augment images; not those of GPUs, as that takes longer."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
