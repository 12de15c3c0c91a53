import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from qtvit.tasks.segment.classes import read_class_file
from qtvit.tasks.segment.data import (
    SegmentationData,
    SegmentationDataset,
    count_pixels,
    load_segmentation_data,
)
from qtvit.tasks.segment.transforms import SegmentationEvalTransform
from tests.tasks.segment.drawn import COLORS, draw_data, draw_pair

PAGE = Path(__file__).parents[3] / "docs" / "segmentation.md"


def read_all(data: SegmentationData, split: str = "train") -> list[np.ndarray]:
    dataset = SegmentationDataset(getattr(data, split), data.mask_classes, SegmentationEvalTransform())
    return [dataset.read(i)[1].numpy() for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train/images train/masks", "val/images val/masks"),
        ("training/imgs training/labels", "test/imgs test/labels"),
        ("images/train masks/train", "images/val masks/val"),
        ("images/train labels/train", "images/validation labels/validation"),
        ("img/Training Annotations/Training", "img/valid Annotations/valid"),
    ],
)
def test_plain_layouts(tmp_path: Path, train: str, val: str) -> None:
    draw_data(tmp_path, train=train, val=val)
    data = load_segmentation_data(str(tmp_path))
    assert data.name == tmp_path.name
    assert [sample.name for sample in data.train] == ["0.png", "1.png", "deep/2.png"]
    assert [sample.name for sample in data.val] == ["3.png"]
    assert all(sample.image.is_file() and sample.mask.is_file() for sample in data.train + data.val)
    assert data.classes == ("0", "1", "2")
    assert data.mask_classes.values == (0, 1, 2)
    assert data.mask_classes.ignored == (255,)


