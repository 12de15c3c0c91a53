"""Distillation: what a trained network, the teacher, makes of the same images is one more target.

Shapes: B images, C classes.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit import console
from qtvit.checkpoints import ModelInfo, load_model
from qtvit.checkpoints.model_file import ATTENTION_ARGS
from qtvit.errors import some
from qtvit.models import QTViT, check_img_size

from .config import ClassifyConfig


class Distillation:
    """The losses that pull a network towards a frozen teacher.

    This is no module, so that the teacher is in no checkpoint, moving average or optimiser.

    Args:
        teacher: any classifier; for features, a model of ours.
        config: of the run.
    """

    def __init__(self, teacher: nn.Module, config: ClassifyConfig) -> None:
        self.teacher = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.temperature = config.distill.temperature
        self.loss = config.optim.loss
        weights = {"logits": config.distill.logits, "features": config.distill.features}
        self.weights = {f"distill_{name}": weight for name, weight in weights.items() if weight}
        """Of the losses that are on, by name."""
        self.stages: list[int] = attention_stages(teacher) if config.distill.features else []
        # Without stages, the student is called, and its call is compiled already.
        self.run_student: Any = torch.compile(_run, dynamic=False) if config.compile and self.stages else _run

    def __call__(self, student: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits, and its losses by the names in ``weights``, of a batch of images."""
        logits, maps = self.run_student(student, images, self.stages)
        with torch.no_grad():
            teacher_logits, teacher_maps = _run(self.teacher, images, self.stages)
        losses = {}
        if "distill_logits" in self.weights:
            losses["distill_logits"] = logit_loss(logits, teacher_logits, self.temperature, self.loss)
        if "distill_features" in self.weights:
            losses["distill_features"] = feature_loss(maps, teacher_maps)
        return logits, losses

    def digest(self) -> str:
        """A hash of the teacher's weights."""
        digest = hashlib.sha256()
        for name, tensor in self.teacher.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _run(model: Any, images: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the outputs of these stages."""
    if not stages:
        return model(images), []
    features, maps = model.forward_intermediates(images, indices=list(stages))
    return model.forward_head(features), maps


def attention_stages(model: Any) -> list[int]:
    """Numbers of the stages of a `QTViT` that have attention."""
    return [i for i, stage in enumerate(model.cfg.stages) if stage.block == "attn"]


def logit_loss(logits: Tensor, teacher: Tensor, temperature: float, kind: str) -> Tensor:
    """Kullback-Leibler divergence of the teacher's probabilities from the student's, at ``temperature``, times its
    square: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.

    Args:
        logits, teacher: (B, C).
        temperature: T; logits are divided by it.
        kind: how logits are read, as in `classify.classification_loss`, on whose scale the result is: "ce", as a
            softmax over the classes; "bce", as a sigmoid of each, and the mean over all B * C.
    """
    student, target = logits.float() / temperature, teacher.float() / temperature
    if kind == "ce":
        divergence = F.kl_div(student.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    else:
        p = target.sigmoid()
        divergence = F.binary_cross_entropy_with_logits(student, p) - F.binary_cross_entropy_with_logits(target, p)
    return divergence * temperature**2


def feature_loss(maps: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The squared error of feature maps in parts of the teacher's mean square, as a mean over the maps: 0 for equal
    ones, 1 for zeros. Hints as in Romero et al., FitNets, ICLR 2015, without their regressors, as the shapes agree.
    """
    errors = [
        F.mse_loss(ours.float(), theirs.float()) / theirs.float().square().mean()
        for ours, theirs in zip(maps, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def load_distillation(
    config: ClassifyConfig, student: nn.Module, info: ModelInfo, sizes: Sequence[tuple[int, int]], before: str | None
) -> Distillation | None:
    """What ``config.distill`` asks for, if anything.

    Args:
        config: of the run.
        student: the network to train.
        info: its description.
        sizes: (H, W) of the training images.
        before: the teacher's digest, when a run goes on.

    Raises:
        FileNotFoundError: the teacher is not there (any more).
        ValueError: it does not fit, or is not the one of ``before``.
    """
    wanted = config.distill
    if not (wanted.logits or wanted.features):
        return None
    path = wanted.teacher or config.checkpoint
    assert path is not None
    try:
        teacher, theirs = load_model(path, task="classify")
    except FileNotFoundError as error:
        if before is None:
            raise
        raise FileNotFoundError(f"{config.resume} cannot go on without its teacher: {error}") from error
    parts = [[model_info.model_args.get(name) for name in ATTENTION_ARGS] for model_info in (theirs, info)]
    if config.swap_kernel and wanted.teacher is None and parts[0] == parts[1]:
        console.say(f"{path} has this attention already: nothing is swapped, and the teacher is the same network")
    if wanted.logits and theirs.classes != info.classes:
        raise ValueError(
            f"--distill.logits {wanted.logits:g}: the teacher {path} tells {len(theirs.classes)} other classes apart "
            f"({some(theirs.classes)}) than {some(info.classes)}; --distill.logits 0 leaves the features"
        )
    if wanted.features:
        for whose, model, name in (("the teacher's", teacher, theirs.model), ("the", student, info.model)):
            if not isinstance(model, QTViT):
                raise ValueError(
                    f"--distill.features {wanted.features:g} compares stages of our own models, {whose} model is "
                    f"{name}; --distill.features 0 leaves the logits"
                )
        assert isinstance(teacher, QTViT)
        assert isinstance(student, QTViT)
        shapes, expected = (
            [(model.feature_info[i]["num_chs"], model.feature_info[i]["reduction"]) for i in attention_stages(model)]
            for model in (teacher, student)
        )
        if shapes != expected:
            raise ValueError(
                f"--distill.features {wanted.features:g}: the stages of the teacher's {theirs.model} (width, stride: "
                f"{some(shapes)}) are not those of {info.model} ({some(expected)}); --distill.features 0 leaves logits"
            )
    for name in ("mean", "std"):
        if list(theirs.preprocess[name]) != list(info.preprocess[name]):
            raise ValueError(
                f"the teacher {path} takes images of {name} {list(theirs.preprocess[name])}, {info.model} of "
                f"{list(info.preprocess[name])}; both are to see the same"
            )
    for size in sizes:
        check_img_size(teacher, size, f"the teacher {path}: --img-size or --augment.train-sizes")
    distillation = Distillation(teacher, config)
    if before not in (None, distillation.digest()):
        raise ValueError(f"{path} is not the teacher that {config.resume} was learning from: its weights are others")
    return distillation
