"""ScanNet: folders as an index, meshes, labels and depth maps; on a scene of four vertices and on the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from clip2scene.data.clouds import read_cloud, read_depth, read_depths, read_labels
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.datasets import fingerprint
from clip2scene.data.index import read_index, write_index
from clip2scene.data.scannet import build_index
from clip2scene.data.vocabulary import vocabulary
from predicting import network_file, predicted

SCANNET = vocabulary("scannet")
SCENE = "scene0001_00"
_XYZ = [(0, 0, 2), (1, 0, 2), (0, 1, 2.5), (0.5, 0.5, 3)]
_RGB = [(255, 255, 255), (0, 0, 0), (255, 0, 0), (10, 20, 30)]


def _header(count: int, kind: str = "binary_little_endian", label: str | None = None) -> bytes:
    properties = [f"property float {axis}" for axis in "xyz"]
    properties += [f"property uchar {colour}" for colour in ("red", "green", "blue", "alpha")]
    properties += [f"property {label} label"] if label else []
    lines = ["ply", f"format {kind} 1.0", "comment made by hand", f"element vertex {count}", *properties]
    return "\n".join([*lines, "element face 1", "property list uchar int vertex_indices", "end_header\n"]).encode()


def _ply(labels: list[int] | None = None, kind: str = "<", label: str = "ushort") -> bytes:
    """A mesh of four vertices and one face."""
    rows = [(*xyz, *rgb, 255) for xyz, rgb in zip(_XYZ, _RGB, strict=True)]
    if labels is not None:
        rows = [(*row, value) for row, value in zip(rows, labels, strict=True)]
    if kind == "ascii":
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        return _header(len(rows), "ascii", label if labels else None) + text.encode() + b"3 0 1 2\n"
    fields = [(axis, f"{kind}f4") for axis in "xyz"] + [(colour, "u1") for colour in "rgba"]
    if labels is not None:
        fields.append(("label", f"{kind}u2" if label == "ushort" else f"{kind}i4"))
    face = np.array([(3, 0, 1, 2)], [("n", "u1"), ("a", f"{kind}i4"), ("b", f"{kind}i4"), ("c", f"{kind}i4")])
    name = {"<": "binary_little_endian", ">": "binary_big_endian"}[kind]
    body = np.array(rows, fields).tobytes() + face.tobytes()
    return _header(len(rows), name, label if labels is not None else None) + body


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """The folder of a scene with five posed images, 0 to 4; the dataset's root is two above."""
    folder = tmp_path / "scans" / SCENE
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    (folder / f"{SCENE}_vh_clean_2.ply").write_bytes(_ply())
    (folder / f"{SCENE}_vh_clean_2.labels.ply").write_bytes(_ply([1, 39, 40, 14]))
    (folder / "intrinsic" / "intrinsic_color.txt").write_text("20 0 20 0\n0 20 15 0\n0 0 1 0\n0 0 0 1\n")
    for number in range(5):
        Image.new("RGB", (40, 30)).save(folder / "color" / f"{number}.jpg")
        Image.fromarray(np.full((15, 20), 2000 + number, np.uint16)).save(folder / "depth" / f"{number}.png")
        pose = np.eye(4)
        pose[0, 3] = number
        np.savetxt(folder / "pose" / f"{number}.txt", pose, fmt="%.6f")
    return folder


def test_scene_is_one_frame_of_mesh_and_posed_images(scene: Path, tmp_path: Path) -> None:
    index = build_index(tmp_path)
    assert (index.dataset, index.left_out, len(index.frames)) == ("scannet", (), 1)
    frame = index.frames[0]
    assert (frame.frame_id, frame.scene, frame.sweeps) == (SCENE, SCENE, ())
    np.testing.assert_array_equal(frame.world_from_lidar, np.eye(4))
    assert [camera.name for camera in frame.cameras] == ["000000", "000001", "000002", "000003", "000004"]
    assert [camera.timestamp_us for camera in frame.cameras] == [0, 33333, 66666, 100000, 133333]
    third = frame.cameras[3]
    assert (third.width, third.height) == (40, 30)
    np.testing.assert_array_equal(third.intrinsics, [[20, 0, 20], [0, 20, 15], [0, 0, 1]])
    np.testing.assert_array_equal(third.camera_from_world[:3, 3], [-3, 0, 0])
    depths = read_depths(DataRoot(tmp_path), frame)
    assert depths is not None
    assert [float(depth_hw[0, 0]) for depth_hw in depths if depth_hw is not None] == pytest.approx(
        [2.0, 2.001, 2.002, 2.003, 2.004]
    )


