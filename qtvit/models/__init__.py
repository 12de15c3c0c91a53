"""The network and its variants; importing this registers them with timm."""

from .qtvit import ARCHITECTURES, PUBLISHED_ACCURACY, Architecture, QTViT, Stage

__all__ = ["ARCHITECTURES", "PUBLISHED_ACCURACY", "Architecture", "QTViT", "Stage"]
