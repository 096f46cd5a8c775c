"""What the tests of all readers expect of a damaged dataset."""

from __future__ import annotations

import pytest

from clip2scene.errors import DataError


def refused(message: str) -> pytest.RaisesExc[DataError]:
    """Expects a DataError of one line that matches ``message``."""
    return pytest.raises(DataError, match=rf"\A[^\n]*{message}[^\n]*\Z")