@pytest.mark.parametrize(
    ("wanted", "chosen"), [(1, [2]), (2, [1, 3]), (3, [0, 2, 4]), (5, [*range(5)]), (9, [*range(5)])]
)
def test_images_per_scene_are_spread_evenly(scene: Path, tmp_path: Path, wanted: int, chosen: list[int]) -> None:
    cameras = build_index(tmp_path, images_per_scene=wanted).frames[0].cameras
    assert [int(camera.name) for camera in cameras] == chosen


def test_pose_that_is_not_finite_is_left_out_and_reported(scene: Path, tmp_path: Path) -> None:
    for number in (1, 4):
        (scene / "pose" / f"{number}.txt").write_text("-inf -inf -inf -inf\n" * 4)
    index = build_index(tmp_path)
    assert [camera.name for camera in index.frames[0].cameras] == ["000000", "000002", "000003"]
    assert index.left_out == (f"{SCENE}: 2 of its images left out, as their poses are not finite (1, 4)",)
    write_index(index, tmp_path / "index.parquet")
    assert read_index(tmp_path / "index.parquet").left_out == index.left_out


def test_zero_padded_names_are_the_same_images(scene: Path, tmp_path: Path) -> None:
    plain = build_index(tmp_path).frames[0]
    for folder, suffix in (("color", "jpg"), ("depth", "png"), ("pose", "txt")):
        for number in range(5):
            (scene / folder / f"{number}.{suffix}").rename(scene / folder / f"{3 * number:05d}.{suffix}")
    (scene / "pose" / "00003.txt").write_text("-inf -inf -inf -inf\n" * 4)
    index = build_index(tmp_path)
    cameras = index.frames[0].cameras
    assert [camera.name for camera in cameras] == ["000000", "000006", "000009", "000012"]
    assert [camera.timestamp_us for camera in cameras] == [0, 200000, 300000, 400000]
    assert cameras[-1].image_path == f"scans/{SCENE}/color/00012.jpg"
    assert cameras[-1].depth_path == f"scans/{SCENE}/depth/00012.png"
    np.testing.assert_array_equal(cameras[-1].camera_from_world, plain.cameras[-1].camera_from_world)
    assert index.left_out == (f"{SCENE}: 1 of its images left out, as their poses are not finite (00003)",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0003.jpg", r"color/3.jpg: has the number of 0003.jpg; allowed: one image per number"),
        ("frame-3.jpg", r"color/frame-3.jpg: not an image's number; allowed: names like 60.jpg or 000060.jpg"),
        ("3.color.jpg", r"color/3.color.jpg: not an image's number"),
    ],
)
def test_names_of_images_are_numbers_and_each_occurs_once(scene: Path, tmp_path: Path, name: str, message: str) -> None:
    shutil.copy(scene / "color" / "3.jpg", scene / "color" / name)
    with refused(message):
        build_index(tmp_path)


def _as_frames_25k(scene: Path) -> Path:
    """Move the images of a scene to where the archive scannet_frames_25k has them, and return that folder."""
    folder = scene.parents[1] / "scannet_frames_25k" / scene.name
    folder.mkdir(parents=True)
    for part, suffix in (("color", "jpg"), ("depth", "png"), ("pose", "txt")):
        (scene / part).rename(folder / part)
        for number in range(5):
            (folder / part / f"{number}.{suffix}").rename(folder / part / f"{100 * number:06d}.{suffix}")
    (scene / "intrinsic" / "intrinsic_color.txt").rename(folder / "intrinsics_color.txt")
    (folder / "intrinsics_depth.txt").write_text("not read")
    return folder


