"""Training a classifier: configuration in, run folder out."""

import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from qtvit import console
from qtvit.checkpoints import BEST, WEIGHT_SOURCES, ModelInfo, load_model, own_args
from qtvit.data import DIGITS, ImageDataset, LabelledImages, Preprocess, drop_broken, load_labelled_images
from qtvit.data.sampling import EpochBatches, SeededDataset, fixed_keys, seed_everywhere
from qtvit.deploy import Predictor
from qtvit.device import resolve_device
from qtvit.errors import some
from qtvit.files import write_text
from qtvit.models import ARCHITECTURES, QTViT, build_model, check_img_size, model_cost

from .callbacks import EpochLines, EstimateBatchNorm, History, SaveBest, SaveState
from .config import DEFAULT_MODEL, AugmentConfig, TrainConfig, save_config
from .evaluate import evaluate
from .plots import plot_curves
from .report import write_report
from .run import (
    build_trainer,
    clean_up,
    create_run_folder,
    default_workers,
    find_state,
    ignore_interrupts,
    lock_run,
    set_threads,
)

SUMMARY = "summary.json"
"""Written last: a run that has it is complete."""
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
    """A network, its loss, optimiser and metrics.

    Args:
        model: the network.
        num_classes: its outputs.
        config: of the run.
        class_weights: (num_classes,) weights of the loss, or None.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, config: TrainConfig, class_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.train_loss = MeanMetric()
        self.train_loss.persistent(True)  # so that an epoch that was interrupted has the same mean
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        self.frozen = freeze(model, config.freeze)
        self.train()

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        seed_everywhere(self.config.seed, self.trainer.global_step, self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(
            logits, labels, weight=self.class_weights, label_smoothing=self.config.optim.label_smoothing
        )
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} in epoch {self.current_epoch + 1}, batch {batch_idx + 1}; try a lower --lr"
            )
        self.train_loss.update(loss.detach(), len(labels))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
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
        self.log("train/loss", self.train_loss.compute())
        self.log("lr", self.trainer.optimizers[0].param_groups[-1]["lr"])
        for metric in (self.top1, self.top5, self.train_loss):
            metric.reset()

    def configure_optimizers(self) -> Any:
        config, optim = self.config, self.config.optim
        groups = parameter_groups(self.model, config.lr, optim.weight_decay, optim.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=optim.betas)
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_warmup = round(num_steps * min(optim.warmup_epochs / config.epochs, 0.5))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, num_steps=num_steps, num_warmup=num_warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def warmup_cosine(step: int, *, num_steps: int, num_warmup: int) -> float:
    """Factor of the peak learning rate: (step + 1) / num_warmup at first, then half a cosine to 0 at ``num_steps``."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - num_warmup) / max(num_steps - num_warmup, 1), 1)))


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters with and without decay; ours by ``QTViT.no_weight_decay``, timm's models by timm's rule.

    With ``layer_decay`` below 1, ``lr`` is multiplied by it once for every layer (as ``group_matcher`` counts them)
    that comes after the parameter's own; the last group is the head's.
    """
    ours = isinstance(model, QTViT)
    skip: Any = getattr(model, "no_weight_decay", set)
    if layer_decay < 1:
        groups = param_groups_layer_decay(
            model,
            weight_decay,
            no_weight_decay_list=skip(),
            weight_decay_exclude_1d=not ours,
            layer_decay=layer_decay,
        )
        return [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    if not ours:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=skip())
    exempt = skip()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay},
    ]


def freeze(model: nn.Module, what: str | None) -> list[nn.Module]:
    """Take parameters out of training; the modules that hold nothing else, whose statistics have to stay too.

    Args:
        model: one of timm's, as its ``group_matcher`` tells the stages apart.
        what: "backbone" for all but the head, "stages=N" for the stem and the first N stages, or None.

    Raises:
        ValueError: the model has fewer stages, or does not tell.
    """
    if what is None:
        return []
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"--freeze {what}: {type(model).__name__} does not say what its stages are (no group_matcher)")
    layer_of = group_parameters(model, matcher(coarse=True), reverse=True)  # the stem is 0, the head last
    num_stages = max(layer_of.values()) - 1
    last = num_stages if what == "backbone" else int(what.removeprefix("stages="))
    if last > num_stages:
        raise ValueError(f"--freeze {what}: {type(model).__name__} has {num_stages} stages")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_of[name] > last)
    return [
        module
        for module in model.modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]


def class_weights(labels: Sequence[int], num_classes: int, how: str | None) -> Tensor | None:
    """(num_classes,) weights of the loss: "balanced" is N / (num_classes · N_c), the same part for each class."""
    if how is None:
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes)
    return len(labels) / (num_classes * counts.clamp_min(1)).float()


def run_training(config: TrainConfig) -> RunSummary:
    """Train as ``config`` says, and leave in the run folder the model file, logs, curves, scores and pictures.

    Raises:
        FileNotFoundError, ValueError: data, model, device, checkpoint or run that are not there or do not fit.
        Interrupted: the user pressed Ctrl-C; a KeyboardInterrupt that says how to go on.
    """
    device = resolve_device(config.device)
    if config.precision == "16-mixed" and device.type == "cpu":
        raise ValueError("--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")
    state, past = find_state(Path(config.resume)) if config.resume else (None, {})
    finished = past.get("finished", False)
    if finished and (Path(config.resume or "") / SUMMARY).is_file():
        raise ValueError(f"{config.resume} is finished; --checkpoint {config.resume} starts a new run from its weights")
    data = _read_data(config, past)
    if config.num_workers is None:
        config = replace(config, num_workers=default_workers(config.data == DIGITS))
    set_threads(config.num_threads, config.num_workers or 0)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    model, info = _build_again(past) if past else _build(config, data)
    config = replace(config, model=info.model)
    check_img_size(model, Preprocess(**info.preprocess).size)
    weights = class_weights([label for _, label in data.train], len(data.classes), config.optim.class_weights)
    task = Classifier(model.to(memory_format=torch.channels_last), len(data.classes), config, weights)
    batches = EpochBatches(len(data.train), config.batch_size, config.seed)
    train_loader, val_loader, bn_loader = _loaders(config, data, Preprocess(**info.preprocess), batches)

    run = Path(config.resume) if config.resume else create_run_folder(config.output, f"{config.model}-{data.name}")
    with lock_run(run):
        if not past:
            save_config(_resolved(config, info, device), run / "config.yaml")
        console.say(
            f"Training {config.model} on {data.name}: {len(data.classes)} classes, {len(data.train)} training and "
            f"{len(data.val)} held-out images of {'x'.join(map(str, info.preprocess['size']))} px, on {device}.\n"
            f"Run folder: {run}"
        )
        history = History(run / "metrics.csv")
        callbacks: list[Callback] = [SaveBest(run / BEST, model, info, monitor="val/top1")]
        if bn_loader is not None:
            callbacks.append(EstimateBatchNorm(bn_loader, model, config.seed))
        if config.early_stopping:
            callbacks.append(
                EarlyStopping("val/top1", mode="max", patience=config.early_stopping, check_on_train_epoch_end=False)
            )
        save_state = SaveState(run, batches, history, {"data": data.digest(), "info": asdict(info)})
        callbacks += [history, save_state, EpochLines(history, EPOCH_COLUMNS)]
        if not finished:  # else only its report is missing
            with warnings.catch_warnings(), save_state.listening(), clean_up(run):
                trainer = build_trainer(config, device, run, callbacks)
                trainer.fit(task, train_loader, val_loader, ckpt_path=state)
            if trainer.current_epoch < config.epochs:
                console.say(f"stopped early: no better top-1 in {config.early_stopping} epochs")
        return _report(config, data, run, past["seconds"] if finished else history.seconds)


def _read_data(config: TrainConfig, past: dict[str, Any]) -> LabelledImages:
    """The images to train on; those of the run that ``past`` describes, if it does."""
    data = load_labelled_images(config.data, val_fraction=config.val_fraction, seed=config.seed)
    if config.on_bad_image == "skip":
        data = replace(data, train=drop_broken(data.train, data.classes), val=drop_broken(data.val))
    if config.batch_size > len(data.train):
        raise ValueError(f"--batch-size {config.batch_size} is more than the {len(data.train)} training images")
    if past and data.digest() != past["data"]:
        raise ValueError(f"{config.data} is not what {config.resume} was training on: images were added or removed")
    return data


def _build_again(past: dict[str, Any]) -> tuple[Any, ModelInfo]:
    """The model of the run that ``past`` describes, whose weights its training state holds."""
    info = ModelInfo(**past["info"])
    return build_model(info.model, **info.model_args).train(), info


def _build(config: TrainConfig, data: LabelledImages) -> tuple[Any, ModelInfo]:
    """The model to train, from random weights or from ``config.checkpoint``, and its description."""
    classes = list(data.classes)
    name = config.model or DEFAULT_MODEL
    if config.freeze and not (config.checkpoint or config.model_args.keys() & set(WEIGHT_SOURCES)):
        console.say(f"--freeze {config.freeze} without --checkpoint keeps random weights as they are")
    model: Any  # timm's models have methods that torch's do not know of
    if config.checkpoint is not None:
        model, source = load_model(config.checkpoint, **config.model_args)
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
        data=config.data if config.data == DIGITS else str(Path(config.data).resolve()),
        checkpoint=None if config.checkpoint is None else str(Path(config.checkpoint).resolve()),
        output=None,
        img_size="x".join(map(str, info.preprocess["size"])),
        crop_pct=info.preprocess["crop_pct"],
        device=str(device),
        num_threads=torch.get_num_threads(),
    )


def _loaders(
    config: TrainConfig, data: LabelledImages, preprocess: Preprocess, batches: EpochBatches
) -> tuple[DataLoader, DataLoader, DataLoader | None]:
    """Batches for training, for evaluation, and for the BatchNorm statistics if they are to be estimated."""
    try:
        train_transform = _train_transform(config.augment, preprocess)
    except AssertionError as error:
        value = config.augment.auto_augment
        raise ValueError(f"--augment.auto-augment {value!r} is not one of timm's: {error}") from error
    num_workers = config.num_workers or 0
    common: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": ignore_interrupts}
    train_set = SeededDataset(ImageDataset(data.train, train_transform), config.seed)
    num_bn_images = min(max(config.bn_images, config.batch_size), len(data.train))
    bn_keys = fixed_keys(random.Random(config.seed).sample(range(len(data.train)), num_bn_images))
    bn_loader = DataLoader(train_set, config.batch_size, sampler=bn_keys, drop_last=True, **common)
    return (
        DataLoader(train_set, batch_sampler=batches, persistent_workers=num_workers > 0, **common),
        DataLoader(ImageDataset(data.val, preprocess.transform()), config.batch_size, **common),
        bn_loader if config.bn_images else None,
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
    write_report(evaluation, data.val, run)
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
    write_text(run / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
    return summary
