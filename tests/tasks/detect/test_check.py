import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qtvit.tasks.detect.check import check_detection_data
from qtvit.tasks.detect.data import load_detection_data
from qtvit_cli import main

from .coco_folder import Content, annotation, annotation_file, write_coco


def change_first(key: str, **values: object) -> Callable[[Content], None]:
    return lambda train: train[key][0].update(values)


def drop(key: str, field: str) -> Callable[[Content], object]:
    return lambda train: train[key][0].pop(field)


def repeat(key: str, **values: object) -> Callable[[Content], None]:
    return lambda train: train[key].append({**train[key][0], **values})


def replace(**values: object) -> Callable[[Content], None]:
    return lambda train: train.update(values)


NUMBERS = r"expected four finite numbers \[left, top, width, height\]"
# What is done to train's annotations, and what is said after the name of their file.
FAULTS: dict[str, tuple[Callable[[Content], object], str]] = {
    "key": (lambda train: train.pop("annotations"), r"lacks the key 'annotations'; it has images, categories"),
    "list": (replace(images={}), r"'images' is no list"),
    "no images": (replace(images=[], annotations=[]), r"no images"),
    "no annotations": (replace(annotations=[]), r"no annotations"),
    "no categories": (replace(categories=[], annotations=[]), r"no categories"),
    "category id": (drop("categories", "id"), r"categories\[0\] lacks the key 'id'"),
    "category name": (change_first("categories", name=3), r"category 18 has 'name': 3; expected a text"),
    "category twice": (repeat("categories", name="cat"), r"category 18 comes twice"),
    "category names": (change_first("categories", name="cat"), r"category 18 is dog, but in .*train2017.json cat"),
    "category of val": (lambda train: (train["categories"].pop(0), train["annotations"].pop(0)),
                        r"category 18 \(dog\) is not in .*train2017.json"),
    "image key": (drop("images", "width"), r"image 3 lacks the key 'width'"),
    "image type": (change_first("images", file_name=7), r"image 3 has 'file_name': 7; expected a text"),
    "image size": (change_first("images", height=0), r"image 3 has a size of 60 x 0"),
    "image twice": (repeat("images", file_name="b.png"), r"image 3 comes twice \(b.png\)"),
    "file twice": (repeat("images", id=4), r"image 4 has the file name of image 3: train_3.png"),
    "image file": (repeat("images", id=4, file_name="b.png"), r"image 4: .*train2017/b.png is missing"),
    "no object": (replace(annotations=[5]), r"annotations\[0\] is no JSON object"),
    "annotation id": (drop("annotations", "id"), r"annotations\[0\] lacks the key 'id'"),
    "annotation id type": (change_first("annotations", id="a"), r"annotation a has 'id': \"a\"; expected a whole numb"),
    "annotation id size": (change_first("annotations", id=2**63), rf"annotation {2**63} has 'id': {2**63}; expected a"),
    "annotation key": (drop("annotations", "bbox"), r"annotation 7 lacks the key 'bbox'"),
    "annotation image": (change_first("annotations", image_id=99), r"annotation 7 is of image 99, which is not in the"),
    "annotation category": (change_first("annotations", category_id=2), r"annotation 7 is of category 2, which is not"),
    "annotation twice": (repeat("annotations"), r"annotation 7 comes twice"),
    "box type": (change_first("annotations", bbox="abcd"), r"annotation 7 has 'bbox': \"abcd\"; expected \[left, top,"),
    "box length": (change_first("annotations", bbox=[1, 2, 3]), rf"annotation 7 has 'bbox': \[1, 2, 3\]; {NUMBERS}"),
    "box text": (change_first("annotations", bbox=[1, 2, 3, "4"]), rf"annotation 7 has 'bbox': .*; {NUMBERS}"),
    "box nan": (change_first("annotations", bbox=[1, 2, 3, float("nan")]), rf"annotation 7 has 'bbox': .*; {NUMBERS}"),
    "box outside": (change_first("annotations", bbox=[40, 30, 40, 20]),
                    r"annotation 7: bbox \[40, 30, 40, 20\] is outside of image 3 \(60 x 40\)"),
    "polygon outside": (change_first("annotations", segmentation=[[100, 0, 130, 0, 130, 20]]),
                        r"annotation 7: a polygon, x from 100 to 130, y from 0 to 20, is outside of image 3"),
    "polygon short": (change_first("annotations", segmentation=[[1, 2, 3, 4]]),
                      r"annotation 7: a polygon of 4 numbers; expected x and y of three points or more"),
    "polygon odd": (change_first("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"annotation 7: a polygon of"),
    "polygon flat": (change_first("annotations", segmentation=[1, 2, 3, 4, 5, 6]), r"annotation 7: a polygon is no l"),
    "polygon text": (change_first("annotations", segmentation=[["a"] * 6]), r"annotation 7: a polygon is no list of"),
    "polygon nan": (change_first("annotations", segmentation=[[float("inf")] * 6]), r"annotation 7: a polygon with nu"),
    "mask kind": (change_first("annotations", segmentation={"size": [40, 60]}), r"annotation 7: segmentation is neith"),
    "mask size": (change_first("annotations", segmentation={"size": [60, 40], "counts": "0"}),
                  r"annotation 7: mask of size \[60, 40\]; its image is \[40, 60\] \(height, width\)"),
    "mask counts": (change_first("annotations", segmentation={"size": [40, 60], "counts": [5, -1]}),
                    r"annotation 7: counts of the mask are neither a string nor a list of numbers from 0"),
    "mask sum": (change_first("annotations", segmentation={"size": [40, 60], "counts": [5, 1]}),
                 r"annotation 7: counts of the mask add up to 6; its image has 2400 pixels"),
    "mask string": (change_first("annotations", segmentation={"size": [40, 60], "counts": "50"}),
                    r"annotation 7: counts of the mask do not cover image 3 \(60 x 40\)"),
    "no mask": (change_first("annotations", segmentation=[]), r"annotation 7: no segmentation, though others of train"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_reported_and_stop_loading(
    tmp_path: Path, change: Callable[[Content], object], message: str
) -> None:
    root = write_coco(tmp_path / "pets", change)
    pattern = rf"^{root}/annotations/instances_(train|val)2017.json: {message}"
    entries = [entry for group in check_detection_data(str(root)).problems.values() for entry in group]
    assert len(entries) == 1, entries
    assert re.match(pattern, entries[0]), entries
    with pytest.raises(ValueError, match=pattern):
        load_detection_data(str(root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"images": [1,\n 2', "not JSON (line 2, column 3: Expecting ',' delimiter)"),
        (b"", "not JSON (line 1, column 1: Expecting value)"),
        (b"\xff", "not JSON ('utf-8' codec can't decode"),
        (b"[]", "no JSON object with images, annotations, categories"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_files_that_are_no_annotations(tmp_path: Path, text: bytes, message: str) -> None:
    root = write_coco(tmp_path / "pets")
    annotation_file(root).write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(f"{annotation_file(root)}: {message}")):
        load_detection_data(str(root))
    assert check_detection_data(str(root)).num_problems == 1


def test_the_number_of_problems_is_said(tmp_path: Path) -> None:
    def change(train: Content) -> None:
        train["annotations"] += [annotation(i, 99, 1, [1, 1, 9, 9]) for i in range(50, 53)]

    root = write_coco(tmp_path / "pets", change)
    with pytest.raises(ValueError, match=r"annotation 50 is of image 99.*; and 2 more problems: `qtvit data check"):
        load_detection_data(str(root))


def test_what_only_the_check_finds(tmp_path: Path) -> None:
    """Problems with pictures, and boxes that training drops or cuts off."""

    def change(train: Content) -> None:
        train["annotations"] += [annotation(20, 3, 1, [5, 5, 0, 9]), annotation(21, 3, 1, [-3, 5, 20, 9])]
        train["annotations"] += [annotation(22, 3, 1, [-1.5, 5, 20, 9])]

    root = write_coco(tmp_path / "pets", change)
    train, val = root / "train2017", root / "val2017"
    (train / "train_3.png").write_bytes(b"\x89PNG")
    Image.new("RGB", (70, 50)).save(train / "train_13.png")
    shutil.copy(train / "train_23.png", val / "val_23.png")
    load_detection_data(str(root))
    file = annotation_file(root)
    assert check_detection_data(str(root)).problems == {
        "boxes or masks outside their image": [
            f"{file}: annotation 21: bbox [-3, 5, 20, 9] reaches out of image 3 (60 x 40)"
        ],
        "images that cannot be read, or are not of the size in the annotation file": [
            f"{train}/train_3.png: not an image that can be read",
            f"{train}/train_13.png: 70 x 50 pixels, but {file} says 50 x 70 for image 13",
        ],
        "boxes of less than a pixel, which are not learnt": [f"{file}: annotation 20: bbox [5, 5, 0, 9]"],
        "images of val that are in train too": [f"{train}/train_23.png = {val}/val_23.png"],
    }


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_coco(tmp_path / "pets", lambda train: train["categories"].append({"id": 30, "name": "cat"}))
    report = tmp_path / "report.json"
    assert main(["data", "check", str(root), "--task", "detect", "--json", str(report)]) == 0
    assert capsys.readouterr().out.splitlines()[:6] == [
        "train: 3 images, 3 objects in 3 categories",
        "  images without objects: 1; crowd regions: 0; objects with masks: 3",
        "  categories without objects: cat",
        "  objects per image: 0 to 2, median 1",
        "  width: 30 to 60 px, median 50",
        "  height: 30 to 70 px, median 40",
    ]
    assert json.loads(report.read_text())["num_problems"] == 0
    (root / "val2017").rename(root / "pictures")
    options = ["--val-images-dir", str(root / "pictures"), "--train-annotations", str(annotation_file(root))]
    assert main(["data", "check", str(root), "--task", "detect", *options]) == 0
    (root / "pictures" / "val_3.png").unlink()
    assert main(["data", "check", str(root), "--task", "detect", *options]) == 1
    assert "val_3.png is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "detect", "--min-side", "9"], "--min-side is for --task classify, not detect"),
        (["--val-images-dir", "x"], "--val-images-dir is for --task detect, not classify"),
    ],
)
def test_options_of_other_tasks(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
