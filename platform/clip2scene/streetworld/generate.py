"""Write a street world as an official nuScenes dataset: tables, sensor files, lidarseg labels and maps."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from clip2scene.config import StreetworldSettings, digest_of
from clip2scene.data.index import DataError
from clip2scene.streetworld.tables import TABLES, VERSION, Row, scene_names, shared_rows

MANIFEST = "streetworld.json"
FORMAT = "streetworld-1"
"""Changes whenever the same settings and seed would give other bytes."""


def world_digest(settings: StreetworldSettings, seed: int) -> str:
    """What determines every byte of a world (16 hex characters)."""
    return digest_of(FORMAT, settings.model_dump(mode="json", exclude={"seed"}), seed)


def generate(
    root: Path,
    settings: StreetworldSettings,
    seed: int,
    *,
    workers: int = 1,
    progress: Callable[..., None] | None = None,
) -> None:
    """Write the world of ``seed`` below ``root`` as version ``v1.0-trainval``; nothing is done where it exists already.

    The folder appears complete or not at all. The bytes do not depend on ``workers`` (processes, each with whole
    scenes). ``progress`` is called with the number of scenes finished since its last call.

    Raises:
        DataError: ``root`` holds something else.
    """
    root = Path(root)
    digest = world_digest(settings, seed)
    if _is_finished(root, digest):
        return
    aside = root.with_name(f".{root.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "lidarseg" / VERSION).mkdir(parents=True)
    try:
        names = scene_names(settings.train_scenes, settings.val_scenes)
        rows: dict[str, list[Row]] = defaultdict(list, shared_rows())
        for part in _record_all(aside, settings, seed, names, workers):
            for table, more in part.items():
                rows[table] += more
            if progress is not None:
                progress(1)
        (aside / VERSION).mkdir()
        for table in TABLES:
            (aside / VERSION / f"{table}.json").write_text(json.dumps(rows[table], indent=0), encoding="utf-8")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "digest": digest,
            "seed": seed,
            "settings": settings.model_dump(mode="json", exclude={"seed"}),
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if root.is_dir():
            root.rmdir()
        aside.replace(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_finished(root: Path, digest: str) -> bool:
    """Whether the wanted world is there; an empty or missing folder is free to be written.

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


def _record_all(folder: Path, settings: StreetworldSettings, seed: int, names: list[str], workers: int) -> Any:
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
