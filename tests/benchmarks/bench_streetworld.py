"""Seconds to record a keyframe of the street world on one core: six images, a scan, nine sweeps (median of five)."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from clip2scene.config import StreetworldSettings
from clip2scene.streetworld.record import KEYFRAME_PERIOD_S, Recorder


def main() -> None:
    """Print the median for a scene of the default size."""
    settings = StreetworldSettings()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lidarseg" / "v1.0-trainval").mkdir(parents=True)
        recorder = Recorder(Path(folder), settings, seed=0, number=0, name="scene-0001")
        steps = settings.sweeps_between_keyframes + 1
        seconds = []
        for frame in range(5):
            begin, time_s = time.perf_counter(), frame * KEYFRAME_PERIOD_S
            recorder.record_keyframe(frame, time_s, f"sample{frame}")
            for step in range(1, steps):
                recorder.record_sweep(time_s + step * KEYFRAME_PERIOD_S / steps, f"sample{frame}")
            seconds.append(time.perf_counter() - begin)
    print(f"streetworld: {statistics.median(seconds):.3f} s a frame (allowed 0.5)")


if __name__ == "__main__":
    main()
