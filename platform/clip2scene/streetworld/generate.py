"""Write a street world as an official nuScenes dataset: tables, sensor files, lidarseg labels and maps."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from clip2scene.config import StreetworldSettings, digest_of
from clip2scene.errors import DataError
from clip2scene.progress import Advance, uncounted
from clip2scene.storage import locked, writing
from clip2scene.streetworld.tables import TABLES, VERSION, Row, scene_names, shared_rows

MANIFEST = "streetworld.json"
FORMAT = "streetworld-1"
"""Must change whenever the same settings and seed give other bytes."""


def world_digest(settings: StreetworldSettings, seed: int) -> str:
    """Hash of all that determines the bytes of a world (16 hex characters)."""
    return digest_of(FORMAT, settings.model_dump(mode="json", exclude={"seed"}), seed)


def generate(
    root: Path,
    settings: StreetworldSettings,
    seed: int,
    *,
    workers: int = 1,
    advance: Advance = uncounted,
) -> None:
    """Write the world of ``seed`` below ``root`` as version ``v1.0-trainval``, unless it is there already.

    The folder appears complete or not at all; of two runs at once, one waits for the other. The bytes do not depend on
    ``workers`` (processes that record one scene at a time). ``advance`` is called with 1 after each scene.

    Raises:
        DataError: ``root`` holds something else.
        StorageError: the folder cannot be written, or the disk is full.
    """
    root = Path(root)
    digest = world_digest(settings, seed)
    if _is_finished(root, digest):
        return
    with locked(root.parent, f"generates {root.name}", name=f".{root.name}.lock"):
        if _is_finished(root, digest):
            return
        for left in root.parent.glob(f".{root.name}.{'[0-9a-f]' * 8}"):  # of `writing` in a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with writing(root) as aside:
            _write(aside, settings, seed, workers, advance)


def _write(folder: Path, settings: StreetworldSettings, seed: int, workers: int, advance: Advance) -> None:
    (folder / "lidarseg" / VERSION).mkdir(parents=True)
    names = scene_names(settings.train_scenes, settings.val_scenes)
    rows: dict[str, list[Row]] = defaultdict(list, shared_rows())
    for part in _record_all(folder, settings, seed, names, workers):
        for table, more in part.items():
            rows[table] += more
        advance(1)
    (folder / VERSION).mkdir()
    for table in TABLES:
        (folder / VERSION / f"{table}.json").write_text(json.dumps(rows[table], indent=0), encoding="utf-8")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "digest": world_digest(settings, seed),
        "seed": seed,
        "settings": settings.model_dump(mode="json", exclude={"seed"}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _is_finished(root: Path, digest: str) -> bool:
    """Whether the wanted world is there; False for a missing or empty folder, which may be written.

    Raises:
        DataError: the folder holds anything else.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: the street world needs a folder here, and there is a file")
    if not root.exists() or not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8")).get("digest")
    except (OSError, ValueError, AttributeError):
        found = None
    if found == digest:
        return True
    held = "another street world (other settings, seed or format)" if found else "something that is not a street world"
    raise DataError(f"{root}: holds {held}; choose another folder or remove this one")


def _record_all(
    folder: Path, settings: StreetworldSettings, seed: int, names: list[str], workers: int
) -> Iterator[dict[str, list[Row]]]:
    tasks = [(folder, settings, seed, number, name) for number, name in enumerate(names)]
    if workers <= 1:
        yield from map(_record, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_record, tasks)


def _record(task: tuple[Path, StreetworldSettings, int, int, str]) -> dict[str, list[Row]]:
    from clip2scene.streetworld.record import Recorder

    folder, settings, seed, number, name = task
    return Recorder(folder, settings, seed, number, name).run()
