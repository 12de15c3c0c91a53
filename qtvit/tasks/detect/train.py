"""Training a detector: configuration in, run folder out."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtvit import console
from qtvit.checkpoints import ModelInfo, find_model_file, own_args, read_model_file
from qtvit.checkpoints.model_file import DEFAULT_KERNEL
from qtvit.errors import some
from qtvit.models import ARCHITECTURES, load_backbone
from qtvit.models.backbone import BODY
from qtvit.training.config import DEFAULT_MODEL
from qtvit.training.job import Job, Speed, Summary, check_model, make_loaders, normalisation
from qtvit.training.options import absolute
from qtvit.training.task import Task

from .coco_eval import GroundTruth
from .config import DetectConfig
from .data import DetectionData, DetectionDataset, Target, collate, load_detection_data
from .evaluate import evaluate_detector
from .model import Detector, build
from .predict import DetectPredictor, Result, coco_results
from .report import write_detection_report
from .transforms import DetectionTransform

LOSSES = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")
"""torchvision's losses, without "loss_": those of the proposals, then those of the heads."""
EPOCH_COLUMNS = {
    "train/loss": "loss {:.4f}",
    "val/box_ap": "box AP {:.2f} %",
    "val/box_ap50": "AP50 {:.2f} %",
    "val/mask_ap": "mask AP {:.2f} %",
    "val/raw_box_ap": "not averaged {:.2f} %",
}
LOGGED = ("ap", "ap50", "ap75")
CURVES = {
    "Loss": {"all": "train/loss", **{name.replace("_", " "): f"train/{name}" for name in LOSSES}},
    "Average precision (%)": {
        "box AP": "val/box_ap",
        "box AP50": "val/box_ap50",
        "mask AP": "val/mask_ap",
        "mask AP50": "val/mask_ap50",
    },
    "Learning rate": {"": "lr"},
}
HEADS = {
    "cascade": False,
    "fpn_chans": 256,
    "fpn_norm": False,
    "box_dim": 1024,
    "anchor_scale": 8.0,
    "proposals": 1000,
    "rois_per_image": 512,
}
"""Defaults of `HeadsConfig`, used unless the checkpoint gives other values."""
MIN_SIZE = 640
LAST_LAYERS = re.compile(r"roi_heads\..*(cls_score|bbox_pred|mask_fcn_logits)")
"""Weights with outputs for each category. The proposals' head is not among them, as it knows no categories."""


@dataclass(frozen=True)
class DetectSummary(Summary):
    """The results of training a detector; scores are of the best weights on the held-out images, in percent."""

    box_ap: float
    box_ap50: float
    mask_ap: float | None  # None for a detector without masks
    mask_ap50: float | None
    num_params: int
    images_per_second: float  # one at a time, on the training device
    train_seconds: float  # wall-clock time of the training loop
    train_images_per_second: float | None  # of the training steps alone; None if not measured

    def lines(self) -> list[tuple[str, str]]:
        lines = [("box AP", f"{self.box_ap:.2f} % on the held-out images (AP50 {self.box_ap50:.2f} %)")]
        if self.mask_ap is not None:
            lines.append(("mask AP", f"{self.mask_ap:.2f} % (AP50 {self.mask_ap50:.2f} %)"))
        return [
            *lines,
            ("parameters", f"{self.num_params / 1e6:.2f} M"),
            ("speed", f"{self.images_per_second:.1f} images/s (one at a time, on the training device)"),
            ("training", f"{self.train_seconds:.0f} s"),
            ("files", "best.safetensors (the model), curves, precision-recall and predictions as .png, summary.json,"),
            ("", "scores.json, per_category.csv, config.yaml"),
        ]


