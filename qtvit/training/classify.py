"""Training a classifier: configuration in, run folder out."""

import json
import math
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from qtvit.checkpoints import BEST, ModelInfo, load_model
from qtvit.data import DIGITS, ImageDataset, LabelledImages, Preprocess, load_labelled_images
from qtvit.deploy import Predictor
from qtvit.device import resolve_device
from qtvit.files import write_text
from qtvit.models import ARCHITECTURES, QTViT, build_model, model_cost

from .config import AugmentConfig, TrainConfig, save_config
from .evaluate import evaluate
from .plots import plot_confusion, plot_curves, plot_predictions
from .run import EstimateBatchNorm, SaveBest, build_trainer, create_run_folder, default_workers, set_threads

EPOCH_COLUMNS = {"train/loss": "loss {:.4f}", "val/loss": "held-out loss {:.4f}", "val/top1": "top-1 {:.2f} %"}


@dataclass(frozen=True)
class RunSummary:
    """What a finished run has to say.

    Attributes:
        run: the run folder.
        top1, top5: of the best weights on the held-out images, in percent.
        num_params, num_macs: of the model at its image size.
        images_per_second: forward pass alone, on the training device.
        train_seconds: wall-clock time of the training loop.
    """

    run: str
    top1: float
    top5: float
    num_params: int
    num_macs: int
    images_per_second: float
    train_seconds: float


class Classifier(lightning.LightningModule):
    """A network, its loss, optimiser and metrics."""

    def __init__(self, model: nn.Module, num_classes: int, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.optim.label_smoothing)
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} in epoch {self.current_epoch}, batch {batch_idx}; try a lower --lr"
            )
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        self.log(
            "lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=False, on_epoch=True, batch_size=len(labels)
        )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.model(images.contiguous(memory_format=torch.channels_last)).float()
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels), prog_bar=True, batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        self.log("val/top1", 100 * self.top1.compute(), prog_bar=True)
        self.log("val/top5", 100 * self.top5.compute())
        self.top1.reset()
        self.top5.reset()

    def configure_optimizers(self) -> Any:
        optim, num_epochs = self.config.optim, self.config.epochs
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, optim.weight_decay), lr=self.config.lr, betas=optim.betas
        )
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_warmup = round(num_steps * min(optim.warmup_epochs / num_epochs, 0.5))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, num_steps=num_steps, num_warmup=num_warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def warmup_cosine(step: int, *, num_steps: int, num_warmup: int) -> float:
    """Factor of the peak learning rate: (step + 1) / num_warmup at first, then half a cosine to 0 at ``num_steps``."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - num_warmup) / max(num_steps - num_warmup, 1), 1)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without decay; ours by ``QTViT.no_weight_decay``, timm's models by timm's rule."""
    if not isinstance(model, QTViT):
        skip: Any = getattr(model, "no_weight_decay", set)
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=skip())
    exempt = model.no_weight_decay()
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]


def train_classifier(config: TrainConfig) -> RunSummary:
    """Train as ``config`` says, and leave in the run folder the model file, logs, curves, scores and pictures.

    Raises:
        FileNotFoundError, ValueError: data, model, device or checkpoint that are not there or do not fit.
    """
    device = resolve_device(config.device)
    if config.precision == "16-mixed" and device.type == "cpu":
        raise ValueError("--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")
    data = load_labelled_images(config.data, val_fraction=config.val_fraction, seed=config.seed)
    if config.batch_size > len(data.train):
        raise ValueError(f"--batch-size {config.batch_size} is more than the {len(data.train)} training images")
    if config.num_workers is None:
        config = replace(config, num_workers=default_workers(config.data == DIGITS))
    set_threads(config.num_threads, config.num_workers or 0)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model, info = _build(config, data)
    train_loader, val_loader, bn_loader = _loaders(config, data, Preprocess(**info.preprocess))

    run = create_run_folder(config.output, f"{config.model}-{data.name}")
    save_config(_resolved(config, info, device), run / "config.yaml")
    print(
        f"Training {config.model} on {data.name}: {len(data.classes)} classes, {len(data.train)} training and "
        f"{len(data.val)} held-out images of {'x'.join(map(str, info.preprocess['size']))} px, on {device}.\n"
        f"Run folder: {run}"
    )
    task = Classifier(model.to(memory_format=torch.channels_last), len(data.classes), config)
    callbacks: list[Callback] = [SaveBest(run / BEST, model, info, monitor="val/top1")]
    if bn_loader is not None:
        callbacks.append(EstimateBatchNorm(bn_loader, model))
    trainer = build_trainer(config, device, run, EPOCH_COLUMNS, callbacks)
    start = time.perf_counter()
    with warnings.catch_warnings():
        for known in ("does not have many workers", "exists and is not empty", "LeafSpec"):
            warnings.filterwarnings("ignore", message=f".*{known}")
        trainer.fit(task, train_loader, val_loader)
    return _report(config, data, run, time.perf_counter() - start)


