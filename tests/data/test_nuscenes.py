"""The index against the tables that it was built from, and against tables that are broken in every way we know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from refusals import refused

from clip2scene.config import digest_of
from clip2scene.data.clouds import read_cloud, read_image, read_labels
from clip2scene.data.contents import are_current
from clip2scene.data.datasets import build_index as build_any
from clip2scene.data.datasets import fingerprint
from clip2scene.data.index import FORMAT, Frame, Index, _row, read_index, write_index
from clip2scene.data.nuscenes import CAMERAS, build_index
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import DataError

Records = list[dict[str, Any]]


@pytest.fixture
def broken(streetworld_root: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the street world to break."""
    return Path(shutil.copytree(streetworld_root[0], tmp_path / "broken"))


def _table(root: Path, version: str, name: str) -> Records:
    return json.loads((root / version / f"{name}.json").read_text())


def _poses_by_devkit(root: Path, version: str) -> Callable[[str], np.ndarray]:
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    nusc = NuScenes(version, str(root), verbose=False)
    token_of = {record["filename"]: record["token"] for record in nusc.sample_data}

    def world_from_sensor(path: str) -> np.ndarray:
        record = nusc.get("sample_data", token_of[path])
        ego = nusc.get("ego_pose", record["ego_pose_token"])
        sensor = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
        world_from_ego, ego_from_sensor = (
            transform_matrix(pose["translation"], Quaternion(pose["rotation"])) for pose in (ego, sensor)
        )
        return world_from_ego @ ego_from_sensor

    return world_from_sensor


def _check_poses(index: Index) -> None:
    world_from_sensor = _poses_by_devkit(index.root.path, index.version)
    for frame in index.frames:
        np.testing.assert_allclose(frame.world_from_lidar, world_from_sensor(frame.cloud_path), rtol=0, atol=1e-9)
        for sweep in frame.sweeps:
            np.testing.assert_allclose(sweep.world_from_lidar, world_from_sensor(sweep.path), rtol=0, atol=1e-9)
        for camera in frame.cameras:
            identity = camera.camera_from_world @ world_from_sensor(camera.image_path)
            np.testing.assert_allclose(identity, np.eye(4), rtol=0, atol=1e-9)


def test_real_keyframe(real_data: Path) -> None:
    index = build_index(real_data / "nuscenes_keyframe", "v1.0-mini")
    (frame,) = index.frames
    assert (index.dataset, index.version, frame.scene, frame.sweeps) == ("nuscenes", "v1.0-mini", "scene-0061", ())
    assert tuple(camera.name for camera in frame.cameras) == CAMERAS
    assert frame.timestamp_us == 1532402927647951
    assert len({camera.timestamp_us for camera in frame.cameras}) == 6
    assert frame.world_from_lidar.dtype == np.float64
    points = len(read_cloud(index.root.path_of(frame.cloud_path)))
    assert points == 34_688
    assert frame.label_path is not None
    assert len(read_labels(index.root.path_of(frame.label_path), points, vocabulary("nuscenes"))) == points
    for camera in frame.cameras:
        assert read_image(index.root.path_of(camera.image_path), camera.width, camera.height).shape == (900, 1600, 3)
    _check_poses(index)


def test_streetworld_frames_are_in_scene_and_time_order_with_every_earlier_sweep(
    streetworld_root: tuple[Path, str], street_index: Index
) -> None:
    root, version = streetworld_root
    scene_name = {scene["token"]: scene["name"] for scene in _table(root, version, "scene")}
    samples = {sample["token"]: sample for sample in _table(root, version, "sample")}
    assert [frame.frame_id for frame in street_index.frames] == sorted(
        samples, key=lambda token: (scene_name[samples[token]["scene_token"]], samples[token]["timestamp"])
    )
    # The sweeps, found without following any link: by folder, scene and time.
    clouds: dict[str, list[tuple[int, str]]] = {}
    for record in _table(root, version, "sample_data"):
        if "/LIDAR_TOP/" in record["filename"]:
            scene = scene_name[samples[record["sample_token"]]["scene_token"]]
            clouds.setdefault(scene, []).append((record["timestamp"], record["filename"]))
    assert any(frame.sweeps for frame in street_index.frames)
    for frame in street_index.frames:
        earlier = sorted((cloud for cloud in clouds[frame.scene] if cloud[0] < frame.timestamp_us), reverse=True)
        assert [(sweep.timestamp_us, sweep.path) for sweep in frame.sweeps] == earlier[:10]
    _check_poses(street_index)


