"""Training a classifier: configuration in, run folder out."""

import json
import math
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from qtvit import console
from qtvit.checkpoints import BEST, WEIGHT_SOURCES, ModelInfo, load_model, own_args
from qtvit.checkpoints.model_file import ATTENTION_ARGS
from qtvit.data import (
    DIGITS,
    ImageDataset,
    LabelledImages,
    Preprocess,
    TrainTransform,
    drop_broken,
    load_labelled_images,
)
from qtvit.data.sampling import EpochBatches, FirstBatches, SeededDataset, StreamBatches, even_batches, fixed_keys
from qtvit.deploy import Predictor
from qtvit.device import processes, resolve_device
from qtvit.errors import some
from qtvit.files import write_text
from qtvit.models import ARCHITECTURES, build_model, check_img_size, model_cost

from .callbacks import EpochLines, EstimateBatchNorm, EvaluateEvery, History, SaveBest, SaveState
from .config import DEFAULT_MODEL, AugmentConfig, TrainConfig, save_config
from .distill import Distillation, load_distillation
from .evaluate import evaluate
from .finite import StopAtNonFinite
from .mixing import mix, soft_targets
from .plots import plot_curves
from .report import write_report
from .run import (
    build_trainer,
    check_device,
    default_workers,
    find_state,
    ignore_interrupts,
    open_run,
    set_threads,
)
from .task import Task

SUMMARY = "summary.json"
"""Written last: a run that has it is complete."""
EPOCH_COLUMNS = {
    "train/loss": "loss {:.4f}",
    "val/loss": "held-out loss {:.4f}",
    "val/top1": "top-1 {:.2f} %",
    "val/raw_top1": "not averaged {:.2f} %",
}


@dataclass(frozen=True)
class RunSummary:
    """What a finished run has to say.

    Attributes:
        run: the run folder.
        top1, top5: of the best weights on the held-out images, in percent.
        num_params, num_macs: of the model at its image size.
        images_per_second: forward pass alone, on the training device.
        train_seconds: wall-clock time of the training loop.
        train_images_per_second: training steps alone, in all processes, without loading images and evaluation; None if
            they were not measured.
    """

    run: str
    top1: float
    top5: float
    num_params: int
    num_macs: int
    images_per_second: float
    train_seconds: float
    train_images_per_second: float | None