def _build(config: TrainConfig, data: LabelledImages) -> tuple[nn.Module, ModelInfo]:
    """The model to train, from random weights or from ``config.checkpoint``, and its description."""
    classes = list(data.classes)
    model: Any
    if config.checkpoint is not None:
        model, source = load_model(config.checkpoint, **config.model_args)
        if source.model != config.model:
            raise ValueError(f"--checkpoint {config.checkpoint} holds {source.model}, not {config.model}")
        if source.classes != classes:
            print(f"{config.checkpoint} tells {', '.join(source.classes[:5])}, … apart: its classifier starts anew")
            model.reset_classifier(len(classes))
        model_args = {**source.model_args, "num_classes": len(classes)}
        preprocess = Preprocess(**source.preprocess)
    else:
        model_args = {**config.model_args, "num_classes": len(classes)}
        if config.image_shape() and _takes_img_size(config.model):
            model_args.setdefault("img_size", config.image_shape())
        model = build_model(config.model, **model_args)
        cfg = resolve_model_data_config(model)
        names = ("crop_pct", "interpolation", "mean", "std")
        preprocess = Preprocess(size=cfg["input_size"][1:], **{name: cfg[name] for name in names})
    preprocess = replace(
        preprocess, size=config.image_shape() or preprocess.size, crop_pct=config.crop_pct or preprocess.crop_pct
    )
    return model.train(), ModelInfo(config.model, model_args, classes, asdict(preprocess), split=data.split)


def _takes_img_size(model: str) -> bool:
    cfg = timm.get_pretrained_cfg(model)
    return model in ARCHITECTURES or bool(cfg and cfg.fixed_input_size)


def _resolved(config: TrainConfig, info: ModelInfo, device: torch.device) -> TrainConfig:
    """``config`` with what it left open, so that it repeats the run from anywhere."""
    return replace(
        config,
        data=config.data if config.data == DIGITS else str(Path(config.data).resolve()),
        checkpoint=None if config.checkpoint is None else str(Path(config.checkpoint).resolve()),
        output=None,
        img_size="x".join(map(str, info.preprocess["size"])),
        crop_pct=info.preprocess["crop_pct"],
        device=str(device),
        num_threads=torch.get_num_threads(),
    )


def _loaders(
    config: TrainConfig, data: LabelledImages, preprocess: Preprocess
) -> tuple[DataLoader, DataLoader, DataLoader | None]:
    """Batches for training, for evaluation, and for the BatchNorm statistics if they are to be estimated."""
    try:
        train_transform = _train_transform(config.augment, preprocess)
    except AssertionError as error:
        value = config.augment.auto_augment
        raise ValueError(f"--augment.auto-augment {value!r} is not one of timm's: {error}") from error
    num_workers = config.num_workers or 0
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
    }
    train_set = ImageDataset(data.train, train_transform)
    num_bn_images = min(max(config.bn_images, config.batch_size), len(train_set))
    bn_set = Subset(train_set, random.Random(config.seed).sample(range(len(train_set)), num_bn_images))
    return (
        DataLoader(train_set, shuffle=True, drop_last=True, **common),
        DataLoader(ImageDataset(data.val, preprocess.transform()), **common),
        DataLoader(bn_set, drop_last=True, **common) if config.bn_images else None,
    )


def _train_transform(augment: AugmentConfig, preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    return create_transform(
        input_size=(3, *preprocess.size),
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        re_prob=augment.random_erasing,
        mean=preprocess.mean,
        std=preprocess.std,
    )


def _report(config: TrainConfig, data: LabelledImages, run: Path, train_seconds: float) -> RunSummary:
    """Evaluate the best weights, draw the pictures, write summary.json."""
    predictor = Predictor.load(run, config.device)
    evaluation = evaluate(predictor, data.val, batch_size=config.batch_size, num_workers=config.num_workers or 0)
    plot_curves(run / "metrics.csv", run / "curves.png")
    plot_confusion(evaluation, run / "confusion.png")
    plot_predictions(evaluation, data.val, run / "predictions.png")
    cost = model_cost(predictor.model, predictor.preprocess.size)
    summary = RunSummary(
        run=str(run),
        top1=round(evaluation.accuracy(1), 2),
        top5=round(evaluation.accuracy(5), 2),
        num_params=cost.num_params,
        num_macs=cost.num_macs,
        images_per_second=round(evaluation.images_per_second, 1),
        train_seconds=round(train_seconds, 1),
    )
    write_text(run / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
    return summary