@pytest.mark.parametrize("max_sweeps", [0, 1, 2])
def test_max_sweeps_keeps_the_nearest(streetworld_root: tuple[Path, str], street_index: Index, max_sweeps: int) -> None:
    for short, full in zip(
        build_index(*streetworld_root, max_sweeps=max_sweeps).frames, street_index.frames, strict=True
    ):
        assert [s.path for s in short.sweeps] == [s.path for s in full.sweeps[:max_sweeps]]


def _same_frame(a: Frame, b: Frame) -> None:
    assert (a.frame_id, a.scene, a.timestamp_us, a.cloud_path, a.label_path) == (
        b.frame_id,
        b.scene,
        b.timestamp_us,
        b.cloud_path,
        b.label_path,
    )
    np.testing.assert_array_equal(a.world_from_lidar, b.world_from_lidar)
    for s, t in zip(a.sweeps, b.sweeps, strict=True):
        assert (s.path, s.timestamp_us) == (t.path, t.timestamp_us)
        np.testing.assert_array_equal(s.world_from_lidar, t.world_from_lidar)
    for c, d in zip(a.cameras, b.cameras, strict=True):
        assert (c.name, c.image_path, c.width, c.height, c.timestamp_us, c.depth_path) == (
            d.name,
            d.image_path,
            d.width,
            d.height,
            d.timestamp_us,
            d.depth_path,
        )
        np.testing.assert_array_equal(c.intrinsics, d.intrinsics)
        np.testing.assert_array_equal(c.camera_from_world, d.camera_from_world)


def test_index_survives_parquet_and_its_digest_does_not_depend_on_the_root(
    street_index: Index, broken: Path, tmp_path: Path
) -> None:
    write_index(street_index, tmp_path / "index.parquet")
    read = read_index(tmp_path / "index.parquet")
    rows = [_row(frame) for frame in street_index.frames]
    assert street_index.digest == digest_of(FORMAT, "nuscenes", street_index.version, (), rows)
    assert (read.root, read.version, read.digest) == (street_index.root, street_index.version, street_index.digest)
    for a, b in zip(read.frames, street_index.frames, strict=True):
        _same_frame(a, b)
        assert (a.cloud_token, b.cloud_token) == (b.cloud_token, Path(b.label_path or "").name[:32])
    about = pq.read_table(tmp_path / "index.parquet").drop_columns("cloud_token")
    pq.write_table(about, tmp_path / "old.parquet")  # written before there were tokens
    assert [frame.cloud_token for frame in read_index(tmp_path / "old.parquet").frames] == [None] * len(read.frames)
    assert build_index(broken, street_index.version).digest == street_index.digest
    assert build_index(broken, street_index.version, max_sweeps=0).digest != street_index.digest


def test_lidarseg_is_optional(broken: Path, street_index: Index) -> None:
    assert all(frame.label_path is not None for frame in street_index.frames)
    (broken / street_index.version / "lidarseg.json").unlink()
    shutil.rmtree(broken / "lidarseg")
    without = build_index(broken, street_index.version)
    assert [frame.label_path for frame in without.frames] == [None] * len(street_index.frames)


