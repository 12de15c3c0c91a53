"""Training a segmenter: configuration in, run folder out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtvit import console
from qtvit.checkpoints import ModelInfo, load_model, own_args
from qtvit.errors import some
from qtvit.models import check_img_size, load_backbone, model_cost
from qtvit.training.config import DEFAULT_MODEL
from qtvit.training.job import Job, Speed, Summary, check_model, make_loaders, normalisation, say_new_classifier
from qtvit.training.options import absolute
from qtvit.training.task import Task

from .config import SegmentConfig
from .data import SegmentationData, SegmentationDataset, count_pixels, load_segmentation_data
from .evaluate import evaluate
from .loss import SegmentationLoss, balanced_weights
from .metric import SegmentationConfusion
from .model import build
from .predict import SegmentPredictor, SegmentPreprocess, mask_args, segment_pixels
from .report import write_report
from .transforms import SegmentationTrainTransform

EPOCH_COLUMNS = {
    "train/loss": "loss {:.4f}",
    "val/miou": "mIoU {:.2f} %",
    "val/aacc": "pixels right {:.2f} %",
    "val/raw_miou": "not averaged {:.2f} %",
}
CLASSIFIER = ".classifier."
"""Part of the names of the layers with an output for each class."""
CURVES = {
    "Loss": {"": "train/loss"},
    "Held-out images (%)": {"mIoU": "val/miou", "mAcc": "val/macc", "aAcc": "val/aacc"},
    "Learning rate": {"": "lr"},
}


@dataclass(frozen=True)
class SegmentSummary(Summary):
    """The results of training a segmenter; scores are of the best weights on the held-out images, in percent."""

    miou: float
    macc: float
    aacc: float
    num_params: int  # without the auxiliary head
    num_macs: int  # likewise, for an image of the size of the crops
    images_per_second: float  # from pixels to labels, on the training device
    train_seconds: float  # wall-clock time of the training loop
    train_images_per_second: float | None  # of the training steps alone; None if not measured

    def lines(self) -> list[tuple[str, str]]:
        return [
            ("mIoU", f"{self.miou:.2f} % on the held-out images ({self.aacc:.2f} % of the pixels right)"),
            ("parameters", f"{self.num_params / 1e6:.2f} M"),
            ("MACs", f"{self.num_macs / 1e9:.2f} G per crop"),
            ("speed", f"{self.images_per_second:.1f} images/s (on the training device)"),
            ("training", f"{self.train_seconds:.0f} s"),
            ("files", "best.safetensors (the model), curves, confusion and predictions as .png,"),
            ("", "summary.json, scores.json, per_class.csv, confusion.csv, config.yaml"),
        ]


class SegmentTask(Task):
    """A segmenter in training.

    Args:
        model: the network.
        data: the data to learn from.
        config: the run's configuration.
        preprocess: the evaluation protocol.
        class_weights: (C,) weights of the cross-entropy; None for equal ones.
    """

    config: SegmentConfig

    def __init__(
        self,
        model: nn.Module,
        data: SegmentationData,
        config: SegmentConfig,
        preprocess: SegmentPreprocess,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(model, config)
        self.classes = data.classes
        self.preprocess = preprocess
        height, width = preprocess.size
        self.loss = SegmentationLoss(
            data.ignore_index,
            class_weights=class_weights,
            ohem=config.loss.kind == "ohem",
            threshold=config.loss.ohem_threshold,
            min_kept=max(int(config.loss.ohem_min_kept * height * width), 1),
            dice_weight=config.loss.dice,
        )
        confusion = partial(SegmentationConfusion, len(data.classes), data.ignore_index)
        self.confusions = nn.ModuleDict({f"{prefix}confusion": confusion() for prefix in self.networks})

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        outputs = self.model(images.contiguous(memory_format=torch.channels_last))
        loss = self.loss(outputs["out"], labels)
        if "aux" in outputs:
            loss = loss + self.config.loss.aux * self.loss(outputs["aux"], labels)
        self.count_loss(loss, len(labels))
        return loss

    def validation_step(self, batch: list[tuple[Tensor, Tensor]], batch_idx: int) -> None:
        for pixels, labels in batch:
            for prefix, network in self.networks.items():
                predicted = segment_pixels(_scorer(network), pixels, len(self.classes), self.preprocess)
                confusion: Any = self.confusions[f"{prefix}confusion"]
                confusion.update(predicted, labels)

    def on_validation_epoch_end(self) -> None:
        for prefix in self.networks:
            confusion: Any = self.confusions[f"{prefix}confusion"]
            scores = confusion.scores(self.classes)
            self.log(f"val/{prefix}miou", scores.mean_iou(), prog_bar=True)
            self.log(f"val/{prefix}macc", scores.mean_accuracy())
            self.log(f"val/{prefix}aacc", scores.pixel_accuracy())
            confusion.reset()
        super().on_validation_epoch_end()


def _scorer(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network as `segment_pixels` calls it.

    It calls ``forward`` directly because torch.compile has compiled the network for the size of the training crops.
    """
    return lambda pixels: network.forward(pixels.contiguous(memory_format=torch.channels_last))


