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

from qtvit.data import open_image
from qtvit.data.sampling import StreamBatches, drawn_size
from qtvit.data.shards import INDEX
from qtvit.tasks.classify.data import load_labelled_images
from qtvit.tasks.classify.pack import pack_folder
from qtvit.tasks.classify.stream import ShardStream, remote_images
from qtvit_cli import main

pytestmark = pytest.mark.slow

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
    return ShardStream(str(root), split, [number], **{"seed": 0, "batch_size": 4, "shuffle_buffer": 8, **options})


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
    assert batches(stream(url + "/", "val")) == batches(stream(packed, "val"))


def test_a_batch_has_one_size_the_same_in_all_processes(packed: Path) -> None:
    sizes = []
    for rank in (0, 1):
        transforms = [lambda image, size=size: torch.tensor([size]) for size in range(4)]
        source = ShardStream(str(packed), "train", transforms, seed=0, batch_size=2, rank=rank, world_size=2)
        sizes.append([set(labels.flatten().tolist()) for labels, _ in DataLoader(source, 2, num_workers=2)])
    assert sizes[0] == sizes[1] == [{drawn_size(0, 0, batch, 3)} for batch in range(len(source) // 2)]
    assert set.union(*sizes[0]) == {1, 2, 3}


def test_it_reaches_loader_processes_that_are_spawned(packed: Path) -> None:
    source = stream(packed)
    copy = pickle.loads(ForkingPickler.dumps(source))
    source.go_to(1)
    assert [float(x[0]) for x, _ in copy] == [row[0] for batch in batches(source, epoch=1) for row in batch]


def test_the_buffer_shuffles_within_shards(packed: Path) -> None:
    sources = [source for source, _ in load_labelled_images(str(packed)).train]
    in_shards = sorted(sources, key=lambda source: (source.shard, source.offset))
    in_order = {float(Path(source.path).stem): place for place, source in enumerate(in_shards)}
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
        batches(stream(tmp_path / "packed", "val", batch_size=1))


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
            batches(stream(url, "val"))
    finally:
        (packed / "away").rename(hidden)


def test_pictures_of_any_size(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # of which PIL makes sure in crops too
    source = stream(packed)
    source.transforms = [lambda image: number(image.crop((0, 0, 20, 20)))]
    assert len(batches(source)) == 15


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies of held-out images are kept."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "qtvit"


def test_held_out_images_are_copied_once(packed: Path, url: str, cache: Path) -> None:
    remote, local = remote_images(url), load_labelled_images(str(packed))
    assert (remote.digest(), remote.stream) == (local.digest(), url)
    assert [open_image(source).tobytes() for source, _ in remote.val] == [
        open_image(source).tobytes() for source, _ in local.val
    ]
    (copy,) = cache.glob("*/val-000000.tar")
    written = copy.stat().st_mtime_ns
    remote_images(url)
    assert copy.stat().st_mtime_ns == written
    copy.write_bytes(b"cut short")
    remote_images(url)
    assert copy.read_bytes() == (packed / "val-000000.tar").read_bytes()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_from_a_url(
    num_workers: int, url: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = f"train classify --data {url} --model qtvit_nano --img-size 8 --batch-size 8 --bn-images 16 --num-threads 1"
    argv += f" --num-workers {num_workers} --augment.train-sizes [8,12] --ema.decay 0.9 --checkpoint-every-steps 2"
    assert main([*argv.split(), "--epochs", "2", "--output", "whole"]) == 0
    calls = []

    def dies_in_the_second_epoch(self: StreamBatches, *args: int) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("dies")
        go_to(self, *args)

    go_to = StreamBatches.go_to
    with monkeypatch.context() as patch:
        patch.setattr(StreamBatches, "go_to", dies_in_the_second_epoch)
        with pytest.raises(RuntimeError, match="dies"):
            main([*argv.split(), "--epochs", "2", "--output", "run"])
    assert main(["train", "classify", "--resume", "run"]) == 0
    ends = [torch.load(f"{run}/last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert Path("run/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()
    assert main([*argv.split(), "--on-bad-image", "skip"]) == 2
