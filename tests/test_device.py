"""What `qtvit.device` changes of the process."""

import platform
import subprocess
import sys

import pytest

PAGES_PER_STEP = """
import resource
import torch
from qtvit.device import keep_freed_memory

def pages(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        tensors = [torch.empty(2 << 20).fill_(1) for _ in range(8)]  # of 8 MiB
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

keep_freed_memory()
pages(3)
print(pages(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_kept() -> None:
    command = [sys.executable, "-c", PAGES_PER_STEP]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100  # most processes would take 16,000, but in some glibc happens to keep them


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
