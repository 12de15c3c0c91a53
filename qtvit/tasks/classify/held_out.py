"""Which images to score a model on, or to measure it with."""

from qtvit.checkpoints import ModelInfo
from qtvit.data import DIGITS, ImageSource, find_images, load_labelled_images, read_split
from qtvit.data.classification import Sample, data_folder, find_val_folder, held_out_part
from qtvit.data.shards import is_packed, read_index


def held_out_samples(data: str, info: ModelInfo) -> tuple[list[Sample], str]:
    """The labelled images of ``data`` to score a model on, and in words which they are.

    Of a folder with val/CLASS (or valid, validation, test) those; of a folder of CLASS alone all images, unless the
    model was trained on a part of these very images: then the part that was held out. The same goes for "digits".

    Raises:
        FileNotFoundError, ValueError: as `qtvit.data.load_labelled_images`, or classes that the model does not have.
    """
    if data == DIGITS:
        if info.split.get("data") != DIGITS:
            raise ValueError(f"the digits are not what {info.model} was trained on ({', '.join(info.classes[:5])}, …)")
        digits = load_labelled_images(data, val_fraction=info.split["val_fraction"], seed=info.split["seed"])
        return digits.val, "the digits held out from training"
    root = data_folder(data)
    folder = find_val_folder(root) or root
    samples = read_split(folder, info.classes)
    held_out = held_out_part(samples, folder, info.split)
    if held_out is not None:
        return held_out, f"the part of {folder} held out from training ({len(samples)} images in all)"
    is_val = is_packed(folder) and "val" in read_index(folder).splits
    return samples, f"all images {'of val ' * is_val}in {folder}"


def all_images(data: str) -> list[ImageSource]:
    """All images in the folder ``data``, packed or not and labelled or not; of "digits" those held out by default.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, no image in it, or a packed one is damaged.
    """
    if data == DIGITS:
        return [image for image, _ in load_labelled_images(DIGITS).val]
    root = data_folder(data)
    if not is_packed(root):
        images: list[ImageSource] = list(find_images(root))
        if not images:
            raise ValueError(f"{data}: no images in this folder")
        return images
    splits = read_index(root).splits.values()
    for split in splits:
        if damage := split.damage(root):
            raise damage[0]
    return [image for split in splits for image in split.sources(root)]
