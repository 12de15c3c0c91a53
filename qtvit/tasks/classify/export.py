"""Export of classifiers: the images on which an exported file is checked."""

from qtvit.data import ImageSource
from qtvit.deploy.artifact import Artifact
from qtvit.deploy.export import Exporter, chosen
from qtvit.deploy.parity import synthetic_images

from .held_out import held_out_samples

NUM_SYNTHETIC = 32
"""Number of synthetic images for the check if no others are given."""


class ClassifyExporter(Exporter):
    """The export of a classifier."""

    def check_images(self, artifact: Artifact) -> tuple[list[ImageSource], list[int] | None, str]:
        data, calibration = self.request.data, self.request.calibration
        if data is not None:
            samples, which = held_out_samples(data, artifact.info)
            drawn = [samples[i] for i in chosen(len(samples))]
            part = f"{len(drawn)} images drawn from " if len(drawn) < len(samples) else ""
            return [image for image, _ in drawn], [label for _, label in drawn], f"{part}{which}"
        if calibration is not None:
            return calibration, None, f"{len(calibration)} calibration images"
        images = synthetic_images(NUM_SYNTHETIC, artifact.img_size)
        return images, None, f"{len(images)} synthetic images (--data or --calibration gives real ones)"
