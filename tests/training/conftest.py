"""What tests of runs on preferences share."""

import pytest

from tests.training.pairs import write_pairs


@pytest.fixture
def pair_folder(tmp_path):
    """A folder with a small model in `base` and 40 pairs in `pairs`."""
    write_pairs(tmp_path)
    return tmp_path