class SegmentJob(Job[SegmentConfig, SegmentSummary]):
    """The training of a segmenter."""

    monitor = "val/miou"
    score = "mIoU"
    columns = EPOCH_COLUMNS
    curves = CURVES

    def read_data(self, config: SegmentConfig) -> SegmentationData:
        data = load_segmentation_data(
            config.data, classes=config.classes, ignore_index=config.ignore_index, train_images=config.train_images
        )
        for line in data.describe():
            console.say(line)
        return data

    def build(self, config: SegmentConfig, data: SegmentationData) -> tuple[nn.Module, ModelInfo]:
        return build_network(config, data)

    def set_up(self, model: Any, device: torch.device, past: dict[str, Any]) -> None:
        config, data, augment = self.config, self.data, self.config.augment
        self.preprocess = preprocess = SegmentPreprocess.of(self.info)
        check_img_size(model, preprocess.size, "--crop-size")
        model = model.to(memory_format=torch.channels_last)
        self.task = SegmentTask(model, data, config, preprocess, class_weights(config, data))
        transform = SegmentationTrainTransform(
            preprocess.size,
            base_size=preprocess.img_size or 0,
            scale=augment.scale,
            hflip=augment.hflip,
            max_class_ratio=augment.cat_max_ratio,
            photometric=augment.photometric,
            ignore_index=data.ignore_index,
            mean=preprocess.mean,
            std=preprocess.std,
        )
        train = SegmentationDataset(data.train, data.mask_classes, transform)
        val = SegmentationDataset(data.val, data.mask_classes, preprocess.transform())
        num_train, num_val = len(data.train), len(data.val)
        self.loaders = make_loaders(
            config, device, [train], num_train, val, num_val, val_collate=list, val_batch_size=1
        )
        self.sources = [sample.image for sample in data.train]
        self.about = f"{data.name}, in crops of {'x'.join(map(str, preprocess.size))} px"

    def resolved(self) -> dict[str, Any]:
        return {
            "classes": absolute(self.config.classes),
            "head": self.info.task_args["head"],
            "head_channels": self.info.task_args["channels"],
            "img_size": self.preprocess.img_size or 0,
        }

    def report(self, run: Path, speed: Speed) -> SegmentSummary:
        predictor = SegmentPredictor.load(run, self.config.device)
        evaluation = evaluate(predictor, self.data.val, self.data.mask_classes)
        write_report(evaluation, run)
        network: Any = predictor.model
        network.aux = None
        cost = model_cost(network, predictor.preprocess.size)
        return SegmentSummary(
            run=str(run),
            miou=round(evaluation.scores.mean_iou(), 2),
            macc=round(evaluation.scores.mean_accuracy(), 2),
            aacc=round(evaluation.scores.pixel_accuracy(), 2),
            num_params=cost.num_params,
            num_macs=cost.num_macs,
            images_per_second=round(evaluation.images_per_second, 1),
            **speed.summary(),
        )


