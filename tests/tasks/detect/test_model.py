"""Detectors: torchvision's interface on any of our networks, at any image size, in half precision; and their sizes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from qtvit.models import Architecture, build_model, load_backbone
from qtvit.models import qtvit as variants
from qtvit.tasks.detect.model import StrideAnchors, build_detector

Architectures = Mapping[str, Architecture]

KEYS = json.loads((Path(__file__).parent / "detector_keys.json").read_text())
PUBLISHED_PARAMS = {"qtvit_1": 57.9, "qtvit_2": 68.5, "qtvit_3": 93.1}
KINDS: dict[str, dict[str, Any]] = {"faster": {"masks": False}, "mask": {}, "cascade": {"cascade": True}}
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


@pytest.fixture
def build(tiny_architectures: Architectures, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A detector on a shrunken network: ``build(family, **args)``."""
    for family, name in {"b": "qtvit_1", "l": "qtvit_4", "nano": "qtvit_nano"}.items():
        monkeypatch.setitem(variants.ARCHITECTURES, name, tiny_architectures[family])
    names = {"b": "qtvit_1", "l": "qtvit_4", "nano": "qtvit_nano"}
    small = {"num_classes": 2, "min_size": 64, "max_size": 96, "fpn_chans": 16, "box_dim": 32, "rois_per_image": 32}
    return lambda family="b", **args: build_detector(names[family], **{**small, **args})


def scene(height: int = 64, width: int = 96) -> tuple[Tensor, dict[str, Tensor]]:
    """A red and a blue rectangle before grey, with the target."""
    boxes = [[0.1, 0.15, 0.4, 0.6], [0.5, 0.4, 0.9, 0.95]]
    corners = (torch.tensor(boxes) * torch.tensor([width, height, width, height])).round()
    image, masks = torch.full((3, height, width), 0.5), torch.zeros(2, height, width, dtype=torch.uint8)
    for i, (left, top, right, bottom) in enumerate(corners.int().tolist()):
        image[:, top:bottom, left:right] = torch.tensor([1.0, 0.0, 0.0]).roll(2 * i)[:, None, None]
        masks[i, top:bottom, left:right] = 1
    return image, {"boxes": corners, "labels": torch.tensor([1, 2]), "masks": masks}


def nothing(height: int, width: int) -> dict[str, Tensor]:
    empty = torch.zeros(0, height, width, dtype=torch.uint8)
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": empty}


def num_params(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_the_cascade_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        cascade = build_detector(name, num_classes=80, cascade=True)
        plain = build_detector(name, num_classes=80)
    assert round(num_params(cascade), 1) == PUBLISHED_PARAMS[name]
    heads = num_params(plain) - num_params(plain.body)
    assert heads == pytest.approx(20.1, abs=0.1)
    assert num_params(cascade) - num_params(cascade.body) == pytest.approx(53.0, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_keys(kind: str, build: Any) -> None:
    names = list(build(**KINDS[kind]).state_dict())
    assert [name for name in names if not name.startswith("backbone.body.")] == KEYS[kind]
    body = build_model("qtvit_1").state_dict()
    assert [name.removeprefix("backbone.body.") for name in names if name.startswith("backbone.body.")] == [
        name for name in body if not name.startswith("head.")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["b", "l", "nano"])
def test_every_parameter_learns(kind: str, family: str, build: Any, randomize: Any) -> None:
    image, target = scene()
    detector = build(family, **KINDS[kind]).train()
    randomize(detector.body)
    losses = detector([image, image.flip(2)], [target, nothing(64, 96)])
    assert losses.keys() == LOSSES - ({"loss_mask"} if kind == "faster" else set())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_overfits_two_rectangles(build: Any, randomize: Any) -> None:
    image, target = scene(48, 64)
    detector = build("nano", cascade=True, min_size=48, max_size=64, box_dim=64).train()
    randomize(detector.body)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=60)
    for _ in range(60):
        optimizer.zero_grad()
        sum(detector([image], [target]).values()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = detector.eval()([image])[0]
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
        best = int((found["labels"] == label).nonzero()[0])
        assert found["scores"][best] > 0.5
        assert box_iou(box[None], found["boxes"][best][None]) > 0.8
        ours = found["masks"][best, 0] >= 0.5
        assert (ours & mask.bool()).sum() / (ours | mask.bool()).sum() > 0.8


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["b", "nano"])
def test_images_of_any_size(kind: str, family: str, build: Any) -> None:
    sizes = [(5, 7), (64, 64), (40, 130), (97, 31), (3, 120)]
    detector = build(family, **KINDS[kind], score_thresh=0.0).eval()
    images = [torch.rand(3, *size) for size in sizes]
    together = detector(images)
    for image, found in zip(images, together, strict=True):
        height, width = image.shape[1:]
        assert len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) > 0
        left, top, right, bottom = found["boxes"].unbind(1)
        assert torch.minimum(left, top).min() >= 0
        assert right.max() <= width + 1e-3
        assert bottom.max() <= height + 1e-3
        assert set(found["labels"].tolist()) <= {1, 2}
        if kind != "faster":
            assert found["masks"].shape == (len(found["boxes"]), 1, height, width)
            assert found["masks"].clamp(0, 1).equal(found["masks"])


