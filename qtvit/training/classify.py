"""Training a classifier: configuration in, run folder out."""

import json
import logging
import math
import os
import random
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from timm.data import create_transform, resolve_model_data_config
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from qtvit.checkpoints import BEST, ModelInfo, load_model, save_model
from qtvit.data import DIGITS, ImageDataset, LabelledImages, Preprocess, load_labelled_images
from qtvit.deploy import Predictor
from qtvit.device import resolve_device
from qtvit.models import ARCHITECTURES, QTViT, build_model, model_cost

from .config import TrainConfig, save_config
from .evaluate import evaluate
from .plots import plot_confusion, plot_curves, plot_predictions

LAST = "last.ckpt"


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
        num_warmup = round(num_steps * optim.warmup_epochs / num_epochs)
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
        return param_groups_weight_decay(model, weight_decay)
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
    if config.num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(config.num_threads or max(_num_cores() - _num_workers(config), 1))
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model, info = _build(config, data)
    run = _create_run_folder(config, data)
    resolved = replace(
        config,
        img_size="x".join(map(str, info.preprocess["size"])),
        crop_pct=info.preprocess["crop_pct"],
        device=str(device),
        num_workers=_num_workers(config),
    )
    save_config(resolved, run / "config.yaml")
    print(
        f"Training {config.model} on {data.name}: {len(data.classes)} classes, {len(data.train)} training and "
        f"{len(data.val)} held-out images of {'x'.join(map(str, info.preprocess['size']))} px, on {device}.\n"
        f"Run folder: {run}"
    )
    task = Classifier(model.to(memory_format=torch.channels_last), len(data.classes), config)
    train_loader, val_loader, bn_loader = _loaders(config, data, Preprocess(**info.preprocess))
    callbacks: list[Callback] = [SaveBest(run / BEST, info)]
    if bn_loader is not None:
        callbacks.append(EstimateBatchNorm(bn_loader))
    trainer = _trainer(config, device, run, callbacks)
    start = time.perf_counter()
    with warnings.catch_warnings():
        for known in ("does not have many workers", "exists and is not empty", "LeafSpec"):
            warnings.filterwarnings("ignore", message=f".*{known}")
        trainer.fit(task, train_loader, val_loader)
    train_seconds = time.perf_counter() - start
    return _report(config, data, run, train_seconds)


def _build(config: TrainConfig, data: LabelledImages) -> tuple[nn.Module, ModelInfo]:
    """The model to train, from random weights or from ``config.checkpoint``, and its description."""
    num_classes = len(data.classes)
    model: Any
    model_args = {**config.model_args, "num_classes": num_classes}
    if config.checkpoint is not None:
        model, source = load_model(config.checkpoint)
        if source.model != config.model:
            raise ValueError(f"--checkpoint {config.checkpoint} holds {source.model}, not {config.model}")
        model_args = {**source.model_args, "num_classes": num_classes}
        if source.classes != list(data.classes):
            print(f"{config.checkpoint} knows {len(source.classes)} other classes: its classifier starts anew")
            model.reset_classifier(num_classes)
    else:
        if config.model in ARCHITECTURES and config.image_shape():
            model_args.setdefault("img_size", config.image_shape())
        model = build_model(config.model, **model_args)
    cfg = resolve_model_data_config(model)
    preprocess = Preprocess(
        size=config.image_shape() or cfg["input_size"][1:],
        crop_pct=config.crop_pct or cfg["crop_pct"],
        interpolation=cfg["interpolation"],
        mean=cfg["mean"],
        std=cfg["std"],
    )
    source_data = config.data if config.data == DIGITS else str(Path(config.data).resolve())
    split = {"data": source_data, "seed": config.seed, "val_fraction": config.val_fraction}
    return model.train(), ModelInfo(config.model, model_args, list(data.classes), asdict(preprocess), split=split)


def _create_run_folder(config: TrainConfig, data: LabelledImages) -> Path:
    if config.output is not None:
        run = Path(config.output)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ValueError(f"--output {run} exists already and is not empty; name another folder")
    else:
        name = re.sub(r"[^\w.-]+", "-", f"{config.model}-{data.name}")
        numbered = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, sys.maxsize))
        run = next(path for path in numbered if not path.exists())
    run.mkdir(parents=True, exist_ok=True)
    return run


def _loaders(
    config: TrainConfig, data: LabelledImages, preprocess: Preprocess
) -> tuple[DataLoader, DataLoader, DataLoader | None]:
    """Batches for training, for evaluation, and for the BatchNorm statistics if they are to be estimated."""
    augment = config.augment
    train_transform = create_transform(
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
    num_workers = _num_workers(config)
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


def _num_workers(config: TrainConfig) -> int:
    if config.num_workers is not None:
        return config.num_workers
    return 0 if config.data == DIGITS else min(8, max(_num_cores() - 1, 1))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trainer(config: TrainConfig, device: torch.device, run: Path, callbacks: list[Callback]) -> lightning.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    interactive = sys.stderr.isatty()
    callbacks = [
        *callbacks,
        ModelCheckpoint(run, filename=Path(LAST).stem, enable_version_counter=False),
        EpochLines(),
    ]
    if interactive:
        callbacks.append(ProgressBar(leave=False))
    return lightning.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=config.precision,
        max_epochs=config.epochs,
        gradient_clip_val=config.optim.grad_clip,
        gradient_clip_algorithm="value",
        callbacks=callbacks,
        logger=[CSVLogger(run, name="", version=""), TensorBoardLogger(run, name="", version="tensorboard")],
        enable_progress_bar=interactive,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


class SaveBest(Callback):
    """Writes the model file whenever the held-out top-1 is the best so far."""

    def __init__(self, path: Path, info: ModelInfo) -> None:
        self.path = path
        self.info = info
        self.best = -1.0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("top1", "top5", "loss")}
        if metrics["top1"] > self.best:
            self.best = metrics["top1"]
            info = replace(self.info, metrics={**metrics, "epoch": trainer.current_epoch + 1})
            save_model(self.path, pl_module.model.state_dict(), info)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class EstimateBatchNorm(Callback):
    """Averages the BatchNorm statistics over ``loader`` before each evaluation, as EfficientViT's recipe does."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            update_bn(self.loader, pl_module.model, device=pl_module.device)
        pl_module.eval()


class EpochLines(Callback):
    """One line an epoch, which stays when the progress bar goes (and is all there is without a terminal)."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        seconds = time.perf_counter() - self.start
        left = seconds * ((trainer.max_epochs or 0) - trainer.current_epoch - 1)
        tqdm.write(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  loss {metrics['train/loss']:.4f}  "
            f"held-out loss {metrics['val/loss']:.4f}  top-1 {metrics['val/top1']:.2f} %  "
            f"({seconds:.1f} s, about {left:.0f} s to go)"
        )
        sys.stdout.flush()


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar without the logger's version number."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _report(config: TrainConfig, data: LabelledImages, run: Path, train_seconds: float) -> RunSummary:
    """Evaluate the best weights, draw the pictures, write summary.json."""
    predictor = Predictor.load(run, config.device)
    evaluation = evaluate(predictor, data.val, batch_size=config.batch_size, num_workers=_num_workers(config))
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
    (run / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary
