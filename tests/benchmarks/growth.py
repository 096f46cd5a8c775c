"""How time, memory and bytes grow with the number of keyframes: synthetic nuScenes tables at sizes ten times apart.

    python tests/benchmarks/growth.py [--keyframes 280 2800 28000] [--json FILE]

``make bench BENCH=full`` runs it too. Three parts, each in a process of its own, so that its peak memory is its own:

- ``tables``: nuscenes-devkit reads tables in the official format, and the index is built from them;
- ``index``: the Parquet file of an index is read, as every worker's driver does, and sent to a worker;
- ``store``: a few frames of features are written and read, and as many empty files listed as there are keyframes.

Seconds are of the processor, so that they say something on a busy machine too. Every row ends with seconds, bytes and
memory per keyframe; where these grow from row to row, it is no longer linear, and the last lines say which do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (280, 2800, 28000)
KEYFRAMES_PER_SCENE = 40
SWEEPS = 10
GRID, DIM = (14, 26), 512
"""Of ViT-B/16 at 224 x 416 pixels."""
STORED_FRAMES = 8
_LINEAR_WITHIN = 1.3
_CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
_PARTS = ("tables", "index", "store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keyframes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a part and its size, in this process
    options = parser.parse_args(arguments)
    if options.one:
        part, count = options.one
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(_measures()[part](int(count), Path(folder))))
        return 0
    rows = []
    for row in measure(options.keyframes, options.parts):
        rows.append(row)
        print(_line(row), flush=True)
    for sentence in bends(rows):
        print(sentence)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


def measure(keyframes: Sequence[int] = SIZES, parts: Sequence[str] = _PARTS) -> Iterator[dict[str, Any]]:
    """A row a part and size, each measured in a process of its own."""
    for part in parts:
        for count in keyframes:
            command = [sys.executable, __file__, "--one", part, str(count)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            yield {"part": part, "keyframes": count, **json.loads(done.stdout.splitlines()[-1])}


def _line(row: dict[str, Any]) -> str:
    values = [f"{key} {value:,.6g}" for key, value in row.items() if key not in ("part", "keyframes")]
    return f"{row['part']:7}{row['keyframes']:>7,} keyframes: {', '.join(values)}"


def bends(rows: list[dict[str, Any]]) -> list[str]:
    """What grows faster than the keyframes do, between one size and the next."""
    sentences = []
    for part in dict.fromkeys(row["part"] for row in rows):
        ours = [row for row in rows if row["part"] == part]
        for key in [key for key in ours[0] if key.endswith("_per_keyframe")]:
            for small, large in itertools.pairwise(ours):
                if large[key] > _LINEAR_WITHIN * small[key]:
                    sentences.append(
                        f"{part}: {key} grows from {small[key]:.3g} to {large[key]:.3g} between "
                        f"{small['keyframes']:,} and {large['keyframes']:,} keyframes: faster than linear"
                    )
    return sentences or ["nothing grows faster than the keyframes do"]


def _measures() -> dict[str, Callable[[int, Path], dict[str, float]]]:
    return {"tables": _tables, "index": _index, "store": _store}


def _tables(count: int, root: Path) -> dict[str, float]:
    """nuscenes-devkit and the index on top of it."""
    import nuscenes.nuscenes  # noqa: F401 (its import is no part of the time)

    from clip2scene.data.index import write_index
    from clip2scene.data.nuscenes import build_index

    write_tables(root, count)
    before = _peak_bytes()
    started = time.process_time()
    index = build_index(root, "v1.0-trainval", max_sweeps=SWEEPS)
    built_s = time.process_time() - started
    memory = _peak_bytes() - before
    started = time.process_time()
    write_index(index, root / "index.parquet")
    written_s = time.process_time() - started
    size = (root / "index.parquet").stat().st_size
    return {
        "build_seconds": built_s,
        "write_seconds": written_s,
        "seconds_per_keyframe": (built_s + written_s) / count,
        "memory_bytes_per_keyframe": memory / count,
        "parquet_bytes_per_keyframe": size / count,
    }


def _index(count: int, folder: Path) -> dict[str, float]:
    """An index on disk, read back and sent."""
    path = folder / "index.parquet"
    # In a process of its own: the peak of this one is to be the reader's.
    code = "import sys, growth; from pathlib import Path; growth.keep_index(int(sys.argv[1]), Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, str(count), str(path)], check=True, cwd=Path(__file__).parent)
    from clip2scene.data.index import read_index

    keep_index(1, folder / "one.parquet")
    read_index(folder / "one.parquet")  # what is imported at the first call is no part of the time
    before = _peak_bytes()
    started = time.process_time()
    index = read_index(path)
    read_s = time.process_time() - started
    read_bytes = _peak_bytes() - before
    started = time.process_time()
    sent = pickle.dumps(index.frames)
    received = pickle.loads(sent)
    sent_s = time.process_time() - started
    assert len(received) == count
    return {
        "read_seconds": read_s,
        "read_seconds_per_keyframe": read_s / count,
        "read_memory_bytes_per_keyframe": read_bytes / count,
        "send_seconds_per_keyframe": sent_s / count,
        "sent_bytes_per_keyframe": len(sent) / count,
        "worker_memory_bytes_per_keyframe": _bytes_of_copy(sent) / count,
    }


def _bytes_of_copy(sent: bytes) -> int:
    """Bytes that the unpickled frames hold."""
    import tracemalloc

    tracemalloc.start()
    copy = pickle.loads(sent)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del copy
    return held


def _store(count: int, folder: Path) -> dict[str, float]:
    """Frames of the feature store."""
    from clip2scene.storage import Storage
    from clip2scene.teacher import store

    storage, rng = Storage(folder), np.random.default_rng(0)
    features = {name: rng.standard_normal((*GRID, DIM)).astype(np.float16) for name in _CAMERAS}
    started = time.process_time()
    for number in range(STORED_FRAMES):
        store.write_frame(folder, f"{number:032x}", features, {}, "0" * 16, storage)
    write_s = (time.process_time() - started) / STORED_FRAMES
    size = store.frame_file(folder, f"{0:032x}").stat().st_size
    started = time.process_time()
    for number in range(STORED_FRAMES):
        store.read_entry(folder, f"{number:032x}", storage)
    entry_s = (time.process_time() - started) / STORED_FRAMES
    for number in range(STORED_FRAMES, count):
        store.frame_file(folder, f"{number:032x}").touch()
    started = time.process_time()
    listed = store.stored_frames(folder, storage)
    list_s = time.process_time() - started
    assert len(listed) == max(count, STORED_FRAMES)
    return {
        "bytes_per_keyframe": size,
        "write_seconds_per_keyframe": write_s,
        "check_seconds_per_keyframe": entry_s,
        "list_seconds_per_keyframe": list_s / count,
        "store_gigabytes": size * count / 1e9,
    }


def keep_index(count: int, path: Path) -> None:
    """Write a synthetic index of ``count`` keyframes, with nuScenes' lengths of names and random poses."""
    from clip2scene.data.dataroot import DataRoot
    from clip2scene.data.index import Camera, Frame, Index, Sweep, write_index

    rng = np.random.default_rng(0)

    def pose() -> np.ndarray:
        return np.vstack((rng.standard_normal((3, 4)), [0, 0, 0, 1]))

    def name(channel: str, folder: str, stamp: int, suffix: str) -> str:
        return f"{folder}/{channel}/n015-2018-07-24-11-22-45+0800__{channel}__{stamp}{suffix}"

    frames = []
    for number in range(count):
        stamp = 1_532_402_927_000_000 + 500_000 * number
        stamps = [stamp - 50_000 * step for step in range(1, SWEEPS + 1)]
        frames.append(
            Frame(
                frame_id=f"{number:032x}",
                scene=f"scene-{number // KEYFRAMES_PER_SCENE:04d}",
                timestamp_us=stamp,
                cloud_path=name("LIDAR_TOP", "samples", stamp, ".pcd.bin"),
                world_from_lidar=pose(),
                sweeps=tuple(Sweep(name("LIDAR_TOP", "sweeps", s, ".pcd.bin"), pose(), s) for s in stamps),
                cameras=tuple(
                    Camera(c, name(c, "samples", stamp, ".jpg"), 1600, 900, rng.standard_normal((3, 3)), pose(), stamp)
                    for c in _CAMERAS
                ),
                label_path=f"lidarseg/v1.0-trainval/{number:032x}_lidarseg.bin",
            )
        )
    write_index(Index("nuscenes", DataRoot(path.parent), "v1.0-trainval", tuple(frames)), path)