def test_scenes_that_were_not_downloaded_are_left_out_and_counted(broken: Path, street_index: Index) -> None:
    first, second, third, fourth = _scenes(street_index)
    version, whole = street_index.version, fingerprint("nuscenes", broken, street_index.version)
    removed = [_unlink_keyframes(broken, street_index, scene) for scene in (first, third)]
    index = build_index(broken, version)
    assert list(map(_row, index.frames)) == list(map(_row, street_index.select(frozenset([second, fourth]))))
    assert index.left_out == (
        f"{version}: 2 of 4 scenes left out, as no cloud and no image of their keyframes is on disk (of {first}, file "
        f"{removed[0][0]} is missing below {broken})",
    )
    assert index.digest != street_index.digest
    # The tables are the same, and yet a stored index must not be taken once the other scenes have come.
    part = fingerprint("nuscenes", broken, version)
    assert part != whole
    (broken / removed[0][1]).touch()
    assert fingerprint("nuscenes", broken, version) != part


def test_folder_that_is_a_link_to_nowhere_has_a_fingerprint(broken: Path, street_index: Index) -> None:
    (broken / "samples" / "LIDAR_TOP").rename(broken / "aside")
    (broken / "samples" / "LIDAR_TOP").symlink_to(broken / "unmounted")
    fingerprint("nuscenes", broken, street_index.version)


def test_keyframes_alone_are_indexed_without_sweeps(broken: Path, street_index: Index) -> None:
    shutil.rmtree(broken / "sweeps")
    index = build_index(broken, street_index.version, max_sweeps=0)
    assert [frame.frame_id for frame in index.frames] == [frame.frame_id for frame in street_index.frames]


def _edit(table: str, change: Callable[[Records], object]) -> Callable[[Path, Index], object]:
    """A breaker that changes one table."""

    def breaker(tables: Path, _: Index) -> None:
        path = tables / f"{table}.json"
        records = json.loads(path.read_text())
        change(records)
        path.write_text(json.dumps(records))

    return breaker


def _set(table: str, field: str, value: object) -> Callable[[Path, Index], object]:
    """A breaker that sets one field of a table's first record."""
    return _edit(table, lambda records: records[0].update({field: value}))


def _set_lidar(field: str, value: object) -> Callable[[Path, Index], object]:
    """A breaker that sets one field of a keyframe cloud's record."""
    return _edit(
        "sample_data",
        lambda records: next(r for r in records if r["filename"].startswith("samples/LIDAR_TOP")).update(
            {field: value}
        ),
    )


def _bend(table: str, value: float) -> Callable[[Path, Index], object]:
    """A breaker that puts a value into the translation of every record of a table."""
    return _edit(table, lambda records: [r["translation"].__setitem__(1, value) for r in records])


def _remove(path_of: Callable[[Index], str | None]) -> Callable[[Path, Index], object]:
    """A breaker that removes a file which the index names."""
    return lambda tables, index: (tables.parent / str(path_of(index))).unlink()


def _swept(index: Index) -> Frame:
    return next(frame for frame in index.frames if frame.sweeps)


def _scenes(index: Index) -> list[str]:
    return list(dict.fromkeys(frame.scene for frame in index.frames))


def _unlink_keyframes(root: Path, index: Index, scene: str) -> list[str]:
    """Remove a scene's clouds and images, and return their paths."""
    frames = index.select(frozenset([scene]))
    paths = [path for f in frames for path in (f.cloud_path, *(camera.image_path for camera in f.cameras))]
    for path in paths:
        (root / path).unlink()
    return paths


def _link_outside(tables: Path, index: Index) -> None:
    cloud = tables.parent / index.frames[0].cloud_path
    outside = tables.parent.parent / "outside"  # a name that does not tell the format
    cloud.rename(outside)
    cloud.symlink_to(outside)


def _link_folder_outside(tables: Path, index: Index) -> None:
    folder = (tables.parent / index.frames[0].cloud_path).parent
    outside = tables.parent.parent / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)


def _loop_sweeps(records: Records) -> None:
    lidar = next(r for r in records if "/LIDAR_TOP/" in r["filename"] and r["is_key_frame"] and r["prev"])
    lidar["prev"] = lidar["token"]


def _drop(table: str) -> Callable[[Path, Index], object]:
    return lambda tables, _: (tables / f"{table}.json").unlink()


def _double(records: Records) -> None:
    records.append(dict(records[0]))


