"""Devices by name, and the processes of a distributed run."""

import os

import torch


def resolve_device(name: str = "auto") -> torch.device:
    """The device called ``name``: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", …

    Raises:
        ValueError: there is no such device here; the message lists those there are.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    available = ["cpu"]
    if accelerator is not None:
        available += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in [*available, "cpu:0"]:
        raise ValueError(f"no such device: {name!r}; this machine has: {', '.join(available)}")
    return torch.device("cpu") if device.type == "cpu" else device


def processes() -> tuple[int, int]:
    """The number of this process and how many there are, as ``torchrun`` sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
