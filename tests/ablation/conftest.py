"""The fixtures of the tests of training, which serve here too."""

from tests.training.conftest import _in_a_folder_of_its_own, network, photos, run

__all__ = ["_in_a_folder_of_its_own", "network", "photos", "run"]
