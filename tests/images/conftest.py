"""An image, and places of every kind that it can be put to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import image_places
import pytest
from image_places import Made, Places


@pytest.fixture
def made() -> Made:
    """Return an image with all that an image can have."""
    return image_places.make()


@pytest.fixture
def places(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Places]:
    """Give the places, empty."""
    with image_places.places(tmp_path, request) as found:
        yield found
