"""Bringing models to other runtimes."""

from .common import Commands


def add_deploy(commands: Commands) -> None:
    """Add the commands that deploy a model."""