def test_images_of_frames_25k_are_those_of_a_scene_without_exported_ones(scene: Path, tmp_path: Path) -> None:
    exported = build_index(tmp_path)
    before = fingerprint("scannet", tmp_path, "")
    _as_frames_25k(scene)
    index = build_index(tmp_path)
    assert fingerprint("scannet", tmp_path, "") != before
    assert (index.left_out, len(index.frames[0].cameras)) == ((), 5)
    assert (index.frames[0].cloud_path, index.frames[0].label_path) == (
        exported.frames[0].cloud_path,
        exported.frames[0].label_path,
    )
    for number, (camera, plain) in enumerate(zip(index.frames[0].cameras, exported.frames[0].cameras, strict=True)):
        assert camera.name == f"{100 * number:06d}"
        assert camera.image_path == f"scannet_frames_25k/{SCENE}/color/{camera.name}.jpg"
        assert camera.depth_path == f"scannet_frames_25k/{SCENE}/depth/{camera.name}.png"
        np.testing.assert_array_equal(camera.camera_from_world, plain.camera_from_world)
        np.testing.assert_array_equal(camera.intrinsics, plain.intrinsics)
    depths = read_depths(DataRoot(tmp_path), index.frames[0])
    assert depths is not None
    assert [float(depth_hw[0, 0]) for depth_hw in depths if depth_hw is not None] == pytest.approx(
        [2.0, 2.001, 2.002, 2.003, 2.004]
    )
    before = fingerprint("scannet", tmp_path, "")
    (tmp_path / "scannet_frames_25k" / SCENE / "color" / "000500.jpg").touch()
    assert fingerprint("scannet", tmp_path, "") != before


def test_exported_images_come_before_those_of_frames_25k(scene: Path, tmp_path: Path) -> None:
    exported = build_index(tmp_path)
    shutil.copytree(scene, tmp_path / "aside" / SCENE)
    _as_frames_25k(scene)
    shutil.copytree(tmp_path / "aside" / SCENE, scene, dirs_exist_ok=True)
    assert build_index(tmp_path).digest == exported.digest


@pytest.mark.parametrize("frames_25k", [False, True])
def test_scene_without_its_folder_of_depth_maps_is_paired_without_them(
    scene: Path, tmp_path: Path, frames_25k: bool
) -> None:
    shutil.copytree(scene, tmp_path / "scans" / "scene0002_00")
    for file in ("vh_clean_2.ply", "vh_clean_2.labels.ply"):
        (tmp_path / "scans" / "scene0002_00" / f"{SCENE}_{file}").rename(
            tmp_path / "scans" / "scene0002_00" / f"scene0002_00_{file}"
        )
    images = _as_frames_25k(scene) if frames_25k else scene
    shutil.rmtree(images / "depth")
    index = build_index(tmp_path)
    one, other = index.frames
    assert [camera.depth_path for camera in one.cameras] == [None] * 5
    assert read_depths(DataRoot(tmp_path), one) is None
    assert read_depths(DataRoot(tmp_path), other) is not None
    assert index.left_out == (
        f"1 of 2 scenes have no folder depth (the first is {images.relative_to(tmp_path)}), so their pairs are not "
        "tested for occlusion",
    )


def test_linked_scene(scene: Path, tmp_path: Path) -> None:
    plain = build_index(tmp_path)
    aside = tmp_path / "aside" / SCENE
    aside.parent.mkdir()
    root = tmp_path / "root"
    (root / "scans").mkdir(parents=True)
    scene.rename(aside)
    (root / "scans" / SCENE).symlink_to(aside)
    with refused(r"leaves the dataset's root through a link, to /\S+; allowed: .*; dataset\.linked_folders"):
        build_index(root)
    linked = build_index(root, linked_folders=[aside.parent])
    assert linked.digests == plain.digests
    assert read_depths(linked.root, linked.frames[0]) is not None
    with refused(r"leaves the dataset's root through a link"):
        read_depths(DataRoot(root), linked.frames[0])


def test_scene_without_its_mesh_is_left_out_even_with_labels(scene: Path, tmp_path: Path) -> None:
    shutil.copytree(scene, tmp_path / "scans" / "scene0000_00")
    index = build_index(tmp_path)
    assert [frame.frame_id for frame in index.frames] == [SCENE]
    assert index.left_out == ("scene0000_00: left out, as its mesh scene0000_00_vh_clean_2.ply is missing",)


