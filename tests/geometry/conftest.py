"""The index of the real keyframe."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip2scene.data.index import Index
from clip2scene.data.nuscenes import build_index


@pytest.fixture(scope="module")
def real_index(real_data: Path) -> Index:
    return build_index(real_data / "nuscenes_keyframe", "v1.0-mini")
