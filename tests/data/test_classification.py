from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from qtvit.data import ImageDataset, Preprocess, load_labelled_images
from qtvit.data.classification import stratified_split


def make_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")


def test_one_folder_is_split_by_class_and_seed(tmp_path: Path) -> None:
    make_images(tmp_path / "cat", 10)
    make_images(tmp_path / "dog", 5)
    data = load_labelled_images(str(tmp_path), seed=1)
    assert data.classes == ("cat", "dog")
    assert Counter(label for _, label in data.val) == {0: 2, 1: 1}
    assert not set(data.train) & set(data.val)
    assert len(data.train) + len(data.val) == 15
    assert load_labelled_images(str(tmp_path), seed=1) == data
    assert load_labelled_images(str(tmp_path), seed=2).val != data.val


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_train_and_val_folders(tmp_path: Path, val: str) -> None:
    for name in ("cat", "dog"):
        make_images(tmp_path / "train" / name, 3)
    make_images(tmp_path / val / "dog", 2)
    data = load_labelled_images(str(tmp_path))
    assert len(data.train) == 6
    assert [label for _, label in data.val] == [1, 1]


def test_split_folders_in_any_case_and_without_hidden_files(tmp_path: Path) -> None:
    for part in ("Train", "VAL"):
        for name in ("cat", "dog", "__MACOSX", ".thumbnails"):
            make_images(tmp_path / part / name, 2)
        (tmp_path / part / "cat" / "._0.png").touch()
        make_images(tmp_path / part / "cat" / ".ipynb_checkpoints", 1)
    data = load_labelled_images(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (4, 4)


def test_who_is_held_out_hardly_changes_when_images_are_added(tmp_path: Path) -> None:
    make_images(tmp_path / "cat", 40)
    make_images(tmp_path / "dog", 40)
    before = set(load_labelled_images(str(tmp_path)).val)
    for i in range(100, 105):
        Image.new("RGB", (8, 8)).save(tmp_path / "cat" / f"{i}.png")
    after = set(load_labelled_images(str(tmp_path)).val)
    assert len(before - after) <= 1
    assert {s for s in before if s[1] == 1} == {s for s in after if s[1] == 1}


def test_split_keeps_an_image_of_every_class_on_both_sides() -> None:
    train, val = stratified_split([("a", 0), ("b", 0), *((str(i), 1) for i in range(9))], 0.01, seed=0)
    assert Counter(label for _, label in train) == {0: 1, 1: 8}
    assert Counter(label for _, label in val) == {0: 1, 1: 1}


def test_the_embedded_digits() -> None:
    data = load_labelled_images("digits")
    assert (len(data.train) + len(data.val), len(data.classes)) == (1797, 10)
    image, label = ImageDataset(data.val, Preprocess((16, 16)).transform())[0]
    assert image.shape == (3, 16, 16)
    assert label == data.val[0][1]


def broken_layouts() -> list[tuple[list[str], str]]:
    """Files to create, and what the error has to say."""
    return [
        ([], "no class folders"),
        (["1.png"], "no class folders"),
        (["cat/1.png", "cat/2.png"], "one class only"),
        (["cat/1.png", "cat/2.png", "dog/readme.txt"], "dog: no images"),
        (["cat/1.png", "dog/1.png", "dog/2.png"], r"cat.1\.png: the only image of its class"),
        (["train/cat/1.png", "train/dog/1.png"], "none of val/"),
        (["train/cat/1.png", "train/dog/1.png", "val/cow/1.png", "val/cat/1.png"], "does not have: cow"),
    ]


@pytest.mark.parametrize(("files", "message"), broken_layouts())
def test_layouts_that_cannot_be_read(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        load_labelled_images(str(tmp_path))


def test_a_missing_folder() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_labelled_images("nowhere")
