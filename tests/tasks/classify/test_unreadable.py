from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtvit import console
from qtvit.data.split import Sample
from qtvit.tasks.classify.data import load_labelled_images
from qtvit.tasks.classify.unreadable import drop_broken, find_broken


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two classes of ten images; of the first, one is no image and one is cut short."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    samples: list[Sample] = []
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for i in range(10):
            path = tmp_path / name / f"{i}.jpg"
            Image.fromarray(noise).save(path)
            samples.append((path, label))
    (tmp_path / "cat" / "3.jpg").write_text("<html>not found</html>")
    path = tmp_path / "cat" / "7.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return samples


def test_broken_images_are_found_with_the_reason(samples: list[Sample]) -> None:
    (first, why), (second, why_second) = find_broken(samples)
    assert (first, second) == (samples[3][0], samples[7][0])
    assert why == f"{first}: not an image that can be read"
    assert why_second.startswith(f"{second}: broken image (image file is truncated")


def test_a_file_that_is_gone_counts_as_broken(samples: list[Sample]) -> None:
    Path(str(samples[12][0])).unlink()
    assert [source for source, _ in find_broken(samples)] == [samples[i][0] for i in (3, 7, 12)]


def test_broken_images_are_dropped_and_named(samples: list[Sample], capsys: pytest.CaptureFixture[str]) -> None:
    kept = drop_broken(samples, ["cat", "dog"])
    assert kept == [sample for i, sample in enumerate(samples) if i not in (3, 7)]
    line = capsys.readouterr().out
    assert line.startswith("skipping 2 of 20 images that cannot be read: ")
    assert "3.jpg" in line
    assert "7.jpg" in line
    assert line.count("\n") == 1
    assert drop_broken(kept, ["cat", "dog"]) == kept
    with console.quiet():
        drop_broken(samples)
    assert capsys.readouterr().out == ""


def test_only_the_first_few_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{i}.jpg" for i in range(9)]
    for path in paths:
        path.touch()
    image = Image.new("RGB", (4, 4))
    assert drop_broken([*((path, 0) for path in paths), (image, 1)]) == [(image, 1)]
    line = capsys.readouterr().out
    assert "skipping 9 of 10" in line
    assert line.count(".jpg") == 3
    assert line.rstrip().endswith("; …")


def test_nothing_left_is_an_error(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 images can be read: .*3\.jpg: not an image"):
        drop_broken([samples[3], samples[7]])


def test_a_class_without_images_left_is_an_error_in_training(samples: list[Sample]) -> None:
    few = [samples[3], samples[7], *samples[10:]]
    assert drop_broken(few) == samples[10:]
    with pytest.raises(ValueError, match=r"no image of class cat can be read: .*3\.jpg"):
        drop_broken(few, ["cat", "dog"])


def test_images_in_memory() -> None:
    data = load_labelled_images("digits")
    assert find_broken(data.val) == []
