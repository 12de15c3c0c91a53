from timm.data import ImageNetInfo

from qtvit.data import class_names


def test_wordnet_ids_get_their_names() -> None:
    assert class_names(["n01440764", "n07753592"]) == ["tench, Tinca tinca", "banana"]


def test_imagenet_names_are_distinct() -> None:
    names = class_names(ImageNetInfo().label_names())
    assert len(set(names)) == 1000
    assert [name for name in names if name.startswith("crane (")] == ["crane (n02012849)", "crane (n03126707)"]


def test_other_names_stay() -> None:
    for classes in (["cat", "dog"], ["n01440764", "dog"], ["n99999999"], []):
        assert class_names(classes) == classes
