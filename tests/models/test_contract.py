"""What timm asks of a model, asked through timm's public API.

Values are those of shrunken networks of both families and of the nano; full sizes are built without memory, for what
their configuration says, the shapes of their features, and the names in their state dicts.
"""

import difflib
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import create_feature_extractor, group_parameters, reparameterize_model
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from qtvit.models import ARCHITECTURES, Architecture, QTViT
from qtvit.ops import KERNELS

Create = Callable[..., Any]
Randomize = Callable[..., nn.Module]

SHRUNKEN = {"b": "qtvit_1", "l": "qtvit_4", "nano": "qtvit_nano"}
recent_compiler = pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.14"),
    reason="torch 2.8 counts statistics twice in a checkpoint, and does not see that a size rounded up is positive",
)
KEYS = Path(__file__).with_name("state_dict_keys.json")
RELEASED = json.loads((Path(__file__).parents[1] / "golden" / "released_state_dict_shapes.json").read_text())


@pytest.fixture(params=SHRUNKEN)
def create(
    request: pytest.FixtureRequest,
    tiny_architectures: Mapping[str, Architecture],
    randomize: Randomize,
    monkeypatch: pytest.MonkeyPatch,
) -> Create:
    """`timm.create_model` for a registered model whose architecture is shrunken meanwhile.

    Unless they are loaded, its weights are such that every part matters, and the same ones each time.
    """
    name = SHRUNKEN[request.param]
    monkeypatch.setitem(ARCHITECTURES, name, tiny_architectures[request.param])

    def create(**kwargs: Any) -> Any:
        model = timm.create_model(name, **kwargs)
        return model if kwargs.keys() & {"checkpoint_path", "pretrained"} else randomize(model, 0)

    return create


@functools.cache
def meta_model(name: str) -> QTViT:
    with torch.device("meta"):
        return timm.create_model(name).eval()


