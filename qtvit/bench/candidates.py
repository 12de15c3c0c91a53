"""The models to measure: found by name, with activations of ordinary size, and brought into inference form."""

import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qtvit.checkpoints import load_model
from qtvit.deploy.artifact import format_of
from qtvit.deploy.fuse import fuse
from qtvit.models import SHIPPED_WEIGHTS, QTViT, build_model, model_cost
from qtvit.ops import KERNELS

from .released import as_released

FORMS = {"plain": "as trained", "released": "as released"}
"""Forms other than the inference form, by the prefix of a model's name that asks for them."""
HUB = "hf-hub:"
NUM_IMAGES = 8
"""Number of noise images whose statistics stand in for those of training."""
TOLERANCE = 1e-3
"""Largest change of the outputs that folding BatchNorms may cause, relative to the largest output."""


@dataclass(frozen=True)
class Candidate:
    """A model to measure, named ``[plain:|released:]MODEL[:KERNEL]``.

    Attributes:
        name: the whole name.
        source: MODEL: a name of ours or timm's, a run folder, a model file, or an exported file.
        kernel: attention kernel to build a model of ours with.
        form: "inference"; "as trained" (plain:), with nothing fused; or "as released" (released:), a model of ours with
            its attention written as in the authors' code.
    """

    name: str
    source: str
    kernel: str | None = None
    form: str = "inference"
    _macs: dict[tuple[int, int], int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """The candidate that a user's ``text`` names."""
        prefix, _, source = text.partition(":")
        source = source if prefix in FORMS else text
        head, _, tail = source.rpartition(":")
        kernel = tail if head and tail in KERNELS else None
        return cls(text, source if kernel is None else head, kernel, FORMS.get(prefix, "inference"))

    @property
    def exported(self) -> Path | None:
        """The path if ``source`` is a file from `qtvit export`, else None; FileNotFoundError if it does not exist."""
        if not format_of(self.source):
            return None
        if not Path(self.source).is_file():
            raise FileNotFoundError(f"{self.source}: no such file")
        return Path(self.source)

    @cached_property
    def module(self) -> nn.Module:
        """The network in evaluation mode, with the weights of its file or folder, or random ones with a fixed seed.

        Raises:
            FileNotFoundError, ValueError: there is no such model, or it has no kernels to choose from.
        """
        model_args: dict[str, Any] = {} if self.kernel is None else {"kernel": self.kernel}
        if timm.is_model(self.source):
            if self.source.split("_")[0] != "qtvit" and (model_args or self.form == "as released"):
                raise ValueError(f"{self.name}: only models of ours, qtvit_…, have kernels and the release's form")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = build_model(self.source, **model_args)
            settle(model)
            return model.eval()
        is_shipped = (SHIPPED_WEIGHTS / f"{self.source}.safetensors").is_file()
        if not (is_shipped or self.source.startswith(HUB) or Path(self.source).exists()):
            return build_model(self.source)  # raises an error that suggests similar names
        return load_model(self.source, task="classify", **model_args)[0]

    def measured(self, img_size: tuple[int, int], eager_cpu: bool = False) -> nn.Module:
        """The network in `form`, for images of ``img_size`` (H, W); see `inference_form` for ``eager_cpu``."""
        if self.form == "inference":
            return inference_form(self.module, img_size, eager_cpu)
        return as_released(self.module) if self.form == "as released" else self.module

    def num_macs(self, form: nn.Module, img_size: tuple[int, int]) -> int:
        """MACs per image that the outputs need: those of the trained network, or of its ``form`` if that has fewer."""
        if img_size not in self._macs:
            self._macs[img_size] = min(model_cost(each, img_size).num_macs for each in (self.module, form))
        return self._macs[img_size]


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Give the BatchNorms of a network with random weights the statistics of noise images, and gains other than 0.

    Otherwise activations fade from layer to layer, also because residual branches often start with a gain of 0, until
    they are denormal numbers, with which CPUs are several times slower.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    generator = torch.Generator().manual_seed(0)
    height, width = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
    images = torch.randn(NUM_IMAGES, getattr(model, "in_chans", 3), height, width, generator=generator)
    model.eval()
    for norm in norms:
        if norm.affine and not norm.weight.any():
            nn.init.ones_(norm.weight)
        norm.reset_running_stats()
        norm.momentum = None  # running statistics become the mean over all batches, here a single one
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def inference_form(model: nn.Module, img_size: tuple[int, int], eager_cpu: bool = False) -> nn.Module:
    """A copy of ``model`` with the least work for the same outputs: branches merged, BatchNorms folded.

    Ours are fused for ``img_size`` as `qtvit export` does it, or with ``eager_cpu`` as `qtvit predict` does. Others go
    through timm's ``reparameterize_model``, and then `fold_batch_norms`, which inference compilers do anyway.
    """
    if isinstance(model, QTViT):
        return fuse(model, img_size, eager_cpu=eager_cpu)
    example = torch.randn(1, getattr(model, "in_chans", 3), *img_size, generator=torch.Generator().manual_seed(0))
    return fold_batch_norms(reparameterize_model(model), example)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy in which each BatchNorm that follows a convolution is folded into it.

    Which one follows which is found by running ``example`` (B, C, H, W). If folding changes the outputs by more than
    `TOLERANCE`, something else read the output of a convolution too, and the copy is returned as it was.
    """
    folded = copy.deepcopy(model).eval()
    made_by: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # by id of the tensor, which is kept so that the id stays unique
    pairs: list[tuple[nn.Conv2d, str, nn.BatchNorm2d]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = (output, module)
        elif isinstance(module, nn.BatchNorm2d) and (found := made_by.get(id(inputs[0]))):
            pairs.append((found[1], name, module))

    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in folded.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    before = folded(example)
    for hook in hooks:
        hook.remove()
    made_by.clear()
    for conv, name, norm in pairs:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        fused = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fused
        # timm's norm layers include the dropout and activation that follow the norm.
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        folded.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())
    difference = (folded(example) - before).abs().max()
    return folded if difference <= TOLERANCE * before.abs().max() else copy.deepcopy(model).eval()
