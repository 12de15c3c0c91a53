"""Cost of a training step: its time, and the memory held from the forward to the backward pass."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from qtvit.device import resolve_device
from qtvit.layers import recompute_activations as apply_recomputation
from qtvit.models import check_img_size

from .candidates import Candidate
from .measure import check_counts, environment, in_turns, paired_ratio
from .released import as_released


def bench_training(
    models: Sequence[str],
    peer: str,
    *,
    img_size: tuple[int, int] = (224, 224),
    batch_size: int = 16,
    rounds: int = 10,
    device: str = "auto",
    autocast: torch.dtype | None = None,
    recompute_activations: bool = False,
) -> dict[str, Any]:
    """Time forward pass, cross-entropy and backward pass of ``models`` and ``peer``, eager and channels-last, in turns.

    Args:
        models: see `qtvit.bench.candidates.Candidate`; exported files cannot be trained.
        peer: the model whose values the others' are divided by.
        img_size: (H, W) of the images.
        batch_size: images per step.
        rounds: timed steps of each model.
        device: see `qtvit.device.resolve_device`.
        autocast: dtype of mixed precision, or None.
        recompute_activations: see `qtvit.layers.recompute_activations`.

    Returns:
        "settings", "environment", and for each model under "models" the bytes kept for the backward pass per image
        (`bytes_kept`), the seconds of every step, their median, and both as ratios to the peer.

    Raises:
        FileNotFoundError, ValueError: an unknown model or device, a file that cannot be trained, or too few rounds.
    """
    check_counts(rounds=rounds, **{"batch size": batch_size})
    where = resolve_device(device)
    names = list(dict.fromkeys([*models, peer]))
    images = torch.randn(batch_size, 3, *img_size, device=where).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.long, device=where)
    steps: dict[str, Callable[[], None]] = {}
    kept = {}
    for name in names:
        candidate = Candidate.parse(name)
        if candidate.exported:
            raise ValueError(f"{name}: an exported file cannot be trained")
        model = candidate.module
        check_img_size(model, img_size)
        if candidate.form == "as released":
            model = as_released(model)
        if recompute_activations:
            apply_recomputation(model)
        model = model.train().to(where).to(memory_format=torch.channels_last)
        forward = partial(_loss, model, images, labels, autocast)
        kept[name] = bytes_kept(forward, model) / batch_size
        steps[name] = partial(_step, forward, model)
    seconds = in_turns(steps, device=where, rounds=rounds)
    settings: dict[str, Any] = {"peer": peer, "img_size": list(img_size), "batch_size": batch_size, "rounds": rounds}
    settings["autocast"] = None if autocast is None else str(autocast).removeprefix("torch.")
    settings["recompute_activations"] = recompute_activations
    return {
        "settings": settings,
        "environment": environment(where),
        "models": {
            name: {
                "bytes_kept_per_image": round(kept[name]),
                "bytes_kept_ratio": kept[name] / kept[peer],
                "step_seconds": seconds[name],
                "step_median_seconds": statistics.median(seconds[name]),
                "step_ratio": asdict(paired_ratio(seconds[name], seconds[peer])),
            }
            for name in names
        },
    }


def bytes_kept(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps after ``run``: each storage once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


def _loss(model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None) -> Tensor:
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        return F.cross_entropy(model(images), labels)


def _step(forward: Callable[[], Tensor], model: nn.Module) -> None:
    forward().backward()
    model.zero_grad()
