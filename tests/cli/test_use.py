"""What ``qtvit eval`` and ``qtvit predict`` say and write."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from qtvit.deploy import annotate
from qtvit_cli import main
from tests.training.conftest import COLORS, draw


@pytest.fixture
def spoilt(photos: Path, tmp_path: Path) -> Path:
    """Three images of a folder, and two files that only look like images."""
    folder = tmp_path / "spoilt" / "red"
    folder.mkdir(parents=True)
    for i in range(3):
        shutil.copy(photos / "red" / f"{i}.png", folder)
    (folder / "1a.png").write_text("not a picture")
    (folder / "3.png").write_text("not a picture")
    return tmp_path / "spoilt"


def test_eval_prints_scores_and_leaves_a_report(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["eval", str(run), "--data", str(photos)]) == 0
    headline, header, *rows, mean, report = capsys.readouterr().out.splitlines()[7:]
    assert re.fullmatch(
        r"top-1 100.00 %   ECE \d+\.\d\d %   of 6 images: the part of .* \(30 images in all\)", headline
    )
    assert header.split()[0] == "class"
    assert [row.split()[:3] for row in rows] == [[color, "2", "100.00"] for color in COLORS]
    assert mean.startswith("mean of 3 classes")
    assert report == f"report: {Path('runs', 'eval-first-photos-2')}"
    scores = json.loads(Path("runs", "eval-first-photos", "scores.json").read_text())
    assert (scores["data"], scores["top1"], len(scores["per_class"])) == (str(photos), 100, 3)
    with Image.open("runs/eval-first-photos/mistakes.png") as sheet:
        assert sheet.width > 6 * annotate.TILE


def test_eval_names_the_classes_without_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "some" / "red" / "1.png", COLORS["blue"], 3)
    assert main(["eval", str(run / "best.safetensors"), "--data", "some", "--output", "new/report"]) == 0
    out = capsys.readouterr().out
    assert "top-1 0.00 %" in out
    assert "of 1 image: all images in some" in out
    assert "no images of 2 of the 3 classes: blue, green" in out
    assert "mean of 1 class " in out
    assert (tmp_path / "new" / "report" / "confusion.png").is_file()


def test_eval_writes_into_no_folder_that_is_in_use(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--data", str(photos), "--output", str(run)]) == 2
    assert "exists already and is not empty" in capsys.readouterr().err


def test_eval_stops_at_a_bad_image_or_skips_it(run: Path, spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", str(run), "--data", str(spoilt), "--num-workers", "0"]
    assert main(argv) == 2
    assert "1a.png: not an image that can be read" in capsys.readouterr().err
    assert not list(Path("runs").iterdir())
    assert main([*argv, "--on-bad-image", "skip"]) == 0
    out = capsys.readouterr().out
    assert "skipping 2 of 5 images" in out
    assert "of 3 images" in out


def test_quiet_leaves_the_results_alone(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--data", str(photos), "--quiet"]) == 0
    headline, *table, report = capsys.readouterr().out.splitlines()
    assert headline.startswith("top-1")
    assert len(table) == 5  # a head, three classes, their mean
    assert report.startswith("report: ")
    assert main(["predict", str(run), str(photos), "--quiet", "--csv", "p.csv"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 31
    assert captured.out.endswith("written: p.csv\n")
    assert captured.err == ""


def test_links_that_lead_nowhere_are_skipped_too(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "linked")
    (tmp_path / "linked" / "red" / "x.png").symlink_to("nowhere.png")
    options = ["--on-bad-image", "skip"]
    assert main(["predict", str(run), str(tmp_path / "linked"), *options]) == 0
    assert "skipped 1 of 31 images" in capsys.readouterr().out
    argv = f"train classify --model qtvit_nano --data {tmp_path / 'linked'} --img-size 8 --epochs 1 --batch-size 8"
    assert main([*argv.split(), "--num-workers", "0", "--output", str(tmp_path / "new"), *options]) == 0
    assert "skipping 1 of " in capsys.readouterr().out


def test_bars_need_a_terminal(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["predict", str(run), str(photos)]
    assert main(argv) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    assert main(argv) == 0
    assert "/30 [" in capsys.readouterr().err


def test_predict_prints_a_table(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), str(photos), "--top-k", "2", "--batch-size", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert len({line.index("%") for line in lines}) == 1
    assert re.search(r"blue.0\.png +blue +\d+\.\d%   (green|red) \d+\.\d%$", lines[0])


def test_predict_writes_csv(run: Path, photos: Path, tmp_path: Path) -> None:
    argv = ["predict", str(run), str(photos / "red"), "--csv", "new/p.csv", "--json", "new/p.json"]
    assert main([*argv, "--top-k", "9"]) == 0
    with (tmp_path / "new" / "p.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 * 3
    assert [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    assert (rows[0]["image"], rows[0]["label"]) == (str(photos / "red" / "0.png"), "red")
    for image in range(10):
        assert sum(float(row["probability"]) for row in rows[3 * image : 3 * image + 3]) == pytest.approx(1, abs=1e-5)
    assert json.loads(Path("new/p.json").read_text())[3]["predictions"][0]["label"] == "red"


def test_predict_draws_sheets(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(annotate, "PER_SHEET", 12)
    assert main(["predict", str(run), str(photos), "--save", "new/sheet.png"]) == 0
    assert sorted(path.name for path in Path("new").iterdir()) == ["sheet-2.png", "sheet-3.png", "sheet.png"]
    assert "written: new/sheet.png, new/sheet-2.png, new/sheet-3.png" in capsys.readouterr().out.replace("\\", "/")
    sizes = [Image.open(f"new/sheet{number}.png").size for number in ("", "-2", "-3")]
    assert sizes[0] == sizes[1]
    assert sizes[2][1] < sizes[0][1]


def test_predict_draws_into_a_folder(run: Path, photos: Path, tmp_path: Path) -> None:
    Image.open(photos / "red" / "0.png").resize((400, 300)).save(tmp_path / "photo.JPG")
    images = [photos, photos / "red" / "1.png", photos / "blue", tmp_path / "photo.JPG"]
    assert main(["predict", str(run), *map(str, images), "--save", "drawn", "--quiet"]) == 0
    written = {path.relative_to("drawn").as_posix() for path in Path("drawn").rglob("*") if path.is_file()}
    assert {"red/1.png", "blue/1.png", "photo.JPG"} <= written
    assert len(written) == 31  # an image that is named twice is predicted once
    with Image.open("drawn/photo.JPG") as drawn:
        assert drawn.width == 400
        assert drawn.height > 300
        assert drawn.getpixel((350, 250)) == pytest.approx((128, 128, 128), abs=3)


def test_names_in_the_folder_are_unique(run: Path, photos: Path, tmp_path: Path) -> None:
    for suffix in ("png", "bmp", "webp"):
        (tmp_path / suffix).mkdir()
        Image.open(photos / "red" / "0.png").save(tmp_path / suffix / f"a.{suffix}")
    images = [str(tmp_path / suffix) for suffix in ("png", "bmp", "webp")]
    assert main(["predict", str(run), *images, "--save", "drawn"]) == 0
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["a-2.png", "a-3.png", "a.png"]


def test_predict_overwrites_no_image_to_predict(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos / "red", tmp_path / "mine")
    before = (tmp_path / "mine" / "0.png").read_bytes()
    for save in (".", "mine", "mine/0.png"):
        assert main(["predict", str(run), "mine", "--save", save]) == 2
        assert "holds images to predict" in capsys.readouterr().err
    assert (tmp_path / "mine" / "0.png").read_bytes() == before


@pytest.mark.parametrize("option", [["--save", "folder.png"], ["--save", "file"], ["--csv", "folder.png"]])
def test_unsuitable_outputs_are_refused_before_any_work(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder.png").mkdir()
    Path("file").touch()
    with pytest.raises(SystemExit):
        main(["predict", "nowhere", "x.jpg", *option])
    assert f"argument {option[0]}: {option[1]} is a f" in capsys.readouterr().err


def test_predict_stops_at_a_bad_image_or_skips_it(run: Path, spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["predict", str(run), str(spoilt), "--json", "p.json"]
    assert main(argv) == 2
    assert "1a.png: not an image that can be read" in capsys.readouterr().err
    for batch_size in ("1", "2", "32"):
        assert main([*argv, "--on-bad-image", "skip", "--save", "p.png", "--batch-size", batch_size]) == 0
        assert "skipped 2 of 5 images that cannot be read: " in capsys.readouterr().out
        assert [Path(row["image"]).name for row in json.loads(Path("p.json").read_text())] == [
            "0.png",
            "1.png",
            "2.png",
        ]
    bad = [str(spoilt / "red" / "1a.png"), str(spoilt / "red" / "3.png")]
    assert main(["predict", str(run), *bad, "--on-bad-image", "skip"]) == 2
    assert "none of the 2 images can be read" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_file_names_in_another_encoding(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    shutil.copy(photos / "red" / "0.png", os.fsdecode(bytes(tmp_path / "old") + b"/caf\xe9.png"))
    assert main(["predict", str(run), "old", "--csv", "p.csv", "--json", "p.json", "--save", "sheet.png"]) == 0
    assert json.loads(Path("p.json").read_text())[0]["image"] == "old/caf\ufffd.png"
