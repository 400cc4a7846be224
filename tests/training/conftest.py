"""What tests of whole runs share."""

import pytest


@pytest.fixture
def text(tmp_path):
    """A folder of ten small documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "all work and no play makes a dull model. " * (i + 2))
    return folder
