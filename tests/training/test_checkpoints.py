"""Which of several checkpoints is the newest intact one."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip2scene.training.checkpoints import SEAL, newest_intact, seal
from clip2scene.training.launch import Worker
from tiny_training import truncate


@pytest.mark.parametrize("name", ["weights", "state", SEAL])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[::-1])])
def test_which_checkpoint_is_intact(tmp_path, name, damage):
    folders, notes = [tmp_path / "checkpoint_000000", tmp_path / "checkpoint_000001"], []
    for folder in folders:
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(range(100)))
        (folder / "state").write_text("{'step': 3}")
        seal(folder)
    assert newest_intact(folders, notes.append) == folders[1]
    damage(folders[1] / name)
    assert newest_intact(folders, notes.append) == folders[0]
    damage(folders[0] / name)
    assert newest_intact(folders, notes.append) is None
    assert len(notes) == 3


def test_a_damaged_checkpoint_is_not_the_one_to_go_back_to(tmp_path):
    def save(worker: Worker) -> None:
        worker.save(lambda folder: (folder / "weights").write_bytes(b"weights"))

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    first = Worker(tmp_path, lambda kind, value: None)
    for _ in range(3):
        save(first)
    assert names() == ["checkpoint_000001", "checkpoint_000002"]
    truncate(tmp_path / "checkpoint_000002" / "weights")
    again = Worker(tmp_path, lambda kind, value: None)
    assert again.last_checkpoint() == tmp_path / "checkpoint_000001"
    assert names() == ["checkpoint_000001", "checkpoint_000002"]  # another node may only see it late
    save(again)
    assert names() == ["checkpoint_000001", "checkpoint_000003"]
