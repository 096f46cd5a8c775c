from __future__ import annotations

from pathlib import Path

from refusals import refused

from clip2scene.data.dataroot import resolve


def test_resolve_stays_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "samples").mkdir(parents=True)
    (tmp_path / "secret").touch()
    (root / "samples" / "link").symlink_to(tmp_path / "secret")
    (root / "samples" / "inside").symlink_to(root / "samples")
    (tmp_path / "alias").symlink_to(root)
    assert resolve(root, "samples/a.bin") == root / "samples" / "a.bin"
    assert resolve(root, "samples/inside/a..bin") == root / "samples" / "a..bin"
    assert resolve(tmp_path / "alias", "samples/a.bin") == root / "samples" / "a.bin"
    for path in ("../secret", "samples/../../secret", str(tmp_path / "secret"), "samples/link", ".."):
        with refused(r"leaves the dataset's root"):
            resolve(root, path)
    for path in ("", "a\0b"):
        with refused(r"is not a path"):
            resolve(root, path)
