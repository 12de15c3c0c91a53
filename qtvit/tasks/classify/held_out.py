"""The choice of the images on which a model is scored or measured."""

from qtvit.checkpoints import ModelInfo
from qtvit.data import DIGITS
from qtvit.data.folders import data_folder, find_val_folder
from qtvit.data.shards import is_packed, read_index
from qtvit.data.split import Sample

from .data import held_out_part, load_labelled_images, read_split


def held_out_samples(data: str, info: ModelInfo) -> tuple[list[Sample], str]:
    """Return the labelled images of ``data`` to score a model on, and a text that says which these are.

    They are the val part of a folder with val/CLASS (or valid, validation, test), and otherwise all images. If the
    model was trained on a part of these very images (or of the digits), they are the part that was held out.

    Raises:
        FileNotFoundError, ValueError: as `load_labelled_images`, or the data have classes that the model lacks.
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