@torch.no_grad()
def test_an_image_is_padded_to_the_largest_stride(build: Any) -> None:
    for family, stride in {"b": 32, "nano": 4}.items():
        detector = build(family, min_size=65, max_size=97).eval()
        images, _ = detector.transform([torch.rand(3, 65, 97)])
        assert images.tensors.shape[2:] == (math.ceil(65 / stride) * stride, math.ceil(97 / stride) * stride)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "strides"), [("b", [4, 8, 16, 32, 64]), ("l", [4, 8, 16, 32, 64]), ("nano", [2, 4, 8])]
)
def test_the_pyramid_follows_the_strides(family: str, strides: list[int], build: Any) -> None:
    backbone = build(family).backbone
    maps = backbone(torch.rand(1, 3, 96, 160))
    assert list(maps) == [*map(str, range(len(strides) - 1)), "pool"]
    assert [tuple(level.shape[1:]) for level in maps.values()] == [
        (16, math.ceil(96 / stride), math.ceil(160 / stride)) for stride in strides
    ]
    assert backbone.strides == strides


def test_anchors_are_eight_strides_wide_and_a_stride_apart() -> None:
    """A padded side of 96 px: the map of stride 64 has two columns, 64 px apart and not 96 // 2."""
    anchors = StrideAnchors([32, 64], 8)
    maps = [torch.zeros(1, 1, 1, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)]
    (boxes,) = anchors(ImageList(torch.zeros(1, 3, 32, 96), [(32, 96)]), maps)
    assert boxes.dtype == torch.float32
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres.tolist() == [[x, 0.0] for x in (0, 32, 64, 0, 64) for _ in range(3)]
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides[:3].tolist() == [[362, 182], [256, 256], [182, 362]]  # rounded to even numbers: half-sides are whole
    assert sides[-3:].tolist() == [[724, 362], [512, 512], [362, 724]]


