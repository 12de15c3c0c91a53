import functools
import http.server
import itertools
import pickle
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qtvit.data import load_labelled_images, open_image, pack_folder
from qtvit.data.shards import INDEX
from qtvit.data.stream import ShardStream

NUM_TRAIN, NUM_VAL = 60, 11


def number(image: Image.Image) -> torch.Tensor:
    """The number that a picture stands for, and a random one."""
    r, g, _ = image.getpixel((0, 0))  # type: ignore[misc]
    return torch.tensor([256 * r + g, random.random()], dtype=torch.float64)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """71 pictures in two classes, that all differ; in shards of about 4."""
    root = tmp_path_factory.mktemp("data")
    for split, count, first in (("train", NUM_TRAIN, 0), ("val", NUM_VAL, 1000)):
        for i in range(count):
            path = root / "plain" / split / ("cat", "dog")[i % 2] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), divmod(first + i, 256) + (0,)).save(path)  # noqa: RUF005
    pack_folder(str(root / "plain"), root / "packed", 4 * 2000)
    return root / "packed"


@pytest.fixture(scope="module")
def url(packed: Path) -> Iterator[str]:
    """The same from a web server."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(packed)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def stream(root: str | Path, split: str = "train", **options: int) -> ShardStream:
    return ShardStream(str(root), split, number, **{"seed": 0, "batch_size": 4, "shuffle_buffer": 8, **options})


def batches(source: ShardStream, num_workers: int = 0, epoch: int = 0, **options: bool) -> list[list[list[float]]]:
    """Number, random number and label of each image, by batch."""
    source.go_to(epoch)
    loader = DataLoader(source, source.batch_size, num_workers=num_workers, **options)
    return [torch.cat([numbers, labels[:, None]], 1).tolist() for numbers, labels in loader]


def test_the_fixture_has_shards_of_few_images(packed: Path) -> None:
    source = stream(packed)
    assert len(source.num_in_shard) > 10
    assert max(source.num_in_shard.values()) <= 8
    assert (source.num_images, source.classes) == (NUM_TRAIN, ("cat", "dog"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_has_its_own_repeatable_order(num_workers: int, packed: Path) -> None:
    source = stream(packed, batch_size=5)
    assert len(source) == NUM_TRAIN
    orders = [batches(source, num_workers, epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert batches(stream(packed, batch_size=5, seed=1), num_workers) != orders[0]
    for order in orders:
        assert [len(batch) for batch in order] == [5] * 12
        numbers = [row[0] for batch in order for row in batch]
        if num_workers < 2:
            assert sorted(numbers) == list(range(NUM_TRAIN)) != numbers
        assert all(row[2] == row[0] % 2 for batch in order for row in batch)


def test_random_numbers_follow_from_seed_epoch_and_image(packed: Path) -> None:
    def draws(epoch: int, num_workers: int, seed: int = 0) -> dict[float, float]:
        rows = [row for batch in batches(stream(packed, seed=seed), num_workers, epoch) for row in batch]
        return {row[0]: row[1] for row in rows}

    first, again = draws(0, 0), draws(0, 2)
    shared = first.keys() & again.keys()
    assert len(shared) > 20
    assert all(first[key] == again[key] for key in shared)
    assert len(set(first.values())) == NUM_TRAIN
    assert not set(draws(1, 0).values()) & set(first.values())
    assert not set(draws(0, 0, seed=1).values()) & set(first.values())


@pytest.mark.parametrize(("world_size", "batch_size", "num_workers"), [(2, 4, 0), (3, 4, 2), (3, 7, 1)])
def test_all_processes_take_the_same_number_of_steps(
    world_size: int, batch_size: int, num_workers: int, packed: Path
) -> None:
    seen: Counter[float] = Counter()
    for rank in range(world_size):
        source = stream(packed, batch_size=batch_size, rank=rank, world_size=world_size)
        steps = NUM_TRAIN // (batch_size * world_size)
        assert len(source) == steps * batch_size
        order = batches(source, num_workers)
        assert [len(batch) for batch in order] == [batch_size] * steps
        assert len(DataLoader(source, batch_size, num_workers=num_workers)) == steps
        mine = Counter(row[0] for batch in order for row in batch)
        assert not set(mine) & set(seen)
        seen += mine
    assert len(seen) > 0.6 * NUM_TRAIN


def test_more_workers_than_shards(packed: Path) -> None:
    num_shards = len(stream(packed).num_in_shard)
    source = stream(packed, world_size=num_shards, batch_size=1)
    assert [len(batch) for batch in batches(source, num_workers=2)] == [1] * len(source)
    with pytest.raises(ValueError, match=rf"packed: {num_shards} train shards for 99 processes; pack smaller ones"):
        stream(packed, world_size=99)


def test_a_worker_with_too_few_images_begins_its_shards_again(packed: Path) -> None:
    assert list(stream(packed, "val").num_in_shard.values()) == [3, 3, 3, 2]
    different = Counter()
    for epoch in range(6):
        for rank in range(3):
            source = stream(packed, "val", world_size=3, rank=rank, batch_size=1)
            numbers = [row[0] for batch in batches(source, epoch=epoch) for row in batch]
            assert len(numbers) == NUM_VAL // 3
            different[len(set(numbers))] += 1
    assert different[2] > 0  # the shard of two, alone
    assert different[3] > 9


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_over_http(num_workers: int, packed: Path, url: str) -> None:
    assert batches(stream(url), num_workers, 1) == batches(stream(packed), num_workers, 1)
    assert batches(stream(url + "/", "val", once=True)) == batches(stream(packed, "val", once=True))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_image_once_for_evaluation(num_workers: int, world_size: int, packed: Path) -> None:
    rows = []
    for rank in range(world_size):
        source = stream(packed, "val", once=True, rank=rank, world_size=world_size)
        rows += [row for batch in batches(source, num_workers) for row in batch]
    assert sorted(row[0] for row in rows) == [1000 + i for i in range(NUM_VAL)]
    with pytest.raises(TypeError, match="has no length"):
        len(source)
    if (num_workers, world_size) == (0, 1):
        expected = [float(number(open_image(image))[0]) for image, _ in load_labelled_images(str(packed)).val]
        assert [row[0] for row in rows] == expected


def test_workers_that_live_on_hear_of_the_next_epoch(packed: Path) -> None:
    source = stream(packed)
    loader = DataLoader(source, 4, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        source.go_to(epoch)
        orders.append([numbers.tolist() for numbers, _ in loader])
    assert orders[0] == orders[2] != orders[1]


def test_workers_that_inherit_nothing_can_get_the_stream(packed: Path) -> None:
    source = stream(packed)
    copy = pickle.loads(ForkingPickler.dumps(source))  # as the start method "spawn" does
    source.go_to(1)
    assert [float(x[0]) for x, _ in copy] == [row[0] for batch in batches(source, epoch=1) for row in batch]


def test_the_buffer_shuffles_within_shards(packed: Path) -> None:
    in_order = {row[0]: i for i, row in enumerate(r for b in batches(stream(packed, once=True)) for r in b)}
    for buffer, shuffled in ((1, False), (8, True)):
        places = [in_order[row[0]] for batch in batches(stream(packed, shuffle_buffer=buffer)) for row in batch]
        steps = sum(b - a == 1 for a, b in itertools.pairwise(places))
        assert (steps < 25) == shuffled  # of 59, of which 15 lead to another shard


def test_what_can_be_wrong_with_shards(packed: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(packed, root)
    shard = root / "train-000003.tar"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(OSError, match=r"train-000003\.tar: cannot be read \(No such file or directory\)"):
        batches(stream(root))
    shard.write_bytes(content[: 512 + 40])
    with pytest.raises(OSError, match=r"train-000003\.tar: cannot be read \(unexpected end of data\)"):
        batches(stream(root))
    for blocks in (2, 4, 6):  # at the end of an image, of its label, of the next image
        shard.write_bytes(content[: 512 * blocks])
        with pytest.raises(ValueError, match=r"train-000003\.tar: [01] images instead of \d; copy or pack it again"):
            batches(stream(root))
    shard.write_bytes(b"")
    with pytest.raises(OSError, match=r"train-000003\.tar: cannot be read"):
        batches(stream(root))
    shutil.copy(root / "train-000004.tar", shard)
    assert len(batches(stream(root))) == 15  # the shards alone cannot tell


def test_broken_images_are_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "plain" / split / name).mkdir(parents=True)
            (tmp_path / "plain" / split / name / "0.JPG").write_text("<html>")
    pack_folder(str(tmp_path / "plain"), tmp_path / "packed")
    with pytest.raises(ValueError, match=r"val-000000\.tar: 00000000\.jpg: not an image that can be read"):
        batches(stream(tmp_path / "packed", "val", once=True))


def test_what_can_be_wrong_with_the_index(packed: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere/shards\.json: cannot be read \(No such file or directory\)"):
        stream(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"http://.*/nowhere/shards\.json: cannot be read \(exit 22\)"):
        stream(f"{url}/nowhere")
    with pytest.raises(ValueError, match="no gopen handler defined"):
        stream("s4://bucket")
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"shards\.json: not a complete index"):
        stream(tmp_path)
    pack_folder(str(packed.parent / "plain" / "train"), tmp_path / "single")
    with pytest.raises(ValueError, match="single: packed from a folder without val/; a stream cannot hold images out"):
        stream(tmp_path / "single")


def test_a_missing_shard_over_http(packed: Path, url: str) -> None:
    hidden = packed / "val-000001.tar"
    hidden.rename(packed / "away")
    try:
        with pytest.raises((OSError, ValueError), match=r"http://.*/val-000001\.tar: "):
            batches(stream(url, "val", once=True))
    finally:
        (packed / "away").rename(hidden)


def test_pictures_of_any_size(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert len(batches(stream(packed))) == 15