def image(*size: int, batch: int = 1, chans: int = 3) -> Tensor:
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Logits of ``x``, and what a training step on them leaves: gradients and statistics, by name."""
    x = x.detach().requires_grad_()
    logits = model(x) if forward is None else forward(x)
    model.zero_grad()
    logits.double().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"logits": logits.detach(), "x": x.grad, **gradients, **{k: b.clone() for k, b in model.named_buffers()}}


def assert_same_step(ours: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """For float64: some gradients are zero behind a BatchNorm, but for rounding."""
    assert ours.keys() == want.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, want[name], rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


# Building


def test_unknown_arguments_are_refused(create: Create) -> None:
    with pytest.raises(TypeError, match="droput"):
        create(droput=0.1)
    with pytest.raises(TypeError, match="output_stride"):  # stages are not dilated
        create(features_only=True, output_stride=16)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_configuration_and_feature_info_are_true(name: str) -> None:
    model = meta_model(name)
    cfg = model.default_cfg
    chans, *size = cfg["input_size"]
    assert (model.in_chans, model.img_size, model.num_classes) == (chans, tuple(size), cfg["num_classes"])
    features, stages = model.forward_intermediates(torch.empty(1, chans, *size, device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    reductions = [1, 2, 4] if name == "qtvit_nano" else [2, 4, 8, 16, 32]
    assert [info["reduction"] for info in model.feature_info] == reductions
    assert [info["num_chs"] for info in model.feature_info] == [stage.width for stage in ARCHITECTURES[name].stages]
    for stage, info in zip(stages, model.feature_info, strict=True):
        assert stage.shape == (1, info["num_chs"], *(side // info["reduction"] for side in size))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model.forward_head(features).shape == (1, model.num_classes)
    first = model.get_submodule(cfg["first_conv"])
    assert isinstance(first, nn.Conv2d)
    assert first is next(module for module in model.modules() if hasattr(module, "weight"))
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()

    side = 32 if name == "qtvit_nano" else 224
    data = timm.data.resolve_data_config(model=model)
    assert data["input_size"] == (3, side, side)
    assert data["crop_pct"] == (0.95 if name in ("qtvit_0", "qtvit_1") else 1.0)
    assert data["interpolation"] == "bicubic"
    assert (data["mean"], data["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_device_and_dtype_arguments(create: Create) -> None:
    model = create(device="meta", dtype=torch.float64)
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert {(tensor.device.type, tensor.dtype) for tensor in floats} == {("meta", torch.float64)}


@torch.no_grad()
def test_weights_are_loaded_from_a_file(create: Create, tmp_path: Path) -> None:
    model = create(num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    x = image(48, 80, batch=2)
    loaded = create(num_classes=5, checkpoint_path=tmp_path / "weights.safetensors").eval()
    assert torch.equal(loaded(x), model(x))

    source = {"file": tmp_path / "weights.safetensors", "num_classes": 5}
    features = create(pretrained=True, pretrained_cfg_overlay=source, features_only=True).eval()
    for ours, want in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(ours, want)
    tuned = create(pretrained=True, pretrained_cfg_overlay=source, num_classes=3).eval()
    assert torch.equal(tuned.forward_features(x), model.forward_features(x))
    assert tuned(x).shape == (2, 3)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(create: Create, in_chans: int, tmp_path: Path) -> None:
    """The first convolution takes them, and takes over weights for colour images: of grey ones, exactly."""
    model = create(in_chans=in_chans, num_classes=10)
    assert model.in_chans == in_chans
    x = image(64, 48, batch=2, chans=in_chans).requires_grad_()
    model(x).square().sum().backward()
    assert (x.grad.abs().amax((0, 2, 3)) > 0).all()

    colour = create().eval()
    save_file(colour.state_dict(), tmp_path / "colour.safetensors")
    source = {"file": tmp_path / "colour.safetensors"}
    adapted = create(in_chans=in_chans, pretrained=True, pretrained_cfg_overlay=source).eval()
    if in_chans == 1:
        grey = image(64, 48, chans=1)
        torch.testing.assert_close(adapted(grey), colour(grey.expand(-1, 3, -1, -1)))
    loaded, want = adapted.state_dict(), colour.state_dict()
    changed = [name for name in loaded if loaded[name].shape != want[name].shape]
    assert changed == ["stages.0.0.conv.weight"]
    assert all(torch.equal(loaded[name], want[name]) for name in loaded if name not in changed)


# Forward, backward


def test_every_parameter_gets_a_gradient(create: Create) -> None:
    model = create(num_classes=10).train()
    logits = model(image(64, 64, batch=2))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (97, 35), (20, 130), (1, 1)])
def test_any_size(create: Create, size: tuple[int, int]) -> None:
    model = create(num_classes=10).eval()
    x = image(*size, batch=2)
    logits = model(x)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    for info, feature in zip(model.feature_info, model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert feature.shape == (2, info["num_chs"], *(-(-side // info["reduction"]) for side in size))
    alone = torch.cat([model(one[None]) for one in x])  # images of a batch do not mix
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_forward_is_features_then_head(create: Create) -> None:
    model = create(num_classes=10).eval()
    x = image(64, 96, batch=2)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.get_classifier()(hidden), model(x))


@torch.no_grad()
@pytest.mark.parametrize("argument", ["drop_rate", "drop_path_rate"])
def test_dropping_acts_in_training_only(create: Create, argument: str) -> None:
    plain, model = create(num_classes=10), create(num_classes=10, **{argument: 0.9})
    x = image(64, 64, batch=2)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    features, want = model.train().forward_features(x), plain.train().forward_features(x)
    assert torch.equal(features, want) == (argument == "drop_rate")
    hidden = model.forward_head(want, pre_logits=True)
    assert torch.equal(hidden, plain.forward_head(want, pre_logits=True))
    assert torch.equal(model.forward_head(want), plain.forward_head(want)) == (argument == "drop_path_rate")


@pytest.mark.parametrize("training", [False, True])
def test_channels_last(create: Create, training: bool) -> None:
    """In and out, with the same numbers."""
    x = image(33, 47, batch=2).double()
    want = create(num_classes=10, dtype=torch.float64).train(training)
    model = create(num_classes=10, dtype=torch.float64).train(training).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    for ours, feature in zip(
        model.forward_intermediates(x_last, intermediates_only=True),
        want.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert feature.is_contiguous()
    assert_same_step(step(model, x_last), step(want, x))


# Features


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", [None, "list", "dict", "hook", "fx", "getter"])
def test_features_only_agrees_with_forward_intermediates(create: Create, feature_cls: str | None) -> None:
    model = create().eval()
    x = image(40, 56, batch=2)
    stages = model.forward_intermediates(x, intermediates_only=True)
    last = len(stages) - 1
    how = {} if feature_cls is None else {"feature_cls": feature_cls}
    for out_indices, want in ((None, range(last + 1)), ((0, 2), (0, 2)), ((-2, -1), (last - 1, last)), (1, (last,))):
        chosen = {} if out_indices is None else {"out_indices": out_indices}
        extractor = create(features_only=True, **how, **chosen).eval()
        features = extractor(x)
        if feature_cls == "dict":
            assert list(features) == [str(i) for i in extractor.feature_info.out_indices]
            features = list(features.values())
        assert extractor.feature_info.channels() == [model.feature_info[i]["num_chs"] for i in want]
        assert extractor.feature_info.reduction() == [model.feature_info[i]["reduction"] for i in want]
        for ours, i in zip(features, want, strict=True):
            assert torch.equal(ours, stages[i])


@torch.no_grad()
def test_forward_intermediates(create: Create) -> None:
    model = create().eval()
    x = image(64, 96)
    final, stages = model.forward_intermediates(x)
    count = len(model.feature_info)
    assert len(stages) == count
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, stages[-1])
    runs: list[None] = []
    for stage in model.stages:
        stage.register_forward_pre_hook(lambda *_: runs.append(None))
    for indices, want in ((2, [-2, -1]), ([0, 2], [0, 2]), ((1,), [1]), ([-1, -3], [-3, -1]), ([-2], [-2])):
        for norm, stop_early in itertools.product((False, True), repeat=2):
            runs.clear()
            final, some = model.forward_intermediates(x, indices, norm=norm, stop_early=stop_early)
            assert [torch.equal(ours, stages[i]) for ours, i in zip(some, want, strict=True)] == [True] * len(want)
            end = want[-1] % count if stop_early else count - 1
            assert len(runs) == end + 1
            assert torch.equal(final, stages[end])
            alone = model.forward_intermediates(x, indices, norm, stop_early, intermediates_only=True)
            assert [torch.equal(ours, same) for ours, same in zip(alone, some, strict=True)] == [True] * len(want)
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, [count])
    with pytest.raises(ValueError, match="must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("index", [0, 1, -1])
def test_pruned_to_a_stage(create: Create, index: int) -> None:
    model = create(drop_rate=0.5).eval()
    x = image(64, 96, batch=2)
    want = model.forward_intermediates(x, [index], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([index]) == [index % len(model.feature_info)]
    chans = want.shape[1]
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (chans, chans, 0)
    assert torch.equal(model.forward_features(x), want)
    assert torch.equal(model.forward_intermediates(x, 1, intermediates_only=True)[0], want)
    torch.testing.assert_close(model(x), want.mean((2, 3)))
    assert not any(module.training for module in model.modules())
    model(x).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_a_pruned_model_takes_a_new_classifier(create: Create) -> None:
    model = create(drop_rate=0.5).to(torch.bfloat16).eval()
    model.prune_intermediate_layers([1])
    model.reset_classifier(5, "max")
    x = image(64, 96, batch=2).bfloat16()
    torch.testing.assert_close(
        model.forward_head(model.forward_features(x), True), model.forward_features(x).amax((2, 3))
    )
    assert model(x).shape == (2, 5)
    assert model(x).dtype == torch.bfloat16
    assert not any(module.training for module in model.modules())
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5]


@torch.no_grad()
def test_pruning_can_leave_the_head(create: Create) -> None:
    model = create(num_classes=10).eval()
    x = image(64, 96)
    want = model(x)
    last = len(model.feature_info) - 1
    assert model.prune_intermediate_layers(2, prune_head=False) == [last - 1, last]
    assert torch.equal(model(x), want)
    model.prune_intermediate_layers([0], prune_head=False)  # it does not fit any more
    assert model(x).shape == (1, model.feature_info[0]["num_chs"])


@pytest.mark.parametrize("training", [False, True])
def test_hooks_hear_of_every_module(create: Create, training: bool) -> None:
    model = create(num_classes=10, drop_path_rate=0.1, softmax_residual=0.1).train(training)
    called = {name for name, module in model.named_modules() if not isinstance(module, nn.ParameterDict)}
    heard: set[str] = set()
    for name in called:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: heard.add(name))
    with torch.set_grad_enabled(training):
        model(image(64, 96, batch=2))
    assert heard == called


@torch.no_grad()
def test_timm_fuses_it(create: Create) -> None:
    """`timm.models.reparameterize_model` folds every BatchNorm, in a copy, and leaves outputs, hooks and export."""
    model = create(num_classes=10).eval()
    x = image(64, 96, batch=2)
    fused = reparameterize_model(model)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    for ours, want in zip(
        fused.forward_intermediates(x, intermediates_only=True),
        model.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    again = reparameterize_model(fused, inplace=True)
    assert torch.equal(again(x), fused(x))


def test_fx_graph(create: Create) -> None:
    model = create(num_classes=10).eval()
    extract = create_feature_extractor(model, {"stages.1": "stage", "head.hidden": "hidden", "head": "logits"})
    for x in (image(64, 96, batch=2), image(33, 47)):
        nodes = extract(x)
        assert torch.equal(nodes["stage"], model.forward_intermediates(x, [1], intermediates_only=True)[0])
        assert nodes["hidden"].shape == (len(x), model.head_hidden_size)
        assert torch.equal(nodes["logits"], model(x))
    x = image(64, 64, batch=2).double()
    ours = step(extract.double().train(), x, lambda x: extract(x)["logits"])
    assert_same_step(ours, step(create(num_classes=10, dtype=torch.float64).train(), x))


# Head


@pytest.mark.parametrize("training", [False, True])
def test_reset_classifier(create: Create, training: bool) -> None:
    """Device, dtype, mode and pooling stay; the classifier is new."""
    model = create(num_classes=10, global_pool="max").double().train(training)
    features = model.forward_features(image(64, 96, batch=2).double())
    hidden = model.forward_head(features, pre_logits=True)
    old = model.get_classifier()
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.get_classifier() is not old
    assert model.get_classifier().weight.abs().max() > 0
    assert model.forward_head(features).shape == (2, 3)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model.forward_head(features), hidden)
    model.reset_classifier(3, "avg")
    assert model.global_pool == "avg"
    assert not torch.allclose(model.forward_head(features, pre_logits=True), hidden)
    assert {module.training for module in model.modules()} == {training}

    model.requires_grad_(False).to("meta").reset_classifier(7)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["head.fc.weight", "head.fc.bias"]


@torch.no_grad()
def test_no_classes(create: Create) -> None:
    model, headless = create(num_classes=10).eval(), create(num_classes=0).eval()
    x = image(64, 96, batch=2)
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    assert isinstance(headless.get_classifier(), nn.Identity)
    assert headless.state_dict().keys() == model.state_dict().keys() - {"head.fc.weight", "head.fc.bias"}
    assert torch.equal(headless(x), hidden)


@torch.no_grad()
def test_pooling(create: Create) -> None:
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "avg": lambda x: x.mean((2, 3)),
        "max": lambda x: x.amax((2, 3)),
        "avgmax": lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2,
    }
    x = image(64, 96, batch=2)
    changed = create(num_classes=10)
    for name, pool in pools.items():
        model = create(num_classes=10, global_pool=name).eval()
        head = model.head
        pooled = pool(head.in_conv(model.forward_features(x)))
        torch.testing.assert_close(model(x), head.fc(head.act(head.norm(head.hidden(pooled)))))
        changed.reset_classifier(10, name)
        changed.load_state_dict(model.state_dict())
        assert torch.equal(changed.eval()(x), model(x))


def test_pooling_that_widens_is_refused(create: Create) -> None:
    with pytest.raises(ValueError, match="global_pool must keep the number of channels, 'catavgmax' does not"):
        create(global_pool="catavgmax")
    model = create(num_classes=10)
    with pytest.raises(ValueError, match="'catavgmax' does not"):
        model.reset_classifier(7, "catavgmax")
    assert (model.num_classes, model.global_pool) == (10, "avg")
    assert model(image(64, 64, batch=2)).shape == (2, 10)


@torch.no_grad()
def test_no_pooling(create: Create) -> None:
    """Without a classifier the feature map, with one its logits at every position."""
    x = image(96, 64)
    pooled, dense = create(num_classes=7).eval(), create(num_classes=7, global_pool="").eval()
    features = dense.forward_features(x)
    logits = dense(x)
    assert logits.shape == (1, 7, *features.shape[2:])
    torch.testing.assert_close(logits[..., 2, 1], pooled.forward_head(features[..., 2:3, 1:2]))
    dense.reset_classifier(0)
    assert torch.equal(dense(x), features)
    pooled.reset_classifier(0, "")
    assert torch.equal(pooled(x), features)
    assert torch.equal(create(num_classes=0, global_pool="").eval()(x), features)


# Training


@pytest.mark.parametrize("how", ["plain", "dropping", "frozen", "autocast"])
def test_gradient_checkpointing_changes_nothing(create: Create, how: str) -> None:
    """Neither gradients nor statistics, but that stages run twice: dropping the same, and counting the batch once."""
    rate = 0.5 if how == "dropping" else 0.0
    model = create(num_classes=10, drop_rate=rate, drop_path_rate=rate).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if how == "frozen":
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms[: len(norms) // 2]:
            norm.eval().requires_grad_(False)
    runs: list[None] = []
    model.stages[1].register_forward_pre_hook(lambda *_: runs.append(None))
    results = []
    for enable in (False, True):
        model.load_state_dict(state)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            step(model, image(64, 64, batch=2))
            results.append(step(model, image(64, 64, batch=2)))
    assert len(runs) == 2 * (1 + 2)
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name, tensor in checkpointed.items():
        assert torch.equal(tensor, plain[name]), name
    for name, buffer in ((name, value) for name, value in model.named_buffers() if name in state):
        moved = how != "frozen" or model.get_submodule(name.rpartition(".")[0]).training
        assert torch.equal(buffer, state[name]) != moved, name


def test_gradient_checkpointing_of_features_only(create: Create) -> None:
    """By timm's wrapper, which counts a batch twice, as it does for all its models."""
    gradients = []
    for enable in (False, True):
        model = create(features_only=True, dtype=torch.float64).train()
        model.set_grad_checkpointing(enable)
        sum(feature.square().mean() for feature in model(image(64, 64, batch=2).double())).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_same_step(*gradients)


