"""The variants of the network as data: stages, widths, depths, and published accuracy.

They are EfficientViT's two families under the paper's names: qtvit_1 to qtvit_3 are B1 to B3, qtvit_4 to qtvit_6 are L1
to L3. qtvit_0, which is B0, and qtvit_nano are not in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One resolution level: a block that changes width and resolution, then ``depth`` residual blocks.

    Attributes:
        width: number of output channels.
        depth: number of residual blocks after the first block.
        block: kind of the residual blocks: "ds" DSConv, "pair" ConvPair, "mb" MBConv, "fused" FusedMBConv, "attn"
            attention followed by a local MBConv.
        first: kind of the first block: "conv" is the plain 3×3 stem convolution, "mb" and "fused" as for ``block``.
        stride: stride of the first block; residual blocks have stride 1.
        expand: expansion ratio of the residual (Fused)MBConvs.
        first_expand: expansion ratio of the first block, if that is a (Fused)MBConv.
        fewer_norm: whether the inner convolutions of MBConvs have a bias instead of a norm.
    """

    width: int
    depth: int
    block: Literal["ds", "pair", "mb", "fused", "attn"]
    first: Literal["conv", "mb", "fused"] = "mb"
    stride: int = 2
    expand: int = 4
    first_expand: int = 4
    fewer_norm: bool = False


@dataclass(frozen=True)
class Architecture:
    """Everything that distinguishes one variant from another.

    Attributes:
        stages: from the highest resolution to the lowest.
        head_dim: channels per attention head.
        head_widths: channels of the classifier head's 1×1 convolution and of its hidden linear layer.
        act: name of the activation, as in ``timm.layers``.
        norm_eps: eps of every norm.
        img_size: default image side in px, which sets the size of the positional maps.
        conv_init: initialisation of the convolutions: "trunc_normal" with std 0.02, as in the paper, or "kaiming"
            (normal, fan-in), for narrow networks, whose blocks without inner norms would otherwise start with almost
            zero outputs.
    """

    stages: tuple[Stage, ...]
    head_dim: int
    head_widths: tuple[int, int]
    act: str = "hard_swish"
    norm_eps: float = 1e-5
    img_size: int = 224
    conv_init: Literal["trunc_normal", "kaiming"] = "trunc_normal"


def _family_b(width: Sequence[int], depth: Sequence[int]) -> tuple[Stage, ...]:
    """EfficientViT-B: attention in the last two stages. As in the paper, depths 1 and 2 count the strided MBConv."""
    return (
        Stage(width[0], depth[0], "ds", first="conv"),
        Stage(width[1], depth[1] - 1, "mb"),
        Stage(width[2], depth[2] - 1, "mb"),
        Stage(width[3], depth[3], "attn", fewer_norm=True),
        Stage(width[4], depth[4], "attn", fewer_norm=True),
    )


def _family_l(width: Sequence[int], depth: Sequence[int]) -> tuple[Stage, ...]:
    """EfficientViT-L: dense convolutions in the early stages, attention in the last stage only."""
    return (
        Stage(width[0], depth[0], "pair", first="conv"),
        Stage(width[1], depth[1], "fused", first="fused", first_expand=16),
        Stage(width[2], depth[2], "fused", first="fused", first_expand=16),
        Stage(width[3], depth[3], "mb", first_expand=16, fewer_norm=True),
        Stage(width[4], depth[4], "attn", first_expand=24, expand=6, fewer_norm=True),
    )


_L = partial(Architecture, head_dim=32, act="gelu_tanh", norm_eps=1e-7)

ARCHITECTURES: dict[str, Architecture] = {
    # For images of 32 to 64 px: small strides, so that attention sees 16 x 16 and 8 x 8 tokens at 32 px. (With a single
    # token, every normalised kernel returns v.)
    "qtvit_nano": Architecture(
        (
            Stage(16, 1, "ds", first="conv", stride=1),
            Stage(48, 2, "attn", expand=3, fewer_norm=True),
            Stage(96, 2, "attn", expand=3, fewer_norm=True),
        ),
        head_dim=16,
        head_widths=(128, 128),
        img_size=32,
        conv_init="kaiming",
    ),
    "qtvit_0": Architecture(_family_b((8, 16, 32, 64, 128), (1, 2, 2, 2, 2)), 16, (1024, 1280)),
    "qtvit_1": Architecture(_family_b((16, 32, 64, 128, 256), (1, 2, 3, 3, 4)), 16, (1536, 1600)),
    "qtvit_2": Architecture(_family_b((24, 48, 96, 192, 384), (1, 3, 4, 4, 6)), 32, (2304, 2560)),
    "qtvit_3": Architecture(_family_b((32, 64, 128, 256, 512), (1, 4, 6, 6, 9)), 32, (2304, 2560)),
    "qtvit_4": _L(_family_l((32, 64, 128, 256, 512), (1, 1, 1, 6, 6)), head_widths=(3072, 3200)),
    "qtvit_5": _L(_family_l((32, 64, 128, 256, 512), (1, 2, 2, 8, 8)), head_widths=(3072, 3200)),
    "qtvit_6": _L(_family_l((64, 128, 256, 512, 1024), (1, 2, 2, 8, 8)), head_widths=(6144, 6400)),
}

PUBLISHED_ACCURACY: dict[str, tuple[float, float]] = {
    "qtvit_1": (79.6, 94.7),
    "qtvit_2": (82.5, 95.9),
    "qtvit_3": (83.9, 96.7),
    "qtvit_4": (84.7, 96.7),
    "qtvit_5": (85.2, 97.0),
    "qtvit_6": (86.0, 97.3),
}
"""ImageNet-1k top-1 and top-5 accuracy in percent at 224 px as reported in the paper's Table 1; not reproduced here."""
