"""Training on some of the images."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from qtvit.tasks.classify.data import choose, load_labelled_images
from qtvit.tasks.classify.pack import pack_folder


def make_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("bird", 4), ("cat", 20), ("dog", 40)):
        make_images(tmp_path / "photos" / "train" / name, count)
        make_images(tmp_path / "photos" / "val" / name, 2)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("num_images", "counts"), [(3, {0: 1, 1: 1, 2: 1}), (16, {0: 1, 1: 5, 2: 10}), (64, {0: 4, 1: 20, 2: 40})]
)
def test_classes_have_their_share_and_one_image_at_least(folder: Path, num_images: int, counts: dict[int, int]) -> None:
    whole, data = load_labelled_images(str(folder)), load_labelled_images(str(folder), train_images=num_images)
    assert Counter(label for _, label in data.train) == counts
    assert [sample for sample in whole.train if sample in data.train] == data.train
    assert (data.val, data.classes) == (whole.val, whole.classes)


def test_a_larger_choice_holds_a_smaller_one_and_no_seed_changes_it(folder: Path) -> None:
    few, more = (load_labelled_images(str(folder), train_images=n).train for n in (10, 30))
    assert set(few) < set(more)
    assert load_labelled_images(str(folder), train_images=10, seed=7).train == few
    assert [int(Path(str(path)).stem) for path, _ in few] != [0, 0, 1, 2, 0, 1, 2, 3, 4, 5]  # drawn, not the first


def test_the_choice_is_that_of_the_folder_wherever_it_is_and_packed(folder: Path, tmp_path: Path) -> None:
    pack_folder(str(folder), tmp_path / "packed" / "photos")
    folder.rename(tmp_path / "moved")
    moved = load_labelled_images(str(tmp_path / "moved"), train_images=10)
    packed = load_labelled_images(str(tmp_path / "packed" / "photos"), train_images=10)
    assert moved.digest() == packed.digest() != load_labelled_images(str(tmp_path / "moved")).digest()


def test_digits_are_chosen_by_their_pixels() -> None:
    """The position in the training part changes with the seed of the split."""
    chosen = [load_labelled_images("digits", seed=seed, train_images=50).train for seed in (0, 1)]
    pixels = [{image.tobytes() for image, _ in part} for part in chosen]
    assert len(chosen[0]) == len(pixels[0]) == 50
    assert len(pixels[0] & pixels[1]) > 30
    assert Counter(label for _, label in chosen[0]) == dict.fromkeys(range(10), 5)


def test_who_is_held_out_does_not_depend_on_it(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        make_images(tmp_path / name, 10)
    whole, data = load_labelled_images(str(tmp_path)), load_labelled_images(str(tmp_path), train_images=6)
    assert data.val == whole.val
    assert set(data.train) < set(whole.train)
    assert len(data.split["trained_on"]) == 6


@pytest.mark.parametrize("num_images", [1, 4])
def test_mistakes(num_images: int) -> None:
    samples = [("a", 0), ("b", 0), ("c", 1)]
    with pytest.raises(
        ValueError, match=f"--train-images must be from 2, the number of classes, to 3, .* {num_images}"
    ):
        choose(samples, num_images)


def test_a_stream_has_no_choice() -> None:
    with pytest.raises(ValueError, match="--train-images reads images by position, and those of https://a/b are"):
        load_labelled_images("https://a/b", train_images=5)