def test_layers_for_learning_rate_decay(create: Create) -> None:
    """A layer is a block, from the stem to the head; coarsely a stage, but for the stem."""
    model = create()
    names = [name for name, _ in model.named_parameters()]
    blocks = [f"stages.{i}.{j}." for i, stage in enumerate(model.stages) for j in range(len(stage))]
    stages = [f"stages.{i}." for i in range(len(model.stages))]
    for coarse, layers in ((False, [*blocks, "head."]), (True, [blocks[0], *stages, "head."])):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert list(groups) == list(range(len(layers)))
        left = list(names)
        for group, prefix in zip(groups.values(), layers, strict=True):
            assert group == [name for name in left if name.startswith(prefix)]
            left = [name for name in left if name not in group]
        assert left == []


def is_decayed(name: str) -> bool:
    """Biases and norms are not, but for the shortcut's norm weight; positional maps and kernel scalars are."""
    return not name.endswith((".bias", "norm.weight")) or name.endswith("shortcut_norm.weight")


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_weight_decay(create: Create, kernel: str) -> None:
    model = create(kernel=kernel)
    exempt = model.no_weight_decay()
    assert exempt == {name for name, _ in model.named_parameters() if not is_decayed(name)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=exempt, weight_decay_exclude_1d=False, layer_decay=0.5
    )
    assert len(names) == sum(len(group["params"]) for group in groups)
    for group in groups:
        assert {is_decayed(names[parameter]) for parameter in group["params"]} == {group["weight_decay"] == 0.05}
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.5**i for i in range(1 + sum(len(stage) for stage in model.stages))}


