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
Sizes = list[tuple[int, int]]
"""(H, W) of each resized image."""
Objects = list[dict[str, Tensor]]
"""The targets or detections of each image, as torchvision's ``RoIHeads`` takes and returns them."""


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

    stages: Any

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float] = (1.0, 0.5, 0.25)) -> None:
        super().__init__()
        assert len(stages) == len(loss_weights)
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)

    def forward(
        self, features: dict[str, Tensor], proposals: Boxes, image_shapes: Sizes, targets: Objects | None = None
    ) -> tuple[Objects, dict[str, Tensor]]:
        """Feature maps and proposals -> detections (empty in training) and losses (empty in evaluation).

        The losses have torchvision's names; each is the weighted sum over the stages.
        """
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}
        losses: dict[str, Tensor] = {}
        for stage, weight in zip(self.stages, self.loss_weights, strict=True):
            samples = stage.select_training_samples(proposals, targets)
            logits, deltas = _predict(stage, features, samples[0], image_shapes)
            for name, loss in _losses(stage, features, samples, logits, deltas, image_shapes, targets).items():
                losses[name] = losses.get(name, 0) + weight * loss
            proposals = _refined(stage, deltas, samples[0], image_shapes)
        return [], losses

    def detect(self, features: dict[str, Tensor], proposals: Boxes, image_shapes: Sizes) -> Objects:
        """The detections in each image: boxes, labels, scores, and masks if there are mask heads."""
        *earlier, last = self.stages
        probs = []
        for stage in earlier:
            logits, deltas = _predict(stage, features, proposals, image_shapes)
            probs.append(logits.softmax(-1))
            proposals = _refined(stage, deltas, proposals, image_shapes)
        logits, deltas = _predict(last, features, proposals, image_shapes)
        probs.append(logits.softmax(-1))
        mean_logits = torch.stack(probs).mean(0).log()  # their softmax is the mean probability
        boxes, scores, labels = last.postprocess_detections(mean_logits, deltas, proposals, image_shapes)
        columns = {"boxes": boxes, "labels": labels, "scores": scores}
        if last.has_mask():
            pooled = last.mask_roi_pool(features, boxes, image_shapes)
            masks = [maskrcnn_inference(s.mask_predictor(s.mask_head(pooled)), labels) for s in self.stages]
            columns["masks"] = [torch.stack(of_image).mean(0) for of_image in zip(*masks, strict=True)]
        return [dict(zip(columns, of_image, strict=True)) for of_image in zip(*columns.values(), strict=True)]


def _predict(stage: Any, features: dict[str, Tensor], boxes: Boxes, image_shapes: Sizes) -> tuple[Tensor, Tensor]:
    """Class logits (R, C) and box deltas (R, 4·C) of the regions of all images."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, image_shapes)))


def _refined(stage: Any, deltas: Tensor, boxes: Boxes, image_shapes: Sizes) -> Boxes:
    """The boxes refined by ``stage``, clipped to their images; no gradient flows from one stage to the next."""
    refined = stage.box_coder.decode(deltas.detach(), boxes)
    # All classes have the same deltas, so the first will do. Without any boxes, decode() returns two dimensions.
    refined = refined.view(len(deltas), deltas.shape[1] // 4, 4)[:, 0]
    per_image = refined.split([len(of_image) for of_image in boxes])
    return [clip_boxes_to_image(*pair) for pair in zip(per_image, image_shapes, strict=True)]


def _losses(
    stage: Any,
    features: dict[str, Tensor],
    samples: tuple[Any, ...],
    logits: Tensor,
    deltas: Tensor,
    image_shapes: Sizes,
    targets: Any,
) -> dict[str, Tensor]:
    """The losses of one stage as in torchvision; ``samples`` are boxes, indices of their targets, labels, deltas."""
    boxes, matches, labels, box_targets = samples
    loss_classifier, loss_box_reg = fastrcnn_loss(logits, deltas, labels, box_targets)
    losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg}
    if stage.has_mask():  # masks are learnt on the regions that are objects
        boxes, matches = ([x[y > 0] for x, y in zip(column, labels, strict=True)] for column in (boxes, matches))
        mask_logits = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))
        masks, classes = [t["masks"] for t in targets], [t["labels"] for t in targets]
        losses["loss_mask"] = maskrcnn_loss(mask_logits, boxes, masks, classes, matches)
    return losses
