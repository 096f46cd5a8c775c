"""What all attempts at a sweep cost together."""

from __future__ import annotations

import json
import time
from pathlib import Path

from clip2scene.storage import writing


class Counts:
    """Totals in the sweep's folder, which a resumed sweep adds to. An attempt killed while it extracts adds nothing."""

    def __init__(self, folder: Path):
        self._path, self._since_s = folder / "counts.json", time.monotonic()

    def read(self) -> dict[str, float]:
        """Return all totals by name."""
        counts: dict[str, float] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        return counts

    def set(self, **values: float) -> None:
        """Replace totals."""
        with writing(self._path) as aside:
            aside.write_text(json.dumps(self.read() | values), encoding="utf-8")

    def add(self, **more: float) -> None:
        """Add to totals."""
        counts = self.read()
        self.set(**{name: counts.get(name, 0) + value for name, value in more.items()})

    def add_seconds(self) -> None:
        """Add the time since the last call, or since this object was made; called often, a kill loses little."""
        now_s = time.monotonic()
        self.add(seconds=now_s - self._since_s)
        self._since_s = now_s
