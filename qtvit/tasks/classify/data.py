"""Images with one label each, from folders or from the digits that come with scikit-learn."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from qtvit.data import open_image
from qtvit.data.digits import DIGITS, load_digits
from qtvit.data.folders import VAL_FOLDERS, data_folder, find_train_folder, find_val_folder
from qtvit.data.images import IMAGE_SUFFIXES, ImageFile, any_size, file_size, find_images, is_hidden, relative_path
from qtvit.data.shards import is_packed, read_index
from qtvit.data.split import Sample, stratified_split
from qtvit.errors import some

LabelledFile = tuple[ImageFile, int]


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images in two splits.

    Attributes:
        name: name of the data set.
        classes: class names; labels index them.
        train, val: the splits.
        split: what `held_out_part` needs to hold out the same images again; empty if the data have a val part.
        stream: URL of the folder from whose shards ``train`` is streamed; None if the images are on this machine.
    """

    name: str
    classes: tuple[str, ...]
    train: list[Sample]
    val: list[Sample]
    split: dict[str, Any] = field(default_factory=dict)
    stream: str | None = None

    def digest(self) -> str:
        """Hash of the images in each split and class; the same wherever the folder is, and whether packed or not."""
        lines = [
            f"{part} {label} {f'{source.name} {file_size(source)}' if isinstance(source, ImageFile) else position}"
            for part, samples in (("train", self.train), ("val", self.val))
            for position, (source, label) in enumerate(samples)
        ]
        return hashlib.sha256("\n".join([*self.classes, *lines]).encode()).hexdigest()


