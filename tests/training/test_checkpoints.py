"""Which of several checkpoints is the newest intact one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clip2scene.training.checkpoints import SEAL, newest_intact, seal


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


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
    # Otherwise the next save would count it as the one to go back to.
    assert [folder.exists() for folder in folders] == [True, False]
    damage(folders[0] / name)
    assert newest_intact(folders[:1], notes.append) is None
    assert len(notes) == 2