def build_network(config: SegmentConfig, data: SegmentationData) -> tuple[nn.Module, ModelInfo]:
    """The network to train, from random weights or from ``config.checkpoint``, and its description."""
    name, model_args = config.model or DEFAULT_MODEL, config.model_args
    source: ModelInfo | None = None
    weights: dict[str, Tensor] = {}
    if config.checkpoint is not None:
        network, source = load_model(config.checkpoint, **model_args)
        if source.task not in ("classify", "segment"):
            raise ValueError(
                f"--checkpoint {config.checkpoint} was trained to {source.task}; a classifier or segmenter fits"
            )
        check_model(config, source)
        name, model_args, weights = source.model, source.model_args, network.state_dict()
    if model_args.get("in_chans", 3) != 3:
        raise ValueError(f"{name} is for images of {model_args['in_chans']} channels, and a segmenter reads RGB")
    model_args = {key: value for key, value in model_args.items() if key != "num_classes"}
    known = source.task_args if source is not None else {}
    head = config.head or known.get("head", "upernet")  # as the options say, else as in the checkpoint, else upernet
    task_args = {
        "head": head,
        "aux": config.loss.aux > 0,
        "channels": config.head_channels or (known.get("channels") if known.get("head") == head else None),
        "drop_rate": config.drop_rate,
        "masks": mask_args(data.mask_classes),
    }
    model: Any = build(name, model_args, task_args)
    if source is not None and source.task == "classify":
        try:
            load_backbone(model.backbone, weights)
        except ValueError as error:
            raise ValueError(f"{config.checkpoint}: {error}") from error
    elif source is not None:
        _load_segmenter(model, weights, source, head, data.classes, config)
    norm = normalisation(name, source)
    mean, std = tuple(norm["mean"]), tuple(norm["std"])
    preprocess = asdict(SegmentPreprocess(config.crop_shape(), config.base_size, config.window, mean, std))
    classes = list(data.classes)
    return model, ModelInfo(name, own_args(model_args), classes, preprocess, task="segment", task_args=task_args)


def _load_segmenter(
    model: nn.Module,
    given: Mapping[str, Tensor],
    source: ModelInfo,
    head: str,
    classes: tuple[str, ...],
    config: SegmentConfig,
) -> None:
    """Load those weights of another segmenter that fit; print which parts start anew."""
    own = model.state_dict()
    others = list(classes) != source.classes
    last = {name for name in own if others and CLASSIFIER in name}
    fitting = {
        name: value
        for name, value in given.items()
        if name in own and own[name].shape == value.shape and name not in last
    }
    if source.task_args["head"] != head:
        fitting = {name: value for name, value in fitting.items() if not name.startswith("head.")}
    if others:
        say_new_classifier(config, source, classes)
    anew = [name for name in own if name not in fitting and name not in last]
    if parts := dict.fromkeys(".".join(name.split(".")[:2]) for name in anew):
        console.say(f"not in {config.checkpoint}, so they start anew: {some(list(parts))}")
    model.load_state_dict({**own, **fitting})


def class_weights(config: SegmentConfig, data: SegmentationData) -> Tensor | None:
    """(C,) weights of the cross-entropy; None for equal ones."""
    weights = config.loss.class_weights
    if weights is None:
        return None
    if weights == "balanced":
        return balanced_weights(count_pixels(data))
    if len(weights) != len(data.classes):
        raise ValueError(f"--loss.class-weights has {len(weights)} numbers, and there are {len(data.classes)} classes")
    return torch.tensor(weights, dtype=torch.float32)
