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
        seconds, processor = [], []
        for frame in range(5):
            begin, worked, time_s = time.perf_counter(), time.process_time(), frame * KEYFRAME_PERIOD_S
            recorder.record_keyframe(frame, time_s, f"sample{frame}")
            for step in range(1, steps):
                recorder.record_sweep(time_s + step * KEYFRAME_PERIOD_S / steps, f"sample{frame}")
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - worked)
    middle, busy = statistics.median(seconds), statistics.median(processor)
    print(f"streetworld: {middle:.3f} s a frame, {busy:.3f} s of processor time (allowed 0.5 on a free core)")


if __name__ == "__main__":
    main()
