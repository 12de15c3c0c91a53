"""The models that are measured: found by name, with activations of ordinary size, and brought into inference form."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
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
"""Prefixes of a model's name that ask for another form than that for inference, and what that is called."""
HUB = "hf-hub:"
NUM_IMAGES = 8
"""Of noise, whose statistics stand in for those of training."""
TOLERANCE = 1e-3
"""By how much folding BatchNorms may change the outputs, relative to the largest."""


@dataclass(frozen=True)
class Candidate:
    """A model to measure, as the command names it: ``[plain:|released:]MODEL[:KERNEL]``.

    Attributes:
        name: all of that.
        source: MODEL: a name, ours or timm's, a run folder, a model file, or an exported file.
        kernel: attention kernel to build a model of ours with.
        form: "inference"; or "as trained" (plain:), the network without anything fused; or "as released" (released:),
            one of ours with its attention written as in the authors' code.
    """

    name: str
    source: str
    kernel: str | None = None
    form: str = "inference"
    _macs: dict[tuple[int, int], int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """Of what a user wrote."""
        prefix, _, source = text.partition(":")
        source = source if prefix in FORMS else text
        head, _, tail = source.rpartition(":")
        kernel = tail if head and tail in KERNELS else None
        return cls(text, source if kernel is None else head, kernel, FORMS.get(prefix, "inference"))

    @property
    def exported(self) -> Path | None:
        """The file, if it is one that `qtvit export` wrote; FileNotFoundError if it is not there."""
        if not format_of(self.source):
            return None
        if not Path(self.source).is_file():
            raise FileNotFoundError(f"{self.source}: no such file")
        return Path(self.source)

    @cached_property
    def module(self) -> nn.Module:
        """The network in evaluation mode, with the weights of the file or folder, or random ones, the same each time.

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
            return build_model(self.source)  # which says what it is called instead
        return load_model(self.source, task="classify", **model_args)[0]

    def measured(self, img_size: tuple[int, int], eager_cpu: bool = False) -> nn.Module:
        """The network in the form that is measured, at ``img_size`` (H, W); ``eager_cpu`` as for `inference_form`."""
        if self.form == "inference":
            return inference_form(self.module, img_size, eager_cpu)
        return as_released(self.module) if self.form == "as released" else self.module

    def num_macs(self, form: nn.Module, img_size: tuple[int, int]) -> int:
        """MACs per image that the outputs need: those of the network as it is trained, or of ``form`` if less."""
        if img_size not in self._macs:
            self._macs[img_size] = min(model_cost(each, img_size).num_macs for each in (self.module, form))
        return self._macs[img_size]


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Give a network with random weights BatchNorms as after training: statistics of its inputs, no gains of 0.

    Residual branches often begin with a gain of 0, and activations fade from layer to layer, until they are so small
    that CPUs take several times as long for them.
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
        norm.momentum = None  # the mean of all batches, of which there is one
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def inference_form(model: nn.Module, img_size: tuple[int, int], eager_cpu: bool = False) -> nn.Module:
    """A copy of ``model`` with as little to do as its outputs allow: branches merged, BatchNorms in the convolutions.

    Ours are fused for ``img_size`` as `qtvit export` does it, or with ``eager_cpu`` as `qtvit predict` does. Others are
    brought into their own form with timm's ``reparameterize_model``, and then `fold_batch_norms` does what the
    compilers of inference do anyway.
    """
    if isinstance(model, QTViT):
        return fuse(model, img_size, eager_cpu=eager_cpu)
    example = torch.randn(1, getattr(model, "in_chans", 3), *img_size, generator=torch.Generator().manual_seed(0))
    return fold_batch_norms(reparameterize_model(model), example)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy in which each BatchNorm that reads the output of a convolution has become part of it.

    Who reads whose output is seen by running ``example`` (B, C, H, W). If the outputs then change by more than
    `TOLERANCE`, something else read it too, and the copy is left as it was.
    """
    folded = copy.deepcopy(model).eval()
    made_by: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # by id; the tensor is kept, so that the id stays its own
    pairs: list[tuple[nn.Conv2d, str, nn.Module]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = (output, module)
        elif found := made_by.get(id(inputs[0])):
            pairs.append((found[1], name, module))

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: note(name, module, inputs, output))
        for name, module in folded.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    before = folded(example)
    for hook in hooks:
        hook.remove()
    made_by.clear()
    for conv, name, norm in pairs:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.bias = bias
        # timm's norms hold what comes after them as well
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        folded.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())
    difference = (folded(example) - before).abs().max()
    return folded if difference <= TOLERANCE * before.abs().max() else copy.deepcopy(model).eval()