def write_tables(root: Path, count: int) -> None:
    """Tables of ``count`` keyframes in the official format, with the (empty) files that they name."""
    from clip2scene.streetworld import tables
    from clip2scene.streetworld.sensors import LIDAR

    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in tables.TABLES} | tables.shared_rows()
    for folder in ("samples", "sweeps"):
        for channel in (LIDAR, *_CAMERAS):
            (root / folder / channel).mkdir(parents=True)
    (root / "maps").mkdir()
    (root / "maps" / "map.png").write_bytes(b"")
    rows["map"] = [{"token": "m", "log_tokens": ["l"], "category": "semantic_prior", "filename": "maps/map.png"}]
    rows["log"] = [{"token": "l", "logfile": "n", "vehicle": "n", "date_captured": "2018-07-24", "location": "none"}]
    for channel in (LIDAR, *_CAMERAS):
        intrinsics = [] if channel == LIDAR else [[1000.0, 0.0, 800.0], [0.0, 1000.0, 450.0], [0.0, 0.0, 1.0]]
        sensor = {"token": f"c{channel}", "sensor_token": tables.sensor_token(channel), "camera_intrinsic": intrinsics}
        rows["calibrated_sensor"].append(sensor | {"translation": [0.0, 0.0, 1.0], "rotation": [1.0, 0.0, 0.0, 0.0]})

    def measure(sample: str, channel: str, stamp: int, *, key: bool) -> dict[str, Any]:
        token = tables.token(channel, stamp)
        suffix = ".pcd.bin" if channel == LIDAR else ".jpg"
        path = f"{'samples' if key else 'sweeps'}/{channel}/n015-2018-07-24-11-22-45+0800__{channel}__{stamp}{suffix}"
        (root / path).touch()
        turn = rng.standard_normal(4)
        rotation = (turn / np.linalg.norm(turn)).tolist()
        translation = rng.standard_normal(3).tolist()
        rows["ego_pose"].append({"token": token, "timestamp": stamp, "rotation": rotation, "translation": translation})
        return {
            "token": token,
            "sample_token": sample,
            "ego_pose_token": token,
            "calibrated_sensor_token": f"c{channel}",
            "timestamp": stamp,
            "fileformat": "pcd" if channel == LIDAR else "jpg",
            "is_key_frame": key,
            "height": 0 if channel == LIDAR else 900,
            "width": 0 if channel == LIDAR else 1600,
            "filename": path,
            "prev": "",
            "next": "",
        }

    for first in range(0, count, KEYFRAMES_PER_SCENE):
        chains: dict[str, list[dict[str, Any]]] = {channel: [] for channel in (LIDAR, *_CAMERAS)}
        samples = []
        scene = f"scene-{first // KEYFRAMES_PER_SCENE:04d}"
        for number in range(first, min(first + KEYFRAMES_PER_SCENE, count)):
            sample, stamp = tables.token("sample", number), 1_532_402_927_000_000 + 500_000 * number
            samples.append({"token": sample, "timestamp": stamp, "prev": "", "next": "", "scene_token": scene})
            for step in range(SWEEPS - 1, 0, -1):
                chains[LIDAR].append(measure(sample, LIDAR, stamp - 50_000 * step, key=False))
            for channel in chains:
                chains[channel].append(measure(sample, channel, stamp, key=True))
        for chain in (samples, *chains.values()):
            tables.link(chain)
        rows["sample"] += samples
        for chain in chains.values():
            rows["sample_data"] += chain
        about = {"token": scene, "log_token": "l", "nbr_samples": len(samples), "name": scene, "description": ""}
        ends = {"first_sample_token": samples[0]["token"], "last_sample_token": samples[-1]["token"]}
        rows["scene"].append(about | ends)
    del rows["lidarseg"]
    (root / "v1.0-trainval").mkdir()
    for name, records in rows.items():
        (root / "v1.0-trainval" / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")


def _peak_bytes() -> int:
    # Not getrusage's: a child inherits the peak of who started it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


if __name__ == "__main__":
    sys.exit(main())
