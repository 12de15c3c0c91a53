"""Speed of reading and augmenting training images, next to timm's loader."""

import itertools
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader

from qtvit.data.sampling import EpochBatches, SeededDataset
from qtvit.device import resolve_device
from qtvit.tasks.classify.data import ImageDataset, load_labelled_images
from qtvit.tasks.classify.transforms import TrainTransform

from .measure import check_counts, environment, in_turns, paired_ratio

AUGMENT: dict[str, Any] = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": 0.0}
AUGMENT["interpolation"] = "bicubic"  # which both loaders understand alike; the published "random" is not timm's
"""Augmentation of both loaders, beside the auto-augment policy."""


def bench_loader(
    data: str,
    *,
    img_size: tuple[int, int] = (224, 224),
    batch_size: int = 128,
    num_workers: int = 0,
    batches: int = 8,
    rounds: int = 10,
    auto_augment: str = "rand-n1-m3-mstd1.0-inc1",
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the images per second of the training loader and of timm's, up to channels-last batches on the device.

    The loaders take turns. A turn is a whole epoch of the same images, so that the processes of one loader are idle
    when the other's turn begins. The first two turns do not count, as processes start in them.

    Args:
        data: folder of labelled images, as for training.
        img_size: (H, W) of the batches.
        batch_size: images per batch.
        num_workers: processes that load images, per loader.
        batches: batches per turn. Images are drawn from the folder, or repeated if it has too few.
        rounds: timed turns of each loader.
        auto_augment: policy as for training, in addition to `AUGMENT`.
        device: see `qtvit.device.resolve_device`. timm's prefetcher, which normalises there, is used on GPUs only.

    Returns:
        "settings", "environment", and under "loaders" for "qtvit" and "timm" the seconds of every turn, the median
        images per second, and the ratio of images per second to timm's.

    Raises:
        FileNotFoundError, ValueError: no such data or device, no image files, or fewer than two rounds.
    """
    check_counts(rounds=rounds, batches=batches, **{"batch size": batch_size})
    where = resolve_device(device)
    samples = _pick(data, batches * batch_size)
    transform = TrainTransform(img_size, auto_augment=auto_augment, **AUGMENT)
    order = EpochBatches(len(samples), batch_size, seed=0)
    ours = DataLoader(
        SeededDataset([ImageDataset(samples, transform)], seed=0),
        batch_sampler=order,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    dataset = create_dataset("", root=data, is_training=True)
    dataset.reader.samples = [(str(path), label) for path, label in samples]
    use_prefetcher = where.type == "cuda"
    peer = create_loader(
        dataset,
        (3, *img_size),
        batch_size,
        is_training=True,
        auto_augment=auto_augment,
        num_workers=num_workers,
        use_prefetcher=use_prefetcher,
        device=where,
        **AUGMENT,
    )
    epochs = itertools.count()

    def next_epoch() -> None:
        order.go_to(next(epochs))
        _consume(ours, where)

    turns: dict[str, Callable[[], None]] = {"qtvit": next_epoch, "timm": partial(_consume, peer, where)}
    seconds = in_turns(turns, device=where, rounds=rounds)
    settings: dict[str, Any] = {"img_size": list(img_size), "batch_size": batch_size, "num_workers": num_workers}
    settings |= {"batches": batches, "rounds": rounds, "auto_augment": auto_augment}
    settings |= {"interpolation": AUGMENT["interpolation"], "timm_use_prefetcher": use_prefetcher}
    return {
        "settings": settings,
        "environment": environment(where),
        "loaders": {
            name: {
                "seconds": seconds[name],
                "images_per_second": len(samples) / statistics.median(seconds[name]),
                "ratio": asdict(paired_ratio(seconds["timm"], seconds[name])),
            }
            for name in turns
        },
    }


def _pick(data: str, number: int) -> list[tuple[Path, int]]:
    """``number`` training images of a folder with their labels: the same random choice each time, or all, repeated."""
    found = [(source, label) for source, label in load_labelled_images(data).train if isinstance(source, Path)]
    if not found:
        raise ValueError(f"{data}: no image files, which timm's loader reads; give a folder of them")
    chosen = random.Random(0).sample(found, min(number, len(found)))
    return list(itertools.islice(itertools.cycle(chosen), number))


def _consume(loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Read all batches and bring them to the device as the training step does."""
    for images, labels in loader:
        labels.to(device)
        images.to(device).contiguous(memory_format=torch.channels_last)
