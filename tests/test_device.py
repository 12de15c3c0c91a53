"""What `qtvit.device` changes of the process."""

import os
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
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # else glibc keeps them too in some processes

    def pages(how: str) -> float:
        command = [sys.executable, "-c", PAGES_PER_STEP, how]
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert pages("keep") < 0.1 * pages("plain")


SIGNAL_AFTER_OPENVINO = """
import gc, signal
import openvino
from openvino import opset13 as op
from qtvit.device import kept_signal_stack

signal.signal(signal.SIGINT, lambda *_: print("handled"))
pixels = op.parameter([2, 2])
model = openvino.Model([op.relu(pixels)], [pixels])
with kept_signal_stack():
    first = openvino.Core().compile_model(model, "CPU")
    second = openvino.Core().compile_model(model, "CPU")
del first
gc.collect()
del second
gc.collect()
signal.raise_signal(signal.SIGINT)
"""


def test_signals_are_handled_after_openvino() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNAL_AFTER_OPENVINO], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
