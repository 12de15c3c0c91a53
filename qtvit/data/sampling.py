"""Which samples a training step sees, and with which random numbers.

Both follow from (seed, epoch, step, sample) alone. They do not depend on how many processes load the images or how
often training was interrupted, so a resumed run goes on exactly where it stopped.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

T = TypeVar("T")

Key = tuple[int, int]
"""Epoch and index of a sample."""


class EpochBatches(Sampler[list[Key]]):
    """Batches of a new random order in every epoch; samples that do not fill the last batch are left out.

    Args:
        num_samples: of the data set.
        batch_size: samples per batch and process.
        seed: of the order.
        rank, world_size: this process and the number of processes, which share each step's ``batch_size *
            world_size`` samples.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for batch in range(self.first_batch, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]

    def go_to(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration yields: the batches of ``epoch`` from ``first_batch`` on."""
        self.epoch, self.first_batch = epoch, first_batch


class SeededDataset(Dataset[T]):
    """``dataset`` with `Key` as index: the random numbers that its item draws follow from ``seed`` and the key."""

    def __init__(self, dataset: Dataset[T], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: Key) -> T:
        _seed_cpu(derived_seed(self.seed, *key))
        return self.dataset[key[1]]


def fixed_keys(indices: Sequence[int]) -> list[Key]:
    """Keys of samples that are the same every time, with the augmentation of epoch 0."""
    return [(0, index) for index in indices]


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
