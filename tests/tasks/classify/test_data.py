from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from qtvit.data import Preprocess
from qtvit.data.folders import find_val_folder
from qtvit.data.split import stratified_split
from qtvit.tasks.classify.data import ImageDataset, load_labelled_images, read_split


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
        make_images(tmp_path / val / name, 2)
    data = load_labelled_images(str(tmp_path))
    assert len(data.train) == 6
    assert [label for _, label in data.val] == [0, 0, 1, 1]


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
        (
            ["train/cat/1.png", "train/dog/1.png", "val/cow/1.png", "val/cat/1.png"],
            "val: class folders that the model or train/ does not have: cow; it has cat, dog",
        ),
        (["train/cat/1.png", "train/dog/1.png", "val/dog/1.png"], "val: no folders for cat, which .*train has"),
        (["train/cat/1.png", "train/dog/1.png", "val/1.png"], r"val: no class folders; expected val/cat/\*\.jpg"),
        (["1.png"], r"no class folders; expected .*/CLASS/\*\.jpg; found images without folders, such as 1\.png"),
        (["x/cat/1.png", "x/dog/1.png"], r"one class only \(x\).*did you mean .*x, with the folders cat, dog\?"),
        (["x/train/cat/1.png", "x/val/cat/1.png"], r"did you mean .*x, with the folders train, val\?"),
    ]


@pytest.mark.parametrize(("files", "message"), broken_layouts())
def test_layouts_that_cannot_be_read(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message) as error:
        load_labelled_images(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_folder() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_labelled_images("nowhere")


def test_an_archive(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").touch()
    with pytest.raises(ValueError, match=r"photos\.zip: a file, where a folder of images is expected; unpack it"):
        load_labelled_images(str(tmp_path / "photos.zip"))


def test_a_split_may_lack_classes_of_the_model(tmp_path: Path) -> None:
    make_images(tmp_path / "dog", 2)
    make_images(tmp_path / "cow", 1)
    assert [label for _, label in read_split(tmp_path, ["cat", "dog", "cow"])] == [2, 1, 1]


def test_a_split_one_level_too_high(tmp_path: Path) -> None:
    make_images(tmp_path / "photos" / "dog", 2)
    with pytest.raises(ValueError, match=r"does not have: photos; it has cat, dog \(did you mean .*photos, with the"):
        read_split(tmp_path, ["cat", "dog"])


def test_imagenet_as_it_usually_lies_on_disk(tmp_path: Path) -> None:
    classes = ImageNetInfo().label_names()
    for name in (classes[0], classes[999]):
        for part in ("train", "val"):
            make_images(tmp_path / part / name, 2)
            (tmp_path / part / name / "0.png").rename(tmp_path / part / name / "ILSVRC2012_val_00000001.JPEG")
    assert find_val_folder(tmp_path) == tmp_path / "val"
    assert find_val_folder(tmp_path / "val") is None
    samples = read_split(tmp_path / "val", classes)
    assert [label for _, label in samples] == [0, 0, 999, 999]


def test_imagenet_val_without_folders(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(ValueError, match=r"expected val/n01440764/\*\.jpg; .* such as ILSVRC2012_val_00000001\.JPEG"):
        read_split(tmp_path / "val", ImageNetInfo().label_names())


def test_a_dataset_crops_pictures_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image = Image.new("RGB", (30, 20))
    with pytest.raises(Image.DecompressionBombError):
        image.crop((0, 0, 20, 20))
    dataset = ImageDataset([(image, 1)], lambda picture: picture.crop((0, 0, 20, 20)))
    assert dataset[0][0].size == (20, 20)
