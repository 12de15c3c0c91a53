"""Images with one label each: from folders, or the embedded digits."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from qtvit.data.digits import DIGITS, load_digits
from qtvit.data.folders import VAL_FOLDERS, data_folder, find_train_folder, find_val_folder
from qtvit.data.images import (
    IMAGE_SUFFIXES,
    ImageFile,
    ImageSource,
    any_size,
    file_size,
    find_images,
    is_hidden,
    open_image,
    relative_path,
)
from qtvit.data.shards import is_packed, read_index
from qtvit.data.split import Sample, stratified_split
from qtvit.errors import some

LabelledFile = tuple[Path, int]


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images in two splits.

    Attributes:
        name: of the data.
        classes: what the labels index.
        train, val: the splits.
        split: how ``val`` was held out, if it was: what `held_out_part` needs to do it again.
        stream: URL of the folder whose shards ``train`` has to be streamed from, as it is not on this machine.
    """

    name: str
    classes: tuple[str, ...]
    train: list[Sample]
    val: list[Sample]
    split: dict[str, Any] = field(default_factory=dict)
    stream: str | None = None

    def digest(self) -> str:
        """A hash of which images are in which split and class, wherever the folder is and whether it is packed."""
        lines = [
            f"{part} {label} {f'{source.name} {file_size(source)}' if isinstance(source, ImageFile) else position}"
            for part, samples in (("train", self.train), ("val", self.val))
            for position, (source, label) in enumerate(samples)
        ]
        return hashlib.sha256("\n".join([*self.classes, *lines]).encode()).hexdigest()


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Samples read with `open_image`, then transformed."""

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.samples[index]
        with any_size():
            return self.transform(open_image(source)), label


def load_labelled_images(
    data: str, *, val_fraction: float = 0.2, seed: int = 0, train_images: int | None = None
) -> LabelledImages:
    """Read ``data``, which is "digits", a folder, or a folder packed by `pack_folder`, which gives the same images.

    Of a packed folder at a URL, the training images are left to `ShardStream`.

    A folder holds either ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (or valid, validation, test), or ``CLASS/*.jpg``
    alone, of which the same ``val_fraction`` of every class is then held out. With ``train_images``, ``train`` has that
    many of the others, see `choose`.

    Raises:
        FileNotFoundError: there is no such folder, or a shard is missing.
        ValueError: it is no folder, holds no images, or not in one of these layouts, or the classes of the two splits
            do not match; the index or a shard is damaged; ``train_images`` are more than there are, or of a stream.
    """
    split: dict[str, Any] = {"val_fraction": val_fraction, "seed": seed}
    if data == DIGITS:
        classes, samples = load_digits()
        train, val = stratified_split(samples, **split)
        return LabelledImages(DIGITS, classes, choose(train, train_images), val, {**split, "data": DIGITS})
    if "://" in data:
        from .stream import remote_images  # needs the train extra

        if train_images is not None:
            raise ValueError(f"--train-images reads images by position, and those of {data} are streamed")
        return remote_images(data)
    root = data_folder(data)
    name = root.resolve().name
    classes, train, held_out = _read_packed(root) if is_packed(root) else _read_plain(root)
    if held_out is not None:
        train_root = find_train_folder(root) or root  # packed images are named from there
        return LabelledImages(name, classes, choose(train, train_images, train_root), held_out)
    train, val = stratified_split(train, root=root, **split)
    train = choose(train, train_images, root)
    return LabelledImages(name, classes, train, val, {**split, "trained_on": _fingerprints(train, root)})


@dataclass(frozen=True)
class ImageFolders:
    """The images of a folder.

    Attributes:
        classes: what the labels index.
        train_root, val_root: the folders of class folders; ``val_root`` is None if there is one such folder only.
        train, val: their images.
    """

    classes: tuple[str, ...]
    train_root: Path
    train: list[LabelledFile]
    val_root: Path | None = None
    val: list[LabelledFile] = field(default_factory=list)


def read_folders(root: Path) -> ImageFolders:
    """The images of a folder that is not packed; errors as `load_labelled_images`."""
    train_root, val_root = find_train_folder(root), find_val_folder(root)
    if train_root is None:
        if val_root is not None:
            raise ValueError(f"{root}: has {val_root.name}/ but no train/")
        classes, train = _read_training_folder(root)
        return ImageFolders(classes, root, train)
    if val_root is None:
        raise ValueError(f"{root}: has {train_root.name}/ but none of {', '.join(f'{name}/' for name in VAL_FOLDERS)}")
    classes, train = _read_training_folder(train_root)
    val = _label(val_root, classes)
    present = {label for _, label in val}
    if absent := [name for label, name in enumerate(classes) if label not in present]:
        raise ValueError(f"{val_root}: no folders for {some(absent)}, which {train_root} has")
    return ImageFolders(classes, train_root, train, val_root, val)


def read_split(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """The images of ``folder/CLASS/``, or of the held-out part (else all) of a packed folder.

    They are labelled by the given classes, of which some may be missing.

    Raises:
        ValueError: a class folder that is not among the classes; no class folders, or an empty one.
    """
    if not is_packed(folder):
        return list(_label(folder, classes))
    found, train, val = _read_packed(folder)
    label_of = _label_of(folder, found, classes)
    return [(image, label_of[found[label]]) for image, label in (train if val is None else val)]


def _label(folder: Path, classes: Sequence[str]) -> list[LabelledFile]:
    found, samples = _read_class_folders(folder, example=classes[0])
    label_of = _label_of(folder, found, classes)
    return [(path, label_of[found[label]]) for path, label in samples]


def _label_of(folder: Path, found: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """The labels of ``classes``, if all that are ``found`` in ``folder`` are among them."""
    label_of = {name: label for label, name in enumerate(classes)}
    if foreign := [name for name in found if name not in label_of]:
        raise ValueError(
            f"{folder}: class folders that the model or train/ does not have: {some(foreign)}; it has "
            f"{some(classes)}{_proposal(folder, found)}"
        )
    return label_of


def choose(samples: Sequence[Sample], num_images: int | None, root: Path | None = None) -> list[Sample]:
    """``num_images`` of the samples, in their order: one of each class, then of each in proportion to its size.

    Which ones follows from a hash of the path below ``root``, or of the pixels of images in memory. So the choice is
    the same wherever the folder is, and a larger one holds a smaller one. None: all of them.

    Raises:
        ValueError: they are more than there are, or fewer than the classes.
    """
    if num_images is None:
        return list(samples)
    num_classes = len({label for _, label in samples})
    if not num_classes <= num_images <= len(samples):
        raise ValueError(
            f"--train-images must be from {num_classes}, the number of classes, to {len(samples)}, all there are to "
            f"train on; got {num_images}"
        )

    def draw(position: int) -> bytes:
        source = samples[position][0]
        content = relative_path(source, root).encode() if root and isinstance(source, ImageFile) else _pixels(source)
        return hashlib.sha256(content).digest()

    by_class: dict[int, list[int]] = {}
    for position in sorted(range(len(samples)), key=draw):
        by_class.setdefault(samples[position][1], []).append(position)
    ranked = [
        (rank / len(members), label, position)
        for label, members in by_class.items()
        for rank, position in enumerate(members)
    ]
    return [samples[position] for position in sorted(position for _, _, position in sorted(ranked)[:num_images])]


def _pixels(source: ImageSource) -> bytes:
    return open_image(source).tobytes()


def held_out_part(samples: Sequence[Sample], root: Path, split: dict[str, Any]) -> list[Sample] | None:
    """Of the images below ``root``, those held out from a training on them; None if it was on other images.

    ``split`` is that of the training's `LabelledImages`. It remembers some of the training images by path and size, so
    that a moved, grown or thinned-out copy of the folder is recognised.
    """
    remembered = set(split.get("trained_on", []))
    if len(remembered & set(_fingerprints(samples, root, limit=None))) * 2 <= len(remembered):
        return None
    return stratified_split(samples, split["val_fraction"], split["seed"], root)[1]


def _fingerprints(samples: Sequence[Sample], root: Path, limit: int | None = 256) -> list[str]:
    """Short hashes of path and size of the images, or of ``limit`` of them."""
    files = (source for source, _ in samples if isinstance(source, ImageFile))
    names = (f"{relative_path(file, root)}:{file_size(file)}" for file in files)
    return sorted(hashlib.sha256(name.encode()).hexdigest()[:12] for name in names)[:limit]


def _read_plain(root: Path) -> tuple[tuple[str, ...], list[Sample], list[Sample] | None]:
    """Classes, training images and held-out images, if there are such."""
    found = read_folders(root)
    return found.classes, list(found.train), None if found.val_root is None else list(found.val)


def _read_packed(root: Path) -> tuple[tuple[str, ...], list[Sample], list[Sample] | None]:
    """As `_read_plain`."""
    index = read_index(root)
    samples: dict[str, list[Sample]] = {}
    for name, split in index.splits.items():
        if damage := split.damage(root):
            raise damage[0]
        samples[name] = list(zip(split.sources(root), split.label.tolist(), strict=True))
    return index.classes, samples["train"], samples.get("val")


def _read_training_folder(root: Path) -> tuple[tuple[str, ...], list[LabelledFile]]:
    classes, samples = _read_class_folders(root)
    if len(classes) == 1:
        raise ValueError(
            f"{root}: one class only ({classes[0]}); there is nothing to tell apart{_proposal(root, classes)}"
        )
    return classes, samples


def _read_class_folders(root: Path, example: str = "CLASS") -> tuple[tuple[str, ...], list[LabelledFile]]:
    classes = class_folders(root)
    if not classes:
        loose = next((p.name for p in sorted(root.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES), None)
        found = "" if loose is None else f"; found images without folders, such as {loose}"
        raise ValueError(f"{root}: no class folders; expected {root.resolve().name}/{example}/*.jpg{found}")
    samples: list[LabelledFile] = []
    for label, name in enumerate(classes):
        files = find_images(root / name)
        if not files:
            raise ValueError(f"{root / name}: no images in this class folder (looked for {', '.join(IMAGE_SUFFIXES)})")
        samples += [(path, label) for path in files]
    return classes, samples


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in ``folder`` that count as classes, in the order of their labels."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name)))


def _proposal(root: Path, classes: Sequence[str]) -> str:
    """The end of an error message if the real class folders seem to be one level further down."""
    if len(classes) == 1 and (below := class_folders(root / classes[0])):
        return f" (did you mean {root / classes[0]}, with the folders {some(below)}?)"
    return ""
