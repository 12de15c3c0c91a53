"""What an exported file says of itself: enough to use it without the run it was made of."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtvit.checkpoints import ModelInfo
from qtvit.version import __version__

METADATA_KEY = "qtvit"
"""Name of the description in a file: in ONNX's metadata_props, OpenVINO's rt_info, the extra files of a .pt2."""

INPUT, OUTPUT = "images", "logits"
"""Names of the graph's input, (B, 3, H, W) normalised pixels in fp32, and output, (B, num_classes) in fp32; of a
segmentation (B, num_classes, H, W).
"""

DETECTIONS = ("boxes", "labels", "scores", "masks")
"""Names of a detector's outputs: (n, 4) in pixels, (n,) from 1 on, (n,), and (n, 1, H, W) in 0..1 if it has masks; its
input is one image, (3, H, W) in 0..1.
"""

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""Formats of exported files, with the ending of each; OpenVINO's weights lie beside the .xml in a .bin."""

PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16", "fp16", "int8"),
    "torch": ("fp32", "bf16", "fp16"),
}
"""Precisions that each format can have."""


@dataclass(frozen=True)
class Artifact:
    """The description in an exported file.

    Attributes:
        info: of the model; ``info.preprocess["size"]`` is the image size it was exported for, but for a detector, which
            takes any.
        format: a name in `FORMATS`.
        precision: a name in `PRECISIONS`.
        dynamic: which of "batch" and "hw" (height and width) may differ from 1 and the image size.
    """

    info: ModelInfo
    format: str
    precision: str = "fp32"
    dynamic: tuple[str, ...] = ("batch",)

    @property
    def img_size(self) -> tuple[int, int]:
        """(H, W) that the preprocessing yields, and the only one that is taken unless "hw" is dynamic; a detector's has
        none.
        """
        height, width = self.info.preprocess["size"]
        return height, width

    def to_json(self) -> str:
        """What is stored in the file: the fields, and the image size and the version of qtvit for other readers."""
        info = dataclasses.replace(self.info, version=__version__)
        fields = {**dataclasses.asdict(self), "info": dataclasses.asdict(info)}
        return json.dumps({"version": __version__, "img_size": self.info.preprocess.get("size"), **fields})

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Artifact":
        """The description that `to_json` wrote; ValueError if this version cannot read it."""
        try:
            fields: dict[str, Any] = json.loads(text)
            del fields["version"], fields["img_size"]
            fields["info"], fields["dynamic"] = ModelInfo(**fields["info"]), tuple(fields["dynamic"])
            return cls(**fields)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: its description was written by another version of qtvit than this {__version__} ({error})"
            ) from error


def format_of(path: str | Path) -> str | None:
    """The format of an exported file by the ending of its name; None if it is not one of `FORMATS`."""
    return next((name for name, suffix in FORMATS.items() if Path(path).suffix.lower() == suffix), None)


def no_description(path: Path) -> ValueError:
    """The error about a file that `qtvit export` has not written."""
    return ValueError(
        f"{path}: has no {METADATA_KEY!r} entry in its metadata (class names, preprocessing), so `qtvit export` did "
        "not write it"
    )
