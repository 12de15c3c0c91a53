"""The shrunken network of the tests of deployment, which serves here too."""

from tests.deploy.conftest import tiny

__all__ = ["tiny"]
