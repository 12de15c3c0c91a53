import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from qtvit.tasks.detect.data import DetectionDataset, collate, load_detection_data
from qtvit.tasks.detect.masks import _covered_pixels

from .coco_folder import Content, annotation, annotation_file, content, write_coco


def load(root: Path, **options: Any) -> Any:
    return load_detection_data(str(root), **options)


def test_ids_are_mapped_and_kept(tmp_path: Path) -> None:
    data = load(write_coco(tmp_path / "pets"))
    assert (data.name, data.classes, data.category_ids) == ("pets", ("person", "dog"), (1, 18))
    assert data.has_masks
    assert data.val_annotations == annotation_file(tmp_path / "pets", "val")
    assert [sample.image_id for sample in data.train] == [3, 13, 23]
    first = data.train[0]
    assert first.image == tmp_path / "pets" / "train2017" / "train_3.png"
    assert (first.width, first.height) == (60, 40)
    assert first.object_ids.tolist() == [7, 9]
    assert first.boxes.tolist() == [[10, 20, 30, 30], [40, 5, 50, 20]]
    assert [data.category_ids[label - 1] for label in first.labels] == [18, 1]
    assert first.areas.tolist() == [200, 150]
    assert data.train[2].labels.tolist() == []
    assert [sample.image_id for sample in data.val[1:]] == [13, 23]


def test_items(tmp_path: Path) -> None:
    data = load(write_coco(tmp_path / "pets"))
    images, targets = collate([DetectionDataset(data.train)[i] for i in range(3)])
    pixels = np.asarray(Image.open(tmp_path / "pets" / "train2017" / "train_13.png")).transpose(2, 0, 1)
    torch.testing.assert_close(images[1], torch.tensor(pixels / 255, dtype=torch.float32))
    assert [tuple(image.shape) for image in images] == [(3, 40, 60), (3, 70, 50), (3, 30, 30)]
    assert {type(value) for value in [*images, *targets[0].values()]} == {torch.Tensor, int}
    assert [target["image_id"] for target in targets] == [3, 13, 23]
    assert targets[0]["labels"].tolist() == [2, 1]
    expected = torch.zeros(2, 40, 60, dtype=torch.uint8)
    expected[0, 20:30, 10:30] = 1
    expected[1, 5:20, 40:50] = 1
    assert torch.equal(targets[0]["masks"], expected)
    assert targets[0]["boxes"].dtype == torch.float32
    assert targets[2]["boxes"].shape == (0, 4)
    assert targets[2]["masks"].shape == (0, 30, 30)
    assert targets[2]["labels"].dtype == torch.int64


def test_masks_are_pycocotools(tmp_path: Path) -> None:
    """Several polygons with broken numbers, uncompressed and compressed RLE."""
    blob = np.zeros((40, 60), np.uint8)
    blob[3:9, 7:20] = 1
    blob[5, 9] = 0
    counts = rle.encode(np.asfortranarray(blob))["counts"].decode()
    polygons = [[1.3, 2.7, 12.1, 3.9, 8.5, 17.6], [30, 30, 41.25, 30, 41.25, 39.9, 33, 38]]

    def change(train: Content) -> None:
        train["annotations"] = [
            annotation(1, 3, 1, [1, 2, 40, 38], segmentation=polygons),
            annotation(2, 3, 1, [7, 3, 13, 6], segmentation={"size": [40, 60], "counts": counts}),
            annotation(3, 13, 1, [0, 0, 1, 20], segmentation={"size": [70, 50], "counts": [5, 15, 3480]}),
        ]

    data = load(write_coco(tmp_path / "pets", change))
    coco = COCO(str(annotation_file(tmp_path / "pets")))
    dataset = DetectionDataset(pickle.loads(pickle.dumps(data.train)))  # as loader processes get it
    masks = torch.cat([dataset[0][1]["masks"].flatten(), dataset[1][1]["masks"].flatten()])
    expected = [coco.annToMask(coco.anns[number]).flatten() for number in (1, 2, 3)]
    assert masks.tolist() == np.concatenate(expected).tolist()
    assert dataset[0][1]["masks"][1].tolist() == blob.tolist()
    assert dataset[1][1]["masks"][0].T.flatten()[:21].tolist() == [0] * 5 + [1] * 15 + [0]


