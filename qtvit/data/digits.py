"""The handwritten digits that come with scikit-learn, as data that need no download."""

import numpy as np
from PIL import Image

DIGITS = "digits"


def load_digits() -> tuple[tuple[str, ...], list[tuple[Image.Image, int]]]:
    """The names of the ten classes, and 1,797 images of 8 x 8 px with their labels."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    labelled = zip(pixels, bunch.target, strict=True)
    return tuple(map(str, bunch.target_names)), [(Image.fromarray(image), int(label)) for image, label in labelled]