@dataclass(eq=False)
class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Samples read with `open_image`, then transformed."""

    samples: Sequence[Sample]
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.samples[index]
        with any_size():
            return self.transform(open_image(source)), label


def load_labelled_images(
    data: str, *, val_fraction: float = 0.2, seed: int = 0, train_images: int | None = None
) -> LabelledImages:
    """Read the labelled images of "digits", of a folder, or of a folder packed by `pack_folder` (with equal results).

    A folder holds either ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (or valid, validation, test), or ``CLASS/*.jpg``
    alone; then `stratified_split` holds out ``val_fraction`` of every class. With ``train_images``, `choose` picks that
    many of the training images. ``data`` may also be the URL of a packed folder; its training images are then left to
    `ShardStream`.

    Raises:
        FileNotFoundError: the folder or a shard does not exist.
        ValueError: ``data`` is not a folder, has no images or another layout, or its splits have different classes; the
            index or a shard is damaged; there are fewer than ``train_images``, or they are streamed.
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
    found = read_folders(root)
    if found.val_root is not None:
        return LabelledImages(name, found.classes, choose(found.train, train_images, found.train_root), [*found.val])
    train, val = stratified_split(found.train, root=root, **split)
    train = choose(train, train_images, root)
    return LabelledImages(name, found.classes, train, val, {**split, "trained_on": _fingerprints(train, root)})


@dataclass(frozen=True)
class ImageFolders:
    """The labelled images of a folder.

    Attributes:
        classes: class names; labels index them.
        train_root, val_root: folders of the class folders; ``val_root`` is None if the data have no val part.
        train, val: the images in them.
    """

    classes: tuple[str, ...]
    train_root: Path
    train: list[LabelledFile]
    val_root: Path | None = None
    val: list[LabelledFile] = field(default_factory=list)


def read_folders(root: Path) -> ImageFolders:
    """Find the images of a folder, packed or not; errors as `load_labelled_images`."""
    if is_packed(root):
        index = read_index(root)
        samples: dict[str, list[LabelledFile]] = {}
        for name, split in index.splits.items():
            if damage := split.damage(root):
                raise damage[0]
            samples[name] = list(zip(split.sources(root), split.label.tolist(), strict=True))
        val_root = root if "val" in samples else None
        return ImageFolders(index.classes, root, samples["train"], val_root, samples.get("val", []))
    train_root, val_root = find_train_folder(root), find_val_folder(root)
    if train_root is None and val_root is not None:
        raise ValueError(f"{root}: has {val_root.name}/ but no train/")
    if train_root is not None and val_root is None:
        raise ValueError(f"{root}: has {train_root.name}/ but none of {', '.join(f'{name}/' for name in VAL_FOLDERS)}")
    train_root = train_root or root
    classes, train = _read_class_folders(train_root)
    if len(classes) == 1:
        hint = _proposal(train_root, classes)
        raise ValueError(f"{train_root}: one class only ({classes[0]}); there is nothing to tell apart{hint}")
    if val_root is None:
        return ImageFolders(classes, train_root, train)
    val = _relabel(val_root, classes, *_read_class_folders(val_root, classes[0]))
    present = {label for _, label in val}
    if absent := [name for label, name in enumerate(classes) if label not in present]:
        raise ValueError(f"{val_root}: no folders for {some(absent)}, which {train_root} has")
    return ImageFolders(classes, train_root, train, val_root, val)


def read_split(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """Read the images of ``folder/CLASS/``, or those of a packed folder: its val part if it has one, else all.

    The labels index the given ``classes``, of which some may have no images.

    Raises:
        ValueError: a class folder is not among ``classes`` or is empty, or there is no class folder.
    """
    if not is_packed(folder):
        return [*_relabel(folder, classes, *_read_class_folders(folder, classes[0]))]
    found = read_folders(folder)
    return [*_relabel(folder, classes, found.classes, found.train if found.val_root is None else found.val)]


def _relabel(
    folder: Path, classes: Sequence[str], found: Sequence[str], samples: Sequence[LabelledFile]
) -> list[LabelledFile]:
    """Make the labels of ``samples``, which index ``found``, index ``classes``; ValueError if these lack one."""
    label_of = {name: label for label, name in enumerate(classes)}
    if foreign := [name for name in found if name not in label_of]:
        raise ValueError(
            f"{folder}: class folders that the model or train/ does not have: {some(foreign)}; it has "
            f"{some(classes)}{_proposal(folder, found)}"
        )
    return [(image, label_of[found[label]]) for image, label in samples]


def choose(samples: Sequence[Sample], num_images: int | None, root: Path | None = None) -> list[Sample]:
    """Choose ``num_images`` samples (None: all), at least one per class and in proportion to the sizes of the classes.

    The choice follows from a hash of each file's path below ``root``, or of the pixels of an image in memory. So it is
    the same wherever the folder is, and a larger choice contains a smaller one. The order stays that of ``samples``.

    Raises:
        ValueError: ``num_images`` is less than the number of classes or more than that of samples.
    """
    if num_images is None:
        return list(samples)
    sizes = Counter(label for _, label in samples)
    if not len(sizes) <= num_images <= len(samples):
        raise ValueError(
            f"--train-images must be from {len(sizes)}, the number of classes, to {len(samples)}, all there are to "
            f"train on; got {num_images}"
        )

    def draw(position: int) -> bytes:
        source = samples[position][0]
        if root and isinstance(source, ImageFile):
            return hashlib.sha256(relative_path(source, root).encode()).digest()
        return hashlib.sha256(open_image(source).tobytes()).digest()

    ranks: Counter[int] = Counter()
    ranked = []
    for position in sorted(range(len(samples)), key=draw):
        label = samples[position][1]
        ranked.append((ranks[label] / sizes[label], label, position))
        ranks[label] += 1
    return [samples[position] for position in sorted(position for _, _, position in sorted(ranked)[:num_images])]


def held_out_part(samples: Sequence[Sample], root: Path, split: dict[str, Any]) -> list[Sample] | None:
    """Return those of all ``samples`` below ``root`` that a training held out; None if it was on other images.

    ``split`` is that of the training's `LabelledImages`. It has hashes of the path and size of some training images, so
    that a moved, grown or thinned-out copy of the folder is recognised.
    """
    remembered = set(split.get("trained_on", []))
    if len(remembered & set(_fingerprints(samples, root, limit=None))) * 2 <= len(remembered):
        return None
    return stratified_split(samples, split["val_fraction"], split["seed"], root)[1]


def _fingerprints(samples: Sequence[Sample], root: Path, limit: int | None = 256) -> list[str]:
    """Short hashes of the path and size of each image, or of ``limit`` of the images."""
    files = (source for source, _ in samples if isinstance(source, ImageFile))
    names = (f"{relative_path(file, root)}:{file_size(file)}" for file in files)
    return sorted(hashlib.sha256(name.encode()).hexdigest()[:12] for name in names)[:limit]


def _read_class_folders(root: Path, example: str = "CLASS") -> tuple[tuple[str, ...], list[LabelledFile]]:
    """Classes and images of ``root``; ``example`` is a class name for the error message."""
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
    """Names of the class folders in ``folder``: all but hidden folders, in the order of their labels."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name)))


def _proposal(root: Path, classes: Sequence[str]) -> str:
    """The end of an error message if the real class folders seem to be one level further down."""
    if len(classes) == 1 and (below := class_folders(root / classes[0])):
        return f" (did you mean {root / classes[0]}, with the folders {some(below)}?)"
    return ""
