"""Benchmarks made quick: turns of one run, small matrices."""

from collections.abc import Iterator

import pytest
import torch

from qtvit.bench import latency, peak, scaling


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(latency, "TURN", 0.0)
    monkeypatch.setattr(scaling, "TURN", 0.0)
    monkeypatch.setattr(peak, "CPU_SIZES", (16, 32))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
