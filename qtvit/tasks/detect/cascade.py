"""The heads of Cascade R-CNN: each stage classifies and refines the boxes of the stage before it.

"Cascade R-CNN: Delving into High Quality Object Detection", Cai and Vasconcelos, CVPR 2018.

Shapes: R regions, C classes including the background, which is class 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

Boxes = list[Tensor]
"""One tensor (R, 4) per image: x1, y1, x2, y2 in pixels of the resized image."""


class CascadeRoIHeads(nn.Module):
    """A sequence of heads (stages) with the interface of torchvision's ``RoIHeads``, which it replaces.

    In training, each stage matches its input boxes to the targets at its own IoU threshold and samples among them; its
    losses are multiplied by its weight. In evaluation, the boxes are those of the last stage; scores and masks are
    means over all stages (every mask head sees the final boxes).

    Args:
        stages: torchvision's heads, each with its own thresholds, box coder and weights. Their box predictors are
            class-agnostic: they give the same deltas for every class. Either all have mask heads or none.
        loss_weights: weight of each stage's losses.
    """

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float] = (1.0, 0.5, 0.25)) -> None:
        super().__init__()
        assert len(stages) == len(loss_weights)
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: Boxes,
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Feature maps and proposals -> detections (empty in training) and losses (empty in evaluation).

        The losses have torchvision's names; each is the weighted sum over the stages.
        """
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}
        losses: dict[str, Tensor] = {}
        for stage, weight in zip(self._stages(), self.loss_weights, strict=True):
            samples = stage.select_training_samples(proposals, targets)
            logits, deltas = _predict(stage, features, samples[0], image_shapes)
            of_stage = _losses(stage, features, samples, logits, deltas, image_shapes, targets)
            for name, loss in of_stage.items():
                losses[name] = losses.get(name, 0) + weight * loss
            proposals = _moved(stage, deltas, samples[0], image_shapes)
        return [], losses

    def detect(
        self, features: dict[str, Tensor], proposals: Boxes, image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The detections in each image: boxes, labels, scores, and masks if there are mask heads."""
        *earlier, last = stages = self._stages()
        probs = []
        for stage in earlier:
            logits, deltas = _predict(stage, features, proposals, image_shapes)
            probs.append(logits.softmax(-1))
            proposals = _moved(stage, deltas, proposals, image_shapes)
        logits, deltas = _predict(last, features, proposals, image_shapes)
        probs.append(logits.softmax(-1))
        mean_logits = torch.stack(probs).mean(0).log()  # their softmax is the mean probability
        found = last.postprocess_detections(mean_logits, deltas, proposals, image_shapes)
        results = [
            {"boxes": boxes, "labels": labels, "scores": scores} for boxes, scores, labels in zip(*found, strict=True)
        ]
        if last.has_mask():
            pooled = last.mask_roi_pool(features, found[0], image_shapes)
            masks = [maskrcnn_inference(s.mask_predictor(s.mask_head(pooled)), found[2]) for s in stages]
            for result, *of_stages in zip(results, *masks, strict=True):
                result["masks"] = torch.stack(of_stages).mean(0)
        return results

    def _stages(self) -> list[Any]:
        return list(self.stages)


def _predict(
    stage: Any, features: dict[str, Tensor], boxes: Boxes, image_shapes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Class logits (R, C) and box deltas (R, 4·C) of all regions of all images."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, image_shapes)))


def _moved(stage: Any, deltas: Tensor, boxes: Boxes, image_shapes: list[tuple[int, int]]) -> Boxes:
    """The boxes refined by ``stage``, clipped to their images; no gradient flows from one stage to the next."""
    moved = stage.box_coder.decode(deltas.detach(), boxes)
    # All classes have the same deltas, so the first will do. Without any boxes, decode() returns two dimensions.
    moved = moved.view(len(deltas), deltas.shape[1] // 4, 4)[:, 0]
    per_image = moved.split([len(of_image) for of_image in boxes])
    return [clip_boxes_to_image(*pair) for pair in zip(per_image, image_shapes, strict=True)]


def _losses(
    stage: Any,
    features: dict[str, Tensor],
    samples: tuple[Any, ...],
    logits: Tensor,
    deltas: Tensor,
    image_shapes: list[tuple[int, int]],
    targets: Any,
) -> dict[str, Tensor]:
    """The losses of one stage as in torchvision; ``samples`` are boxes, indices of their targets, labels, deltas."""
    boxes, matches, labels, box_targets = samples
    loss_classifier, loss_box_reg = fastrcnn_loss(logits, deltas, labels, box_targets)
    losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg}
    if stage.has_mask():
        objects = [of_image > 0 for of_image in labels]
        boxes = [of_image[chosen] for of_image, chosen in zip(boxes, objects, strict=True)]
        matches = [of_image[chosen] for of_image, chosen in zip(matches, objects, strict=True)]
        mask_logits = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))
        masks, classes = [t["masks"] for t in targets], [t["labels"] for t in targets]
        losses["loss_mask"] = maskrcnn_loss(mask_logits, boxes, masks, classes, matches)
    return losses
