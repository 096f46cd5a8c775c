"""The index of the real keyframe, and of the street world."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip2scene.data.index import Index
from clip2scene.data.nuscenes import build_index


@pytest.fixture(scope="module")
def real_index(real_data: Path) -> Index:
    return build_index(real_data / "nuscenes_keyframe", "v1.0-mini")


@pytest.fixture(scope="module")
def street_index(streetworld_root: tuple[Path, str]) -> Index:
    return build_index(*streetworld_root)