def test_scene_without_images_or_labels_is_kept(scene: Path, tmp_path: Path) -> None:
    shutil.rmtree(scene / "color")
    (scene / f"{SCENE}_vh_clean_2.labels.ply").unlink()
    index = build_index(tmp_path)
    frame = index.frames[0]
    assert (frame.cameras, frame.label_path) == ((), None)
    assert read_depths(DataRoot(tmp_path), frame) is None
    assert index.left_out == (
        f"{SCENE}: kept for supervised training, but without pairs, as color has no image with a finite pose",
    )


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("depth/3.png", None, r"color/3.jpg: file .*depth/3.png is missing"),
        ("pose/3.txt", None, r"color/3.jpg: file .*pose/3.txt is missing"),
        ("pose/3.txt", "1 0 0", r"pose/3.txt: 3 numbers; a matrix of 4 x 4 is needed"),
        ("pose/3.txt", "one two", r"pose/3.txt: not a matrix"),
        ("pose/3.txt", "2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1", r"pose/3.txt: not a rigid pose"),
        (
            "intrinsic/intrinsic_color.txt",
            None,
            r"have no intrinsics; allowed: scans/\S+/intrinsic/intrinsic_color.txt or scans/\S+/intrinsics_c",
        ),
        ("intrinsic/intrinsic_color.txt", "0 " * 16, r"is not a pinhole camera"),
        (
            "intrinsic/intrinsic_color.txt",
            "1170 0 648 0 0 1170 484 0 0 0 1 0 0 0 0 1",
            r"the principal point \(648, 484\) lies outside the images of 40 x 30 pixels",
        ),
        ("color/0.jpg", "no image", r"color/0.jpg: truncated or damaged image"),
    ],
)
def test_damaged_scene(scene: Path, tmp_path: Path, file: str, text: str | None, message: str) -> None:
    (scene / file).unlink()
    if text is not None:
        (scene / file).write_text(text)
    with refused(message):
        build_index(tmp_path)


def test_folder_without_scenes(tmp_path: Path) -> None:
    with refused(r"scans: cannot list the scenes \(No such file or directory\)"):
        build_index(tmp_path)
    (tmp_path / "scans").mkdir()
    with refused(r"scans: no folder sceneXXXX_YY"):
        build_index(tmp_path)


@pytest.mark.parametrize("kind", ["<", ">", "ascii"])
def test_mesh_in_every_encoding(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mesh.ply").write_bytes(_ply(kind=kind))
    cloud_NI = read_cloud(tmp_path / "mesh.ply")
    assert (cloud_NI.shape, cloud_NI.dtype) == ((4, 7), np.float32)
    np.testing.assert_array_equal(cloud_NI[:, :3], np.array(_XYZ, np.float32))
    np.testing.assert_allclose(cloud_NI[:, 3], [1, 0, 0.299, (2.99 + 11.74 + 3.42) / 255], atol=1e-6)
    np.testing.assert_allclose(cloud_NI[:, 4:] * 255, np.array(_RGB), atol=1e-4)
    (tmp_path / "mesh.labels.ply").write_bytes(_ply([1, 0, 40, 39], kind=kind))
    labels_N = read_labels(tmp_path / "mesh.labels.ply", 4, SCANNET)
    assert labels_N.tolist() == [1, 0, 0, 20]  # wall, unlabelled, other property, other furniture


@pytest.mark.parametrize("kind", ["<", "ascii"])
def test_truncated_mesh(tmp_path: Path, kind: str) -> None:
    data = _ply(kind=kind)
    start = data.index(b"end_header")
    complete = {"<": start + 11 + 3 * 16, "ascii": len(data) - len(b"0.5 0.5 3 10 20 30 255\n3 0 1 2\n")}[kind]
    for keep, message in ((2, "not a PLY file"), (start, "no end_header"), (complete + 4, "3 of 4 vertices are there")):
        (tmp_path / "mesh.ply").write_bytes(data[:keep])
        with refused(f"mesh.ply: .*{message}"):
            read_cloud(tmp_path / "mesh.ply")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"format ascii", b"format morse", "without a known format; allowed: binary_little_endian"),
        (b"element vertex 4", b"element vertex 0", "without vertices"),
        (b"element vertex 4", b"element vertex many", "first element: not 'element vertex COUNT'"),
        (b"property float x", b"property list uchar int x", "is not a scalar property of a vertex"),
        (b"property float y", b"property float x", "property 'x' occurs twice"),
        (b"uchar red", b"uchar rot", "no property red"),
        (b"uchar red", b"float red", "red is float32; 8-bit colours"),
        (b"1 0 2 0 0 0", b"1 zero 2 0 0 0", "a vertex that is not numbers"),
        (b"1 0 2 0 0 0", b"1 nan 2 0 0 0", "point 1 of 4 is not finite"),
        (b"1 0 2 0 0 0", b"1 0 2 0 256 0", "property green has values that are not uint8"),
    ],
)
def test_damaged_mesh(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    data = _ply(kind="ascii")
    assert old in data
    (tmp_path / "mesh.ply").write_bytes(data.replace(old, new))
    with refused(f"mesh.ply: .*{message}"):
        read_cloud(tmp_path / "mesh.ply")


def test_labels_outside_nyu40_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mesh.labels.ply"
    path.write_bytes(_ply([1, 41, 1163, 41]))
    with refused(r"mesh.labels.ply: label ids \[41, 1163\] are unknown to the vocabulary 'scannet'"):
        read_labels(path, 4, SCANNET)
    path.write_bytes(_ply([1, -7, 2, 3], label="int"))
    with refused(r"label -7 is not a class id"):
        read_labels(path, 4, SCANNET)
    path.write_bytes(_ply())
    with refused(r"no property label"):
        read_labels(path, 4, SCANNET)
    with refused(r"mesh.labels.ply: 4 labels for a cloud of 5 points"):
        path.write_bytes(_ply([1, 2, 3, 4]))
        read_labels(path, 5, SCANNET)


def test_labels_are_never_read_as_a_cloud(tmp_path: Path) -> None:
    (tmp_path / "mesh.labels.ply").write_bytes(_ply([1, 2, 3, 4]))
    (tmp_path / "mesh.ply").symlink_to(tmp_path / "mesh.labels.ply")
    for name in ("mesh.labels.ply", "mesh.ply"):
        with refused(r"a file of labels \(its colours are the labels\)"):
            read_cloud(tmp_path / name)


def test_depth_map_is_millimetres_of_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    with refused("0.png: missing depth map"):
        read_depth(path)
    Image.fromarray(np.array([[0, 1500], [65535, 1]], np.uint16)).save(path)
    depth_hw = read_depth(path)
    assert depth_hw.dtype == np.float32
    np.testing.assert_allclose(depth_hw, [[0, 1.5], [65.535, 0.001]], rtol=1e-6)
    Image.fromarray(np.random.default_rng(0).integers(0, 9000, (48, 64), dtype=np.uint16)).save(path)
    whole = path.read_bytes()
    for keep in (0, 20, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:keep])
        with refused("0.png: truncated or damaged depth map"):
            read_depth(path)
    Image.new("RGB", (4, 4)).save(path)
    with refused("0.png: the depth map has mode RGB; one channel of 16 bits"):
        read_depth(path)


