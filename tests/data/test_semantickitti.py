"""The index of the real SemanticKITTI pieces, and of a tiny layout that is broken in every way we know."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from scipy.spatial import cKDTree

from clip2scene.data.clouds import read_cloud, read_image, read_labels
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.datasets import build_index as build_any
from clip2scene.data.datasets import fingerprint
from clip2scene.data.index import Index, read_index, write_index
from clip2scene.data.semantickitti import build_index
from clip2scene.data.splits import missing_of_split, split_frames
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import ConfigError
from clip2scene.geometry.pairing import pair
from clip2scene.geometry.projection import image_from_lidar
from clip2scene.geometry.registration import choose_sweeps, register
from clip2scene.inspection import inspect_frame
from clip2scene.teacher.store import frame_file
from predicting import network_file, predicted

WORDS = vocabulary("semantickitti")

# LiDAR: x forward, y left, z up. Camera: x right, y down, z forward.
TR = np.array([[0.0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3]])
P2 = np.array([[50.0, 0, 20, 10], [0, 50, 12, -4], [0, 0, 1, 0.05]])


@pytest.fixture(scope="module")
def real_index(real_data: Path) -> Index:
    root = real_data / "semantickitti"
    if not root.is_dir():
        pytest.skip(f"no SemanticKITTI piece at {root}")
    return build_index(root)


def _text(rows: np.ndarray) -> str:
    return "".join(" ".join(f"{value:.12e}" for value in row) + "\n" for row in rows)


def _poses(count: int) -> np.ndarray:
    """(count, 12): half a metre forward per scan, turning."""
    poses = []
    for n in range(count):
        c, s = np.cos(0.05 * n), np.sin(0.05 * n)
        poses.append([c, 0, s, 0.1 * n, 0, 1, 0, 0, -s, 0, c, 0.5 * n])
    return np.array(poses)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Sequences 00 (scans 0 to 3 of 5 poses, labelled) and 11 (one scan, no labels)."""
    rng = np.random.default_rng(0)
    for name, scans, labelled in (("00", 4, True), ("11", 1, False)):
        folder = tmp_path / "kitti" / "sequences" / name
        for part in ("velodyne", "image_2", *(["labels"] if labelled else [])):
            (folder / part).mkdir(parents=True)
        (folder / "calib.txt").write_text(
            "".join(f"{key}: {_text(m.reshape(1, 12))}" for key, m in (("P0", P2), ("P2", P2), ("Tr", TR)))
        )
        (folder / "poses.txt").write_text(_text(_poses(5)))
        (folder / "times.txt").write_text("".join(f"{0.1 * n:e}\n" for n in range(5)))
        for n in range(scans):
            cloud_N4 = rng.uniform(0, 1, (30, 4)).astype(np.float32)
            (folder / "velodyne" / f"{n:06d}.bin").write_bytes(cloud_N4.tobytes())
            Image.new("RGB", (40, 24)).save(folder / "image_2" / f"{n:06d}.png")
            if labelled:
                ids = np.resize([10, 252, 40, 60, 81, 0], 30) + (np.arange(30) << 16)
                (folder / "labels" / f"{n:06d}.label").write_bytes(ids.astype("<u4").tobytes())
    return tmp_path / "kitti"


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --- the real pieces ---


def test_real_scans_have_the_known_points_and_pairs(real_index: Index) -> None:
    counts = {"00": [], "08": []}
    for frame in real_index.frames:
        report = inspect_frame(real_index, frame, WORDS)
        counts[frame.scene].append((report["points"], report["pairs"]["image_2"]))
        assert sum(report["labels"].values()) == report["points"]
    assert counts["00"] == [
        (124668, 19298),
        (124605, 19088),
        (124478, 18898),
        (124167, 18636),
        (123969, 18429),
        (123924, 18428),
    ]
    assert counts["08"] == [(123389, 19894), (123433, 19929), (123159, 19899)]


