import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from qtvit.tasks.detect.check import check_detection_data
from qtvit.tasks.detect.data import DetectionDataset, load_detection_data
from qtvit.tasks.scenes import DIGIT_NAMES, Scene, SceneGenerator, write_scenes
from qtvit_cli import main


@pytest.fixture(scope="module")
def generator() -> SceneGenerator:
    return SceneGenerator()


@pytest.fixture(scope="module")
def scenes(generator: SceneGenerator) -> list[Scene]:
    return [generator.scene("train", index) for index in range(40)]


def test_scenes_follow_from_seed_split_and_index(generator: SceneGenerator, scenes: list[Scene]) -> None:
    again = SceneGenerator().scene("train", 7)
    assert np.array_equal(again.image, scenes[7].image)
    assert np.array_equal(again.masks, scenes[7].masks)
    others = [generator.scene("val", 7), SceneGenerator(1).scene("train", 7), scenes[8]]
    assert all(other.image.shape != again.image.shape or (other.image != again.image).any() for other in others)


def test_train_and_val_share_no_digit(generator: SceneGenerator) -> None:
    train, val = ({pixels.tobytes() for pixels, _ in generator._digits[split]} for split in ("train", "val"))
    assert len(train) + len(val) == 1797
    assert not train & val


def test_masks_are_exact_and_digits_visible(scenes: list[Scene]) -> None:
    assert {len(scene.digits) for scene in scenes} >= set(range(8))
    assert len({scene.image.shape for scene in scenes}) > 30
    overlaps = 0
    for scene in scenes:
        height, width = scene.image.shape[:2]
        assert 96 <= min(height, width) <= max(height, width) <= 160
        assert scene.masks.shape == (len(scene.digits), height, width)
        assert scene.masks.sum(axis=0).max(initial=0) <= 1
        boxes = scene.boxes()
        for (left, top, right, bottom), mask in zip(boxes, scene.masks, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 40
            assert all(edge.any() for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]))
            ink, around = scene.image[mask].mean(axis=0), scene.image[~scene.masks.any(axis=0)].mean(axis=0)
            assert abs((ink - around) @ [0.299, 0.587, 0.114]) > 40  # of 255: it stands out
        for one, two in itertools.combinations(boxes, 2):
            overlaps += (np.maximum(one[:2], two[:2]) < np.minimum(one[2:], two[2:])).all()
    assert overlaps > 5


def test_scenes_for_detection(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", "detect", num_train=4, num_val=2)
    assert check_detection_data(str(tmp_path / "scenes")).num_problems == 0
    data = load_detection_data(str(tmp_path / "scenes"))
    assert data.classes == DIGIT_NAMES
    assert data.category_ids == (1, 11, 21, 31, 41, 51, 61, 71, 81, 91)
    assert (len(data.train), len(data.val)) == (4, 2)
    scene = SceneGenerator().scene("train", 2)
    image, target = DetectionDataset(data.train)[2]
    assert len(scene.digits) > 0
    assert target["masks"].tolist() == scene.masks.astype(int).tolist()
    assert target["boxes"].tolist() == scene.boxes().tolist()
    assert target["labels"].tolist() == (scene.digits + 1).tolist()
    assert np.abs(255 * image.numpy().transpose(1, 2, 0) - scene.image).mean() < 8  # JPEG


def test_scenes_for_segmentation(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", "segment", num_train=2, num_val=3)
    assert (root / "classes.txt").read_text().splitlines()[:2] == ["background: 0 0 0", "zero: 230 25 75"]
    assert [path.name for path in sorted((root / "val" / "images").iterdir())] == [
        "00000.jpg",
        "00001.jpg",
        "00002.jpg",
    ]
    scene = SceneGenerator().scene("val", 1)
    with Image.open(root / "val" / "masks" / "00001.png") as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:6] == [0, 0, 0, 230, 25, 75]
        expected = sum((digit + 1) * m for digit, m in zip(scene.digits, scene.masks.astype(int), strict=True))
        assert np.asarray(mask).tolist() == expected.tolist()


def test_several_processes_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_scenes(tmp_path / "one", "segment", 5, 1), tmp_path / "two"
    scene = SceneGenerator.scene

    def in_a_worker(self: SceneGenerator, split: str, index: int) -> Scene:
        assert split == "val" or get_worker_info() is not None
        return scene(self, split, index)

    monkeypatch.setattr(SceneGenerator, "scene", in_a_worker)
    monkeypatch.setattr("qtvit.tasks.scenes.num_cores", lambda: 2)
    monkeypatch.setattr("qtvit.tasks.scenes._SCENES_PER_WORKER", 2)
    write_scenes(two, "segment", 5, 1)
    files = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert len(files) == 2 * 6 + 2
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)


def test_a_folder_is_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SceneGenerator, split: str, index: int) -> Scene:
        raise KeyboardInterrupt

    root = tmp_path / "scenes"
    (tmp_path / ".scenes.tmp" / "train").mkdir(parents=True)  # of a process that was killed
    with monkeypatch.context() as patch:
        patch.setattr(SceneGenerator, "scene", fail)
        with pytest.raises(KeyboardInterrupt):
            write_scenes(root, num_train=1, num_val=1)
        assert list(tmp_path.iterdir()) == []
    root.mkdir()
    write_scenes(root, num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == [root]
    monkeypatch.setattr(SceneGenerator, "scene", fail)
    write_scenes(root, num_train=1, num_val=1)
    with pytest.raises(ValueError, match="has other content than these scenes; remove it, or choose another folder"):
        write_scenes(root, num_train=1, num_val=1, seed=1)
    (root / "scenes.json").unlink()
    with pytest.raises(ValueError, match="has other content"):
        write_scenes(root, num_train=1, num_val=1)


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'classify'; known: detect, segment"):
        write_scenes(tmp_path / "scenes", "classify")
    with pytest.raises(ValueError, match="num_val must be 1 or more, got 0"):
        write_scenes(tmp_path / "scenes", num_val=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: a file, where a folder for the scenes is expected"):
        write_scenes(tmp_path / "file")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "scenes"
    options = ["--task", "segment", "--num-train", "2", "--num-val", "1", "--seed", "3"]
    assert main(["data", "scenes", str(root), *options]) == 0
    assert capsys.readouterr().out == f"2 train and 1 val scenes for --task segment: {root}\n"
    settings = json.loads((root / "scenes.json").read_text())
    assert settings == {"version": 1, "task": "segment", "num_train": 2, "num_val": 1, "seed": 3}
