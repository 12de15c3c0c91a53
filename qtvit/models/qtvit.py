"""QT-ViT: EfficientViT's architecture with quadratic-Taylor linear attention.

"QT-ViT: Improving Linear Attention in ViT with Quadratic Taylor Expansion", Xu et al., NeurIPS 2024; the macro
design is that of "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", Cai et al., ICCV
2023.

Shapes: B batch, C channels, H x W image or feature map. The network takes any H x W, square or not.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead as PoolHead
from timm.layers import SelectAdaptivePool2d, create_act_layer, register_notrace_module, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from qtvit.layers import (
    ConvNormAct,
    ConvPair,
    DropPath,
    DSConv,
    FusedMBConv,
    MBConv,
    MultiScaleAttention,
    Residual,
    recompute,
)

from .architectures import ARCHITECTURES, Architecture, Stage
from .foreign import fit_weights, kernel_mismatch

# The attention op branches on shapes, dtypes and devices, which torch.fx cannot trace; as a leaf module, the layer can
# stay in a traced graph.
register_notrace_module(MultiScaleAttention)


class AttentionBlock(nn.Module):
    """Attention for global context, then an MBConv for local detail; both residual, without pre-norm."""

    def __init__(
        self, attn: nn.Module, local: nn.Module, attn_drop_path: nn.Module, local_drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.attn = attn
        self.attn_drop_path = attn_drop_path
        self.local = local
        self.local_drop_path = local_drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_drop_path(self.attn(x))
        x = x + self.local_drop_path(self.local(x))
        return x


@torch.no_grad()
def _init_weights(module: nn.Module, conv_init: str = "trunc_normal") -> None:
    """Initialise a convolution or linear layer; other modules keep PyTorch's initial values."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        if isinstance(module, nn.Conv2d) and conv_init == "kaiming":
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ClassifierHead(nn.Module):
    """1×1 convolution, global pool, hidden linear layer, classifier: (B, C, H, W) -> (B, num_classes).

    Without a pool (``global_pool=""``), every position is classified: (B, num_classes, H, W). With neither pool nor
    classifier, the feature map is returned unchanged.
    """

    def __init__(
        self,
        in_chans: int,
        widths: tuple[int, int],
        num_classes: int,
        *,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        act: str = "hard_swish",
    ) -> None:
        super().__init__()
        self.in_conv = ConvNormAct(in_chans, widths[0], 1, norm_eps=norm_eps, act=act)
        self.hidden = nn.Linear(widths[0], widths[1], bias=False)
        self.norm = nn.LayerNorm(widths[1], eps=norm_eps)
        self.act = create_act_layer(act, inplace=False)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier by one of ``num_classes`` outputs (0: none), and optionally the pooling ("": none).

        Raises:
            ValueError: the pooling changes the number of channels, as "catavgmax" does.
        """
        if pool_type is not None:
            pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
            if pool.feat_mult() != 1:
                raise ValueError(f"global_pool must keep the number of channels, {pool_type!r} does not")
            self.global_pool = pool.train(self.training)
        self.num_classes = num_classes
        weight = self.hidden.weight
        fc = nn.Linear(len(weight), num_classes) if num_classes > 0 else nn.Identity()
        self.fc = fc.apply(_init_weights).to(weight.device, weight.dtype).train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = bool(self.global_pool.pool_type)
        if not pooled and self.num_classes == 0:
            return x
        x = self.global_pool(self.in_conv(x))
        x = x if pooled else x.movedim(1, -1)
        x = self.act(self.norm(self.hidden(x)))
        x = x if pre_logits else self.fc(self.drop(x))
        return x if pooled else x.movedim(-1, 1)


class QTViT(nn.Module):
    """The QT-ViT backbone and classifier, (B, in_chans, H, W) -> (B, num_classes), under timm's model contract.

    Args:
        cfg: the architecture.
        img_size: (H, W), or one side, that sets the size of the positional maps; None: the architecture's. Images of
            other sizes work too, as the maps are resized.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 leaves it out.
        global_pool: pooling of the head, "avg", "max" or "avgmax"; "" for none, see `ClassifierHead`.
        kernel: attention kernel, a name in ``qtvit.ops.KERNELS``.
        ape, shortcut, attn_eps, softmax_residual: parts of the attention, see `qtvit.layers.MultiScaleAttention`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last residual unit, in [0, 1); unit i of n, counted from 0, has
            ``drop_path_rate * (i + 1) / n``. An attention block is two units; family B's stem blocks are not counted.
        drop_path_skip: number of first units that are never dropped and do not count in n. (The paper's table says
            blocks; at the start of family L, where the recipe uses it, every block is one unit.)
        device, dtype: of the parameters, as for any ``torch.nn`` module.

    Raises:
        ValueError: the kernel is unknown, the pooling changes the number of channels, or a drop path argument is out of
            range.
    """

    def __init__(
        self,
        cfg: Architecture,
        *,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        kernel: str = "taylor2",
        ape: bool = True,
        shortcut: bool = True,
        attn_eps: float | None = None,
        softmax_residual: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_skip: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.img_size: tuple[int, int] = to_2tuple(cfg.img_size if img_size is None else img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.kernel = kernel
        self.grad_checkpointing = False

        attention: dict[str, Any] = {
            "head_dim": cfg.head_dim,
            "kernel": kernel,
            "ape": ape,
            "shortcut": shortcut,
            "attn_eps": attn_eps,
            "softmax_residual": softmax_residual,
        }
        drop_paths = _drop_paths(cfg.stages, drop_path_rate, drop_path_skip)
        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        chans, reduction = in_chans, 1
        for i, stage in enumerate(cfg.stages):
            reduction *= stage.stride
            map_size = (-(-self.img_size[0] // reduction), -(-self.img_size[1] // reduction))
            attention["map_size"] = map_size
            blocks = [_residual_block(stage, cfg, attention, drop_paths) for _ in range(stage.depth)]
            self.stages.append(nn.Sequential(_first_block(stage, chans, cfg), *blocks))
            chans = stage.width
            self.feature_info.append({"num_chs": chans, "reduction": reduction, "module": f"stages.{i}"})

        self.num_features = chans
        self.head_hidden_size = cfg.head_widths[1]
        self.head: ClassifierHead | PoolHead = ClassifierHead(
            chans,
            cfg.head_widths,
            num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_eps=cfg.norm_eps,
            act=cfg.act,
        )
        self.init_weights()
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights for training from scratch.

        ``cfg.conv_init`` for convolutions, truncated normal with std 0.02 for linear layers, biases 0. The weight of
        the last norm of each residual branch is 0, so that every residual block starts as the identity.
        """
        self.apply(partial(_init_weights, conv_init=self.cfg.conv_init))
        for name, module in self.named_modules():
            if isinstance(module, DropPath):
                module.init_non_persistent_buffers()
            if name.endswith((".main", ".attn", ".local")):  # the residual branches
                last_norm = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)][-1]
                nn.init.zeros_(last_norm.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, ceil(H / reduction), ceil(W / reduction))."""
        if self.grad_checkpointing and self.training:
            for stage in self.stages:
                x = recompute(stage, x)
        else:
            x = self.stages(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits; with ``pre_logits``, the input of the last linear layer, (B, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of the stages chosen by ``indices``, after timm's convention.

        Args:
            x: (B, in_chans, H, W).
            indices: the stages; None: all, an int: the last so many.
            norm: accepted for timm's interface; stages end in a norm already, so it changes nothing.
            stop_early: do not run the stages after the last chosen one.
            output_fmt: only "NCHW".
            intermediates_only: return the list of feature maps alone, without the final features.

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = recompute(stage, x) if self.grad_checkpointing and self.training else stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages that `forward_intermediates` with ``indices`` does not need, and the head.

        The remaining network pools its last feature map; `reset_classifier` adds a linear classifier after the pool.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if prune_head or max_index + 1 < len(self.stages):
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
            self.num_classes = 0
            drop_rate = self.head.drop.p
            self.head = PoolHead(self.num_features, 0, self.global_pool, drop_rate).train(self.training)
        del self.stages[max_index + 1 :]
        return take_indices

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialised one, and optionally the pooling."""
        self.head.reset(num_classes, global_pool)
        if isinstance(self.head, PoolHead):  # timm's head has no other parameters to take device and dtype from
            weight = next(self.parameters())
            self.head.to(weight.device, weight.dtype).train(self.training)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay in the paper's recipe: biases, and norm weights except the shortcuts'.

        The recipe exempts parameters with "norm" or "bias" in their name, and the authors' code calls the shortcut's
        norm "bn". So the weights of the shortcuts' norms, the kernels' scalars and the positional maps are decayed.
        """
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if re.search(r"\.bias$|(?<!\.shortcut_)norm\.weight$", name)}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]
        return {"stem": r"^stages\.0\.0\.", "blocks": blocks}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module, but weights may have any of the names that `qtvit.models.foreign.fit_weights` knows.

        Raises:
            RuntimeError: the weights do not fit; if ``strict``, the message says whether they are of another kernel.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if strict and (mismatch := kernel_mismatch(state_dict, self.kernel)):
                raise RuntimeError(mismatch) from error
            raise

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Fit the weights under ``prefix`` to this model; called by ``load_state_dict`` of this or an outer module."""
        given = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        weights = fit_weights(
            {key.removeprefix(prefix): value for key, value in given.items()}, self.state_dict(), self.cfg, self.kernel
        )
        state_dict.update({prefix + key: value for key, value in weights.items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _drop_paths(stages: Sequence[Stage], rate: float, skip: int) -> Iterator[nn.Module]:
    """One drop-path module per residual unit, in order; the recipe does not count the DSConv blocks of B's stem."""
    num_units = sum((2 if s.block == "attn" else 1) * s.depth for s in stages if s.block != "ds")
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must be at least 0 and less than 1, got {rate}")
    last = max(num_units - 1, 0)
    if skip not in range(last + 1):
        raise ValueError(f"drop_path_skip must be a whole number from 0 to {last}, got {skip}")
    rates = [rate * max(i + 1 - skip, 0) / (num_units - skip) for i in range(num_units)]
    return (DropPath(rate) if rate else nn.Identity() for rate in rates)


def _first_block(stage: Stage, in_chans: int, cfg: Architecture) -> nn.Module:
    common: dict[str, Any] = {"stride": stage.stride, "norm_eps": cfg.norm_eps, "act": cfg.act}
    match stage.first:
        case "conv":
            return ConvNormAct(in_chans, stage.width, 3, **common)
        case "mb":
            return MBConv(in_chans, stage.width, expand=stage.first_expand, fewer_norm=stage.fewer_norm, **common)
        case "fused":
            return FusedMBConv(in_chans, stage.width, expand=stage.first_expand, **common)


def _residual_block(
    stage: Stage, cfg: Architecture, attention: dict[str, Any], drop_paths: Iterator[nn.Module]
) -> nn.Module:
    width = stage.width
    common: dict[str, Any] = {"norm_eps": cfg.norm_eps, "act": cfg.act}
    match stage.block:
        case "ds":
            return Residual(DSConv(width, width, **common), nn.Identity())  # no stochastic depth in family B's stem
        case "pair":
            return Residual(ConvPair(width, width, **common), next(drop_paths))
        case "mb":
            mbconv = MBConv(width, width, expand=stage.expand, fewer_norm=stage.fewer_norm, **common)
            return Residual(mbconv, next(drop_paths))
        case "fused":
            return Residual(FusedMBConv(width, width, expand=stage.expand, **common), next(drop_paths))
        case "attn":
            attn = MultiScaleAttention(width, norm_eps=cfg.norm_eps, **attention)
            local = MBConv(width, width, expand=stage.expand, fewer_norm=stage.fewer_norm, **common)
            return AttentionBlock(attn, local, next(drop_paths), next(drop_paths))


SHIPPED_WEIGHTS = Path(__file__).parent.parent / "weights"
"""Folder of the model files that come with the package; `qtvit.checkpoints.load_model` accepts their names."""


def _cfg(
    side: int = 224, stride: int = 32, num_classes: int = 1000, crop_pct: float = 1.0, file: str | None = None
) -> dict[str, Any]:
    return {
        "url": "",
        "file": file,
        "num_classes": num_classes,
        "input_size": (3, side, side),
        "pool_size": (side // stride, side // stride),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.0.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "qtvit_nano.cifar10": _cfg(32, 4, num_classes=10, file=str(SHIPPED_WEIGHTS / "nano-cifar10.safetensors")),
        "qtvit_0": _cfg(crop_pct=0.95),
        "qtvit_1": _cfg(crop_pct=0.95),
        **{f"qtvit_{i}": _cfg() for i in range(2, 7)},
    }
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: QTViT) -> dict[str, Tensor]:
    """Fit a downloaded checkpoint, or its ``state_dict`` entry, to ``model``; timm's filter for pretrained weights."""
    return fit_weights(state_dict.get("state_dict", state_dict), model.state_dict(), model.cfg, model.kernel)


def _create_qtvit(variant: str, pretrained: bool, **kwargs: Any) -> QTViT:
    cfg = ARCHITECTURES[variant]
    if pretrained:
        weights = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not (weights.has_weights or weights.state_dict):
            raise ValueError(
                f"no weights of {variant} can be downloaded; `qtvit convert` makes a model file from the authors' "
                f"checkpoint, for checkpoint_path="
            )
    return build_model_with_cfg(
        QTViT,
        variant,
        pretrained,
        model_cfg=cfg,
        feature_cfg={"out_indices": tuple(range(len(cfg.stages))), "flatten_sequential": True},
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


@register_model
def qtvit_nano(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """The smallest variant, for images of 32 to 64 px; not in the paper. Its weights are trained on CIFAR-10."""
    return _create_qtvit("qtvit_nano", pretrained, **kwargs)


@register_model
def qtvit_0(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """A variant of the size of EfficientViT-B0; not in the paper."""
    return _create_qtvit("qtvit_0", pretrained, **kwargs)


@register_model
def qtvit_1(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """QT-ViT-1, of the size of EfficientViT-B1."""
    return _create_qtvit("qtvit_1", pretrained, **kwargs)


@register_model
def qtvit_2(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """QT-ViT-2, of the size of EfficientViT-B2."""
    return _create_qtvit("qtvit_2", pretrained, **kwargs)


@register_model
def qtvit_3(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """QT-ViT-3, of the size of EfficientViT-B3."""
    return _create_qtvit("qtvit_3", pretrained, **kwargs)


@register_model
def qtvit_4(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """QT-ViT-4, of the size of EfficientViT-L1."""
    return _create_qtvit("qtvit_4", pretrained, **kwargs)


@register_model
def qtvit_5(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """QT-ViT-5, of the size of EfficientViT-L2."""
    return _create_qtvit("qtvit_5", pretrained, **kwargs)


@register_model
def qtvit_6(pretrained: bool = False, **kwargs: Any) -> QTViT:
    """QT-ViT-6, of the size of EfficientViT-L3."""
    return _create_qtvit("qtvit_6", pretrained, **kwargs)