class DetectTask(Task):
    """A detector in training; ``truth`` holds the objects to find in the held-out images."""

    model: Detector
    config: DetectConfig

    def __init__(self, model: Detector, config: DetectConfig, info: ModelInfo, truth: GroundTruth) -> None:
        self.has_masks = info.task_args["masks"]
        super().__init__(model, config, loss_parts=LOSSES if self.has_masks else LOSSES[:-1])
        self.category_ids = tuple(info.task_args["category_ids"])
        self.truth = truth
        self.found: dict[str, list[Result]] = {}

    def run_norms(self, network: nn.Module, batch: tuple[list[Tensor], list[Target]]) -> None:
        detector: Any = network
        images, _ = detector.transform(batch[0])
        detector.backbone(images.tensors)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.count_loss(loss, len(images), {name.removeprefix("loss_"): part for name, part in losses.items()})
        return loss

    def on_validation_epoch_start(self) -> None:
        self.found = {prefix: [] for prefix in self.networks}

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        for prefix, network in self.networks.items():
            for image, target in zip(*batch, strict=True):  # one at a time, as DetectPredictor does
                [output] = network.forward([image])
                self.found[prefix] += coco_results(output, target["image_id"], self.category_ids)

    def on_validation_epoch_end(self) -> None:
        for prefix, found in self.found.items():
            for name, score in self._score(found).items():
                self.log(f"val/{prefix}{name}", score, prog_bar=name == "box_ap")
        self.found = {}
        super().on_validation_epoch_end()

    def _score(self, found: list[Result]) -> dict[str, float]:
        """The scores of what all processes have found, computed by the first one."""
        if self.trainer.world_size > 1:
            parts: Any = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = [result for part in parts for result in part]
        scores: dict[str, float] = {}
        if self.global_rank == 0:
            kinds = self.truth.score(found, self.has_masks).items()
            scores = {f"{kind}_{name}": of_kind.figures[name] or 0.0 for kind, of_kind in kinds for name in LOGGED}
        return self.trainer.strategy.broadcast(scores)


class DetectJob(Job[DetectConfig, DetectSummary]):
    """The training of a detector."""

    monitor = "val/box_ap"
    score = "box AP"
    columns = EPOCH_COLUMNS
    curves = CURVES
    changes = "images or annotations have changed"

    def read_data(self, config: DetectConfig) -> DetectionData:
        data = load_detection_data(
            config.data,
            **{name: getattr(config, name) for name in config.paths},
            train_images=config.train_images,
            use_masks=config.masks is not False,
            drop_empty=config.drop_empty,
        )
        if config.masks is True and not data.has_masks:
            raise ValueError(f"--masks true: no object of {data.train.file.path} has a segmentation")
        return data

    def build(self, config: DetectConfig, data: DetectionData) -> tuple[nn.Module, ModelInfo]:
        return build_detector(config, data)

    def set_up(self, model: Any, device: torch.device, past: dict[str, Any]) -> None:
        config, data = self.config, self.data
        self.truth = GroundTruth(data.val, dict(zip(data.category_ids, data.classes, strict=True)))
        if not any(self.truth.counts.values()):
            raise ValueError(f"{data.val_annotations}: there are no objects in the held-out images to score it on")
        self.task = DetectTask(model, config, self.info, self.truth)
        train = DetectionDataset(data.train, DetectionTransform(**asdict(config.augment)))
        val = DetectionDataset(data.val)
        self.loaders = make_loaders(
            config, device, [train], len(data.train), val, len(data.val), collate=collate, val_batch_size=1
        )
        self.sources = data.train
        what = "boxes and masks" if data.has_masks else "boxes"
        self.about = (
            f"{data.name}: {what} of {len(data.classes)} categor{'y' if len(data.classes) == 1 else 'ies'} in "
            f"{len(data.train)} training and {len(data.val)} held-out images"
        )

    def resolved(self) -> dict[str, Any]:
        config, task_args = self.config, self.info.task_args
        return {
            **{name: absolute(getattr(config, name)) for name in config.paths},
            "masks": task_args["masks"],
            "min_size": list(task_args["min_size"]),
            "max_size": task_args["max_size"],
            "heads": replace(config.heads, **{name: task_args[name] for name in HEADS}),
        }

    def report(self, run: Path, speed: Speed) -> DetectSummary:
        predictor = DetectPredictor.load(run, self.config.device)
        evaluation = evaluate_detector(predictor, self.data.val, self.truth, num_workers=self.config.num_workers or 0)
        write_detection_report(evaluation, self.data.val, run)
        metrics = evaluation.metrics()
        return DetectSummary(
            run=str(run),
            box_ap=metrics["box_ap"] or 0.0,
            box_ap50=metrics["box_ap50"] or 0.0,
            mask_ap=metrics.get("mask_ap"),
            mask_ap50=metrics.get("mask_ap50"),
            num_params=sum(p.numel() for p in predictor.model.parameters()),
            images_per_second=round(evaluation.images_per_second, 2),
            **speed.summary(),
        )