BROKEN: dict[str, tuple[Callable[[Path, Index], object], str]] = {
    "no ego_pose": (_drop("ego_pose"), r"ego_pose\.json: missing table"),
    "no sample": (_drop("sample"), r"sample\.json: missing table"),
    "no map": (_drop("map"), r"map\.json: missing table"),
    "half a table": (
        lambda tables, _: (tables / "sample_data.json").write_text('[{"token": "a", '),
        r"sample_data\.json: not valid JSON",
    ),
    "not a table": (lambda tables, _: (tables / "scene.json").write_text('{"a": 1}'), r"scene\.json: not a table"),
    "missing field": (_edit("sample_data", lambda r: r[0].pop("filename")), r"no field 'filename'"),
    "missing token field": (_edit("sample_data", lambda r: r[0].pop("sample_token")), r"no field 'sample_token'"),
    "dangling calibration": (_set_lidar("calibrated_sensor_token", "nix"), r"names calibrated_sensor 'nix'"),
    "dangling pose": (_set_lidar("ego_pose_token", "nix"), r"names ego_pose 'nix', which ego_pose\.json does not hold"),
    "dangling sample": (_set_lidar("sample_token", "nix"), r"names sample 'nix'"),
    "dangling scene": (_set("sample", "scene_token", "nix"), r"names scene 'nix'"),
    "dangling sensor": (_set("calibrated_sensor", "sensor_token", "nix"), r"names sensor 'nix'"),
    "dangling prev": (
        _edit("sample_data", lambda r: [x.update(prev="nix") for x in r if x["is_key_frame"]]),
        r"names sample_data 'nix'",
    ),
    "sweeps in a loop": (_edit("sample_data", _loop_sweeps), r"is not an earlier sweep of LIDAR_TOP"),
    "no camera": (
        _edit("sample_data", lambda r: r.remove(next(x for x in r if x["filename"].startswith("samples/CAM_BACK/")))),
        r"has no keyframe of CAM_BACK",
    ),
    "sample twice": (_edit("sample", _double), r"occurs twice"),
    "no keyframe": (
        lambda tables, _: [
            (tables / f"{table}.json").write_text("[]") for table in ("sample", "sample_data", "sample_annotation")
        ],
        r"sample\.json: no keyframe",
    ),
    "no map record": (_edit("map", list.clear), r"map\.json: no record"),
    "no map image": (_set("map", "filename", "maps/nix.png"), r"file maps/nix\.png is missing"),
    "NaN pose": (_bend("ego_pose", float("nan")), r"ego_pose\.json: record .*not finite"),
    "infinite pose": (_bend("calibrated_sensor", float("inf")), r"calibrated_sensor\.json: record .*not finite"),
    "no unit quaternion": (
        _edit("ego_pose", lambda r: [x.update(rotation=[1, 1, 0, 0]) for x in r]),
        r"rotation has norm 1\.41421; a unit quaternion",
    ),
    "NaN quaternion": (
        _edit("ego_pose", lambda r: [x.update(rotation=[float("nan"), 1, 0, 0]) for x in r]),
        r"not finite",
    ),
    "three numbers": (
        _edit("ego_pose", lambda r: [x.update(rotation=[1, 0, 0]) for x in r]),
        r"rotation \[1, 0, 0\] is not 4 numbers",
    ),
    "no intrinsics": (
        _edit("calibrated_sensor", lambda r: [x.update(camera_intrinsic=[]) for x in r]),
        r"camera_intrinsic \[\] is not 3 x 3 numbers",
    ),
    "NaN intrinsics": (
        _edit("calibrated_sensor", lambda r: [x.update(camera_intrinsic=np.full((3, 3), np.nan).tolist()) for x in r]),
        r"is not a pinhole camera",
    ),
    "no width": (_edit("sample_data", lambda r: [x.update(width=0) for x in r]), r"width 0 is not a positive number"),
    "no time": (_set_lidar("timestamp", None), r"timestamp None is not a whole number"),
    "no cloud": (_remove(lambda index: index.frames[0].cloud_path), r"file samples/LIDAR_TOP/\S+ is missing"),
    "no sweep": (
        _remove(lambda index: _swept(index).sweeps[0].path),
        r"file sweeps/LIDAR_TOP/\S+ is missing below .*; allowed: dataset\.max_sweeps=0 .* if only keyframes were",
    ),
    "no image": (
        _remove(lambda index: index.frames[-1].cameras[3].image_path),
        r"file samples/CAM_BACK/\S+ is missing below .*; allowed: all files of a scene's keyframes or none",
    ),
    "no cloud in a scene with one image": (
        lambda tables, index: (
            [_unlink_keyframes(tables.parent, index, scene) for scene in _scenes(index)]
            and (tables.parent / index.frames[0].cameras[5].image_path).touch()
        ),
        r"file samples/LIDAR_TOP/\S+ is missing below .*; allowed: all files of a scene's keyframes or none",
    ),
    "no label": (_remove(lambda index: index.frames[0].label_path), r"file lidarseg/\S+ is missing"),
    "no folder": (
        lambda tables, _: shutil.rmtree(tables.parent / "samples"),
        r"none of its 4 scenes can be indexed, as no cloud and no image .* file samples/LIDAR_TOP/\S+ is missing",
    ),
    "old categories": (_edit("category", lambda r: [x.pop("index") for x in r]), r"a category has no index"),
    "too many labels": (
        lambda tables, _: (tables.parent / "lidarseg" / tables.name / "more.bin").touch(),
        r"label files for \d+ records",
    ),
    "climbing cloud": (_set_lidar("filename", "samples/../../outside.bin"), r"leaves the dataset's root"),
    "absolute cloud": (_set_lidar("filename", "/etc/hostname"), r"leaves the dataset's root"),
    "climbing label": (_set("lidarseg", "filename", "../outside.bin"), r"leaves the dataset's root"),
    "climbing map": (_set("map", "filename", "../outside.png"), r"leaves the dataset's root"),
    "no path": (_set_lidar("filename", None), r"None is not a path"),
    "linked cloud": (
        _link_outside,
        r"leaves the dataset's root through a link, to /\S+/outside; allowed: .*; dataset\.linked_folders",
    ),
    "linked folder": (
        _link_folder_outside,
        r"leaves the dataset's root through a link, to /\S+/outside; allowed: .*; dataset\.linked_folders",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_dataset_is_refused_in_one_sentence(broken: Path, street_index: Index, case: str) -> None:
    breaker, message = BROKEN[case]
    breaker(broken / street_index.version, street_index)
    with refused(message):
        build_index(broken, street_index.version)


@pytest.mark.parametrize("link", [_link_outside, _link_folder_outside])
def test_links_into_an_allowed_folder_give_the_same_index(
    broken: Path, street_index: Index, link: Callable[[Path, Index], None]
) -> None:
    plain = build_any("nuscenes", broken, version=street_index.version)
    cloud_NI = read_cloud(plain.root.path_of(plain.frames[0].cloud_path))
    link(broken / street_index.version, street_index)
    index = build_any("nuscenes", broken, version=street_index.version, linked_folders=[broken.parent])
    assert plain.contents is not None
    assert index.contents is not None
    assert (index.digests, index.contents.hashes) == (plain.digests, plain.contents.hashes)
    assert are_current(index)
    write_index(index, broken.parent / "index.parquet")
    read = read_index(broken.parent / "index.parquet", linked_folders=[broken.parent])
    assert read.root == index.root
    np.testing.assert_array_equal(read_cloud(read.root.path_of(read.frames[0].cloud_path)), cloud_NI)
    # An index is a file too that may come from elsewhere, and does not allow what it names itself.
    stranger = read_index(broken.parent / "index.parquet")
    with refused(r"leaves the dataset's root through a link"):
        stranger.root.path_of(stranger.frames[0].cloud_path)


def test_missing_root_and_missing_version(broken: Path, street_index: Index) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        build_index(broken / "nowhere", "v1.0-mini")
    for version in ("v1.0-mini", "../broken/v1.0-trainval", ""):
        with pytest.raises(DataError, match=rf"no folder of tables '{version}'; allowed here: {street_index.version}"):
            build_index(broken, version)
