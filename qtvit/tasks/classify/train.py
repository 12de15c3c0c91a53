"""Training a classifier, from configuration to run folder."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from qtvit.checkpoints import ModelInfo, load_model, own_args
from qtvit.checkpoints.model_file import ATTENTION_ARGS
from qtvit.data import Preprocess
from qtvit.data.sampling import FirstBatches, StreamBatches
from qtvit.device import processes
from qtvit.models import ARCHITECTURES, build_model, check_img_size, model_cost
from qtvit.training.config import DEFAULT_MODEL
from qtvit.training.job import (
    Job,
    Loaders,
    Speed,
    Summary,
    bn_plan,
    check_model,
    loader_options,
    make_loaders,
    say_new_classifier,
)
from qtvit.training.options import absolute
from qtvit.training.task import Task

from .config import ClassifyConfig
from .data import ImageDataset, LabelledImages, load_labelled_images
from .distill import Distillation, load_distillation
from .evaluate import evaluate
from .mixing import mix, soft_targets
from .predict import ClassPredictor
from .report import write_report
from .transforms import TrainTransform
from .unreadable import drop_broken

EPOCH_COLUMNS = {
    "train/loss": "loss {:.4f}",
    "val/loss": "held-out loss {:.4f}",
    "val/top1": "top-1 {:.2f} %",
    "val/raw_top1": "not averaged {:.2f} %",
}
CURVES = {
    "Loss": {"training": "train/loss", "held out": "val/loss"},
    "Accuracy (%)": {"top-1": "val/top1", "top-5": "val/top5"},
    "Learning rate": {"": "lr"},
}


@dataclass(frozen=True)
class RunSummary(Summary):
    """Result of training a classifier.

    Attributes:
        top1, top5: accuracy of the best weights on the held-out images, in percent.
        num_params, num_macs: of the model at its image size.
        images_per_second: speed of the forward pass alone, on the training device.
        train_seconds: wall-clock time of the training loop.
        train_images_per_second: speed of the training steps in all processes, without loading images and evaluation;
            None if it was not measured.
    """

    top1: float
    top5: float
    num_params: int
    num_macs: int
    images_per_second: float
    train_seconds: float
    train_images_per_second: float | None

    def lines(self) -> list[tuple[str, str]]:
        top5 = f" (top-5 {self.top5:.2f} %)" if self.top5 < 100 else ""
        pictures = "curves, confusion, calibration, mistakes and predictions as .png"
        return [
            ("top-1", f"{self.top1:.2f} % on the held-out images{top5}"),
            ("parameters", f"{self.num_params / 1e6:.2f} M"),
            ("MACs", f"{self.num_macs / 1e6:.1f} M per image"),
            ("speed", f"{self.images_per_second:.0f} images/s (forward pass on the training device)"),
            ("training", f"{self.train_seconds:.0f} s"),
            ("files", f"best.safetensors (the model), {pictures},"),
            ("", "summary.json, scores.json, per_class.csv, config.yaml"),
        ]


class Classifier(Task):
    """A classifier in training; ``class_weights``, (num_classes,), are those of the loss of the labels."""

    config: ClassifyConfig

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        config: ClassifyConfig,
        class_weights: Tensor | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        distill_weights = distillation.weights if distillation else {}
        super().__init__(model, config, loss_parts=list(distill_weights))
        self.distillation, self.distill_weights = distillation, distill_weights
        self.num_classes = num_classes
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.scores = nn.ModuleDict({f"{prefix}scores": _scores(num_classes) for prefix in self.networks})

    def on_fit_start(self) -> None:
        if self.distillation is not None:
            self.distillation.teacher.to(self.device)  # the teacher is no submodule, so Lightning does not move it

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        augment, optim, ema = self.config.augment, self.config.optim, self.config.ema
        targets = soft_targets(labels, self.num_classes, optim.label_smoothing)
        images = images.contiguous(memory_format=torch.channels_last)
        images, targets = mix(images, targets, mixup=augment.mixup, cutmix=augment.cutmix, alpha=augment.mix_alpha)
        logits, parts = self.distillation(self.model, images) if self.distillation else (self.model(images), {})
        loss = classification_loss(logits, targets, optim.loss, self.class_weights)
        loss = sum((weight * parts[name] for name, weight in self.distill_weights.items()), start=loss)
        if self.ema is not None and ema.mesa_ratio and self.progress >= ema.mesa_start:
            with torch.no_grad():
                teacher = self.ema(images).float()
            beliefs = teacher.sigmoid() if optim.loss == "bce" else teacher.softmax(-1)
            loss = loss + ema.mesa_ratio * classification_loss(logits, beliefs, optim.loss)
        self.count_loss(loss, len(labels), parts)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        images = images.contiguous(memory_format=torch.channels_last)
        for prefix, network in self.networks.items():
            logits = network.forward(images).float()
            scores: Any = self.scores[f"{prefix}scores"]
            scores["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
            for name in ("top1", "top5"):
                scores[name].update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        for prefix in self.networks:
            scores: Any = self.scores[f"{prefix}scores"]
            self.log(f"val/{prefix}top1", 100 * scores["top1"].compute(), prog_bar=True)
            self.log(f"val/{prefix}top5", 100 * scores["top5"].compute())
            loss = scores["loss"].compute()
            if not loss.isfinite():
                which = "moving average" if self.ema is not None and not prefix else "trained weights"
                raise FloatingPointError(f"the held-out loss of the {which} is {loss.item()}; try a lower --lr")
            self.log(f"val/{prefix}loss", loss)
            for metric in scores.values():
                metric.reset()
        super().on_validation_epoch_end()


def _scores(num_classes: int) -> nn.ModuleDict:
    top1 = MulticlassAccuracy(num_classes, average="micro")
    top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
    # By default MeanMetric leaves NaN out, and a diverged network would look fine.
    return nn.ModuleDict({"loss": MeanMetric(nan_strategy=math.nan), "top1": top1, "top5": top5})


def classification_loss(logits: Tensor, targets: Tensor, kind: str, class_weights: Tensor | None = None) -> Tensor:
    """The mean loss of a batch.

    Args:
        logits, targets: (B, C); targets from 0 to 1.
        kind: "ce", softmax cross-entropy, or "bce", the mean binary cross-entropy of all B * C sigmoids.
        class_weights: (C,). For "ce" they weight the term of each class. For "bce", where every class has a term in
            every image, they weight the images by their targets.
    """
    if kind == "ce":
        return F.cross_entropy(logits.float(), targets, weight=class_weights)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)
    return losses.mean() if class_weights is None else ((targets @ class_weights) * losses).mean()


def class_weights(labels: Sequence[int], num_classes: int, how: str | None) -> Tensor | None:
    """(num_classes,) weights of the loss: "balanced" is N / (num_classes · N_c), so that all classes count equally."""
    if how is None:
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes)
    return len(labels) / (num_classes * counts.clamp_min(1)).float()


class ClassifyJob(Job[ClassifyConfig, RunSummary]):
    """The training of a classifier."""

    monitor = "val/top1"
    score = "top-1"
    columns = EPOCH_COLUMNS
    curves = CURVES

    def read_data(self, config: ClassifyConfig) -> LabelledImages:
        return read_data(config)

    def build(self, config: ClassifyConfig, data: LabelledImages) -> tuple[nn.Module, ModelInfo]:
        return build_classifier(config, data)

    def set_up(self, model: Any, device: torch.device, past: dict[str, Any]) -> None:
        config, data = self.config, self.data
        if past.get("stream_workers") not in (None, config.num_workers):
            raise ValueError(
                f"--num-workers {config.num_workers} cannot change for a stream, whose order depends on it: "
                f"{config.resume} had {past['stream_workers']}"
            )
        preprocess = Preprocess(**self.info.preprocess)
        sizes = (preprocess.size, *config.augment.train_shapes())
        for size in sizes:
            check_img_size(model, size, "--img-size" if size == preprocess.size else "--augment.train-sizes")
        is_done = past.get("finished", False)  # then only the report is missing
        distillation = None if is_done else load_distillation(config, model, self.info, sizes, past.get("teacher"))
        weights = class_weights([label for _, label in data.train], len(data.classes), config.optim.class_weights)
        model = model.to(memory_format=torch.channels_last)
        self.task = Classifier(model, len(data.classes), config, weights, distillation)
        self.loaders = _loaders(config, data, preprocess, device)
        self.sources = [source for source, _ in data.train]
        self.description |= {
            "stream_workers": config.num_workers if data.stream else None,
            "teacher": distillation.digest() if distillation else None,
        }
        self.about = (
            f"{data.name}: {len(data.classes)} classes, {len(data.train)} training and {len(data.val)} held-out images "
            f"of {'x'.join(map(str, preprocess.size))} px"
        )
        self.scored_first = config.swap_kernel

    def resolved(self) -> dict[str, Any]:
        distill, preprocess = self.config.distill, self.info.preprocess
        return {
            "distill": replace(distill, teacher=absolute(distill.teacher)),
            "img_size": "x".join(map(str, preprocess["size"])),
            "crop_pct": preprocess["crop_pct"],
        }

    def report(self, run: Path, speed: Speed) -> RunSummary:
        config, data = self.config, self.data
        predictor = ClassPredictor.load(run, config.device)
        evaluation = evaluate(predictor, data.val, batch_size=config.batch_size, num_workers=config.num_workers or 0)
        write_report(evaluation, data.val, run)
        cost = model_cost(predictor.model, predictor.preprocess.size)
        return RunSummary(
            run=str(run),
            top1=round(evaluation.accuracy(1), 2),
            top5=round(evaluation.accuracy(5), 2),
            num_params=cost.num_params,
            num_macs=cost.num_macs,
            images_per_second=round(evaluation.images_per_second, 1),
            **speed.summary(),
        )


def read_data(config: ClassifyConfig) -> LabelledImages:
    """Read the images to train on and those held out."""
    data = load_labelled_images(
        config.data, val_fraction=config.val_fraction, seed=config.seed, train_images=config.train_images
    )
    if config.on_bad_image == "stop":
        return data
    if data.stream:
        raise ValueError(f"--on-bad-image skip reads all images beforehand, and those of {data.stream} are streamed")
    return replace(data, train=drop_broken(data.train, data.classes), val=drop_broken(data.val))


def build_classifier(config: ClassifyConfig, data: LabelledImages) -> tuple[Any, ModelInfo]:
    """Build the model to train, from random weights or from ``config.checkpoint``, and its description."""
    classes = list(data.classes)
    name = config.model or DEFAULT_MODEL
    shape = config.image_shape()
    model: Any  # timm's models have methods that nn.Module lacks
    if (path := config.checkpoint) is not None:
        try:
            model, source = load_model(path, task=config.task, swap_kernel=config.swap_kernel, **config.model_args)
        except ValueError as error:
            if config.swap_kernel or not config.model_args.keys() & set(ATTENTION_ARGS):
                raise
            raise ValueError(f"{error}; --swap-kernel true takes over the weights that both have") from error
        check_model(config, source)
        name = source.model
        if source.classes != classes:
            say_new_classifier(config, source, classes)
            model.reset_classifier(len(classes))
        model_args = {**source.model_args, "num_classes": len(classes)}
        preprocess = Preprocess(**source.preprocess)
    else:
        model_args = {**config.model_args, "num_classes": len(classes)}
        if shape and (name in ARCHITECTURES or getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)):
            model_args.setdefault("img_size", shape)
        model = build_model(name, **model_args)
        cfg = resolve_model_data_config(model)
        names = ("crop_pct", "interpolation", "mean", "std")
        preprocess = Preprocess(size=cfg["input_size"][1:], **{name: cfg[name] for name in names})
    preprocess = replace(preprocess, size=shape or preprocess.size, crop_pct=config.crop_pct or preprocess.crop_pct)
    return model, ModelInfo(name, own_args(model_args), classes, asdict(preprocess), split=data.split)


def _loaders(config: ClassifyConfig, data: LabelledImages, preprocess: Preprocess, device: torch.device) -> Loaders:
    sizes = (preprocess.size, *config.augment.train_shapes())
    own = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "interpolation", "random_erasing")
    options = {name: getattr(config.augment, name) for name in own}
    transforms = [TrainTransform(size, mean=preprocess.mean, std=preprocess.std, **options) for size in sizes]
    train = [ImageDataset(data.train, transform) for transform in transforms]
    val = ImageDataset(data.val, preprocess.transform())
    loaders = make_loaders(config, device, train, len(data.train), val, len(data.val))
    if data.stream is None:
        return loaders
    from .stream import ShardStream  # webdataset takes a second to import

    rank, world_size = processes()
    share: dict[str, Any] = {"seed": config.seed, "rank": rank, "world_size": world_size}
    common = loader_options(config, device)
    stream = ShardStream(data.stream, "train", transforms, batch_size=config.batch_size, **share)
    bn_size, num_bn_batches = bn_plan(config, len(data.train))
    fixed = ShardStream(data.stream, "train", transforms[:1], batch_size=bn_size, **share)
    return replace(
        loaders,
        batches=StreamBatches(stream.num_batches, stream.go_to),
        train=DataLoader(stream, config.batch_size, persistent_workers=common["num_workers"] > 0, **common),
        bn=FirstBatches(DataLoader(fixed, bn_size, **common), num_bn_batches) if config.bn_images else None,
    )