class Classifier(Task):
    """The task of telling classes apart.

    Args:
        model: the network.
        num_classes: its outputs.
        config: of the run.
        class_weights: (num_classes,) weights of the loss, or None.
        distillation: from a teacher, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        config: TrainConfig,
        class_weights: Tensor | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        weights = distillation.weights if distillation else {}
        super().__init__(model, config, loss_parts=list(weights))
        self.distillation = distillation
        self.distill_weights = weights
        self.num_classes = num_classes
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.scores = nn.ModuleDict({f"{prefix}scores": _scores(num_classes) for prefix in self.networks})

    def on_fit_start(self) -> None:
        if self.distillation is not None:
            self.distillation.teacher.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        augment, optim, ema = self.config.augment, self.config.optim, self.config.ema
        targets = soft_targets(labels, self.num_classes, optim.label_smoothing)
        images = images.contiguous(memory_format=torch.channels_last)
        images, targets = mix(images, targets, mixup=augment.mixup, cutmix=augment.cutmix, alpha=augment.mix_alpha)
        parts: dict[str, Tensor] = {}
        if self.distillation is None:
            logits = self.model(images)
        else:
            logits, parts = self.distillation(self.model, images)
        loss = classification_loss(logits, targets, optim.loss, self.class_weights)
        for name, weight in self.distill_weights.items():
            loss = loss + weight * parts[name]
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
            scores["top1"].update(logits, labels)
            scores["top5"].update(logits, labels)

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
    return nn.ModuleDict(
        {
            "loss": MeanMetric(nan_strategy=math.nan),  # by default it leaves NaN out
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
        }
    )


def classification_loss(logits: Tensor, targets: Tensor, kind: str, class_weights: Tensor | None = None) -> Tensor:
    """The mean loss of a batch.

    Args:
        logits, targets: (B, C); targets from 0 to 1.
        kind: "ce", cross-entropy of the softmax; or "bce", the mean binary cross-entropy of all B * C sigmoids.
        class_weights: (C,); for "ce", of the terms of each class; for "bce", where all classes have a term in every
            image, of the images by their targets.
    """
    if kind == "ce":
        return F.cross_entropy(logits.float(), targets, weight=class_weights)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)
    return losses.mean() if class_weights is None else ((targets @ class_weights) * losses).mean()


def class_weights(labels: Sequence[int], num_classes: int, how: str | None) -> Tensor | None:
    """(num_classes,) weights of the loss: "balanced" is N / (num_classes · N_c), the same part for each class."""
    if how is None:
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes)
    return len(labels) / (num_classes * counts.clamp_min(1)).float()


def run_training(config: TrainConfig) -> RunSummary | None:
    """Train as ``config`` says, and leave in the run folder the model file, logs, curves, scores and pictures.

    Under ``torchrun``, every process calls this; the first one writes, and gets the summary.

    Raises:
        FileNotFoundError, ValueError: data, model, device, checkpoint or run that are not there or do not fit.
        FloatingPointError: a loss or gradient is not finite.
        Interrupted: the user pressed Ctrl-C; a KeyboardInterrupt that says how to go on.
    """
    device = resolve_device(config.device)
    check_device(config, device)
    rank, world_size = processes()
    state, past = find_state(Path(config.resume), world_size) if config.resume else (None, {})
    finished = past.get("finished", False)
    if finished and (Path(config.resume or "") / SUMMARY).is_file():
        raise ValueError(f"{config.resume} is finished; --checkpoint {config.resume} starts a new run from its weights")
    data = read_data(config, past, world_size)
    if config.num_workers is None:
        config = replace(config, num_workers=default_workers(config.data == DIGITS))
    if past.get("stream_workers") not in (None, config.num_workers):
        raise ValueError(
            f"--num-workers {config.num_workers} cannot change for a stream, whose order depends on it: "
            f"{config.resume} had {past['stream_workers']}"
        )
    set_threads(config.num_threads, config.num_workers or 0)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model, info = _build_again(past) if past else build_classifier(config, data)
    config = replace(config, model=info.model)
    image_size = Preprocess(**info.preprocess).size
    sizes = (image_size, *config.augment.train_shapes())
    for size in sizes:
        check_img_size(model, size, "--img-size" if size == image_size else "--augment.train-sizes")
    distillation = None if finished else load_distillation(config, model, info, sizes, past.get("teacher"))
    weights = class_weights([label for _, label in data.train], len(data.classes), config.optim.class_weights)
    model = model.to(memory_format=torch.channels_last)
    task = Classifier(model, len(data.classes), config, weights, distillation)
    batches, train_loader, val_loader, bn_loader = _loaders(config, data, Preprocess(**info.preprocess), device)

    with open_run(config, f"{config.model}-{data.name}") as run:
        if not past and rank == 0:
            save_config(_resolved(config, info, device), run / "config.yaml")
        console.say(
            f"Training {config.model} on {data.name}: {len(data.classes)} classes, {len(data.train)} training and "
            f"{len(data.val)} held-out images of {'x'.join(map(str, info.preprocess['size']))} px, on {device}"
            f"{f', {world_size} processes' if world_size > 1 else ''}.\nRun folder: {run}"
        )
        history = History(run / "metrics.csv")
        names = [source for source, _ in data.train]
        callbacks: list[Callback] = [EvaluateEvery(config.eval_every), SaveBest(run / BEST, info, monitor="val/top1")]
        callbacks.append(StopAtNonFinite(run, batches, names))
        if bn_loader is not None:
            callbacks.append(EstimateBatchNorm(bn_loader))
        if config.early_stopping:
            callbacks.append(
                EarlyStopping("val/top1", mode="max", patience=config.early_stopping, check_on_train_epoch_end=False)
            )
        description: dict[str, Any] = {"data": data.digest(), "info": asdict(info), "world_size": world_size}
        description["stream_workers"] = config.num_workers if data.stream else None
        description["teacher"] = distillation.digest() if distillation else None
        save_state = SaveState(run, batches, history, description, config.checkpoint_every_steps)
        callbacks += [history, save_state, EpochLines(history, EPOCH_COLUMNS)]
        if not finished:  # else only its report is missing
            with warnings.catch_warnings(), save_state.listening():
                if config.swap_kernel and not past:
                    history.rows.append(_score_start(task, device, run, val_loader, bn_loader))
                trainer = build_trainer(config, device, run, callbacks)
                trainer.fit(task, train_loader, val_loader, ckpt_path=state)
            if trainer.current_epoch < config.epochs:
                s = "s" * (config.early_stopping != 1)
                console.say(f"stopped early: no better top-1 in {config.early_stopping} evaluation{s}")
        if rank > 0:
            return None
        if finished:
            return _report(config, data, run, past["seconds"], past.get("seconds_per_batch", 0.0))
        return _report(config, data, run, history.seconds, history.seconds_per_batch)


def _score_start(
    task: Task,
    device: torch.device,
    run: Path,
    val_loader: DataLoader,
    bn_loader: Iterable[tuple[Tensor, Tensor]] | None,
) -> dict[str, float]:
    """The scores before the first step, as a row of `History`."""
    callbacks: list[Callback] = [] if bn_loader is None else [EstimateBatchNorm(bn_loader)]
    trainer = build_trainer(task.config, device, run, callbacks, inference_mode=False)  # as within training
    [scores] = trainer.validate(task, val_loader, verbose=False)
    values = "  ".join(text.format(scores[name]) for name, text in EPOCH_COLUMNS.items() if name in scores)
    console.say(f"epoch 0/{task.config.epochs}  {values}  (before the first step)")
    return {"epoch": 0, "step": 0, **scores}


def read_data(config: TrainConfig, past: dict[str, Any], world_size: int) -> LabelledImages:
    """The images to train on; those of the run that ``past`` describes, if it does."""
    data = load_labelled_images(
        config.data, val_fraction=config.val_fraction, seed=config.seed, train_images=config.train_images
    )
    if config.on_bad_image == "skip" and data.stream:
        raise ValueError(f"--on-bad-image skip reads all images beforehand, and those of {data.stream} are streamed")
    if config.on_bad_image == "skip":
        data = replace(data, train=drop_broken(data.train, data.classes), val=drop_broken(data.val))
    if config.batch_size * world_size > len(data.train):
        times = f" in each of {world_size} processes" if world_size > 1 else ""
        raise ValueError(f"--batch-size {config.batch_size}{times} is more than the {len(data.train)} training images")
    if len(data.val) < world_size:
        raise ValueError(f"{len(data.val)} held-out images are fewer than the {world_size} processes")
    if past and data.digest() != past["data"]:
        raise ValueError(f"{config.data} is not what {config.resume} was training on: images were added or removed")
    return data


def _build_again(past: dict[str, Any]) -> tuple[Any, ModelInfo]:
    """The model of the run that ``past`` describes, whose weights its training state holds."""
    info = ModelInfo(**past["info"])
    return build_model(info.model, **info.model_args).train(), info


def build_classifier(config: TrainConfig, data: LabelledImages) -> tuple[Any, ModelInfo]:
    """The model to train, from random weights or from ``config.checkpoint``, and its description."""
    classes = list(data.classes)
    name = config.model or DEFAULT_MODEL
    if config.freeze and not (config.checkpoint or config.model_args.keys() & set(WEIGHT_SOURCES)):
        console.say(f"--freeze {config.freeze} without --checkpoint keeps random weights as they are")
    model: Any  # timm's models have methods that torch's do not know of
    if config.checkpoint is not None:
        try:
            model, source = load_model(config.checkpoint, swap_kernel=config.swap_kernel, **config.model_args)
        except ValueError as error:
            if config.swap_kernel or not config.model_args.keys() & set(ATTENTION_ARGS):
                raise
            raise ValueError(f"{error}; --swap-kernel true takes over the weights that both have") from error
        if config.model not in (None, source.model):
            raise ValueError(f"--checkpoint {config.checkpoint} holds {source.model}, not {config.model}")
        name = source.model
        if source.classes != classes:
            console.say(
                f"{config.checkpoint} tells {len(source.classes)} other classes apart ({some(source.classes)}): "
                f"its classifier starts anew for {some(classes)}"
            )
            model.reset_classifier(len(classes))
        model_args = {**source.model_args, "num_classes": len(classes)}
        preprocess = Preprocess(**source.preprocess)
    else:
        model_args = {**config.model_args, "num_classes": len(classes)}
        if config.image_shape() and _takes_img_size(name):
            model_args.setdefault("img_size", config.image_shape())
        model = build_model(name, **model_args)
        cfg = resolve_model_data_config(model)
        names = ("crop_pct", "interpolation", "mean", "std")
        preprocess = Preprocess(size=cfg["input_size"][1:], **{name: cfg[name] for name in names})
    preprocess = replace(
        preprocess, size=config.image_shape() or preprocess.size, crop_pct=config.crop_pct or preprocess.crop_pct
    )
    return model.train(), ModelInfo(name, own_args(model_args), classes, asdict(preprocess), split=data.split)


def _takes_img_size(model: str) -> bool:
    cfg = timm.get_pretrained_cfg(model)
    return model in ARCHITECTURES or bool(cfg and cfg.fixed_input_size)


def _resolved(config: TrainConfig, info: ModelInfo, device: torch.device) -> TrainConfig:
    """``config`` with what it left open, so that it repeats the run from anywhere."""
    return replace(
        config,
        data=config.data if config.data == DIGITS else absolute(config.data) or config.data,
        checkpoint=absolute(config.checkpoint),
        distill=replace(config.distill, teacher=absolute(config.distill.teacher)),
        output=None,
        resume=None,
        img_size="x".join(map(str, info.preprocess["size"])),
        crop_pct=info.preprocess["crop_pct"],
        device=str(device),
        num_threads=torch.get_num_threads(),
    )


def absolute(name: str | None) -> str | None:
    """The whole path, if ``name`` is one, and not a URL or the name of what comes with the package."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def _loaders(
    config: TrainConfig, data: LabelledImages, preprocess: Preprocess, device: torch.device
) -> tuple[EpochBatches | StreamBatches, DataLoader, DataLoader, Iterable[tuple[Tensor, Tensor]] | None]:
    """Batches for training, with the loader of their images; for evaluation; and for the BatchNorm statistics if they
    are to be estimated.
    """
    rank, world_size = processes()
    share: dict[str, Any] = {"rank": rank, "world_size": world_size}
    num_workers = config.num_workers or 0
    common: dict[str, Any] = {
        "num_workers": num_workers,
        "worker_init_fn": ignore_interrupts,
        "pin_memory": device.type == "cuda",
    }
    sizes = [preprocess.size, *config.augment.train_shapes()]
    transforms = [_train_transform(config.augment, preprocess, size) for size in sizes]
    bn_size = min(config.bn_batch_size or config.batch_size, len(data.train) // world_size)
    num_bn_batches = max(min(config.bn_images, len(data.train)) // (bn_size * world_size), 1)

    batches: EpochBatches | StreamBatches
    bn_loader: Iterable[tuple[Tensor, Tensor]]
    if data.stream is None:
        batches = EpochBatches(
            len(data.train), config.batch_size, config.seed, num_sizes=len(config.augment.train_sizes), **share
        )
        train_set = SeededDataset([ImageDataset(data.train, transform) for transform in transforms], config.seed)
        train_loader = DataLoader(train_set, batch_sampler=batches, persistent_workers=num_workers > 0, **common)
        num_bn_images = num_bn_batches * world_size * bn_size
        bn_keys = fixed_keys(random.Random(config.seed).sample(range(len(data.train)), num_bn_images))
        bn_batches = [bn_keys[i : i + bn_size] for i in range(rank * bn_size, num_bn_images, world_size * bn_size)]
        bn_loader = DataLoader(train_set, batch_sampler=bn_batches, **common)
    else:
        from qtvit.data.stream import ShardStream  # webdataset takes a second to import

        stream = ShardStream(data.stream, "train", transforms, seed=config.seed, batch_size=config.batch_size, **share)
        batches = StreamBatches(stream.num_batches, stream.go_to)
        train_loader = DataLoader(stream, config.batch_size, persistent_workers=num_workers > 0, **common)
        fixed = ShardStream(data.stream, "train", transforms[:1], seed=config.seed, batch_size=bn_size, **share)
        bn_loader = FirstBatches(DataLoader(fixed, bn_size, **common), num_bn_batches)
    val_batches = even_batches(len(data.val), config.batch_size, **share)
    val_loader = DataLoader(ImageDataset(data.val, preprocess.transform()), batch_sampler=val_batches, **common)
    return batches, train_loader, val_loader, bn_loader if config.bn_images else None


def _train_transform(augment: AugmentConfig, preprocess: Preprocess, size: tuple[int, int]) -> TrainTransform:
    own = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "interpolation", "random_erasing")
    options = {name: getattr(augment, name) for name in own}
    return TrainTransform(size, mean=preprocess.mean, std=preprocess.std, **options)


def _report(
    config: TrainConfig, data: LabelledImages, run: Path, train_seconds: float, seconds_per_batch: float
) -> RunSummary:
    """Evaluate the best weights, draw the pictures, write summary.json."""
    predictor = Predictor.load(run, config.device)
    evaluation = evaluate(predictor, data.val, batch_size=config.batch_size, num_workers=config.num_workers or 0)
    plot_curves(run / "metrics.csv", run / "curves.png")
    write_report(evaluation, data.val, run)
    cost = model_cost(predictor.model, predictor.preprocess.size)
    batch = config.batch_size * processes()[1]
    summary = RunSummary(
        run=str(run),
        top1=round(evaluation.accuracy(1), 2),
        top5=round(evaluation.accuracy(5), 2),
        num_params=cost.num_params,
        num_macs=cost.num_macs,
        images_per_second=round(evaluation.images_per_second, 1),
        train_seconds=round(train_seconds, 1),
        train_images_per_second=round(batch / seconds_per_batch, 1) if seconds_per_batch else None,
    )
    write_text(run / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
    return summary
