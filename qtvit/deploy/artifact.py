"""The description inside an exported file, which makes the file usable without the run it was exported from."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtvit.checkpoints import ModelInfo
from qtvit.version import __version__

METADATA_KEY = "qtvit"
"""Key of the description in ONNX's metadata_props, OpenVINO's rt_info, or the extra files of a .pt2."""

INPUT, OUTPUT = "images", "logits"
"""Names of the graph's input, (B, 3, H, W) normalised pixels, and output, (B, num_classes) or, of a segmenter,
(B, num_classes, H, W); both in fp32.
"""

DETECTIONS = ("boxes", "labels", "scores", "masks")
"""Names of a detector's outputs: (n, 4) in pixels, (n,) from 1 on, (n,), and, with mask heads, (n, 1, H, W) in 0..1.

Its input is one image, (3, H, W) in 0..1.
"""

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""File suffix of each format; OpenVINO's weights lie in a .bin beside the .xml."""

PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16", "fp16", "int8"),
    "torch": ("fp32", "bf16", "fp16"),
}
"""Precisions of each format."""


@dataclass(frozen=True)
class Artifact:
    """The description in an exported file.

    Attributes:
        info: description of the model; ``info.preprocess["size"]`` is the image size it was exported for. A detector
            has none and takes any size.
        format: a name in `FORMATS`.
        precision: one of the format's `PRECISIONS`.
        dynamic: which of "batch" and "hw" (height and width) may differ from 1 and the image size.
    """

    info: ModelInfo
    format: str
    precision: str = "fp32"
    dynamic: tuple[str, ...] = ("batch",)

    @property
    def img_size(self) -> tuple[int, int]:
        """(H, W) of preprocessed images; unless "hw" is dynamic, the graph takes no other. Detectors have none."""
        height, width = self.info.preprocess["size"]
        return height, width

    def to_json(self) -> str:
        """The text stored in the file: the fields, with the image size and qtvit's version on top for other readers."""
        info = dataclasses.replace(self.info, version=__version__)
        fields = {**dataclasses.asdict(self), "info": dataclasses.asdict(info)}
        return json.dumps({"version": __version__, "img_size": self.info.preprocess.get("size"), **fields})

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Artifact":
        """Parse what `to_json` wrote; ValueError if this version cannot read it. ``path`` is for the error."""
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
    """The format of a file by the suffix of its name; None if it is not one of `FORMATS`."""
    return next((name for name, suffix in FORMATS.items() if Path(path).suffix.lower() == suffix), None)
