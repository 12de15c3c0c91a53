import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtvit.data.shards import read_index
from qtvit.tasks.classify.check import Duplicates, check_data
from qtvit.tasks.classify.pack import pack_folder
from qtvit_cli import main


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 50)) -> Path:
    """Noise of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Two classes in train and val without a fault."""
    for i, split in enumerate(("train", "val")):
        for j, name in enumerate(("cat", "dog")):
            for k in range(3 - i):
                draw(tmp_path / "good" / split / name / f"{k}.png", 100 * i + 10 * j + k, (40 + k, 50 + 10 * i))
    return tmp_path / "good"


@pytest.fixture
def bad(good: Path) -> Path:
    """``good`` with one or two of every fault."""
    root = good.rename(good.with_name("bad"))
    train, val = root / "train", root / "val"
    (train / "cat" / "0.png").write_text("<html>")
    (train / "dog" / "9.jpg").write_bytes(b"")
    draw(train / "dog" / "thin.png", 500, (31, 90))
    draw(train / "dog" / "just.png", 501, (32, 90))
    shutil.copy(train / "cat" / "1.png", train / "dog" / "wrong.png")
    shutil.copy(train / "dog" / "1.png", val / "dog" / "leak.png")
    shutil.copy(train / "dog" / "2.png", train / "dog" / "2b.png")
    shutil.copy(train / "dog" / "2.png", train / "dog" / "2c.png")
    (train / "empty").mkdir()
    (train / "empty" / "readme.txt").touch()
    draw(val / "zebra" / "0.png", 502)
    draw(val / "loose.png", 503)
    (val / "dog" / "NOTES.TXT").touch()
    (val / "dog" / ".hidden.png").touch()
    return root


def test_a_good_folder(good: Path) -> None:
    report = check_data(str(good))
    assert report.num_problems == 0
    assert report.splits["train"].class_counts == {"cat": 3, "dog": 3}
    assert (report.splits["train"].num_images, report.splits["val"].num_images) == (6, 4)
    assert report.splits["train"].width == (40, 41, 42)
    assert report.splits["train"].height == (50, 50, 50)
    assert report.splits["val"].height == (60, 60, 60)
    assert report.lines() == [
        "train: 6 images in 2 classes",
        "  images per class: 3 to 3, median 3",
        "  width: 40 to 42 px, median 41",
        "  height: 50 to 50 px, median 50",
        "val: 4 images in 2 classes",
        "  images per class: 2 to 2, median 2",
        "  width: 40 to 41 px, median 40.5",
        "  height: 60 to 60 px, median 60",
        "no problems found",
    ]


def test_all_problems_at_once(bad: Path) -> None:
    report = check_data(str(bad))
    train, val = bad / "train", bad / "val"
    assert report.broken == [
        f"{train}/cat/0.png: not an image that can be read",
        f"{train}/dog/9.jpg: not an image that can be read",
    ]
    assert report.tiny == [f"{train}/dog/thin.png: 31 x 90"]
    assert report.conflicts == [Duplicates([f"{train}/cat/1.png", f"{train}/dog/wrong.png"], ["train"], ["cat", "dog"])]
    assert report.leaks == [Duplicates([f"{train}/dog/1.png", f"{val}/dog/leak.png"], ["train", "val"], ["dog"])]
    assert report.duplicates == [
        Duplicates([f"{train}/dog/{name}.png" for name in ("2", "2b", "2c")], ["train"], ["dog"])
    ]
    assert report.folders == [
        f"{train}/empty: no images in this class folder",
        f"{val}: images that are in no class folder: loose.png",
        f"{val}: no folder empty, which {train} has",
        f"{train}: no folder zebra, which {val} has",
    ]
    assert report.other_files == {".txt": 2}
    assert report.num_problems == 10
    assert report.splits["train"].class_counts == {"cat": 3, "dog": 9, "empty": 0}
    assert report.splits["val"].class_counts == {"cat": 2, "dog": 3, "zebra": 1}
    assert report.splits["train"].width == (31, 41, 42)  # of those that can be read
    lines = report.lines()
    assert lines[1] == "  images per class: 0 to 9, median 3"
    assert "4 problems: with class folders or shards" in lines
    assert f"  {train}/dog/1.png = {val}/dog/leak.png" in lines
    assert "1 problem: images with a side below 32 px" in lines
    assert lines[-2:] == ["ignored, as no images by their names: 2 .txt", "10 problems found"]


def test_a_leak_may_be_a_conflict_too(good: Path) -> None:
    shutil.copy(good / "train" / "cat" / "0.png", good / "val" / "dog" / "0b.png")
    report = check_data(str(good))
    assert report.conflicts == report.leaks != []
    assert report.duplicates == []


