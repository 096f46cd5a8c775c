"""Artifacts appear whole or not at all."""

from __future__ import annotations

import errno
import json

import pytest

from clip2scene import cli
from clip2scene.storage import Storage, StorageError


def test_a_written_artifact_replaces_the_old_one(tmp_path):
    storage = Storage(tmp_path)
    path = storage.path("kind", "digest")
    for value in (1, 2):
        storage.write_json(path, {"value": value})
        assert json.loads(path.read_text()) == {"value": value}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_what_fails_leaves_nothing_and_the_old_one_stays(tmp_path, error):
    storage = Storage(tmp_path)
    path = storage.path("kind", "digest")
    storage.write_json(path, "old")
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)), storage.writing(path) as aside:
        aside.write_text("half")
        raise error
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text()) == "old"


def test_a_full_disk_is_one_sentence(streetworld_root, tmp_path, capsys):
    """/dev/full answers every write as a full disk does."""
    root, version = streetworld_root
    index = str(tmp_path / "index.parquet")
    assert cli.main(["index", "nuscenes", "--root", str(root), "--version", version, "--output", index]) == 0
    assert cli.main(["inspect", index, "--figure", "/dev/full"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("clip2scene: the disk is full")
    assert err.count("\n") == 1