@torch.no_grad()
@pytest.mark.parametrize(("family", "strides"), [("b", [4, 8, 16, 32]), ("nano", [2, 4])])
def test_a_region_is_pooled_from_the_map_of_its_size_whatever_images_came_first(
    family: str, strides: list[int], build: Any
) -> None:
    pool = build(family).roi_heads.box_roi_pool
    maps = {
        str(i): torch.full((1, 1, 1024 // stride, 1024 // stride), float(stride)) for i, stride in enumerate(strides)
    }
    small = {name: level[..., :1, :1] for name, level in maps.items()}
    pool(small, [torch.tensor([[0.0, 0.0, 2.0, 2.0]])], [(3, 3)])
    for stride in strides:
        side = 20.0 * stride
        region = torch.tensor([[100.0, 100.0, 100.0 + side, 100.0 + side]])
        assert (pool(maps, [region], [(1024, 1024)]) == stride).all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, build: Any) -> None:
    image, target = scene()
    detector = build(**KINDS[kind], score_thresh=0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector([image, image], [target, nothing(64, 96)])
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    detector.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector([image])[0]
    assert len(found["boxes"]) > 0
    assert all(found[name].dtype == torch.float32 for name in found.keys() - {"labels"})


@torch.no_grad()
def test_boxes_in_half_precision_are_not_rounded_to_it(build: Any) -> None:
    """Where nothing moves them, the proposals are anchors: to the pixel, far from the corner."""
    detector = build(min_size=512, max_size=512).eval()
    nn.init.zeros_(detector.rpn.head.bbox_pred.weight)
    images, _ = detector.transform([torch.rand(3, 512, 512)])
    with torch.autocast("cpu", torch.bfloat16):
        maps = detector.backbone(images.tensors)
        (proposals,), _ = detector.rpn(images, maps)
    anchors = detector.rpn.anchor_generator(images, list(maps.values()))[0].clamp(0, 512)
    assert maps["0"].dtype == torch.bfloat16
    assert torch.cdist(proposals[::10], anchors).min(1).values.max() < 1e-2


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_batches_without_any_object(kind: str, build: Any) -> None:
    detector = build(**KINDS[kind]).train()
    losses = detector([torch.rand(3, 64, 96)] * 2, [nothing(64, 96)] * 2)
    sum(losses.values()).backward()
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("how", ["frozen", "synchronised"])
def test_frozen_and_synchronised_batch_norms(how: str, build: Any, randomize: Any) -> None:
    image, target = scene()
    detector: Any = randomize(build())
    if how == "synchronised":
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    detector.train()
    norms = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    if how == "frozen":
        for norm in norms:
            norm.eval()
    before = [norm.running_mean.clone() for norm in norms]
    sum(detector([image, image], [target, target]).values()).backward()
    moved = [not torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    assert all(moved) if how == "synchronised" else not any(moved)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert detector.eval()([image])


# Cascade


def test_stages_of_the_cascade(build: Any) -> None:
    stages = build(cascade=True).roi_heads.stages
    assert [stage.proposal_matcher.high_threshold for stage in stages] == [0.5, 0.6, 0.7]
    assert [stage.proposal_matcher.low_threshold for stage in stages] == [0.5, 0.6, 0.7]
    assert [stage.box_coder.weights for stage in stages] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]


class Fixed(nn.Module):
    """Gives the same for every region."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        outputs = tuple(output.expand(len(x), *output.shape) for output in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]


@torch.no_grad()
def test_a_cascade_moves_boxes_in_turn_and_averages_scores_and_masks(build: Any) -> None:
    detector = build(cascade=True, score_thresh=0.3).eval()
    probs = torch.tensor([[0.2, 0.6, 0.2], [0.3, 0.6, 0.1], [0.1, 0.3, 0.6]])
    for stage, prob, mask_prob in zip(detector.roi_heads.stages, probs, (0.9, 0.6, 0.3), strict=True):
        wx = stage.box_coder.weights[0]
        stage.box_predictor = Fixed(prob.log(), torch.tensor([0.1 * wx, 0, 0, 0]).repeat(3))  # a tenth to the right
        stage.mask_predictor = Fixed(torch.tensor(mask_prob).logit().expand(3, 28, 28))
    maps = detector.backbone(torch.rand(1, 3, 64, 96))
    (found,), losses = detector.roi_heads(maps, [torch.tensor([[10.0, 10.0, 30.0, 50.0]])], [(64, 96)])
    assert losses == {}
    assert found["labels"].tolist() == [1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.5]))
    torch.testing.assert_close(found["boxes"], torch.tensor([[16.0, 10.0, 36.0, 50.0]]))
    torch.testing.assert_close(found["masks"], torch.full((1, 1, 28, 28), 0.6))


@torch.no_grad()
def test_a_cascade_without_proposals_finds_nothing(build: Any) -> None:
    detector = build(cascade=True).eval()
    maps = detector.backbone(torch.rand(1, 3, 64, 96))
    (found,), _ = detector.roi_heads(maps, [torch.zeros(0, 4)], [(64, 96)])
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
        "masks": (0, 1, 28, 28),
    }


def test_training_of_a_cascade_moves_boxes_in_turn_and_weighs_losses(build: Any) -> None:
    """Predictions are fixed and all regions are background, so that each stage's boxes and loss are known."""
    detector = build(cascade=True).train()
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    seen: list[list[float]] = []
    for stage, of_stage in zip(detector.roi_heads.stages, logits, strict=True):
        stage.box_predictor = Fixed(of_stage, torch.tensor([0.1 * stage.box_coder.weights[0], 0, 0, 0]).repeat(3))
    pool = detector.roi_heads.stages[0].box_roi_pool  # that of all stages
    pool.register_forward_pre_hook(lambda _, args: seen.append(args[1][0][0].tolist()))
    maps = detector.backbone(torch.rand(1, 3, 64, 96))
    _, losses = detector.roi_heads(maps, [torch.tensor([[10.0, 10.0, 30.0, 50.0]])], [(64, 96)], [nothing(64, 96)])
    assert seen == [pytest.approx([left, 10, left + 20, 50]) for left in (10, 12, 14)]
    background = -logits.log_softmax(1)[:, 0]
    torch.testing.assert_close(losses["loss_classifier"], background @ torch.tensor([1.0, 0.5, 0.25]))


# Weights of classifiers


def test_weights_of_a_classifier(build: Any, randomize: Any) -> None:
    classifier: Any = randomize(build_model("qtvit_1", num_classes=5, img_size=96))
    detector = build(model_args={"img_size": 96})
    dropped = load_backbone(detector.backbone, classifier.state_dict())
    assert dropped == [name for name in classifier.state_dict() if name.startswith("head.")]
    for name, tensor in detector.body.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[name]), name
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = detector.body.eval().forward_intermediates(images, intermediates_only=True)
        assert torch.equal(maps[-1], classifier.eval().forward_features(images))


# Other networks, and what training asks of a model


def test_any_network_of_timm(randomize: Any) -> None:
    small = {"num_classes": 2, "min_size": 64, "max_size": 96, "fpn_chans": 16, "box_dim": 32, "rois_per_image": 32}
    detector = build_detector("resnet18", **small).train()
    image, target = scene()
    sum(detector([image], [target]).values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    weights = randomize(build_model("resnet18", num_classes=7)).state_dict()
    assert load_backbone(detector.backbone, weights) == ["fc.weight", "fc.bias"]
    assert torch.equal(detector.body.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


def test_an_image_of_which_nothing_would_be_left(build: Any) -> None:
    detector = build().eval()
    longest = detector.transform.max_size
    detector([torch.rand(3, 1, longest)])
    with pytest.raises(ValueError, match=f"an image of {longest + 1} x 1 px cannot be resized to a longer side of"):
        detector([torch.rand(3, 1, longest + 1)])


def test_networks_without_a_pyramid() -> None:
    with pytest.raises(
        ValueError, match=r"VisionTransformer has feature maps of strides 16, 16; .* twice the one before"
    ):
        build_detector("vit_tiny_patch16_224", num_classes=2, model_args={"depth": 2})


def test_bad_arguments(build: Any) -> None:
    with pytest.raises(ValueError, match=r"num_classes has to be at least 1 .* got 0"):
        build(num_classes=0)
    with pytest.raises(ValueError, match=r"min_size .* at most max_size 96, got \[64, 128\]"):
        build(min_size=[64, 128])
    with pytest.raises(ValueError, match=r"min_size .* got 0"):
        build(min_size=0)
    with pytest.raises(ValueError, match="unknown model 'qtvit_11'"):
        build_detector("qtvit_11", num_classes=2)
    with pytest.raises(ValueError, match="qtvit_1 cannot be built with"):
        build(model_args={"droput": 0.1})


def test_what_training_asks_of_a_model(build: Any) -> None:
    detector = build()
    names = dict(detector.named_parameters())
    exempt = detector.no_weight_decay()
    assert exempt == {f"backbone.body.{name}" for name in detector.body.no_weight_decay()}
    assert exempt
    assert exempt <= names.keys()
    layers = group_parameters(detector, detector.group_matcher(coarse=True), reverse=True)
    of_body = {name: layer for name, layer in layers.items() if name.startswith("backbone.body.")}
    assert layers["backbone.body.stages.0.0.conv.weight"] == 0
    assert sorted(set(of_body.values())) == [0, 1, 2, 3, 4, 5]
    assert {layers[name] for name in names.keys() - of_body.keys()} == {6}
    detector.set_grad_checkpointing()
    assert detector.body.grad_checkpointing
