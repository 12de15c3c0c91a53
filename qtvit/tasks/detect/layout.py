"""Where a data set in COCO's layout keeps its annotation files and images."""

from collections.abc import Sequence
from pathlib import Path

from qtvit.errors import some

from .coco import CocoFile


def find_annotations(root: Path, split: str, names: Sequence[str]) -> Path:
    """The annotation file in ``root`` of a split, which may have any of ``names``.

    Raises:
        ValueError: there is none, or more than one.
    """
    patterns = [
        f"{folder}{pattern}.json"
        for folder in ("annotations/", "")
        for pattern in ("instances_{0}", "instances_{0}*", "{0}", "{0}*")
    ] + ["{0}*/*.json"]
    for pattern in patterns:
        for name in names:
            found = sorted(path for path in root.glob(pattern.format(name)) if not path.name.startswith("."))
            if len(found) > 1:
                shown = some([path.relative_to(root).as_posix() for path in found])
                raise ValueError(f"{root}: several annotation files for {split}: {shown}; give --{split}-annotations")
            if found:
                return found[0]
    raise ValueError(
        f"{root}: no annotation file for {split} (looked for annotations/instances_{split}*.json, "
        f"annotations/{split}.json, {split}/*.json); give --{split}-annotations"
    )


def find_images_folder(root: Path, split: str, names: Sequence[str], file: CocoFile) -> Path:
    """The folder that the file names of an annotation file are relative to.

    Raises:
        ValueError: none of the usual folders has the images, or more than one has.
    """
    parents = [root, root / "images"]
    likely = [parent / file.path.stem.removeprefix("instances_") for parent in parents]  # such as train2017
    named = [path for parent in parents for name in names for path in sorted(parent.glob(f"{name}*")) if path.is_dir()]
    candidates = [*likely, *named, *(path / "images" for path in named), root / "images", file.path.parent, root]
    names = file.file_names[:100]
    holding = [path for path in dict.fromkeys(candidates) if any((path / name).is_file() for name in names)]
    if len(holding) == 1 or (holding and holding[0] in likely):
        return holding[0]
    option = f"give --{split}-images-dir"
    if holding:
        raise ValueError(f"{file.path}: its images may be in any of {some([str(path) for path in holding])}; {option}")
    raise ValueError(f"{file.path}: found no folder with its images, such as {file.file_names[0]}; {option}")