@pytest.mark.parametrize("name", RELEASED)
def test_the_release_exempts_as_many_from_decay(name: str) -> None:
    model = meta_model(name)
    keys = {key: shape for key, shape in RELEASED[name]["keys"].items() if "running" not in key and "num_b" not in key}
    want = Counter(tuple(shape) for key, shape in keys.items() if "norm" in key or "bias" in key)
    assert Counter(tuple(model.get_parameter(key).shape) for key in model.no_weight_decay()) == want


# Compilers, which are slow: b and l have all that nano has


@pytest.mark.parametrize("create", ["b", "l"], indirect=True)
def test_compiles_to_one_graph_for_all_sizes(create: Create) -> None:
    model, plain = (create(num_classes=10, dtype=torch.float64).train() for _ in range(2))
    torch.compiler.reset()
    graphs: list[None] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(None)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch, *size in ((2, 48, 64), (3, 41, 67), (4, 97, 35)):
        x = image(*size, batch=batch).double()
        assert_same_step(step(model, x, compiled), step(plain, x))
    assert len(graphs) == 1
    torch.compiler.reset()


@recent_compiler
@pytest.mark.parametrize("create", ["nano"], indirect=True)
def test_compiles_with_checkpointing_and_in_evaluation(create: Create) -> None:
    model, plain = (create(num_classes=10, dtype=torch.float64).train() for _ in range(2))
    model.set_grad_checkpointing()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = image(24, 32, batch=2).double()
    assert_same_step(step(model, x, compiled), step(plain, x))
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain.eval()(x))
    torch.compiler.reset()


