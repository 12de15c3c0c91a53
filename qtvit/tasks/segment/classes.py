"""The classes of a segmentation data set: from a file, ADE20K's, or those found in the masks."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtvit.errors import some, unknown_name

from .masks import MaskClasses, ValueCounts
from .palette import Color, format_color, key_color, parse_color

CLASS_FILES = ("classes.txt", "classes.yaml", "classes.yml")
"""Names of the file in a data set's folder that lists its classes."""

ADE20K_CLASSES = 150
ADE20K_NAMES = "objectInfo150.txt"
"""The list of class names that is part of ADE20K."""

MAX_FOUND = 256
"""Largest number of classes that are found in masks; more different values are noise."""

_KEYS = ("names", "colors", "ignore", "ignore_colors")


def find_class_file(root: Path, classes: str | None) -> Path | None:
    """The file that lists the classes: ``classes`` if given, else one of `CLASS_FILES` in ``root``, else None.

    Raises:
        FileNotFoundError: ``classes`` does not exist.
        ValueError: ``root`` has several such files.
    """
    if classes is not None:
        if not Path(classes).is_file():
            raise FileNotFoundError(f"{classes}: no such file of classes")
        return Path(classes)
    found = [root / name for name in CLASS_FILES if (root / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{root}: has both {found[0].name} and {found[1].name}; keep one")
    return found[0] if found else None


def read_class_file(path: Path, ignore_index: int = 255) -> MaskClasses:
    """The classes in a text or YAML file; docs/segmentation.md shows both.

    Raises:
        ValueError: something is wrong; the message names the file and the line or key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    try:
        return (_from_yaml if path.suffix.lower() in (".yaml", ".yml") else _from_text)(text, ignore_index)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def ade20k_classes(root: Path, ignore_index: int = 255) -> MaskClasses:
    """ADE20K's classes: values 1 to 150, and 0 for pixels without a class; named if ``root`` has ADE20K's list."""
    names = {value: str(value) for value in range(1, ADE20K_CLASSES + 1)}
    if (root / ADE20K_NAMES).is_file():
        for line in (root / ADE20K_NAMES).read_text(encoding="utf-8").splitlines():
            fields = line.strip().split("\t")
            if len(fields) > 1 and fields[0].strip().isdigit() and int(fields[0]) in names:
                names[int(fields[0])] = fields[-1].strip()
    count = Counter(names.values())
    names = {value: name if count[name] == 1 else f"{name} ({value})" for value, name in names.items()}  # made distinct
    ignored = (0, *_default_ignored(ignore_index, (0, *names)))
    return MaskClasses(tuple(names.values()), tuple(names), ignored, ignore_index=ignore_index)


def found_classes(root: Path, masks: Iterable[ValueCounts], ignore_index: int = 255) -> MaskClasses:
    """The values or colours that the masks of ``root`` have, in ascending order; each is a class named after itself.

    Raises:
        ValueError: there are both colours and values, too many of them, or fewer than two.
    """
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for counts in masks:
        found[counts.color].update(counts.pixels)
    if all(len(set(key_color(key))) == 1 for key in found[True]):  # index masks of three equal channels
        found = {True: set(), False: found[False] | {key & 255 for key in found[True]}}
    if found[True] and found[False]:
        raise ValueError(
            f"{root}: has both colour masks and index masks; list the classes in classes.txt, with colours"
        )
    color = bool(found[True])
    ignored = () if color else tuple(found[False] & {ignore_index})
    values = sorted((found[True] | found[False]) - set(ignored))
    what = "colours" if color else "values"
    if len(values) > MAX_FOUND:
        raise ValueError(
            f"{root}: the masks have {len(values):,} different {what}; these are no classes, or resized with "
            "interpolation; list the classes in classes.txt" + ", with colours" * color
        )
    if len(values) < 2:
        only = f"{f'value {values[0]}' if values else 'no value'} only"
        if ignored:
            only += f" besides {ignore_index}, which is ignored (give another ignore_index if it is a class)"
        raise ValueError(f"{root}: the masks have {only}; two classes are needed")
    if not color:
        return MaskClasses(tuple(map(str, values)), tuple(values), ignored, ignore_index=ignore_index)
    colors = tuple(map(key_color, values))
    names = tuple(map(format_color, colors))
    return MaskClasses(names, tuple(range(len(names))), (), colors, by_color=True, ignore_index=ignore_index)


def _from_text(text: str, ignore_index: int) -> MaskClasses:
    names: list[str] = []
    colors: list[Color] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        shown = f"line {number}: {line.strip()!r}"
        name, colon, rest = line.rpartition(":")
        if colon and re.search(r"\d", rest):
            if (color := parse_color(rest)) is None:
                raise ValueError(f"{shown}; expected NAME or NAME: RED GREEN BLUE, each 0 to 255")
            if len(colors) < len(names):
                raise ValueError(f"{shown} is the first with a colour; give all or none")
            colors.append(color)
        elif colors:
            raise ValueError(f"{shown} has no colour, and others have")
        else:
            name = line
        names.append(name.strip())
    return _build(names, range(len(names)), None, colors, [], ignore_index)


def _from_yaml(text: str, ignore_index: int) -> MaskClasses:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError("not valid YAML" + (f" (line {mark.line + 1})" if mark else "")) from None
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError("expected the key names, with a list of names or a map from mask value to name")
    if unknown := [key for key in content if key not in _KEYS]:
        raise unknown_name("key", str(unknown[0]), _KEYS)
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(value, int) for value in names):
        raise ValueError("names: expected a list of names, or a map from mask value to name")
    ordered = [str(name) for name in names.values()]
    colors = content.get("colors")
    if isinstance(colors, dict):
        if missing := [name for name in ordered if name not in colors]:
            raise ValueError(f"colors: none for {some(missing)}")
        if foreign := [str(name) for name in colors if name not in ordered]:
            raise unknown_name("name in colors", foreign[0], ordered)
        colors = [colors[name] for name in ordered]
    ignore = content.get("ignore")
    if ignore is not None and not (isinstance(ignore, list) and all(isinstance(value, int) for value in ignore)):
        raise ValueError(f"ignore: expected a list of mask values, got {ignore!r}")
    colors, ignored = _color_list(colors, "colors"), _color_list(content.get("ignore_colors"), "ignore_colors")
    return _build(ordered, list(names), ignore, colors, ignored, ignore_index)


def _color_list(colors: Any, key: str) -> list[Color]:
    if not isinstance(colors, (list, type(None))):
        raise ValueError(f"{key}: expected a list of colours, got {colors!r}")
    parsed = []
    for color in colors or ():
        if (rgb := parse_color(" ".join(map(str, color)) if isinstance(color, list) else "")) is None:
            raise ValueError(f"{key}: {color!r} is no colour; expected such as [128, 64, 0]")
        parsed.append(rgb)
    return parsed


def _build(
    names: list[str],
    values: Sequence[int],
    ignored: list[int] | None,
    colors: list[Color],
    ignored_colors: list[Color],
    ignore_index: int,
) -> MaskClasses:
    """The classes that a file lists; ``ignored`` is None if it does not say which values are ignored."""
    if colors and len(colors) != len(names):
        raise ValueError(f"{len(colors)} colours for {len(names)} classes")
    void = _default_ignored(ignore_index, values) if ignored is None else tuple(ignored)
    given = tuple(names), tuple(values), void, tuple(colors), tuple(ignored_colors)
    return MaskClasses(*given, by_color=bool(colors), ignore_index=ignore_index)


def _default_ignored(ignore_index: int, values: Sequence[int]) -> tuple[int, ...]:
    return (ignore_index,) if ignore_index >= 0 and ignore_index not in values else ()
