"""The network for semantic segmentation: pooling, heads, sizes, and what it learns."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qtvit.models import ARCHITECTURES, Architecture
from qtvit.models.build import build_model
from qtvit.tasks.segment.model import HEADS, POOL_BINS, Segmenter, average_bins, build_segmenter, resize

Randomize = Callable[[nn.Module, int], nn.Module]
SHRUNKEN = {"b": "qtvit_1", "l": "qtvit_4", "nano": "qtvit_nano"}


@pytest.fixture
def shrunken(tiny_architectures: Mapping[str, Architecture], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes networks of both families and the nano small."""
    for family, name in SHRUNKEN.items():
        monkeypatch.setitem(ARCHITECTURES, name, tiny_architectures[family])


@pytest.fixture(params=[(name, head) for name in SHRUNKEN.values() for head in HEADS], ids="-".join)
def segmenter(request: pytest.FixtureRequest, shrunken: None, randomize: Randomize) -> Segmenter:
    """A small one of 5 classes in which every part matters, in training."""
    name, head = request.param
    model: Any = randomize(build_segmenter(name, num_classes=5, head=head, channels=12, drop_rate=0), 0)
    return model


def pixels(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


# Pooling


@given(st.sampled_from(POOL_BINS), st.integers(1, 40), st.integers(1, 40))
def test_pooling_is_torchs(bins: int, height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(average_bins(x, bins), F.adaptive_avg_pool2d(x, bins), rtol=0, atol=1e-6)


def test_pooling_by_hand() -> None:
    """Bins of a side that they do not divide overlap; of one that is shorter than they, they repeat."""
    x = torch.tensor([[1.0, 2, 4, 8, 16], [0, 0, 0, 0, 0]])[None, None]
    assert average_bins(x, 2).flatten().tolist() == pytest.approx([7 / 3, 28 / 3, 0, 0])
    assert average_bins(x[..., :2], 3)[0, 0].tolist() == [[1, 1.5, 2], [0.5, 0.75, 1], [0, 0, 0]]


def test_pooling_sums_in_full_precision() -> None:
    """A sum beyond fp16, and the averages of numbers that bf16 holds exactly, with autocast and without."""
    large = torch.full((1, 1, 90, 90), 60000.0, dtype=torch.float16)
    assert average_bins(large, 1).item() == 60000
    ones = torch.ones(1, 1, 14, 83, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        averages = [average_bins(ones, bins) for bins in POOL_BINS]
        assert average_bins(ones.float(), 3).dtype == torch.float32
    for average in averages:
        assert average.dtype == torch.bfloat16
        assert (average == 1).all()


# Networks


@pytest.mark.parametrize(("name", "published"), [("qtvit_1", 32.8), ("qtvit_2", 44.3), ("qtvit_3", 69.7)])
@pytest.mark.parametrize("original", [False, True], ids=["qtvit", "efficientvit"])
def test_published_parameters(name: str, published: float, original: bool) -> None:
    """The paper's Table 6, for QT-ViT and the EfficientViT that it starts from."""
    if original:
        published = {"qtvit_1": 32.5, "qtvit_2": 43.7, "qtvit_3": 68.8}[name]
        name = name.replace("qtvit_", "efficientvit_b")
    with torch.device("meta"):
        model = build_segmenter(name, num_classes=150)
    assert model.aux is not None
    num_params, num_aux = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.aux))
    assert num_params - num_aux == pytest.approx(published, rel=0.003)
    assert num_params == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", ["qtvit_1", "qtvit_nano", "test_resnet"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_are_put_on_the_last_stages(shrunken: None, name: str, head: str) -> None:
    strides = {"upernet": (4, 8, 16, 32), "light": (8, 16, 32), "light_skip": (4, 8, 16, 32)}[head]
    if name == "qtvit_nano":
        strides = (1, 2, 4) if head == "light_skip" else (2, 4)
    with torch.device("meta"):
        model = build_segmenter(name, num_classes=3, head=head)
        logits: Any = model(torch.empty(2, 3, 96, 160))
    assert logits["out"].shape == (2, 3, 96 // strides[0], 160 // strides[0])
    assert logits["aux"].shape == (2, 3, 96 // strides[-2], 160 // strides[-2])
    finest_sum = {"qtvit_1": 16, "qtvit_nano": 16, "test_resnet": 48}[name]
    classifier: Any = model.head.classifier
    in_channels = {"upernet": 512, "light": 4 * finest_sum, "light_skip": 2 * finest_sum}
    assert classifier.conv.in_channels == in_channels[head]


def test_names_in_the_state_dict(shrunken: None) -> None:
    """They are public: checkpoints have them."""

    def convolutions(part: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of weights; of a convolution with a norm, the norm's entries are checked and left out."""
        shapes = {name: (*value.shape,) for name, value in part.state_dict().items()}
        for name in [name.removesuffix("norm.weight") for name in shapes if name.endswith("norm.weight")]:
            chans = shapes[f"{name}conv.weight"][:1]
            for entry in ("weight", "bias", "running_mean", "running_var"):
                assert shapes.pop(f"{name}norm.{entry}") == chans
            assert shapes.pop(f"{name}norm.num_batches_tracked") == ()
        return shapes

    upernet = build_segmenter("qtvit_1", num_classes=5, channels=12)
    assert convolutions(upernet.head) == {
        **{f"pool.branches.{i}.conv.weight": (12, 32, 1, 1) for i in range(4)},
        "pool.fuse.conv.weight": (12, 32 + 4 * 12, 3, 3),
        **{f"laterals.{i}.conv.weight": (12, chans, 1, 1) for i, chans in enumerate((16, 16, 24))},
        **{f"smooth.{i}.conv.weight": (12, 12, 3, 3) for i in range(3)},
        "fuse.conv.weight": (12, 4 * 12, 3, 3),
        "classifier.conv.weight": (5, 12, 1, 1),
        "classifier.conv.bias": (5,),
    }
    assert upernet.aux is not None
    assert convolutions(upernet.aux) == {
        "conv.conv.weight": (256, 24, 3, 3),
        "classifier.conv.weight": (5, 256, 1, 1),
        "classifier.conv.bias": (5,),
    }
    light = build_segmenter("qtvit_1", num_classes=5, head="light", aux=False)
    assert light.aux is None
    assert convolutions(light.head) == {
        **{f"laterals.{i}.conv.weight": (16, chans, 1, 1) for i, chans in enumerate((16, 24, 32))},
        **{f"blocks.{i}.main.inverted_conv.conv.weight": (64, 16, 1, 1) for i in range(3)},
        **{f"blocks.{i}.main.depth_conv.conv.weight": (64, 1, 3, 3) for i in range(3)},
        **{f"blocks.{i}.main.point_conv.conv.weight": (16, 64, 1, 1) for i in range(3)},
        "expand.conv.weight": (64, 16, 1, 1),
        "classifier.conv.weight": (5, 64, 1, 1),
        "classifier.conv.bias": (5,),
    }
    skip = build_segmenter("qtvit_1", num_classes=5, head="light_skip", aux=False)
    assert convolutions(skip.head) == {
        **convolutions(light.head),
        "skip.conv.weight": (16, 16, 1, 1),
        "expand.conv.weight": (32, 16, 1, 1),
        "classifier.conv.weight": (5, 32, 1, 1),
    }
    parts = {name.split(".")[0] for name in upernet.state_dict()}
    assert parts == {"backbone", "head", "aux"}
    assert next(iter(upernet.state_dict())) == "backbone.body.stages.0.0.conv.weight"


def test_every_parameter_learns_on_a_rectangle(segmenter: Segmenter) -> None:
    logits: Any = segmenter(pixels(49, 107))
    assert list(logits) == ["out", "aux"]
    sum(map_.double().square().mean() for map_ in logits.values()).backward()
    for name, parameter in segmenter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_evaluation_is_at_the_images_size(segmenter: Segmenter) -> None:
    for size in [(97, 211), (32, 32), (5, 3)]:
        x = pixels(*size).double()
        logits: Any = segmenter.double().eval()(x)
        assert logits.shape == (2, 5, *size)
        maps = segmenter.head(segmenter.backbone(x))
        want = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, want, rtol=0, atol=0)
        single: Any = segmenter(x[:1])
        torch.testing.assert_close(single, logits[:1], rtol=1e-6, atol=1e-6)


def test_autocast(segmenter: Segmenter) -> None:
    x = pixels(64, 96)
    with torch.no_grad():
        want: Any = segmenter.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            half: Any = segmenter(x)
    assert (half.float() - want).norm() < 0.1 * want.norm()
    with torch.autocast("cpu", torch.bfloat16):
        logits: Any = segmenter.train()(x)
        loss = logits["out"].float().square().mean() + logits["aux"].float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmenter.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_one_batch_is_learnt(shrunken: None, head: str) -> None:
    """Which half of an image is red, of two images that differ in where the border lies."""
    images, masks = torch.zeros(2, 3, 32, 48), torch.zeros(2, 32, 48, dtype=torch.long)
    for i, border in enumerate((12, 32)):
        images[i, 0, :, :border] = 1
        images[i, 2, :, border:] = 1
        masks[i, :, border:] = 1
    model = build_segmenter("qtvit_nano", num_classes=2, head=head, channels=16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        logits: Any = model(images)
        losses = {name: F.cross_entropy(resize(maps, (32, 48)), masks) for name, maps in logits.items()}
        optimizer.zero_grad()
        (losses["out"] + 0.4 * losses["aux"]).backward()
        optimizer.step()
    assert losses["out"] < 0.1
    assert losses["aux"] < 0.3


def test_what_is_in_the_finer_map_alone_reaches_the_logits(shrunken: None, randomize: Randomize) -> None:
    """Of two neighbours that are one position of the coarser maps, each gets its own part of the finer one."""
    model: Any = randomize(build_segmenter("qtvit_nano", num_classes=3, head="light_skip"), 0).eval()
    finer, *coarser = model.backbone(pixels(8, 8))
    changed = finer.clone()
    changed[:, :, 2, 3] += 1
    with torch.no_grad():
        difference = model.head([changed, *coarser]) - model.head([finer, *coarser])
    assert difference[:, :, 2, 3].abs().min() > 0
    difference[:, :, 2, 3] = 0
    assert not difference.any()


def test_untrained_classes_are_equally_likely(shrunken: None) -> None:
    """So that the first loss is that of guessing, whatever the network."""
    logits: Any = build_segmenter("qtvit_1", num_classes=7, channels=16)(pixels(64, 64))
    for maps in logits.values():
        loss = F.cross_entropy(maps, torch.zeros_like(maps[:, 0], dtype=torch.long))
        assert loss.item() == pytest.approx(torch.tensor(7.0).log().item(), rel=0.1)


def test_upernet_is_not_trained_on_one_image(shrunken: None) -> None:
    """BatchNorm on the average of the whole map would leave infinite statistics."""
    model = build_segmenter("qtvit_nano", num_classes=2, channels=8)
    with pytest.raises(ValueError, match="in batches of 2 images or more, got 1"):
        model(pixels(32, 32, batch=1))
    for module in model.head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(pixels(32, 32, batch=1))["out"].shape == (1, 2, 16, 16)
    light = build_segmenter("qtvit_nano", num_classes=2, head="light")
    assert light(pixels(32, 32, batch=1))["out"].shape == (1, 2, 16, 16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"head": "uppernet"}, "unknown head 'uppernet'; did you mean upernet"),
        ({"num_classes": 0}, "num_classes and channels are 1 or more, got 0 and None"),
        ({"channels": 0}, "num_classes and channels are 1 or more, got 5 and 0"),
        ({"model": "qtvit_11"}, "unknown model 'qtvit_11'"),
    ],
)
def test_what_users_get_wrong(shrunken: None, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_segmenter(**{"model": "qtvit_1", "num_classes": 5, **args})


@pytest.mark.parametrize(
    ("head", "aux", "message"),
    [
        ("light_skip", False, "the head light_skip needs two$"),
        ("light", True, "an auxiliary head needs two: --loss.aux 0"),
    ],
)
def test_a_backbone_with_one_map(
    shrunken: None, monkeypatch: pytest.MonkeyPatch, head: str, aux: bool, message: str
) -> None:
    nano = build_model("qtvit_nano")
    del nano.feature_info[:2]
    monkeypatch.setattr("qtvit.tasks.segment.model.build_model", lambda _: nano)
    with pytest.raises(ValueError, match=f"qtvit_nano gives one feature map, and {message}"):
        build_segmenter("qtvit_nano", num_classes=5, head=head, aux=aux)
