"""What attention looks at: exact rows of its weights, and how focused they are.

``qtvit.explain.draw`` makes pictures of them; it needs matplotlib, which the ``train`` extra installs.
"""

from .entropy import Focus, sharpness
from .view import Attention, View, attention, focus, look

__all__ = ["Attention", "Focus", "View", "attention", "focus", "look", "sharpness"]