def test_broken_files_are_no_duplicates(good: Path) -> None:
    for name in ("a.png", "b.png"):
        (good / "train" / "cat" / name).touch()
    report = check_data(str(good))
    assert (len(report.broken), report.duplicates) == (2, [])


def test_the_smallest_side_is_a_choice(good: Path) -> None:
    assert len(check_data(str(good), min_side=41).tiny) == 4
    assert len(check_data(str(good), min_side=40).tiny) == 0


def test_layouts(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    assert check_data(str(root)).folders == [f"{root}: no class folders"]
    draw(root / "cat" / "0.png", 0)
    assert check_data(str(root)).folders == [
        f"{root}: one class only",
        f"{root}: one image only in class cat, so none can be held out",
    ]
    draw(root / "cat" / "1.png", 1)
    draw(root / "dog" / "0.png", 2)
    report = check_data(str(root))
    assert report.folders == [f"{root}: one image only in class dog, so none can be held out"]
    assert list(report.splits) == ["train"]
    pack_folder(str(root), tmp_path / "packed")
    assert check_data(str(tmp_path / "packed")).folders == [report.folders[0].replace("photos", "packed")]
    for name in ("train", "validation"):
        (root / name).mkdir()
        for part in ("cat", "dog"):
            shutil.copytree(root / "cat", root / name / part)
        found = check_data(str(root)).folders
        assert found == ([f"{root}: has train/ but none of val/, valid/, validation/, test/"] * (name == "train"))
    shutil.rmtree(root / "train")
    assert check_data(str(root)).folders == [f"{root}: has validation/ but no train/"]


def test_packed_folders(bad: Path, tmp_path: Path) -> None:
    for path in (bad / "train" / "empty", bad / "val" / "zebra"):
        shutil.rmtree(path)
    plain = check_data(str(bad))
    out = tmp_path / "packed"
    pack_folder(str(bad), out, 20_000)
    packed = check_data(str(out))
    assert packed.splits == plain.splits
    assert len(packed.broken) == 2
    assert packed.broken[0].endswith(": 00000000.png (cat/0.png): not an image that can be read")
    for groups, plain_groups in ((packed.conflicts, plain.conflicts), (packed.leaks, plain.leaks)):
        assert [(g.splits, g.classes) for g in groups] == [(g.splits, g.classes) for g in plain_groups]
    assert [len(group.images) for group in packed.duplicates] == [3]
    assert packed.folders == []
    first, second, *_ = sorted(out.glob("train-*.tar"))
    first.unlink()
    os.truncate(second, 1024)
    damaged = check_data(str(out))
    num_bytes = read_index(out).splits["train"].shards[1].num_bytes
    assert damaged.folders == [
        f"{first}: no such shard, but shards.json names it",
        f"{second}: 1024 bytes instead of {num_bytes}; copy or pack it again",
    ]
    assert any("no such shard" in reason for reason in damaged.broken)
    assert any("the shard is cut short" in reason for reason in damaged.broken)


def test_long_lists_are_cut(good: Path) -> None:
    for i in range(13):
        (good / "train" / "cat" / f"x{i:02d}.png").touch()
    lines = check_data(str(good)).lines()
    assert "  and 3 more" in lines
    assert sum("not an image" in line for line in lines) == 10
    for path in (good / "train" / "cat").glob("x*"):
        shutil.copy(good / "train" / "dog" / "0.png", path)
    assert any(line.endswith(" = …") and line.count(" = ") == 10 for line in check_data(str(good)).lines())


def test_files_that_may_not_be_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "2.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    found = check_data(str(good)).broken
    assert found == [f"{good}/train/{name}/2.png: cannot be read (Permission denied)" for name in ("cat", "dog")]


def test_the_command(bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.json"
    assert main(["data", "check", str(bad), "--json", str(out), "--num-workers", "2"]) == 1
    printed = capsys.readouterr().out
    assert "10 problems found" in printed
    report = json.loads(out.read_text())
    assert report["num_problems"] == 10
    assert report["leaks"][0]["splits"] == ["train", "val"]
    assert report["splits"]["train"]["class_counts"]["dog"] == 9
    shutil.rmtree(bad / "train" / "empty")
    assert main(["data", "check", str(bad)]) == 1
    assert main(["data", "check", "nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "check", "--help"])
    assert "exit code is 1" in " ".join(capsys.readouterr().out.split())


def test_the_command_on_a_good_folder(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quiet", "data", "check", str(good)]) == 0
    assert capsys.readouterr().out.endswith("no problems found\n")
