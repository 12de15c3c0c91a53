"""What people call the classes."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from timm.data import ImageNetInfo

_imagenet = lru_cache(ImageNetInfo)


def class_names(classes: Sequence[str]) -> list[str]:
    """Readable names: of classes that are all WordNet ids, like ImageNet's folders, what WordNet calls them.

    n01440764 becomes "tench, Tinca tinca". Where two are called the same, like the two cranes of ImageNet, the id is
    added. Other classes are returned as they are.
    """
    try:
        names = [_imagenet().label_name_to_description(name) for name in classes]
    except KeyError:
        return list(classes)
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({key})" for name, key in zip(names, classes, strict=True)]
