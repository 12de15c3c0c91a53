"""Packing folders into shards, and reading them as the folders that they were."""

import errno
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from qtvit.checkpoints import load_model
from qtvit.data import PackedImage, Preprocess, open_image
from qtvit.data import shards as shards_module
from qtvit.data.images import relative_path, source_name
from qtvit.data.shards import INDEX, PackedSplit, read_index
from qtvit.tasks.classify.data import ImageDataset, held_out_part, load_labelled_images, read_split
from qtvit.tasks.classify.held_out import held_out_samples
from qtvit.tasks.classify.pack import pack_folder
from qtvit.tasks.classify.unreadable import drop_broken, find_broken
from qtvit_cli import main

NAMES = ("0.png", "a.b.JPG", "sub/ü 2.jpeg", "10.webp", "9.png", "x.PNG")


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog", "eel")) -> Path:
    """Pictures of noise of many kinds and names, and files that are none."""
    for label, name in enumerate(classes):
        for i, file in enumerate(NAMES[: 6 - label]):
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(len(root.name) + 10 * label + i)
            Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(path)
        (root / name / "notes.txt").touch()
    return root


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder of class folders."""
    return make_folder(tmp_path / "photos")


@pytest.fixture
def double(tmp_path: Path) -> Path:
    """A folder with training and held-out images."""
    make_folder(tmp_path / "both" / "Train")
    make_folder(tmp_path / "both" / "validation")
    return tmp_path / "both"


@pytest.fixture
def packed(double: Path, tmp_path: Path) -> Path:
    """``double``, packed into shards of few images."""
    pack_folder(str(double), tmp_path / "packed", 9000)
    return tmp_path / "packed"


def change_index(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((root / INDEX).read_text())
    change(index)
    (root / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["single", "double"])
@pytest.mark.parametrize("shard_bytes", [1, 9000, 10**9])
def test_shards_give_what_the_folder_gives(
    layout: str, shard_bytes: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root, out = request.getfixturevalue(layout), tmp_path / "out"
    pack_folder(str(root), out, shard_bytes)
    for seed in (0, 1):
        plain, packed = (load_labelled_images(str(place), seed=seed) for place in (root, out))
        assert packed.classes == plain.classes == ("cat", "dog", "eel")
        assert packed.digest() == plain.digest()
        assert packed.split == plain.split
        for a, b in ((plain.train, packed.train), (plain.val, packed.val)):
            assert [(Path(str(s)).read_bytes(), source_name(s), label) for s, label in a] == [
                (s.read(), source_name(s), label) for s, label in b if isinstance(s, PackedImage)
            ]
            assert all(
                relative_path(s, root).endswith(t.path)
                for (s, _), (t, _) in zip(a, b, strict=True)
                if isinstance(s, Path) and isinstance(t, PackedImage)
            )
    num_shards = len(list(out.glob("*.tar")))
    num_splits = len(read_index(out).splits)
    assert num_splits == (1 if layout == "single" else 2)
    if shard_bytes == 9000:
        assert num_splits < num_shards < 15 * num_splits
    else:
        assert num_shards == num_splits * (15 if shard_bytes == 1 else 1)


def test_the_held_out_part_is_known_in_either_form(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_folder(str(single), out)
    plain, packed = load_labelled_images(str(single), seed=3), load_labelled_images(str(out), seed=3)
    for split in (plain.split, packed.split):
        for root, data in ((single, plain), (out, packed)):
            assert held_out_part(read_split(root, plain.classes), root, split) == data.val
    assert held_out_part(read_split(out, plain.classes), out, {**plain.split, "trained_on": ["0" * 12]}) is None


def test_labels_follow_the_classes_of_a_model(packed: Path) -> None:
    val = load_labelled_images(str(packed)).val
    found = read_split(packed, ["eel", "ant", "dog", "cat"])
    assert found == [(source, (3, 2, 0)[label]) for source, label in val]
    with pytest.raises(ValueError, match="packed: class folders that the model or train/ does not have: eel; it has"):
        read_split(packed, ["cat", "dog"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_are_the_same_to_the_bit(num_workers: int, double: Path, packed: Path) -> None:
    def items(root: Path) -> list[torch.Tensor]:
        dataset = ImageDataset(load_labelled_images(str(root)).train, Preprocess((16, 16)).transform())
        loader = DataLoader(dataset, batch_sampler=[[3, 14, 0], [7, 8, 1]], num_workers=num_workers)
        return [images for images, _ in loader]

    first = load_labelled_images(str(packed)).train[0][0]
    open_image(first)  # so that its shard is open before the workers start
    for a, b in zip(items(double), items(packed), strict=True):
        assert a.equal(b)


def test_threads_and_few_open_files(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = shards_module.functools.lru_cache(2)(shards_module._OpenShard)
    monkeypatch.setattr(shards_module, "_open_shard", opened)
    samples = load_labelled_images(str(packed)).train
    expected = [source.read() for source, _ in samples if isinstance(source, PackedImage)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    wrong = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(samples), 300).tolist():
            source = samples[i][0]
            assert isinstance(source, PackedImage)
            if source.read() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_packing_twice_gives_the_same_bytes(double: Path, packed: Path, tmp_path: Path) -> None:
    for path in double.rglob("*.png"):
        os.utime(path, (0, 0))
    pack_folder(str(double), tmp_path / "again", 9000)
    names = sorted(path.name for path in packed.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes(), name


def test_shards_are_as_large_as_they_may_be(packed: Path) -> None:
    for split in read_index(packed).splits.values():
        used = [0] * len(split.shards)
        for shard, size in zip(split.shard.tolist(), split.size.tolist(), strict=True):
            used[shard] += size + -size % 512 + 3 * 512
        assert all(num_bytes <= 9000 for num_bytes in used)
        assert all(num_bytes > 5000 for num_bytes in used[:-1])  # no image takes 4000
        end = 2 * 512  # of the archive, which then is filled up to whole records
        assert [shard.num_bytes for shard in split.shards] == [-(-(n + end) // 10240) * 10240 for n in used]


def test_other_programs_can_read_the_shards(packed: Path) -> None:
    split = read_index(packed).splits["train"]
    found: dict[int, tuple[bytes, int]] = {}
    order = []
    for shard in split.shards:
        with tarfile.open(packed / shard.name) as tar:
            members = tar.getmembers()
            assert len(members) == 2 * shard.num_images
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
            for image, label in zip(members[::2], members[1::2], strict=True):
                key = int(image.name.split(".")[0])
                assert label.name == f"{key:08d}.cls"
                assert image.offset_data == split.offset[key]
                assert image.name.split(".")[1] == Path(split.path[key]).suffix[1:].lower()
                files = [tar.extractfile(member) for member in (image, label)]
                content, text = (file.read() if file else b"" for file in files)
                found[key] = content, int(text)
                order.append(key)
    sources = [source for source, _ in load_labelled_images(str(packed)).train]
    assert sorted(found) == list(range(15)) != order  # a stream would not like them sorted by class
    assert [found[key][0] for key in range(15)] == [s.read() for s in sources if isinstance(s, PackedImage)]
    assert [found[key][1] for key in range(15)] == split.label.tolist()
    urls = [str(packed / shard.name) for shard in split.shards]
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        key = int(sample["__key__"])
        suffix = Path(split.path[key]).suffix[1:].lower()
        assert sample["cls"] == split.label[key]
        if suffix != "webp":  # of which it does not know
            assert sample[suffix].tobytes() == open_image(sources[key]).tobytes()


def test_a_packed_image_has_names(packed: Path) -> None:
    (source, _) = load_labelled_images(str(packed)).train[5]
    assert isinstance(source, PackedImage)
    assert (source.path, source.name) == ("cat/x.PNG", "x.PNG")
    assert str(source).endswith(".tar: 00000005.png (cat/x.PNG)")
    assert pickle.loads(pickle.dumps(source)) == source
    assert hash(source) == hash(pickle.loads(pickle.dumps(source)))
    assert not hasattr(source, "__dict__")
    assert source_name(Path("a/b.png")) == "b.png"
    assert source_name(Image.new("RGB", (1, 1))) is None


def test_broken_images_are_packed_and_found(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (single / "cat" / "0.png").write_text("<html>")
    (single / "dog" / "0.png").write_bytes(b"")
    pack_folder(str(single), tmp_path / "out")
    plain, packed = (read_split(root, ["cat", "dog", "eel"]) for root in (single, tmp_path / "out"))
    assert len(find_broken(packed)) == len(find_broken(plain)) == 2
    assert [reason.split("): ")[1] for _, reason in find_broken(packed)] == ["not an image that can be read"] * 2
    capsys.readouterr()
    assert len(drop_broken(packed)) == 13
    assert "train-000000.tar: 00000000.png (cat/0.png): not an image" in capsys.readouterr().out


def test_names_in_any_encoding(single: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(single / "cat" / "0.png", single / "cat" / name)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    pack_folder(str(single), tmp_path / "out")
    assert f"cat/{name}" in read_index(tmp_path / "out").splits["train"].path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / INDEX).write_text("{"), r"shards\.json: not a complete index of packed images"),
        (lambda out: (out / INDEX).write_bytes(b"\xff\x00"), "not a complete index"),
        (lambda out: (out / INDEX).write_text("[]"), "not a complete index"),
        (lambda out: (out / INDEX).write_text("{}"), r"not a complete index of packed images \(no 'format'\)"),
        (lambda out: change_index(out, lambda i: i.update(format="x")), "not a complete index .*another format"),
        (lambda out: change_index(out, lambda i: i.update(version=2)), "version 2; this release of qtvit reads .* 1"),
        (lambda out: change_index(out, lambda i: i.pop("classes")), r"a damaged index \(no 'classes'\)"),
        (lambda out: change_index(out, lambda i: i["splits"].pop("train")), r"a damaged index \(no 'train'\)"),
        (lambda out: change_index(out, lambda i: i["splits"]["train"]["label"].pop()), "lists of different lengths"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"].update(label=[3] * 15)), "labels that do not"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"].update(label=[-1] * 15)), "labels that do not"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"].update(shard=[99] * 15)), "shards that do not"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"].update(shard=[0] * 15)), "in other shards"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"].update(shard=["a"] * 15)), "a damaged index"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"]["offset"].__setitem__(0, 0)), "offsets that are"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"]["offset"].__setitem__(0, 513)), "offsets that are"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"]["size"].__setitem__(0, -1)), "offsets that are"),
        (lambda out: change_index(out, lambda i: i["splits"]["val"]["size"].__setitem__(0, 10**6)), "offsets that are"),
        (
            lambda out: change_index(out, lambda i: i["splits"]["val"]["shards"][0].update(name="../val.tar")),
            r"damaged index \(shard '\.\./val\.tar' is not in its folder\)",
        ),
        (lambda out: os.truncate(out / "val-000000.tar", 5120), r"val-000000\.tar: 5120 bytes instead of \d+; copy or"),
    ],
)
def test_damaged_indices_and_shards(damage: Callable[[Path], object], message: str, packed: Path) -> None:
    damage(packed)
    with pytest.raises(ValueError, match=message) as error:
        load_labelled_images(str(packed))
    assert "\n" not in str(error.value)
    assert str(packed) in str(error.value)


def test_a_missing_shard(packed: Path) -> None:
    (packed / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar: no such shard, but shards\.json names it"):
        load_labelled_images(str(packed))


def test_shards_that_change_later(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = load_labelled_images(str(packed)).train
    source = samples[0][0]
    assert isinstance(source, PackedImage)
    name = rf"{source.shard.name}: 00000000\.png \(cat/0\.png\): "
    content = source.shard.read_bytes()
    os.truncate(source.shard, source.offset + source.size - 1)
    with pytest.raises(ValueError, match=name + r"the shard is cut short; it has to have \d+ bytes"):
        open_image(source)
    source.shard.write_bytes(content[:512] * (len(content) // 512))
    wrong = next(s for s, _ in samples if isinstance(s, PackedImage) and s.shard == source.shard and s.offset > 512)
    with pytest.raises(ValueError, match=rf"not at byte {wrong.offset} of this shard"):
        open_image(wrong)
    with monkeypatch.context() as patch:

        def fail(*args: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(os, "pread", fail)
        with pytest.raises(OSError, match=name + r"cannot be read \(Input/output error\)"):
            open_image(source)
    for shard in packed.glob("*.tar"):
        shard.unlink()
    shards_module._open_shard.cache_clear()
    with pytest.raises(FileNotFoundError, match=name + "no such shard"):
        open_image(source)
    assert len(find_broken(samples)) == len(samples)


def test_short_reads_are_completed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_labelled_images(str(packed)).train[0][0]
    assert isinstance(source, PackedImage)
    expected, pread = source.read(), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 100), offset))
    assert source.read() == expected


def test_a_folder_that_is_packed_anew_is_read_anew(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for size in (20, 50):
        Image.new("RGB", (size, size)).save(single / "cat" / "0.png")
        shutil.rmtree(out, ignore_errors=True)
        pack_folder(str(single), out)
        assert open_image(read_split(out, ["cat", "dog", "eel"])[0][0]).size == (size, size)


def test_where_shards_cannot_go(single: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packed exists already and is not empty; name another folder"):
        pack_folder(str(single), packed)
    with pytest.raises(ValueError, match="exists already"):
        pack_folder(str(single), single / "cat" / "0.png")
    with pytest.raises(ValueError, match="packed: packed already"):
        pack_folder(str(packed), tmp_path / "new")
    with pytest.raises(ValueError, match=r"new is in .*photos, where its files would be taken for images"):
        pack_folder(str(single), single / "new")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        pack_folder("nowhere", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        pack_folder(str(tmp_path / "empty"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    pack_folder(str(single), tmp_path / "empty")


@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_nothing(
    existed: bool, double: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    addfile, count = tarfile.TarFile.addfile, [0]

    def fail(self: tarfile.TarFile, info: tarfile.TarInfo, file: io.BytesIO) -> None:
        count[0] += 1
        if count[0] > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        addfile(self, info, file)

    monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    with pytest.raises(OSError, match=r"val-00000\d\.tar: cannot be written \(No space left on device\)"):
        pack_folder(str(double), out, 9000)
    assert out.exists() == existed
    assert not existed or not any(out.iterdir())


def test_an_image_that_cannot_be_read_leaves_nothing(single: Path, tmp_path: Path) -> None:
    (single / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(OSError, match=r"gone\.png: cannot be read \(No such file or directory\)"):
        pack_folder(str(single), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_offsets_beyond_32_bits(packed: Path) -> None:
    """A sparse shard of 5 GB, as there is no time to write a full one."""
    split = read_index(packed).splits["train"]
    offset = 5 * 2**30
    with (packed / split.shards[0].name).open("r+b") as file:
        key = int(np.flatnonzero(split.shard == 0)[0])
        file.seek(int(split.offset[key]) - 512)
        member = file.read(512 + int(split.size[key]))
        file.seek(offset - 512)
        file.write(member)
    source = PackedImage(packed / split.shards[0].name, offset, int(split.size[key]), key, split.path[key])
    assert source.read() == member[512:]


def test_the_command_and_a_run_from_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, color in (("blue", (40, 60, 200)), ("red", (200, 50, 40))):
        for i in range(8):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), tuple(value + 3 * i for value in color)).save(path)
    assert main(["data", "pack", "photos", "packed", "--shard-size", "1"]) == 0
    assert "packed 16 train images of 2 classes into 1 shard, 0.0 MB: packed\n" in capsys.readouterr().out
    assert main(["data", "pack", "photos", "packed"]) == 2
    assert "qtvit: error: packed exists already" in capsys.readouterr().err
    argv = "train classify --model qtvit_nano --img-size 16 --epochs 2 --batch-size 4 --num-workers 0 --num-threads 1"
    for data in ("photos", "packed"):
        assert main([*argv.split(), "--data", data, "--output", data + "-run"]) == 0
    plain, packed = (load_model(tmp_path / f"{data}-run") for data in ("photos", "packed"))
    assert plain[1] == packed[1]
    for name, tensor in plain[0].state_dict().items():
        assert tensor.equal(packed[0].state_dict()[name]), name
    assert (tmp_path / "packed-run" / "mistakes.png").is_file()
    samples, which = held_out_samples("packed", packed[1])
    assert len(samples) == 4
    assert "held out from training" in which
    capsys.readouterr()
    for data in ("photos", "packed"):
        assert main(["eval", "photos-run", "--data", data, "--num-workers", "0", "--output", f"{data}-eval"]) == 0
    first, second = (json.loads((tmp_path / f"{d}-eval" / "scores.json").read_text()) for d in ("photos", "packed"))
    assert first["per_class"] == second["per_class"]
    assert first["loss"] == second["loss"]


def test_a_split_can_be_empty_of_shards(tmp_path: Path) -> None:
    empty = np.zeros(0, np.int64)
    assert PackedSplit([], empty, empty, empty, empty, []).sources(tmp_path) == []
