"""Devices by name, and what runs need to know or set about processes, cores, memory and signals."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def resolve_device(name: str = "auto") -> torch.device:
    """The device called ``name``: "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", "mps", …

    Raises:
        ValueError: this machine has no such device; the message lists the devices it has.
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
    """Rank of this process and number of processes, as ``torchrun`` sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def num_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_interrupts(worker: int) -> None:
    """Initialise a loader process: Ctrl-C also reaches it, but is handled by its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory instead of returning it to the system.

    Each training step on a CPU allocates and frees the same memory, and a seventh of its time would go into fresh
    pages, which the system clears. With another C library, nothing is done.
    """
    if (mallopt := _from_libc("mallopt")) is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD in malloc.h, in bytes
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; 32 MiB is the largest value that glibc documents


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restore this thread's stack for signal handlers (``sigaltstack``) afterwards; for use around OpenVINO.

    On Linux, each ``openvino.Core`` gives the thread that loads its CPU plugin a signal stack. When the plugin is
    unloaded, it frees that stack, but restores the previous one only if its own is still in use. So of two, the first
    that is unloaded leaves the thread with freed memory, and the next handled signal, such as Ctrl-C or the exit of a
    loader process, kills the process without a message.
    """
    sigaltstack = _from_libc("sigaltstack") or (lambda new, old: None)
    stack = ctypes.create_string_buffer(64)  # larger than a stack_t
    sigaltstack(None, stack)
    try:
        yield
    finally:
        sigaltstack(stack, None)


def _from_libc(name: str) -> Any:
    """A function of the C library; None if it is missing or this is not Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
