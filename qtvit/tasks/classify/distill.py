"""Distillation: the outputs of a trained network, the teacher, for the same images are further targets.

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
    """The losses that pull a network towards a frozen teacher: any classifier, or for ``distill.features`` a `QTViT`.

    It is not a module, so that the teacher is not part of checkpoints, the moving average or the optimiser.

    Attributes:
        weights: weight of each loss that is on, by name.
    """

    def __init__(self, teacher: nn.Module, config: ClassifyConfig) -> None:
        self.teacher = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.temperature, self.loss = config.distill.temperature, config.optim.loss
        weights = {"logits": config.distill.logits, "features": config.distill.features}
        self.weights = {f"distill_{name}": weight for name, weight in weights.items() if weight}
        self.stages: list[int] = attention_stages(teacher) if config.distill.features else []
        # Without stages `_run` calls the student itself, whose call is compiled already.
        self.run_student: Any = torch.compile(_run, dynamic=False) if config.compile and self.stages else _run

    def __call__(self, student: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's logits for a batch of images, and its losses by the names in ``weights``."""
        losses = {}
        logits, maps = self.run_student(student, images, self.stages)
        with torch.no_grad():
            teacher_logits, teacher_maps = _run(self.teacher, images, self.stages)
        if "distill_logits" in self.weights:
            losses["distill_logits"] = logit_loss(logits, teacher_logits, self.temperature, self.loss)
        if "distill_features" in self.weights:
            losses["distill_features"] = feature_loss(maps, teacher_maps)
        return logits, losses

    def digest(self) -> str:
        """Hash of the teacher's weights."""
        digest = hashlib.sha256()
        for name, tensor in self.teacher.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _run(model: Any, images: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the outputs of the given stages."""
    if not stages:
        return model(images), []
    features, maps = model.forward_intermediates(images, indices=list(stages))
    return model.forward_head(features), maps


def attention_stages(model: Any) -> list[int]:
    """Indices of those stages of a `QTViT` that have attention."""
    return [i for i, stage in enumerate(model.cfg.stages) if stage.block == "attn"]


def logit_loss(logits: Tensor, teacher: Tensor, temperature: float, kind: str) -> Tensor:
    """T² · KL(teacher ‖ student), the Kullback-Leibler divergence of the class probabilities at temperature T.

    The (B, C) logits are divided by T. For the ``kind`` "ce" a softmax over the classes makes them probabilities; for
    "bce" a sigmoid of each does, and the mean is over all B * C. The scale is that of `train.classification_loss`.
    See Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    student, target = logits.float() / temperature, teacher.float() / temperature
    if kind == "ce":
        divergence = F.kl_div(student.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    else:
        p = target.sigmoid()
        divergence = F.binary_cross_entropy_with_logits(student, p) - F.binary_cross_entropy_with_logits(target, p)
    return divergence * temperature**2


def feature_loss(maps: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of the feature maps divided by the teacher's mean square, averaged over the maps.

    It is 0 for equal maps and 1 for maps of zeros. These are the hints of Romero et al., FitNets, ICLR 2015, without
    regressors, as the shapes agree.
    """
    pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(maps, teacher, strict=True)]
    return torch.stack([F.mse_loss(ours, theirs) / theirs.square().mean() for ours, theirs in pairs]).mean()


def load_distillation(
    config: ClassifyConfig, student: nn.Module, info: ModelInfo, sizes: Sequence[tuple[int, int]], before: str | None
) -> Distillation | None:
    """Load the teacher, and check that it fits the student, which ``info`` describes; None if there is no distillation.

    Args:
        sizes: (H, W) of the training images.
        before: the teacher's digest in the run that is resumed; None for a new run.

    Raises:
        FileNotFoundError: the teacher does not exist, or no longer does.
        ValueError: the teacher does not fit the student, or has another digest than ``before``.
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
    same_attention = all(theirs.model_args.get(name) == info.model_args.get(name) for name in ATTENTION_ARGS)
    if config.swap_kernel and wanted.teacher is None and same_attention:
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
        networks: tuple[Any, Any] = (teacher, student)
        shapes, expected = (
            [(net.feature_info[i]["num_chs"], net.feature_info[i]["reduction"]) for i in attention_stages(net)]
            for net in networks
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
