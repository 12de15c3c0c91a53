"""Fixtures for the whole suite: shrunken networks, and weights under which every part of them matters."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small, and threads that share cores with others crawl

import pytest
import torch
from hypothesis import settings
from torch import nn

from qtvit.models import Architecture, Stage

settings.register_profile("qtvit", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("qtvit")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signal_stack() -> Iterator[None]:
    """Fails a test that leaves OpenVINO's stack for signal handlers; see `qtvit.device.kept_signal_stack`.

    Other libraries may set one, and keep it: so does what Lightning imports on some machines with GPUs.
    """
    before = _sigaltstack()
    yield
    assert "openvino" not in sys.modules or _sigaltstack() == before


def _sigaltstack() -> bytes:
    stack = ctypes.create_string_buffer(64)
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(None, stack)
    return stack.raw


@pytest.fixture(scope="session")
def tiny_architectures() -> Mapping[str, Architecture]:
    """One shrunken network for each family, with every kind of block in it."""
    return {
        "b": Architecture(
            (
                Stage(8, 1, "ds", first="conv"),
                Stage(16, 1, "mb"),
                Stage(16, 1, "mb"),
                Stage(24, 1, "attn", fewer_norm=True),
                Stage(32, 2, "attn", fewer_norm=True),
            ),
            head_dim=8,
            head_widths=(64, 72),
        ),
        "l": Architecture(
            (
                Stage(8, 1, "pair", first="conv"),
                Stage(8, 1, "fused", first="fused", first_expand=4),
                Stage(16, 2, "fused", first="fused", first_expand=4),
                Stage(16, 1, "mb", first_expand=4, fewer_norm=True),
                Stage(32, 2, "attn", first_expand=6, expand=3, fewer_norm=True),
            ),
            head_dim=16,
            head_widths=(64, 72),
            act="gelu_tanh",
            norm_eps=1e-7,
        ),
        "nano": Architecture(
            (
                Stage(8, 1, "ds", first="conv", stride=1),
                Stage(16, 1, "attn", fewer_norm=True),
                Stage(24, 1, "attn", fewer_norm=True),
            ),
            head_dim=8,
            head_widths=(32, 32),
            img_size=32,
        ),
    }


@pytest.fixture(scope="session")
def randomize() -> Callable[[nn.Module, int], nn.Module]:
    """Fills parameters and statistics with numbers that matter: a fresh network's residual branches are silent."""
    return _randomize


@torch.no_grad()
def _randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            value = 1 + 0.5 * noise.tanh()
        elif name.endswith("pos_embed"):
            value = noise
        elif tensor.ndim > 1:
            value = noise * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("norm.weight", "scalars.c")):
            value = 1 + 0.2 * noise
        else:
            value = 0.2 * noise
        tensor.copy_(value)
    return model
