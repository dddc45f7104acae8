"""Photos of three colors, in files."""

from __future__ import annotations

import pytest
from color_photos import COLORS, draw


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Six pictures of each of three colors: (paths, labels)."""
    return draw(tmp_path_factory.mktemp("photos"), dict.fromkeys(COLORS, 6))


@pytest.fixture(scope="session")
def more_photos(tmp_path_factory):
    """Four others of each."""
    return draw(tmp_path_factory.mktemp("more"), dict.fromkeys(COLORS, 4), seed=1)