def test_real_frames_are_named_timed_and_split(real_index: Index) -> None:
    assert (real_index.dataset, real_index.left_out) == ("semantickitti", ())
    assert [f.frame_id for f in real_index.frames] == [f"00_{n:06d}" for n in range(6)] + [
        f"08_{n:06d}" for n in range(3)
    ]
    second = real_index.frames[1]
    assert (second.scene, second.timestamp_us, second.cameras[0].timestamp_us) == ("00", 103_736, 103_736)
    assert [(s.path[-10:], s.timestamp_us) for s in real_index.frames[2].sweeps] == [
        ("000001.bin", 103_736),
        ("000000.bin", 0),
    ]
    assert len(choose_sweeps(real_index.frames[5], 3, 0.5)) == 2
    assert {f.scene for f in split_frames(real_index, "train")} == {"00"}
    assert {f.scene for f in split_frames(real_index, "val")} == {"08"}
    assert frame_file(Path("store"), second.frame_id) == Path("store/frames/00_000001.safetensors")
    camera = second.cameras[0]
    assert read_image(real_index.root.path_of(camera.image_path), camera.width, camera.height).shape == (376, 1241, 3)


def test_depth_is_in_the_frame_of_camera_2(real_index: Index) -> None:
    # By KITTI's own formula: P2 Tr x, whose third coordinate is the depth in camera 2.
    frame = real_index.frames[0]
    rows = dict(
        line.split(":", 1)
        for line in (real_index.root.path / "sequences/00/calib.txt").read_text().splitlines()
        if line
    )
    p2, tr = (np.array(rows[key].split(), dtype=float).reshape(3, 4) for key in ("P2", "Tr"))
    points = read_cloud(real_index.root.path_of(frame.cloud_path))[:, :3].astype(np.float64)
    points_4N = np.vstack((points.T, np.ones(len(points))))
    expected = p2 @ np.vstack((tr @ points_4N, np.ones(len(points))))
    depth = (image_from_lidar(frame.cameras[0], frame.world_from_lidar) @ points_4N)[2]
    # The printed Tr is a rotation up to 1e-7; the index has the exact one.
    np.testing.assert_allclose(depth, expected[2], rtol=0, atol=1e-5)
    pairs = pair(points, frame.world_from_lidar, frame.cameras)
    assert len(pairs)
    np.testing.assert_allclose(pairs.pixel_P2, (expected[:2] / expected[2]).T[pairs.point_P], rtol=0, atol=1e-3)


def test_registered_scans_lie_on_each_other(real_index: Index) -> None:
    first, last = real_index.frames[0], real_index.frames[5]
    clouds = [read_cloud(real_index.root.path_of(frame.cloud_path))[::10, :3] for frame in (first, last)]
    still = np.abs(clouds[1][:, :2]).max(axis=1) < 30
    tree = cKDTree(read_cloud(real_index.root.path_of(first.cloud_path))[:, :3])
    registered = register(clouds[1], last.world_from_lidar, first.world_from_lidar)
    # What stands upright, as the road lies on itself however far it is moved.
    upright = still & (registered[:, 2] > -1)
    apart, wrong = (np.median(tree.query(cloud[upright])[0]) for cloud in (registered, clouds[1]))
    assert apart < 0.08
    assert apart < wrong / 4


# --- a tiny layout ---


def test_tiny_layout_becomes_an_index(tiny: Path, tmp_path: Path) -> None:
    index = build_index(tiny, max_sweeps=2)
    assert [f.frame_id for f in index.frames] == ["00_000000", "00_000001", "00_000002", "00_000003", "11_000000"]
    assert [len(f.sweeps) for f in index.frames] == [0, 1, 2, 2, 0]
    frame = index.frames[3]
    assert [s.path for s in frame.sweeps] == [f"sequences/00/velodyne/00000{n}.bin" for n in (2, 1)]
    pose = np.vstack((_poses(5)[3].reshape(3, 4), [0, 0, 0, 1]))
    np.testing.assert_allclose(frame.world_from_lidar, pose @ np.vstack((TR, [0, 0, 0, 1])), atol=1e-9)
    (camera,) = frame.cameras
    assert (camera.name, camera.width, camera.height) == ("image_2", 40, 24)
    np.testing.assert_array_equal(camera.intrinsics, P2[:, :3])
    point_in_world = pose @ [0.5, -0.2, 7, 1]
    np.testing.assert_allclose(
        camera.intrinsics @ (camera.camera_from_world @ point_in_world)[:3], P2 @ [0.5, -0.2, 7, 1], atol=1e-9
    )
    write_index(index, tmp_path / "index.parquet")
    assert read_index(tmp_path / "index.parquet").digest == index.digest


