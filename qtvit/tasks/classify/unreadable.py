"""Finding images that cannot be read before they stop a training or an evaluation."""

from collections.abc import Sequence

from qtvit import console
from qtvit.data.images import ImageSource, for_each_image, open_image
from qtvit.data.split import Sample


def find_broken(samples: Sequence[Sample], num_threads: int = 8) -> list[tuple[ImageSource, str]]:
    """Return the images that `open_image` cannot read, each with the reason; all files are read in full."""
    sources = [source for source, _ in samples]
    reasons = for_each_image(_why_broken, sources, num_threads)
    return [(source, reason) for source, reason in zip(sources, reasons, strict=True) if reason is not None]


def drop_broken(samples: Sequence[Sample], classes: Sequence[str] | None = None) -> list[Sample]:
    """Return ``samples`` without those that cannot be read, and print the number of these and the first reasons.

    Raises:
        ValueError: no sample is left, or none of one of the ``classes`` (given for training images).
    """
    broken = find_broken(samples)
    if not broken:
        return list(samples)
    reasons = "; ".join(reason for _, reason in broken[:3]) + ("; …" if len(broken) > 3 else "")
    if len(broken) == len(samples):
        raise ValueError(f"none of the {len(samples)} images can be read: {reasons}")
    sources = {id(source) for source, _ in broken}
    kept = [sample for sample in samples if id(sample[0]) not in sources]
    present = {label for _, label in kept}
    if absent := [name for label, name in enumerate(classes or ()) if label not in present]:
        raise ValueError(f"no image of class {absent[0]} can be read: {reasons}")
    console.say(f"skipping {len(broken)} of {len(samples)} images that cannot be read: {reasons}")
    return kept


def _why_broken(source: ImageSource) -> str | None:
    try:
        open_image(source)
    except (ValueError, OSError) as error:
        return str(error)
    return None
