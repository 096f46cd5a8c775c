from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from refusals import refused

from clip2scene.data.dataroot import DataRoot


def test_paths_stay_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "samples").mkdir(parents=True)
    (tmp_path / "secret").touch()
    (root / "samples" / "link").symlink_to(tmp_path / "secret")
    (root / "samples" / "inside").symlink_to(root / "samples")
    (tmp_path / "alias").symlink_to(root)
    assert DataRoot(root).path_of("samples/a.bin") == root / "samples" / "a.bin"
    assert DataRoot(root).path_of("samples/inside/a..bin") == root / "samples" / "inside" / "a..bin"
    assert DataRoot(tmp_path / "alias").path_of("samples/a.bin") == tmp_path / "alias" / "samples" / "a.bin"
    for path in ("../secret", "samples/../../secret", str(tmp_path / "secret"), "samples/link", ".."):
        with refused(r"leaves the dataset's root"):
            DataRoot(root).path_of(path)
    for path in ("", "a\0b"):
        with refused(r"is not a path"):
            DataRoot(root).path_of(path)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A root with a link to the folder ``fast/samples`` beside it, and others to files beside that folder."""
    root = tmp_path / "root"
    root.mkdir()
    for folder in ("fast/samples", "faster"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.bin").touch()
    (tmp_path / "fast" / "samples" / "out.bin").symlink_to(tmp_path / "faster" / "a.bin")
    (root / "samples").symlink_to(tmp_path / "fast" / "samples")
    (root / "faster.bin").symlink_to(tmp_path / "faster" / "a.bin")
    return root


def test_links_may_lead_into_the_linked_folders_only(linked: Path, tmp_path: Path) -> None:
    fast = tmp_path / "fast"
    (tmp_path / "disk").symlink_to(fast)
    for folder in (fast, fast / "samples", tmp_path / "disk"):
        root = pickle.loads(pickle.dumps(DataRoot.at(linked, [folder])))
        assert root.path_of("samples/a.bin") == linked / "samples" / "a.bin"
        # Neither through a second link, nor to a folder whose name begins like the allowed one's, nor by the path.
        for path in ("samples/out.bin", "faster.bin", "../fast/samples/a.bin", str(fast / "samples" / "a.bin")):
            with refused(r"leaves the dataset's root"):
                root.path_of(path)
    with refused(
        rf"the index: path 'samples/a\.bin' leaves the dataset's root through a link, to {fast}/samples/a\.bin; "
        rf"allowed: files in {linked}, {tmp_path}/faster; dataset\.linked_folders \(.*: --linked-folder\) allows other"
    ):
        DataRoot(linked, (tmp_path / "faster",)).path_of("samples/a.bin")
    assert DataRoot(linked, (tmp_path / "faster", fast)).path_of("samples/out.bin") == linked / "samples" / "out.bin"


def test_a_root_is_absolute_for_workers(linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = DataRoot.at("root", ["fast"])
    monkeypatch.chdir("/")
    assert root == DataRoot(linked, (tmp_path / "fast",))
    assert root.path_of("samples/a.bin").exists()