def test_labels_and_clouds_of_the_tiny_layout(tiny: Path) -> None:
    labelled, *_, test = build_index(tiny).frames
    cloud = read_cloud(DataRoot(tiny).path_of(labelled.cloud_path))
    assert (cloud.shape, cloud.dtype) == ((30, 4), np.float32)
    assert test.label_path is None
    assert labelled.label_path is not None
    labels = read_labels(DataRoot(tiny).path_of(labelled.label_path), 30, WORDS)
    names = ["ignore" if label == 0 else WORDS.classes[label - 1] for label in labels[:6]]
    assert names == ["car", "car", "road", "road", "traffic_sign", "ignore"]


def test_the_archives_dataset_folder_may_be_there(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    tiny.rename(tmp_path / "unpacked" / "dataset")
    frame = build_index(tmp_path / "unpacked").frames[0]
    assert frame.cloud_path == "dataset/sequences/00/velodyne/000000.bin"


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_scan_whose_pose_is_not_finite_is_left_out_and_reported(
    tiny: Path, tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from clip2scene.cli import main

    poses = tiny / "sequences/00/poses.txt"
    lines = poses.read_text().splitlines()
    lines[2] = " ".join([*lines[2].split()[:-1], value])
    poses.write_text("\n".join(lines))
    index = build_index(tiny)
    assert [f.frame_id for f in index.frames] == ["00_000000", "00_000001", "00_000003", "11_000000"]
    assert [s.path[-10:] for s in index.frames[2].sweeps] == ["000001.bin", "000000.bin"]
    output = tmp_path / "index.parquet"
    assert main(["index", "semantickitti", "--root", str(tiny), "--output", str(output)]) == 0
    assert read_index(output).left_out == index.left_out
    assert index.left_out == ("sequences/00/poses.txt: line 3 is not finite, so scan 00_000002 is left out",)
    assert index.left_out[0] in capsys.readouterr().out


def test_no_finite_pose_at_all(tiny: Path) -> None:
    for name in ("00", "11"):
        (tiny / "sequences" / name / "poses.txt").write_text(_text(np.full((5, 12), np.nan)))
    with refused(r"kitti: no scan with a finite pose; sequences/00/poses.txt: line 1 is not finite"):
        build_index(tiny)


def test_calibration_without_tr_says_so(tiny: Path) -> None:
    _change(tiny / "sequences/00/calib.txt", "Tr:", "Tr_cam_to_road:")
    with refused(r"sequences/00/calib.txt: has no Tr; .*from the LiDAR to camera 0"):
        build_index(tiny)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("calib.txt", "P2:", "P4:", r"calib.txt: has no P2;"),
        ("calib.txt", "Tr: 0.000000000000e+00", "Tr:", r"calib.txt: Tr: has 11 numbers; exactly 12 are allowed"),
        ("calib.txt", "Tr: 0.000000000000e+00", "Tr: nan", r"calib.txt: Tr has values that are not finite"),
        ("calib.txt", "Tr: 0.000000000000e+00", "Tr: 3", r"calib.txt: Tr, matrix 1 is not a rigid transform"),
        ("calib.txt", "P2: 5.0", "P2: -5.0", r"calib.txt: P2 .* is not a pinhole camera"),
        ("poses.txt", "1.000000000000e+00", "one", r"poses.txt: line 1: 'one .*' are not numbers"),
        ("poses.txt", "1.000000000000e+00 ", "", r"poses.txt: line 1: has 11 numbers; exactly 12 are allowed"),
        ("poses.txt", "1.000000000000e+00", "1.1", r"poses.txt: the pose of line 1 is not a rigid transform"),
        ("poses.txt", "1.000000000000e+00", "-1", r"poses.txt: the pose of line 1 is not a rigid transform"),
        ("times.txt", "4.000000e-01\n", "", r"times.txt: 4 times for the 5 poses of poses.txt"),
        ("times.txt", "1.000000e-01", "0", r"times.txt: line 2 \(0.0 s\) is not later than the line before"),
        ("times.txt", "4.000000e-01", "inf", r"times.txt: line 5 \(inf s\) is not later"),
    ],
)
def test_damaged_tables(tiny: Path, file: str, old: str, new: str, message: str) -> None:
    _change(tiny / "sequences/00" / file, old, new)
    with refused(message):
        build_index(tiny)


