"""Images that cannot be read, found before they stop the work."""

from collections.abc import Sequence
from multiprocessing.pool import ThreadPool

from qtvit import console

from .classification import Sample
from .images import ImageSource, open_image


def find_broken(samples: Sequence[Sample], num_threads: int = 8) -> list[tuple[ImageSource, str]]:
    """The images that `open_image` cannot read, each with the reason. All files are read in full.

    Threads are enough, as PIL decodes without Python's lock. Each holds one image at a time.
    """
    sources = [source for source, _ in samples]
    with ThreadPool(num_threads) as pool:
        reasons = pool.imap(_why_broken, sources, chunksize=16)
        checked = console.progress(
            zip(sources, reasons, strict=True), total=len(sources), desc="Checking images", unit="image"
        )
        return [(source, reason) for source, reason in checked if reason is not None]


def drop_broken(samples: Sequence[Sample], classes: Sequence[str] | None = None) -> list[Sample]:
    """``samples`` without those that cannot be read; how many these are, and the first of them, are said.

    Args:
        samples: to check.
        classes: what the labels index, for training images: every class has to keep an image.

    Raises:
        ValueError: nothing is left, or a class is left without images.
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
