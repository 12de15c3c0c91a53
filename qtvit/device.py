"""Devices by name, and what a run has to do with processes, cores, memory and signals."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_KEPT = {-1: 1 << 30, -3: 32 << 20}
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, in bytes; glibc documents 32 MiB as the most for the latter."""


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


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_interrupts(worker: int) -> None:
    """For loader processes: Ctrl-C reaches them too, but is for the process that has them to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors leave free, up to 1 GiB, instead of returning it and asking for it anew.

    Each step of a training on the CPU takes and leaves the same memory, and a seventh of its time would go into fresh
    pages, which the system clears. Where the C library is another one, nothing is done.
    """
    mallopt = _from_libc("mallopt")
    if mallopt is not None:
        for option, size in _KEPT.items():
            mallopt(option, size)


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Leave this thread with the stack for signal handlers (``sigaltstack``) that it had; around OpenVINO.

    On Linux, each ``openvino.Core`` gives the thread that loads its CPU plugin a stack of its own. When the plugin
    goes, it frees that, and puts the one before back only if its own is still in use. Of two, the first to go thus
    leaves the thread with memory that is gone, and the next signal with a handler, such as Ctrl-C or the end of a
    loader's process, ends the process without a word.
    """
    sigaltstack = _from_libc("sigaltstack")
    if sigaltstack is None:
        yield
        return
    stack = ctypes.create_string_buffer(64)  # larger than a stack_t
    sigaltstack(None, stack)
    try:
        yield
    finally:
        sigaltstack(stack, None)


def _from_libc(name: str) -> Any:
    """A function of the C library on Linux, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