def test_real_scene_has_a_label_of_the_20_classes_or_none_for_every_vertex(real_data: Path) -> None:
    index = build_index(real_data / "scannet")
    (frame,) = index.frames
    assert [camera.name for camera in frame.cameras] == ["000000", "000060", "000120", "000180", "000240", "000290"]
    cloud_NI = read_cloud(index.root.path_of(frame.cloud_path))
    assert cloud_NI.shape == (81369, 7)
    assert 0 <= cloud_NI[:, 3].min() < 0.1 < 0.9 < cloud_NI[:, 3].max() <= 1
    assert frame.label_path is not None
    labels_N = read_labels(index.root.path_of(frame.label_path), len(cloud_NI), SCANNET)
    assert len(SCANNET.classes) == 20
    assert 0 < labels_N.max() <= 20
    # The floor lies at the bottom and the walls' middle stands above it: labels and vertices are in one order.
    heights = {name: np.median(cloud_NI[labels_N == SCANNET.classes.index(name) + 1, 2]) for name in ("floor", "wall")}
    assert heights["floor"] < 0.1 < 1 < heights["wall"]


@pytest.mark.parametrize("folder", ["scans", "scans_test"])
def test_predictions_are_a_nyu40_id_per_line_for_every_vertex(scene: Path, tmp_path: Path, folder: str) -> None:
    shutil.rmtree(scene)  # a given network needs no training scenes
    name = "scene0707_00"
    test = tmp_path / folder / name
    test.mkdir(parents=True)
    (test / f"{name}_vh_clean_2.ply").write_bytes(_ply())
    (tmp_path / "scannetv2_train.txt").write_text(SCENE)
    (tmp_path / "scannetv2_test.txt").write_text(name)
    network = network_file(tmp_path / "network.safetensors", num_classes=20)
    done = predicted("scannet", tmp_path, tmp_path / "s", "dataset.eval_split=test", f"predict.checkpoint={network}")
    assert [file.name for file in done.folder.iterdir()] == [f"{name}.txt"]
    text = (done.folder / f"{name}.txt").read_text()
    assert text.endswith("\n")
    ids = [int(line) for line in text.splitlines()]
    assert len(ids) == len(_XYZ)
    labels_N = SCANNET.labels(np.array(ids), name)
    assert labels_N.min() > 0
    assert list(done.manifest["points"].values()) == np.bincount(labels_N, minlength=21)[1:].tolist()
