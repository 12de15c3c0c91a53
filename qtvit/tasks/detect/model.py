"""Detectors: Faster, Mask and Cascade (Mask) R-CNN with a feature pyramid on one of our networks or of timm's.

The components are torchvision's, configured as in mmdetection; the pyramid follows the strides of the network.
"Mask R-CNN", He et al., ICCV 2017; "Feature Pyramid Networks", Lin et al., CVPR 2017.

Tables 4 and 5 of the QT-ViT paper say Mask R-CNN, but their parameter counts are, to the last digit, those of Cascade
Mask R-CNN with three mask heads (``cascade=True``). In millions, with 80 categories and without the classifier's head:

    ======================  ========  ========  ========  ===============  ===============  ===============
    heads                   QT-ViT-1  QT-ViT-2  QT-ViT-3  EfficientViT-B1  EfficientViT-B2  EfficientViT-B3
    ======================  ========  ========  ========  ===============  ===============  ===============
    published                   57.9      68.5      93.1             57.6             68.0             92.1
    cascade                    57.85     68.52     93.13            57.60            68.00            92.08
    with one mask head         52.57     63.24     87.85            52.31            62.71            86.79
    Mask R-CNN                 24.93     35.60     60.21            24.68            35.07            59.15
    ======================  ========  ========  ========  ===============  ===============  ===============

Shapes: B batch, C channels, H x W image or feature map.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from qtvit.models.backbone import Backbone, OnBackbone, strides_of
from qtvit.models.build import build_model

from .cascade import CascadeRoIHeads

CASCADE = ((0.5, 10.0), (0.6, 20.0), (0.7, 30.0))
"""Stages of Cascade R-CNN: IoU from which a region is an object, and weight of its x, y deltas (w, h: half of it)."""


class Detector(OnBackbone, GeneralizedRCNN):
    """A detector with torchvision's interface, built by `build_detector`.

    Its input is a list of images (3, H, W) with values in 0..1, of any sizes. In training,
    ``detector(images, targets)`` returns a dict of losses; each target is a dict of boxes (float (N, 4): x1, y1, x2, y2
    in pixels), labels (int64 (N,), from 1 to num_classes) and, with mask heads, masks (uint8 (N, H, W)); N may be 0. In
    evaluation, ``detector(images)`` returns for each image a dict of boxes, labels, scores and, with mask heads, masks
    (float (N, 1, H, W) in 0..1), all in pixels of the original image.

    Under autocast, convolutions and linear layers run in half precision; anchors, boxes, losses and the selection of
    boxes are fp32.
    """

    num_classes: int
    """Number of categories, without the background."""


class PyramidBackbone(Backbone):
    """A network and a feature pyramid: (B, 3, H, W) -> {"0": (B, C, H / stride, W / stride), …, "pool": …}.

    The pyramid takes the network's feature maps from 1/8 of the largest stride on, strides 4 to 32 for most networks.
    "pool" is the coarsest map at half its resolution, for the largest proposals.

    Args:
        body: see `Backbone`.
        chans: C.
        norm_layer: norm after each of the pyramid's convolutions; None for no norms.

    Attributes:
        out_channels: C, under the name that torchvision uses.
        strides: strides of all feature maps, including "pool".

    Raises:
        ValueError: the network has no ``forward_intermediates``, or strides that do not double from map to map.
    """

    def __init__(self, body: nn.Module, chans: int, norm_layer: Callable[..., nn.Module] | None = None) -> None:
        strides = strides_of(body)
        super().__init__(body, sum(stride >= strides[-1] // 8 for stride in strides))
        if any(2 * fine != coarse for fine, coarse in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(
                f"{type(body).__name__} has feature maps of strides {', '.join(map(str, self.strides))}; "
                "a pyramid needs each to be twice the one before"
            )
        self.strides.append(2 * self.strides[-1])
        self.out_channels = chans
        self.fpn = FeaturePyramidNetwork(self.channels, chans, LastLevelMaxPool(), norm_layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): feature_map for i, feature_map in enumerate(super().forward(x))})


class StrideAnchors(AnchorGenerator):
    """Three anchors per position of each feature map: area (scale · stride)², height to width 1/2, 1 and 2.

    torchvision's generator derives strides from the maps' sizes, which is wrong where a map's size does not divide the
    image's, and computes in the maps' dtype, which is off by pixels in half precision.
    """

    def __init__(self, strides: Sequence[int], scale: float) -> None:
        super().__init__(tuple((scale * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors, (num_anchors, 4) in pixels and fp32, once per image; they are the same for all images."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        sizes: Any = [feature_map.shape[-2:] for feature_map in feature_maps]
        strides: Any = [(stride, stride) for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, strides))
        return [anchors] * len(image_list.image_sizes)


class Resize(GeneralizedRCNNTransform):
    """torchvision's resizing with sizes computed in integers: a rounded scale factor can lose a pixel."""

    def new_size(self, height: Any, width: Any, shorter: int) -> tuple[Any, Any]:
        """(H, W) with the shorter side at ``shorter``, or with the longer side at ``max_size`` if that is smaller.

        ``height`` and ``width`` may be symbolic, so that exported files compute the same sizes.
        """
        short, long = torch.sym_min(height, width), torch.sym_max(height, width)
        new: Any = [torch.sym_min(side * shorter // short, side * self.max_size // long) for side in (height, width)]
        return new[0], new[1]

    def scaled(self, image: Tensor, shorter: int) -> Tensor:
        """``image`` (3, H, W) resized to its `new_size`."""
        size = self.new_size(image.shape[-2], image.shape[-1], shorter)
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]

    def resize(self, image: Tensor, target: Any = None) -> Any:
        """``image`` (3, H, W), and the boxes and masks of ``target``, at the new size.

        In training, the length of the shorter side is drawn from ``min_size``; in evaluation, it is the last of these.

        Raises:
            ValueError: the image is so elongated that less than a pixel of its shorter side would be left.
        """
        height, width = image.shape[-2:]
        if min(height, width) * self.max_size < max(height, width):
            raise ValueError(
                f"an image of {width} x {height} px cannot be resized to a longer side of {self.max_size} px: less "
                "than a pixel of its shorter side would be left"
            )
        shorter = self.torch_choice(list(self.min_size)) if self.training else self.min_size[-1]
        image = self.scaled(image, shorter)
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], [height, width], list(image.shape[-2:]))
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None].float(), image.shape[-2:])[:, 0].byte()
        return image, target


