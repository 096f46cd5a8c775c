"""Finds what is wrong with nuScenes tables that nuscenes-devkit cannot load, and tells it in one sentence.

The devkit trusts its input: a missing table or a dangling token ends in a traceback that names neither file nor record.
The tables are read a second time only after such a failure, so that a sound dataset is parsed once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clip2scene.data.dataroot import DataRoot, DatasetFiles
from clip2scene.errors import DataError

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
"""Tables that every version has; ``lidarseg`` is read if it exists."""

_REFERENCES = (
    ("calibrated_sensor", "sensor_token", "sensor"),
    ("instance", "category_token", "category"),
    ("sample", "scene_token", "scene"),
    ("sample_annotation", "instance_token", "instance"),
    ("sample_annotation", "sample_token", "sample"),
    ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
    ("sample_data", "ego_pose_token", "ego_pose"),
    ("sample_data", "sample_token", "sample"),
    ("scene", "log_token", "log"),
)
"""(table, field, table that the field refers to), as in the devkit's reverse index."""

Tables = dict[str, list[dict[str, Any]]]


def check_tables(root: Path, version: str) -> None:
    """Refuse a dataset that lacks a table, before the devkit loads it.

    Raises:
        DataError: the root, the folder of tables or a table is missing.
    """
    folder = root / version
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; the dataset's root is needed")
    if version in ("", "..") or Path(version).name != version or not folder.is_dir():
        present = sorted(path.parent.name for path in root.glob("*/sample.json"))
        raise DataError(f"{root}: no folder of tables {version!r}; allowed here: {', '.join(present) or 'none'}")
    for table in TABLES:
        if not (folder / f"{table}.json").is_file():
            raise DataError(f"{folder / table}.json: missing table; {version} needs {', '.join(TABLES)}")


def explain(root: DataRoot, version: str) -> None:
    """Look for the reason why the devkit failed; returns if none is found.

    Raises:
        DataError: the reason, with the table and the record.
    """
    tables = {table: _read(root.path / version / f"{table}.json") for table in TABLES}
    if (root.path / version / "lidarseg.json").exists():
        tables["lidarseg"] = _read(root.path / version / "lidarseg.json")
        _explain_lidarseg(root, version, tables)
    tokens = {table: {record["token"] for record in records} for table, records in tables.items()}
    for table, field, target in _REFERENCES:
        for record in tables[table]:
            if field not in record:
                raise DataError(f"{table}.json: record {record['token']!r} has no field {field!r}")
            if not isinstance(record[field], str) or record[field] not in tokens[target]:
                raise DataError(
                    f"{table}.json: record {record['token']!r} names {target} {record[field]!r}, "
                    f"which {target}.json does not hold"
                )
    _explain_maps(root, tables)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot read the table ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and isinstance(record.get("token"), str) for record in records
    ):
        raise DataError(f"{path}: not a table; a list of records, each with a token, is needed")
    return records


def _explain_lidarseg(root: DataRoot, version: str, tables: Tables) -> None:
    if any("index" not in record for record in tables["category"]):
        raise DataError(
            f"{root.path / version}/category.json: a category has no index; the file that comes with lidarseg is needed"
        )
    files = DatasetFiles(root)
    for record in tables["lidarseg"]:
        files.existing(record.get("filename"), f"lidarseg.json: record {record['token']!r}")
    folder = root.path / "lidarseg" / version
    found = sum(path.suffix in (".bin", ".npz") for path in folder.iterdir()) if folder.is_dir() else 0
    if found != len(tables["lidarseg"]):
        raise DataError(
            f"{folder}: {found} label files for {len(tables['lidarseg'])} records of lidarseg.json; one each is needed"
        )


def _explain_maps(root: DataRoot, tables: Tables) -> None:
    if not tables["map"]:
        raise DataError("map.json: no record; nuscenes-devkit needs at least one map")
    files = DatasetFiles(root)
    for record in tables["map"]:
        files.existing(record.get("filename"), f"map.json: record {record['token']!r}")
    mapped = {token for record in tables["map"] for token in record.get("log_tokens") or []}
    for log in tables["log"]:
        if log["token"] not in mapped:
            raise DataError(f"map.json: no map for log {log['token']!r}; every log needs one")