def test_run_lengths_that_do_not_fill_the_image_are_found() -> None:
    rng = np.random.default_rng(0)
    strings, pixels = [], []
    for i in range(60):
        height, width = rng.integers(1, 90, 2)
        noise = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        noise[:, : width // 2] = i % 2
        strings.append(rle.encode(np.asfortranarray(noise))["counts"])
        pixels.append(int(height * width))
    for i, text in ((10, b"zzz"), (20, b"\xff\xff"), (30, b"")):  # a number without end, no characters of it, nothing
        strings[i], pixels[i] = text, -1
    ends = np.append(0, np.cumsum([len(text) for text in strings]))
    assert _covered_pixels(np.frombuffer(b"".join(strings), np.uint8), ends).tolist() == pixels


def test_crowd_regions_are_kept_but_not_learnt(tmp_path: Path) -> None:
    def change(train: Content) -> None:
        train["annotations"][1]["iscrowd"] = 1

    data = load(write_coco(tmp_path / "pets", change))
    assert data.train[1].crowd.tolist() == [True]
    assert data.train[1].masks is not None
    assert data.train.num_learnt().tolist() == [2, 0, 0]
    assert DetectionDataset(data.train)[1][1]["labels"].tolist() == []


def test_degenerate_boxes_are_dropped_with_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [[5, 5, 0, 9], [5, 5, 9, -3], [5, 5, 0.5, 9], [-9, 5, 9.5, 9], [59.2, 5, 1.2, 9]]

    def change(train: Content) -> None:
        train["annotations"] += [
            annotation(100 + i, 3, 1, box, segmentation=[[5, 5, 6, 5, 6, 6]]) for i, box in enumerate(boxes)
        ]

    with pytest.raises(ValueError, match="annotation 103: bbox"):  # nearly all of it is outside
        load(write_coco(tmp_path / "bad", change))
    boxes.pop(3)
    root = write_coco(tmp_path / "pets", change)
    data = load(root)
    assert capsys.readouterr().out == (f"dropped 4 degenerate boxes of {annotation_file(root)}: less than a pixel\n")
    assert data.train[0].object_ids.tolist() == [7, 9, 100, 101, 102, 103]
    assert DetectionDataset(data.train)[0][1]["labels"].tolist() == [2, 1]
    assert data.val.num_degenerate() == 0


def test_boxes_are_cut_off_at_the_edge(tmp_path: Path) -> None:
    def change(train: Content) -> None:
        train["annotations"][0]["bbox"] = [-4, 20, 20, 24]

    data = load(write_coco(tmp_path / "pets", change))
    assert data.train[0].boxes[0].tolist() == [-4, 20, 16, 44]
    assert DetectionDataset(data.train)[0][1]["boxes"][0].tolist() == [0, 20, 16, 40]


@pytest.mark.parametrize("segmentation", [None, []])
def test_boxes_alone(tmp_path: Path, segmentation: object) -> None:
    def change(train: Content) -> None:
        for entry in train["annotations"]:
            entry.pop("area")
            entry["segmentation"] = segmentation

    data = load(write_coco(tmp_path / "pets", change))
    assert not data.has_masks
    assert data.train[0].masks is data.val[0].masks is None
    assert data.train[0].areas.tolist() == [200, 150]
    assert set(DetectionDataset(data.train)[0][1]) == {"boxes", "labels", "image_id"}


def test_masks_can_be_left_out(tmp_path: Path) -> None:
    data = load(write_coco(tmp_path / "pets"), use_masks=False)
    assert not data.has_masks
    assert data.train[0].masks is None


def test_fewer_images(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "pets")
    assert [sample.image_id for sample in load(root, drop_empty=True).train] == [3, 13]
    one, two = ({sample.image_id for sample in load(root, train_images=n).train} for n in (1, 2))
    assert one < two
    with pytest.raises(ValueError, match=r"--train-images must be from 1 to 3, .* got 4"):
        load(root, train_images=4)
    with pytest.raises(ValueError, match="the images to train on have no objects"):
        load(
            write_coco(tmp_path / "crowd", lambda train: [entry.update(iscrowd=1) for entry in train["annotations"]]),
        )


def test_the_digest_is_of_content_not_of_place(tmp_path: Path) -> None:
    one, two = load(write_coco(tmp_path / "a")), load(write_coco(tmp_path / "b"))
    assert one.digest() == two.digest()
    digests = {
        one.digest(),
        load(tmp_path / "a", train_images=2).digest(),
        load(tmp_path / "a", use_masks=False).digest(),
    }

    def change(train: Content) -> None:
        train["annotations"][0]["segmentation"][0][0] += 1

    digests.add(load(write_coco(tmp_path / "c", change)).digest())
    assert len(digests) == 4


def move(root: Path, moves: dict[str, str]) -> None:
    for old, new in moves.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        os.rename(root / old, root / new)


LAYOUTS = {
    "plain names": {"annotations/instances_train2017.json": "annotations/train.json", "train2017": "train"},
    "files beside": {"annotations/instances_train2017.json": "train.json"},
    "images below images": {"train2017": "images/train2017"},
    "images below images of another name": {"train2017": "images/train"},
    "a folder for the split": {"train2017": "train/images", "annotations/instances_train2017.json": "train/x.json"},
    "all in one": {f"train2017/train_{i}.png": f"images/train_{i}.png" for i in (3, 13, 23)},
}


@pytest.mark.parametrize("moves", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path: Path, moves: dict[str, str]) -> None:
    root = write_coco(tmp_path / "pets")
    move(root, moves)
    assert [sample.image.is_file() for sample in load(root).train] == [True] * 3


def test_file_names_with_folders(tmp_path: Path) -> None:
    def change(train: Content) -> None:
        for entry in train["images"]:
            entry["file_name"] = f"train2017/{entry['file_name']}"

    assert load(write_coco(tmp_path / "pets", change)).train[2].image.is_file()


def test_explicit_paths(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "pets")
    move(root, {"annotations/instances_val2017.json": "labels/v.json", "val2017": "elsewhere"})
    with pytest.raises(ValueError, match=r"no annotation file for val \(looked .*\); give --val-annotations"):
        load(root)
    with pytest.raises(ValueError, match=r"found no folder with its images, such as val_3.png; give --val-images-dir"):
        load(root, val_annotations=root / "labels" / "v.json")
    data = load(root, val_annotations=root / "labels" / "v.json", val_images_dir=root / "elsewhere")
    assert data.val[0].image == root / "elsewhere" / "val_3.png"
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of images"):
        load(root, train_images_dir="nowhere", val_annotations=root / "labels" / "v.json")
    with pytest.raises(FileNotFoundError, match=r"no.json: no such annotation file"):
        load(root, train_annotations="no.json", val_annotations=root / "labels" / "v.json")


def test_ambiguous_places(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "pets")
    other = root / "annotations" / "instances_train2014.json"
    other.write_text(json.dumps(content("train")))
    with pytest.raises(ValueError, match=r"several annotation files for train: .*2014.json, .*2017.json; give --tr"):
        load(root)
    other.unlink()
    move(root, {"train2017": "train_a"})
    (root / "train_b").mkdir()
    (root / "train_b" / "train_3.png").touch()
    with pytest.raises(ValueError, match=r"images may be in any of .*train_a, .*train_b; give --train-images-dir"):
        load(root)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "pets")
    path = root / "train2017" / "train_3.png"
    Image.new("RGB", (61, 40)).save(path)
    dataset = DetectionDataset(load(root).train)
    expected = f"61 x 40 pixels, but {annotation_file(root)} says 60 x 40 for image 3"
    with pytest.raises(ValueError, match=f"^{path}: {expected}$"):
        dataset[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    with pytest.raises(ValueError, match=r"40 x 60 pixels, but .* 60 x 40 for image 3; its EXIF data turn it"):
        dataset[0]
