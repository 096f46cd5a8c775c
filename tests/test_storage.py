"""Artifacts appear completely or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import threading
import time

import pytest

from clip2scene import cli
from clip2scene.data.index import read_index
from clip2scene.errors import StorageError
from clip2scene.storage import Storage, locked, writing


def test_a_written_artifact_replaces_the_old_one(tmp_path):
    storage = Storage(tmp_path)
    path = storage.path("kind", "digest")
    for value in (1, 2):
        storage.write_json(path, {"value": value})
        assert json.loads(path.read_text()) == {"value": value}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_what_fails_leaves_nothing_and_the_old_one_stays(tmp_path, error):
    path = tmp_path / "kind" / "digest"
    Storage(tmp_path).write_json(path, "old")

    def fail():
        with writing(path) as aside:
            aside.write_text("half")
            raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        fail()
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text()) == "old"


def test_of_two_runs_one_waits(tmp_path, caplog):
    order = []

    def second():
        with locked(tmp_path / "store", "fills this store"):
            order.append("second")

    with locked(tmp_path / "store", "fills this store"):
        waiting = threading.Thread(target=second)
        waiting.start()
        while "another run fills this store; waiting for it" not in caplog.text:
            time.sleep(0.01)
        order.append("first")
    waiting.join(timeout=10)
    assert order == ["first", "second"]


def test_a_lock_that_is_held_for_a_moment_is_waited_for_in_silence(tmp_path, caplog):
    def second():
        with locked(tmp_path):
            pass

    with locked(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(timeout=0.2)
        assert waiting.is_alive()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert not caplog.text


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, "fills this store"):
        pass
    assert f"{tmp_path}: no locks there (Function not implemented); do not start a command twice at once" in caplog.text


def test_a_name_that_others_write_again_is_fetched_again(tmp_path):
    class Remote:
        def get(self, name, aside):
            if not there:
                raise FileNotFoundError(name)
            aside.write_text(there[name])

    storage, path, there = Storage(tmp_path), tmp_path / "report.json", {"report.json": "first"}
    storage.remote = Remote()
    for text, refresh, expected in (("first", False, "first"), ("second", False, "first"), ("second", True, "second")):
        there["report.json"] = text
        assert storage.fetch(path, refresh=refresh)
        assert path.read_text() == expected
    there.clear()
    assert not storage.fetch(path, refresh=True)


def test_a_full_disk_is_one_sentence_and_nothing_half_written(streetworld_root, tmp_path, small_disk, capsys):
    root, version = streetworld_root
    words = ["index", "nuscenes", "--root", str(root), "--version", version, "--output"]
    index = str(tmp_path / "index.parquet")
    assert cli.main([*words, index]) == 0
    frame = read_index(index).frames[0].frame_id
    assert cli.main(["inspect", index, "--frame", frame, "--figure", str(small_disk / "frame.png")]) == 1
    err = capsys.readouterr().err
    assert "No space left" in err
    assert err.startswith("clip2scene: ")
    assert err.count("\n") == 1
    assert not list(small_disk.iterdir())