@recent_compiler
@torch.no_grad()
@pytest.mark.parametrize("create", ["b", "l"], indirect=True)
def test_exports_for_any_batch_and_size(create: Create) -> None:
    """Any that leaves two rows and columns to the last feature map: torch.export takes a side of 1 for a constant."""
    model = create(num_classes=10).eval()
    smallest = model.feature_info[-1]["reduction"] + 1
    side = {"min": smallest, "max": 1024}
    dim = torch.export.Dim
    dims = {0: dim("batch", min=1, max=64), 2: dim("height", **side), 3: dim("width", **side)}
    exported = torch.export.export(model, (image(64, 96, batch=2),), dynamic_shapes={"x": dims}).module()
    for batch, *size in ((1, smallest, 47), (3, 64, 64), (2, 97, 35)):
        x = image(*size, batch=batch)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


# State dict


def state_dict_table(name: str) -> dict[str, dict[str, str]]:
    """Names and shapes by block. Equal blocks in a row are one entry, and so are equally large tensors of a module."""
    blocks: dict[str, dict[tuple[str, str], list[str]]] = {}
    for key, value in meta_model(name).state_dict().items():
        block, module, tensor = re.fullmatch(r"(stages\.\d+\.\d+|head)\.(.+)\.(.+)", key).groups()
        shape = "x".join(map(str, value.shape)) or "scalar"
        blocks.setdefault(block, {}).setdefault((module, shape), []).append(tensor)
    table = {}
    for tensors, (first, *others) in ((t, tuple(same)) for t, same in itertools.groupby(blocks, blocks.__getitem__)):
        label = f"{first} to {others[-1]}" if others else first
        table[label] = {f"{module}.{' '.join(names)}": shape for (module, shape), names in tensors.items()}
    return table


def test_state_dict_keys_are_public() -> None:
    def lines(tables: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[str]:
        return [
            f"{model}: {block}: {tensors}: {shape}"
            for model, blocks in tables.items()
            for block, entries in blocks.items()
            for tensors, shape in entries.items()
        ]

    then = lines(json.loads(KEYS.read_text()))
    now = lines({name: state_dict_table(name) for name in ARCHITECTURES})
    changes = [line for line in difflib.ndiff(then, now) if line.startswith(("- ", "+ "))]
    if changes:
        pytest.fail(
            f"names or shapes in state dicts changed: people's checkpoints no longer load. If that is meant, let "
            f"checkpoint_filter_fn translate the old names, and rewrite {KEYS.name} (python -m {__name__}).\n"
            + "\n".join(changes[:40]),
            pytrace=False,
        )


if __name__ == "__main__":
    KEYS.write_text(json.dumps({name: state_dict_table(name) for name in ARCHITECTURES}, indent=1) + "\n")