@pytest.mark.parametrize("file", ["calib.txt", "poses.txt", "times.txt"])
def test_missing_and_binary_tables(tiny: Path, file: str) -> None:
    path = tiny / "sequences/00" / file
    path.write_bytes(b"\xff\xfe")
    with refused(rf"{file}: damaged: not a text of numbers"):
        build_index(tiny)
    path.unlink()
    with refused(rf"{file}: missing file; every sequence needs calib.txt, poses.txt, times.txt"):
        build_index(tiny)


def test_scan_beyond_the_poses(tiny: Path) -> None:
    folder = tiny / "sequences/00"
    for file in ("poses.txt", "times.txt"):
        (folder / file).write_text("".join((folder / file).read_text().splitlines(keepends=True)[:3]))
    with refused(r"poses.txt: 3 poses, none for scan 000003; line n is the pose of scan n, counted from 0"):
        build_index(tiny)


@pytest.mark.parametrize(("part", "suffix"), [("image_2", "png"), ("labels", "label")])
def test_missing_image_and_label_file(tiny: Path, part: str, suffix: str) -> None:
    (tiny / "sequences/00" / part / f"000002.{suffix}").unlink()
    with refused(rf"scan 00_000002: file sequences/00/{part}/000002.{suffix} is missing"):
        build_index(tiny)


def test_sequence_without_its_folder_of_images_is_kept_without_cameras(tiny: Path) -> None:
    whole = build_index(tiny)
    shutil.rmtree(tiny / "sequences/00/image_2")
    index = build_index(tiny)
    assert [f.frame_id for f in index.frames] == [f.frame_id for f in whole.frames]
    assert [len(f.cameras) for f in index.frames] == [0, 0, 0, 0, 1]
    assert index.frames[1].label_path == whole.frames[1].label_path
    assert index.left_out == (
        "sequences/00: kept for supervised training, but without pairs, as it has no folder image_2",
    )
    report = inspect_frame(index, index.frames[1], WORDS)
    assert (report["points"], report["pairs"], report["seen_by_any"], report["sweeps"]) == (30, {}, 0, 1)


def test_linked_velodyne_and_image_2(tiny: Path, tmp_path: Path) -> None:
    plain = build_any("semantickitti", tiny)
    for part in ("velodyne", "image_2", "calib.txt"):
        aside = tmp_path / "odometry" / part
        aside.parent.mkdir(exist_ok=True)
        (tiny / "sequences/00" / part).rename(aside)
        (tiny / "sequences/00" / part).symlink_to(aside)
        with refused(r"leaves the dataset's root through a link, to /\S+; allowed: .*; dataset\.linked_folders"):
            build_any("semantickitti", tiny)
        linked = build_any("semantickitti", tiny, linked_folders=[tmp_path / "odometry"])
        assert (linked.digests, linked.contents) == (plain.digests, plain.contents)


@pytest.mark.parametrize("part", ["", "velodyne"])
def test_sequence_that_was_not_downloaded_is_not_indexed(tiny: Path, part: str) -> None:
    """Its labels, poses and times may be there: they come in archives of all sequences."""
    whole = build_index(tiny)
    shutil.rmtree(tiny / "sequences/00" / part)
    index = build_index(tiny)
    assert [f.frame_id for f in index.frames] == [f.frame_id for f in whole.frames if f.scene != "00"] != []
    assert missing_of_split(index, "test") == "1 of 20351 scans"


@pytest.mark.parametrize("content", [b"\x89PNG", b"", "JPEG"])
def test_image_that_is_no_png(tiny: Path, content: bytes | str) -> None:
    path = tiny / "sequences/00/image_2/000001.png"
    if content == "JPEG":
        Image.new("RGB", (40, 24)).save(path, format=content)
    else:
        path.write_bytes(content)
    with refused(r"image_2/000001.png: truncated or damaged image"):
        build_index(tiny)