class ProposalHead(RPNHead):
    """torchvision's head of the region proposal network (RPN), with fp32 outputs under autocast too."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class BoxPredictor(nn.Module):
    """Class logits and box deltas of R regions in fp32: (R, C) -> (R, num_outputs), (R, 4 · num_outputs).

    Args:
        chans: C.
        num_outputs: number of classes, including the background.
        class_agnostic: predict one set of deltas and repeat it for every class.
    """

    def __init__(self, chans: int, num_outputs: int, class_agnostic: bool) -> None:
        super().__init__()
        self.repeats = num_outputs if class_agnostic else 1
        self.cls_score = nn.Linear(chans, num_outputs)
        self.bbox_pred = nn.Linear(chans, 4 * num_outputs // self.repeats)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).float().repeat(1, self.repeats)


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's mask predictor, with fp32 outputs under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def build(name: str, model_args: Mapping[str, Any], task_args: Mapping[str, Any]) -> nn.Module:
    """The detector that a model file describes; ``task_args`` are ``category_ids`` and `build_detector`'s options."""
    heads = dict(task_args)
    return build_detector(name, num_classes=len(heads.pop("category_ids")), model_args=model_args, **heads)


def build_detector(
    model: str,
    *,
    num_classes: int,
    masks: bool = True,
    cascade: bool = False,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    model_args: Mapping[str, Any] | None = None,
    fpn_chans: int = 256,
    fpn_norm: bool = False,
    box_dim: int = 1024,
    anchor_scale: float = 8.0,
    proposals: int = 1000,
    rois_per_image: int = 512,
    score_thresh: float = 0.05,
    max_detections: int = 100,
) -> Detector:
    """Build a detector with newly initialised weights; `qtvit.models.load_backbone` can load those of its network.

    Args:
        model: name of the network, ours or timm's.
        num_classes: number of categories, without the background.
        masks: True for Mask R-CNN; False for Faster R-CNN, which is trained on boxes alone.
        cascade: use three stages of heads instead of one (Cascade R-CNN).
        min_size: length in px to which the shorter side of images is resized. From several, training draws one for each
            image, and evaluation takes the last.
        max_size: upper bound in px of the longer side of the resized images.
        mean, std: per channel, for normalising the images.
        model_args: arguments of the network for ``timm.create_model``. With those of a classifier's checkpoint, the
            positional maps have that classifier's size.
        fpn_chans: channels of the pyramid, the RPN head and the mask heads.
        fpn_norm: whether the pyramid has BatchNorms.
        box_dim: channels of the box heads' linear layers.
        anchor_scale: side of the square anchors in units of the stride.
        proposals: number of best-scoring proposals per image that are passed to the heads; twice as many in training.
        rois_per_image: number of proposals per image that the heads are trained on, at most a quarter of them objects.
        score_thresh: detections with a lower score are dropped.
        max_detections: number of best-scoring detections per image that are kept.

    Raises:
        ValueError: there is no such network, it does not take these arguments, its feature maps do not fit a pyramid,
            or a number is out of range.
    """
    sizes = [min_size] if isinstance(min_size, int) else list(min_size)
    if num_classes < 1:
        raise ValueError(f"num_classes has to be at least 1 (the background does not count), got {num_classes}")
    if not sizes or not 0 < min(sizes) <= max(sizes) <= max_size:
        raise ValueError(f"min_size has to be positive and at most max_size {max_size}, got {min_size}")
    network = build_model(model, **(model_args or {}))
    backbone = PyramidBackbone(network, fpn_chans, nn.BatchNorm2d if fpn_norm else None)
    anchors = StrideAnchors(backbone.strides, anchor_scale)
    num_proposals = {"training": 2 * proposals, "testing": proposals}
    rpn = RegionProposalNetwork(
        anchors,
        ProposalHead(fpn_chans, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=num_proposals,
        post_nms_top_n=num_proposals,
        nms_thresh=0.7,
    )
    box_pool, mask_pool = (_roi_align(backbone.strides[:-1], size) for size in (7, 14))

    def heads(iou: float = 0.5, weight: float = 10.0) -> RoIHeads:
        return RoIHeads(
            box_pool,
            TwoMLPHead(fpn_chans * math.prod(box_pool.output_size), box_dim),
            BoxPredictor(box_dim, num_classes + 1, class_agnostic=cascade),
            fg_iou_thresh=iou,
            bg_iou_thresh=iou,
            batch_size_per_image=rois_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=(weight, weight, weight / 2, weight / 2),
            score_thresh=score_thresh,
            nms_thresh=0.5,
            detections_per_img=max_detections,
            mask_roi_pool=mask_pool if masks else None,
            mask_head=MaskRCNNHeads(fpn_chans, [fpn_chans] * 4, dilation=1) if masks else None,
            mask_predictor=MaskPredictor(fpn_chans, fpn_chans, num_classes + 1) if masks else None,
        )

    roi_heads = CascadeRoIHeads([heads(*stage) for stage in CASCADE]) if cascade else heads()
    resize: Any = Resize
    transform = resize(sizes, max_size, list(mean), list(std), size_divisible=backbone.strides[-2])
    detector = Detector(backbone, rpn, roi_heads, transform)
    detector.num_classes = num_classes
    return detector


def _roi_align(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """RoIAlign to ``size`` x ``size``; sides of 14·s to 28·s px use the map of stride s (Lin et al., equation 1).

    The strides are set here because torchvision guesses them from the first images that it sees, wrongly if these are
    small.
    """
    pool: Any = MultiScaleRoIAlign([str(i) for i in range(len(strides))], size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    levels = [stride.bit_length() - 1 for stride in (strides[0], strides[-1])]
    pool.map_levels = LevelMapper(*levels, canonical_scale=224, canonical_level=4)
    return pool
