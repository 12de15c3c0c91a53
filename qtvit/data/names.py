"""Readable names of classes."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from timm.data import ImageNetInfo

_imagenet = lru_cache(ImageNetInfo)


def class_names(classes: Sequence[str]) -> list[str]:
    """Replace WordNet ids, which name ImageNet's folders, by WordNet's words, unless some class is not such an id.

    n01440764 becomes "tench, Tinca tinca". Where two classes have the same words, like ImageNet's two cranes, the id is
    added.
    """
    try:
        names = [_imagenet().label_name_to_description(name) for name in classes]
    except KeyError:
        return list(classes)
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({key})" for name, key in zip(names, classes, strict=True)]
