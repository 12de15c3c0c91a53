"""What `qtvit.device` changes of the process."""

import platform
import subprocess
import sys

import pytest

PAGES_PER_STEP = """
import resource, sys
import torch
from qtvit.device import keep_freed_memory

def pages(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        tensors = [torch.empty(2 << 20).fill_(1) for _ in range(8)]  # of 8 MiB
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

if sys.argv[1] == "keep":
    keep_freed_memory()
pages(3)
print(pages(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_kept() -> None:
    def pages(how: str) -> float:
        command = [sys.executable, "-c", PAGES_PER_STEP, how]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert pages("keep") < 0.1 * pages("plain")