def test_no_dataset_and_no_scans(tmp_path: Path) -> None:
    with refused(r"no SemanticKITTI there; allowed: a folder that holds sequences or dataset/sequences"):
        build_index(tmp_path)
    (tmp_path / "sequences/00").mkdir(parents=True)
    with refused(r"no scan with a finite pose; allowed: files like sequences/00/velodyne/000000.bin"):
        build_index(tmp_path)


def test_truncated_scan_and_damaged_labels(tiny: Path) -> None:
    frame = build_index(tiny).frames[0]
    assert frame.label_path is not None
    cloud, labels = tiny / frame.cloud_path, tiny / frame.label_path
    cloud.write_bytes(cloud.read_bytes()[:-3])
    with refused(r"000000.bin: truncated point cloud: 477 bytes is not a multiple of 16 \(4 float32 each\)"):
        read_cloud(cloud)
    with refused(r"000000.label: 30 labels for a cloud of 29 points; exactly one per point is allowed"):
        read_labels(labels, 29, WORDS)
    labels.write_bytes(np.array([10, 2, 300 | 7 << 16], dtype="<u4").tobytes())
    with refused(r"label ids \[2, 300\] are unknown to the vocabulary 'semantickitti' \(allowed: 0 to 1, 10 to 11"):
        read_labels(labels, 3, WORDS)
    labels.write_bytes(labels.read_bytes()[:-1])
    with refused(r"000000.label: truncated label file: 11 bytes is not a multiple of 4"):
        read_labels(labels, 3, WORDS)


# --- build_index of any kind ---


def test_datasets_are_indexed_by_kind(tiny: Path) -> None:
    found = replace(build_any("semantickitti", tiny, max_sweeps=1), contents=None)
    assert found.digest == build_index(tiny, max_sweeps=1).digest
    with pytest.raises(
        ConfigError,
        match=r"nuscenes: give the name of its folder of tables .* as --version \(in a job: dataset\.version\)",
    ):
        build_any("nuscenes", tiny)


@pytest.mark.parametrize("below", ["", "dataset"])
def test_fingerprint_changes_with_tables_and_scans(tiny: Path, below: str) -> None:
    if below:
        aside = tiny.rename(tiny.parent / "aside")
        tiny.mkdir()
        aside.rename(tiny / below)
    before = fingerprint("semantickitti", tiny, "")
    assert fingerprint("semantickitti", tiny, "") == before
    poses = tiny / below / "sequences/11/poses.txt"
    poses.write_text(poses.read_text() + "\n")
    changed = fingerprint("semantickitti", tiny, "")
    assert changed != before
    (tiny / below / "sequences/11/velodyne/000001.bin").touch()
    assert fingerprint("semantickitti", tiny, "") != changed


def test_predictions_are_raw_ids_one_per_point_of_every_scan(tiny: Path, tmp_path: Path) -> None:
    for name in ("11", "12"):
        shutil.copytree(tiny / "sequences" / "00", tiny / "sequences" / name, dirs_exist_ok=True)
        shutil.rmtree(tiny / "sequences" / name / "labels")
    network = network_file(tmp_path / "network.safetensors", num_classes=19)
    done = predicted("semantickitti", tiny, tmp_path / "s", "dataset.eval_split=test", f"predict.checkpoint={network}")
    files = sorted(file.relative_to(done.folder).as_posix() for file in done.folder.rglob("*.*"))
    assert files == [f"sequences/{name}/predictions/00000{n}.label" for name in ("11", "12") for n in range(4)]
    ids = np.concatenate([np.fromfile(done.folder / file, "<u4").reshape(30) for file in files])
    assert set(ids) <= {10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81}
    np.testing.assert_array_equal(
        np.bincount(WORDS.labels(ids, "predictions"), minlength=20)[1:], list(done.manifest["points"].values())
    )
    # As labels of the sequence, they are read like the benchmark's own.
    assert read_labels(done.folder / files[0], 30, WORDS).min() > 0
