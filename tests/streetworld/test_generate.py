"""A world is written completely or not at all, is the same for any number of processes, and spares foreign files."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from clip2scene.config import StreetworldSettings
from clip2scene.data.nuscenes import build_index
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import DataError
from clip2scene.streetworld.generate import MANIFEST, generate
from clip2scene.streetworld.tables import scene_names

TINY = StreetworldSettings(
    train_scenes=1,
    val_scenes=1,
    keyframes_per_scene=1,
    sweeps_between_keyframes=1,
    image_width_px=80,
    image_height_px=48,
    lidar_azimuth_steps=36,
)


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "world"
    generate(root, TINY, seed=3)
    return root


def test_the_bytes_do_not_depend_on_the_number_of_workers(tiny: Path, tmp_path: Path) -> None:
    generate(tmp_path / "world", TINY, seed=3, workers=2)
    assert contents(tmp_path / "world") == contents(tiny)


def test_another_seed_is_another_world(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()  # an empty folder is filled
    killed, foreign = tmp_path / ".world.01ab23cd" / "samples", tmp_path / ".world.mine" / "samples"
    for folder in (killed, foreign):
        folder.mkdir(parents=True)
    generate(tmp_path / "world", TINY, seed=4)
    assert foreign.is_dir()
    assert not killed.parent.exists()
    ours, theirs = contents(tiny), contents(tmp_path / "world")
    assert not {path for path, digest in ours.items() if path.startswith("samples") and theirs.get(path) == digest}


def test_a_finished_world_is_left_alone_and_counted_by_progress(tmp_path: Path) -> None:
    finished: list[int] = []
    generate(tmp_path / "world", TINY, seed=5, advance=finished.append)
    before = (tmp_path / "world" / MANIFEST).stat().st_mtime_ns
    generate(tmp_path / "world", TINY, seed=5, advance=finished.append)
    assert finished == [1, 1]
    assert (tmp_path / "world" / MANIFEST).stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"world", ".world.lock"}


def test_of_two_runs_at_once_one_waits_and_finds_everything_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished: list[str] = []
    second = threading.Thread(target=generate, args=(tmp_path / "world", TINY, 5), kwargs={"advance": finished.append})

    def start_the_second(_: int) -> None:
        finished.append("scene of the first")
        if len(finished) == 1:
            second.start()
            while "another run generates world; waiting for it" not in caplog.text and second.is_alive():
                time.sleep(0.01)

    generate(tmp_path / "world", TINY, 5, advance=start_the_second)
    second.join(timeout=60)
    assert finished == ["scene of the first"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"world", ".world.lock"}


@pytest.mark.parametrize("held", ["notes.txt", MANIFEST])
def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path, held: str) -> None:
    (tmp_path / held).write_text(json.dumps({"digest": "of another world"}))
    with pytest.raises(DataError, match="choose another folder"):
        generate(tmp_path, TINY, seed=3)
    assert [path.name for path in tmp_path.iterdir()] == [held]


def test_a_failed_run_leaves_nothing_but_the_lock(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "world", TINY, seed=3, advance=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".world.lock"]


def test_sweeps_before_the_first_keyframe_are_its_own(tmp_path: Path) -> None:
    generate(tmp_path / "world", TINY.model_copy(update={"sweeps_before_first": 3}), seed=3)
    for frame in build_index(tmp_path / "world", "v1.0-trainval").frames:
        before_s = [(frame.timestamp_us - sweep.timestamp_us) / 1e6 for sweep in frame.sweeps]
        assert before_s == pytest.approx([0.25, 0.5, 0.75], abs=1e-5)
        places = [sweep.world_from_lidar[:3, 3] for sweep in frame.sweeps]
        driven_m = [float(np.linalg.norm(frame.world_from_lidar[:3, 3] - place)) for place in places]
        assert driven_m == sorted(driven_m)
        assert 0.25 * 4 < driven_m[0] < 0.25 * 9.5
        assert all((tmp_path / "world" / sweep.path).stat().st_size for sweep in frame.sweeps)


def test_scene_names_are_those_of_the_official_splits() -> None:
    from nuscenes.utils import splits

    assert scene_names(700, 150) == [*splits.train, *splits.val]
    assert scene_names(2, 1) == ["scene-0001", "scene-0002", "scene-0003"]


def test_every_class_occurs_in_train_and_val(streetworld_root: tuple[Path, str]) -> None:
    root, version = streetworld_root
    tables = {
        name: json.loads((root / version / f"{name}.json").read_text())
        for name in ("scene", "sample", "sample_data", "lidarseg")
    }
    scene_of_sample = {row["token"]: row["scene_token"] for row in tables["sample"]}
    scene_of_data = {row["token"]: scene_of_sample[row["sample_token"]] for row in tables["sample_data"]}
    validation = {row["token"] for row in tables["scene"] if row["name"] in scene_names(0, 150)}
    counts = np.zeros((2, 17), int)
    for row in tables["lidarseg"]:
        raw = np.fromfile(root / row["filename"], np.uint8)
        part = int(scene_of_data[row["sample_data_token"]] in validation)
        counts[part] += np.bincount(vocabulary("nuscenes").labels(raw, row["filename"]), minlength=17)
    assert (counts[:, 1:] > 0).sum(axis=1).min() >= 14
    assert (counts[:, 0] == 0).all()