def test_ade20k(tmp_path: Path) -> None:
    draw_data(tmp_path, "images/training annotations/training", "images/validation annotations/validation")
    data = load_segmentation_data(str(tmp_path))
    assert len(data.classes) == len(set(data.colors)) == 150
    assert data.classes[:2] == ("1", "2")
    assert data.mask_classes.ignored == (0, 255)
    mask = np.asarray(Image.open(data.train[0].mask))
    labels = read_all(data)[0]
    assert (labels[(mask == 0) | (mask == 255)] == 255).all()
    assert (labels[mask == 2] == 1).all()
    rows = [f"{i}\t0.1\t9\t9\t{'door' if i in (3, 5) else f'thing {i}, object'}" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    named = load_segmentation_data(str(tmp_path))
    assert named.classes[0] == "thing 1, object"
    assert (named.classes[2], named.classes[4]) == ("door (3)", "door (5)")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert load_segmentation_data(str(tmp_path)).mask_classes.values == (0, 1, 2)


@pytest.mark.parametrize(
    ("of_image", "of_mask"),
    [("", "_L"), ("_leftImg8bit", "_gtFine_labelTrainIds"), ("_leftImg8bit", "_leftImg8bit")],
    ids=["CamVid", "Cityscapes", "renamed"],
)
def test_names_with_an_ending(tmp_path: Path, of_image: str, of_mask: str) -> None:
    draw_data(tmp_path)
    for kind, ending in (("images", of_image), ("masks", of_mask)):
        for path in [path for path in tmp_path.glob(f"*/{kind}/**/*") if path.is_file()]:
            path.rename(path.with_name(f"{path.stem}{ending}{path.suffix}"))
    data = load_segmentation_data(str(tmp_path))
    assert [sample.image.stem for sample in data.train] == [f"{i}{of_image}" for i in range(3)]
    assert [sample.mask.name for sample in data.train] == [f"{i}{of_mask}.png" for i in range(3)]


def test_text_and_yaml_mean_the_same(tmp_path: Path) -> None:
    draw_data(tmp_path)
    text = tmp_path / "a.txt"
    text.write_text("\ufeffsky: 10 20 30\n\nroad: first: 200 0 0\ncar: 0 0 255\n", encoding="utf-8")
    yaml = tmp_path / "a.yaml"
    yaml.write_text(
        "names: [sky, 'road: first', car]\ncolors: {car: [0, 0, 255], sky: [10, 20, 30], 'road: first': [200, 0, 0]}\n"
    )
    data = [load_segmentation_data(str(tmp_path), classes=str(path)) for path in (text, yaml)]
    assert data[0].mask_classes == data[1].mask_classes
    assert data[0].classes == ("sky", "road: first", "car")
    assert data[0].colors == ((10, 20, 30), (200, 0, 0), (0, 0, 255))
    assert data[0].digest() == data[1].digest()


def test_values_and_names_in_yaml(tmp_path: Path) -> None:
    draw_data(tmp_path)
    (tmp_path / "classes.yaml").write_text("names: {2: car, 0: road}\nignore: [1, 255]\n")
    data = load_segmentation_data(str(tmp_path))
    assert data.classes == ("car", "road")
    stored = np.asarray(Image.open(data.train[0].mask))
    expected = np.select([stored == 2, stored == 0], [0, 1], 255)
    assert set(np.unique(expected)) == {0, 1, 255}
    assert (read_all(data)[0] == expected).all()


def test_colour_masks(tmp_path: Path) -> None:
    index = draw_data(tmp_path / "index")
    color = draw_data(tmp_path / "color", colors=COLORS)
    (color / "classes.yaml").write_text(
        f"names: [a, b, c]\ncolors: {[list(COLORS[i]) for i in range(3)]}\nignore_colors: [{list(COLORS[255])}]\n"
    )
    expected = read_all(load_segmentation_data(str(index)))
    data = load_segmentation_data(str(color))
    for got, want in zip(read_all(data), expected, strict=True):
        assert (got == want).all()
    (color / "classes.yaml").unlink()
    found = load_segmentation_data(str(color))
    assert found.classes == ("0 0 0", "0 90 200", "200 0 0", "255 255 255")
    assert found.colors == ((0, 0, 0), (0, 90, 200), (200, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("mode", ["grey rgb", "P", "I;16", "LA"])
def test_index_masks_of_every_kind(tmp_path: Path, mode: str) -> None:
    root = draw_data(tmp_path / "a")
    expected = read_all(load_segmentation_data(str(root)))
    for path in root.glob("*/masks/**/*.png"):
        values = np.asarray(Image.open(path))
        if mode == "P":
            image = Image.fromarray(values)
            image.putpalette([(7 * i) % 256 for i in range(768)])
        elif mode == "I;16":
            image = Image.fromarray(values.astype(np.uint16))
        elif mode == "LA":
            image = Image.merge("LA", [Image.fromarray(values), Image.new("L", values.shape[::-1], 9)])
        else:
            image = Image.fromarray(np.stack([values] * 3, -1))
        image.save(path)
        assert Image.open(path).mode == {"grey rgb": "RGB"}.get(mode, mode)
    data = load_segmentation_data(str(root))
    assert data.classes == ("0", "1", "2")
    assert all((got == want).all() for got, want in zip(read_all(data), expected, strict=True))


def test_ignore_index(tmp_path: Path) -> None:
    draw_data(tmp_path)
    data = load_segmentation_data(str(tmp_path), ignore_index=-1)
    assert data.classes == ("0", "1", "2", "255")
    assert data.ignore_index == -1
    assert read_all(data)[0].max() == 3
    other = load_segmentation_data(str(tmp_path), ignore_index=1000)
    assert other.mask_classes.ignored == ()


def test_the_dataset(tmp_path: Path) -> None:
    draw_data(tmp_path)
    data = load_segmentation_data(str(tmp_path))
    dataset = SegmentationDataset(
        data.train, data.mask_classes, SegmentationEvalTransform(mean=(0, 0, 0), std=(1, 1, 1))
    )
    assert len(dataset) == 3
    pixels, labels = dataset[0]
    assert (pixels.shape, pixels.dtype) == ((3, 97, 211), torch.float32)
    assert (labels.shape, labels.dtype) == ((97, 211), torch.int64)
    assert torch.equal(
        (pixels * 255).round().byte(), torch.from_numpy(np.array(Image.open(data.train[0].image))).permute(2, 0, 1)
    )


def test_a_turned_image_needs_a_mask_that_is_upright(tmp_path: Path) -> None:
    draw_data(tmp_path)
    image = Image.open(tmp_path / "train/images/0.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "train/images/0.jpg", exif=exif)
    (tmp_path / "train/images/0.png").unlink()
    mask = tmp_path / "train/masks/0.png"
    photo = tmp_path / "train/images/0.jpg"
    message = f"{mask}: 211 x 97 pixels, and the image {photo} has 97 x 211, upright as its EXIF data say"
    with pytest.raises(ValueError, match="upright") as error:
        load_segmentation_data(str(tmp_path))
    assert str(error.value) == message
    Image.open(mask).transpose(Image.Transpose.ROTATE_270).save(mask)
    data = load_segmentation_data(str(tmp_path))
    image, labels = SegmentationDataset(data.train, data.mask_classes, SegmentationEvalTransform()).read(0)
    assert image.size == (97, 211)
    assert labels.shape == (211, 97)


def test_the_dataset_names_what_is_wrong(tmp_path: Path) -> None:
    draw_data(tmp_path)
    data = load_segmentation_data(str(tmp_path))
    dataset = SegmentationDataset(data.train, data.mask_classes, SegmentationEvalTransform())
    mask = data.train[0].mask
    good = mask.read_bytes()
    Image.new("L", (20, 10), 1).save(mask)
    with pytest.raises(ValueError, match="20 x 10 pixels") as error:
        dataset[0]
    assert str(error.value) == f"{mask}: 20 x 10 pixels, and the image {data.train[0].image} has 211 x 97"
    mask.write_bytes(good)
    values = np.array(Image.open(mask))
    values[0, :3] = 9
    Image.fromarray(values).save(mask)
    with pytest.raises(ValueError, match="9") as error:
        dataset[0]
    assert (
        str(error.value)
        == f"{mask}: values that no class has: 9 (3 px); those of the 3 classes are 0 to 2, and 255 of none"
    )
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"0.png: no such mask file"):
        dataset[0]


def test_digest(tmp_path: Path) -> None:
    root = draw_data(tmp_path / "a")
    digest = load_segmentation_data(str(root)).digest()
    moved = root.rename(tmp_path / "b")
    assert load_segmentation_data(str(moved)).digest() == digest
    (moved / "classes.txt").write_text("x\ny\nz\n")
    assert load_segmentation_data(str(moved)).digest() != digest
    (moved / "classes.txt").unlink()
    draw_pair(moved, "train/images train/masks", "0", seed=77)
    assert load_segmentation_data(str(moved)).digest() != digest


def test_fewer_training_images(tmp_path: Path) -> None:
    draw_data(tmp_path)
    samples = load_segmentation_data(str(tmp_path)).train
    one, two = (load_segmentation_data(str(tmp_path), train_images=n).train for n in (1, 2))
    assert (len(one), len(two)) == (1, 2)
    assert set(one) < set(two) < set(samples)
    assert load_segmentation_data(str(tmp_path), train_images=3).train == samples
    for number in (0, 4):
        with pytest.raises(
            ValueError, match=f"--train-images must be from 1 to 3, all there are to train on; got {number}"
        ):
            load_segmentation_data(str(tmp_path), train_images=number)


def test_what_is_shown_before_training(tmp_path: Path) -> None:
    draw_data(tmp_path)
    assert load_segmentation_data(str(tmp_path)).describe() == [
        "3 classes, with their mask values: 0 (0), 1 (1), 2 (2); ignored mask values: 255",
        "3 images to train on, 1 held out",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "sky\n", "1 class (sky); two are needed"),
        ("c.txt", "", "0 classes (); two are needed"),
        ("c.txt", "sky\nsky\n", "two classes have the name sky"),
        ("c.txt", "sky: 1 2 3\nroad\n", "line 2: 'road' has no colour, and others have"),
        ("c.txt", "road\nsky: 1 2 3\n", "line 2: 'sky: 1 2 3' is the first with a colour; give all or none"),
        ("c.txt", "sky: 1 2\nroad: 1 2 3", "line 1: 'sky: 1 2'; expected NAME or NAME: RED GREEN BLUE, each 0 to 255"),
        ("c.txt", "a: 1 2 256\nb: 1 2 3", "line 1: 'a: 1 2 256'; expected NAME or NAME: RED GREEN BLUE, each 0 to 255"),
        ("c.txt", "a: 1 2 3\nb: 1 2 3", "the colour 1 2 3 is given two meanings"),
        ("c.txt", b"\xff\xfe\x80", "not a text file in UTF-8"),
        ("c.yaml", "names: [a, b\n", "not valid YAML (line 2)"),
        ("c.yaml", "[a, b]", "expected the key names, with a list of names or a map from mask value to name"),
        ("c.yaml", "names: [a, b]\ncolours: []", "unknown key 'colours'; did you mean colors"),
        ("c.yaml", "names: a", "names: expected a list of names, or a map from mask value to name"),
        ("c.yaml", "names: {a: 0, b: 1}", "names: expected a list of names, or a map from mask value to name"),
        ("c.yaml", "names: {0: a, 65536: b}", "mask value 65536; expected 0 to 65535"),
        ("c.yaml", "names: [a, b]\ncolors: {a: [1, 2, 3]}", "colors: none for b"),
        ("c.yaml", "names: [a, b]\ncolors: {a: [1, 2, 3], b: [2, 3, 4], bb: [3, 4, 5]}", "unknown name in colors 'bb'"),
        ("c.yaml", "names: [a, b]\ncolors: [[1, 2, 3]]", "1 colours for 2 classes"),
        ("c.yaml", "names: [a, b]\ncolors: red", "colors: expected a list of colours, got 'red'"),
        ("c.yaml", "names: [a, b]\ncolors: [red, blue]", "colors: 'red' is no colour; expected such as [128, 64, 0]"),
        ("c.yaml", "names: [a, b]\nignore: 255", "ignore: expected a list of mask values, got 255"),
        ("c.yaml", "names: [a, b]\nignore: [1]", "mask value 1 is given two meanings"),
        ("c.txt", "\n".join(map(str, range(300))), "ignore_index 255 is the label of class 255; give one from 300 on"),
    ],
)
def test_files_of_classes_that_are_wrong(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    draw_data(tmp_path)
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"c\.") as error:
        load_segmentation_data(str(tmp_path), classes=str(path))
    assert str(error.value).startswith(f"{path}: {message}")


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    def error_of(**options: object) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_segmentation_data(str(tmp_path / "d"), **options)
        return str(error.value).replace(str(tmp_path) + "/", "")

    root = tmp_path / "d"
    assert error_of().startswith("d: no such folder")
    assert error_of().endswith("qtvit data scenes DIR --task segment)")
    root.mkdir()
    expected = (
        "expected train/images/, train/masks/, val/images/ and val/masks/, or images/train/, masks/train/, images/val/ "
        "and masks/val/"
    )
    assert error_of() == f"d: {expected}"
    (root / "train").mkdir()
    assert error_of() == "d: has train/ but none of val/, valid/, validation/, test/"
    (root / "val").mkdir()
    assert error_of() == "d/train: has none of images/, image/, imgs/, img/"
    (root / "train/images").mkdir()
    assert error_of() == "d/train: has none of masks/, mask/, labels/, annotations/"
    (root / "train/masks").mkdir()
    (root / "train/labels").mkdir()
    assert error_of() == "d/train: has both labels/ and masks/; keep one"
    (root / "images").mkdir()
    assert error_of() == f"d: has both train/ and images/; {expected}"
    shutil.rmtree(root)
    draw_data(root, "images/train masks/train", "images/val masks/val")
    shutil.rmtree(root / "masks/val")
    assert error_of() == "d/masks: has none of val/, valid/, validation/, test/"
    shutil.rmtree(root)
    draw_data(root)
    assert error_of(classes="nowhere.txt") == "nowhere.txt: no such file of classes"
    for name in ("classes.txt", "classes.yaml"):
        (root / name).write_text("a\nb\n")
    assert error_of() == "d: has both classes.txt and classes.yaml; keep one"


def test_classes_that_cannot_be_found(tmp_path: Path) -> None:
    draw_data(tmp_path)
    masks = list(tmp_path.glob("*/masks/**/*.png"))
    rng = np.random.default_rng(0)
    for path in masks:
        Image.fromarray(rng.integers(0, 400, (97, 211)).astype(np.uint16)).save(path)
    with pytest.raises(ValueError, match="the masks have 399 different values; these are no classes, or resized with"):
        load_segmentation_data(str(tmp_path))
    for path in masks:
        Image.fromarray(rng.integers(0, 256, (97, 211, 3), dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"different colours; .* list the classes in classes.txt, with colours"):
        load_segmentation_data(str(tmp_path))
    Image.new("L", (211, 97)).save(masks[0])
    with pytest.raises(ValueError, match="has both colour masks and index masks"):
        load_segmentation_data(str(tmp_path))
    for path in masks:
        Image.fromarray(rng.choice(np.array([0, 255], np.uint8), (97, 211))).save(path)
    with pytest.raises(ValueError, match="the masks have value 0 only besides 255, which is ignored"):
        load_segmentation_data(str(tmp_path))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"the 4 masks looked at have class a only \(ignored values: 255\)"):
        load_segmentation_data(str(tmp_path))


def test_pixels_of_the_classes(tmp_path: Path) -> None:
    draw_data(tmp_path)
    counts = count_pixels(load_segmentation_data(str(tmp_path), train_images=1))
    (mask,) = (sample.mask for sample in load_segmentation_data(str(tmp_path), train_images=1).train)
    values = np.asarray(Image.open(mask))
    assert counts.tolist() == [(values == i).sum() for i in range(3)]
    assert sum(count_pixels(load_segmentation_data(str(tmp_path))).tolist()) == 3 * (97 * 211 - 150)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_data(tmp_path / "streets")
    section = PAGE.read_text(encoding="utf-8").split("\n## Data\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(block, str(PAGE), "exec"), {})
    data = load_segmentation_data("streets")
    assert (data.mask_classes.read(Path("values.png")) == data.mask_classes.read(data.train[0].mask)).all()
    text = section.split("```\nroad:")[1].split("```")[0]
    Path("classes.txt").write_text(f"road:{text}")
    assert load_segmentation_data("streets", classes="classes.txt").classes == ("road", "car", "sky")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    Path("classes.yaml").write_text(yaml)
    meaning = read_class_file(Path("classes.yaml"))
    assert (meaning.names, meaning.values, meaning.ignored) == (("road", "car"), (7, 26), (0, 255))
    assert (meaning.colors[1], meaning.ignored_colors) == ((0, 0, 142), ((0, 0, 0),))