def build_detector(config: DetectConfig, data: DetectionData) -> tuple[Any, ModelInfo]:
    """The detector to train, from random weights or from ``config.checkpoint``, and its description."""
    name, model_args = config.model or DEFAULT_MODEL, config.model_args
    weights: dict[str, Tensor] = {}
    source: ModelInfo | None = None
    if config.checkpoint is not None:
        weights, source = read_model_file(find_model_file(config.checkpoint), model_args.get("kernel"))
        _check_source(config, source)
        name, model_args = source.model, {**source.model_args, **model_args}
    if model_args.get("in_chans", 3) != 3:
        raise ValueError(f"{name} is for images of {model_args['in_chans']} channels, and a detector reads RGB")
    known = source.task_args if source is not None and source.task == "detect" else {}
    task_args = _task_args(config, data, known, normalisation(name, source))
    detector: Any = build(name, model_args, task_args)
    if source is not None and known:
        _load_detector(config, detector, weights, source, data)
    elif source is not None:
        try:
            load_backbone(detector.backbone, weights)
        except ValueError as error:
            raise ValueError(f"{config.checkpoint}: {error}") from error
    info = ModelInfo(name, own_args(model_args), list(data.classes), {}, task="detect", task_args=task_args)
    return detector, info


def _check_source(config: DetectConfig, source: ModelInfo) -> None:
    """ValueError unless training can start from the checkpoint that ``source`` describes."""
    if source.task not in ("classify", "detect"):
        raise ValueError(f"{config.checkpoint}: trained to {source.task}; a classifier or detector is needed")
    check_model(config, source)
    kernel, trained = config.model_args.get("kernel"), source.model_args.get("kernel", DEFAULT_KERNEL)
    if source.model in ARCHITECTURES and kernel not in (None, trained):
        raise ValueError(f"{config.checkpoint}: its {source.model} was trained with kernel {trained}, not {kernel}")


def _task_args(
    config: DetectConfig, data: DetectionData, known: Mapping[str, Any], normalisation: dict[str, list[float]]
) -> dict[str, Any]:
    """The arguments of the detector: from the options, else from the checkpoint (``known``), else the defaults."""
    chosen = {name: value for name, value in asdict(config.heads).items() if value is not None}
    heads = {name: chosen.get(name, known.get(name, default)) for name, default in HEADS.items()}
    min_size = sorted(config.min_size) or known.get("min_size", [MIN_SIZE])
    max_size = config.max_size or (known.get("max_size") if not config.min_size else None) or max(min_size) * 5 // 3
    sizes = {"min_size": list(min_size), "max_size": max_size}
    return {"category_ids": list(data.category_ids), "masks": data.has_masks, **heads, **sizes, **normalisation}


def _load_detector(
    config: DetectConfig, detector: nn.Module, weights: dict[str, Tensor], source: ModelInfo, data: DetectionData
) -> None:
    """Load those ``weights`` of another detector that fit; if it knows other categories, the last layers start anew.

    Raises:
        ValueError: not even the weights of the network fit.
    """
    others = (source.task_args["category_ids"], source.classes) != (list(data.category_ids), list(data.classes))
    own = detector.state_dict()
    last = {name for name in own if others and LAST_LAYERS.match(name)}
    fitting = {
        name: t for name, t in weights.items() if name in own and own[name].shape == t.shape and name not in last
    }
    anew = [name for name in own if name not in fitting]
    if wrong := [name for name in anew if name.startswith(BODY)]:
        raise ValueError(f"{config.checkpoint}: these weights do not fit {source.model}: {some(wrong, 3)}")
    detector.load_state_dict({**own, **fitting})
    if others:
        console.say(
            f"{config.checkpoint} finds other categories ({some(source.classes)}): the last layers start anew for "
            f"{some(data.classes)}"
        )
    if parts := dict.fromkeys(name.rpartition(".")[0] for name in anew if name not in last):
        console.say(f"not in {config.checkpoint}, so they start anew: {some(list(parts))}")
