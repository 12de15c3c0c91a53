import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from qtvit.data.sampling import EpochBatches, SeededDataset, derived_seed, even_batches, fixed_keys, seed_everywhere


class Draws(Dataset[torch.Tensor]):
    """An item is its index and one draw from each generator."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def test_an_epoch_is_every_sample_once_in_an_order_of_its_own() -> None:
    batches = EpochBatches(10, 3, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        batches.go_to(epoch)
        keys = list(batches)
        assert [len(batch) for batch in keys] == [3, 3, 3]
        assert {key[0] for batch in keys for key in batch} == {epoch}
        orders.append([key[1] for batch in keys for key in batch])
        assert len(set(orders[-1])) == 9
    assert orders[0] == orders[2] != orders[1]
    assert list(EpochBatches(10, 3, seed=2)) != list(EpochBatches(10, 3, seed=1))


def test_going_on_in_the_middle_of_an_epoch() -> None:
    batches = EpochBatches(10, 3, seed=1)
    batches.go_to(4)
    whole = list(batches)
    batches.go_to(4, 2)
    assert list(batches) == whole[2:]
    assert len(batches) == 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_steps_of_one_process_with_larger_batches(world_size: int) -> None:
    one = list(EpochBatches(25, 2 * world_size, seed=3))
    shares = [list(EpochBatches(25, 2, seed=3, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [[key for part in parts for key in part] for parts in zip(*shares, strict=True)] == one


@pytest.mark.parametrize("num_workers", [0, 2])
def test_randomness_follows_from_seed_epoch_and_sample(num_workers: int) -> None:
    def items(epoch: int, first_batch: int = 0) -> list[list[float]]:
        batches = EpochBatches(8, 2, seed=0)
        batches.go_to(epoch, first_batch)
        loader = DataLoader(SeededDataset([Draws()], seed=5), batch_sampler=batches, num_workers=num_workers)
        return [row for batch in loader for row in batch.tolist()]

    torch.manual_seed(num_workers)  # of no consequence
    first = items(0)
    assert items(0, 2) == first[4:]
    assert items(0) == first
    alone = {row[0]: row for row in first}
    assert SeededDataset([Draws()], seed=5)[(0, 3, 0)].tolist() == alone[3]
    assert all(row[1:] != alone[row[0]][1:] for row in items(1))
    assert SeededDataset([Draws()], seed=6)[(0, 3, 0)].tolist()[1:] != alone[3][1:]


def test_every_number_matters_for_a_seed() -> None:
    seeds = {derived_seed(*numbers) for numbers in [(0,), (1,), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derived_seed(3, 2**70) == derived_seed(np.int64(3), 2**70)  # the value matters, not its type


def test_a_seed_fixes_every_generator() -> None:
    drawn = []
    for seed in (5, 6, 5):
        seed_everywhere(seed)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))


def test_fixed_keys_repeat() -> None:
    assert fixed_keys([4, 2]) == [(0, 4, 0), (0, 2, 0)]


def test_a_batch_has_one_size_the_same_in_all_processes() -> None:
    ranks = [EpochBatches(4000, 2, seed=3, num_sizes=4, rank=rank, world_size=2) for rank in (0, 1)]
    sizes = [[{size for _, _, size in batch} for batch in batches] for batches in ranks]
    assert sizes[0] == sizes[1]
    assert all(len(size) == 1 for size in sizes[0])
    counts = [sum(size == {number} for size in sizes[0]) for number in range(5)]
    assert counts[0] == 0  # of the evaluation
    assert all(200 < count < 300 for count in counts[1:])
    whole = list(ranks[0])
    ranks[0].go_to(0, 700)
    assert list(ranks[0]) == whole[700:]
    assert ranks[0].keys(700) == whole[700]
    ranks[0].go_to(1)
    assert [batch[0][2] for batch in ranks[0]] != [batch[0][2] for batch in whole]


def test_the_size_chooses_the_data_set() -> None:
    class Sized(Dataset[int]):
        def __init__(self, size: int) -> None:
            self.size = size

        def __getitem__(self, index: int) -> int:
            return 100 * self.size + index

    dataset = SeededDataset([Sized(1), Sized(2)], seed=0)
    assert [dataset[(5, 3, 0)], dataset[(5, 3, 1)]] == [103, 203]


@pytest.mark.parametrize("num_samples", [2, 3, 5, 16, 17, 18])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_is_shared_without_repeats(num_samples: int, batch_size: int, world_size: int) -> None:
    shares = [even_batches(num_samples, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(num_samples))
    assert len({len(share) for share in shares}) == 1
    assert all(0 < len(batch) <= max(batch_size, 2) for share in shares for batch in share)
