from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from clip2scene.data.clouds import read_cloud, read_image, read_labels
from clip2scene.data.vocabulary import vocabulary

NUSCENES = vocabulary("nuscenes")


@pytest.fixture
def cloud(tmp_path: Path) -> tuple[Path, np.ndarray]:
    cloud_N5 = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    path = tmp_path / "cloud.pcd.bin"
    path.write_bytes(cloud_N5.tobytes())
    return path, cloud_N5


def test_cloud_is_read_as_it_was_written_and_may_be_changed(cloud: tuple[Path, np.ndarray]) -> None:
    path, expected = cloud
    read = read_cloud(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read[:, :3], expected[:, :3])
    np.testing.assert_array_equal(read[:, 3], expected[:, 3] / 255)
    read += 1  # an array of its own, not a view of immutable bytes


def test_the_suffix_says_how_many_columns_a_point_has(tmp_path: Path) -> None:
    cloud_N4 = np.random.default_rng(0).uniform(size=(50, 4)).astype(np.float32)
    (tmp_path / "000000.bin").write_bytes(cloud_N4.tobytes())
    read = read_cloud(tmp_path / "000000.bin")
    np.testing.assert_array_equal(read, cloud_N4)
    read += 1
    (tmp_path / "cloud.las").write_bytes(cloud_N4.tobytes())
    with refused(r"cloud.las: its name is not a point cloud's; allowed: .pcd.bin, .bin, .ply"):
        read_cloud(tmp_path / "cloud.las")


@pytest.mark.parametrize("keep", [999, 981, 4])
def test_truncated_cloud(cloud: tuple[Path, np.ndarray], keep: int) -> None:
    cloud[0].write_bytes(cloud[0].read_bytes()[:keep])
    with refused(rf"cloud.pcd.bin: truncated point cloud: {keep} bytes is not a multiple of 20"):
        read_cloud(cloud[0])


def test_empty_and_missing_cloud(tmp_path: Path) -> None:
    with refused(r"nowhere.bin: missing point cloud"):
        read_cloud(tmp_path / "nowhere.bin")
    folder = tmp_path / "folder.bin"
    folder.mkdir()
    with refused(r"cannot read the point cloud \(Is a directory\)"):
        read_cloud(folder)
    (tmp_path / "empty.bin").touch()
    with refused(r"empty.bin: empty point cloud"):
        read_cloud(tmp_path / "empty.bin")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_cloud_with_values_that_are_not_finite(cloud: tuple[Path, np.ndarray], value: float) -> None:
    path, cloud_N5 = cloud
    cloud_N5[17, 2] = value
    path.write_bytes(cloud_N5.tobytes())
    with refused(r"point 17 of 50 is not finite"):
        read_cloud(path)


def test_labels_are_mapped_to_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "labels.bin"
    path.write_bytes(bytes([0, 17, 24, 31, 15, 16]))
    labels = read_labels(path, 6, NUSCENES)
    assert labels.dtype == np.uint8
    names = ["ignore" if label == 0 else NUSCENES.classes[label - 1] for label in labels]
    assert names == ["ignore", "car", "driveable_surface", "ignore", "bus", "bus"]


@pytest.mark.parametrize("points", [5, 7])
def test_label_file_of_the_wrong_length(tmp_path: Path, points: int) -> None:
    path = tmp_path / "labels.bin"
    path.write_bytes(bytes(6))
    with refused(rf"labels.bin: 6 labels for a cloud of {points} points"):
        read_labels(path, points, NUSCENES)


def test_labels_of_uint32_have_the_class_below_and_the_instance_above(tmp_path: Path) -> None:
    path = tmp_path / "000000.label"
    path.write_bytes(np.array([0xFFFF << 16 | 259, 1 << 16 | 40, 99, 80], dtype="<u4").tobytes())
    words = vocabulary("semantickitti")
    labels = read_labels(path, 4, words)
    assert labels.dtype == np.uint8
    names = ["ignore" if label == 0 else words.classes[label - 1] for label in labels]
    assert names == ["other_vehicle", "road", "ignore", "pole"]


def test_unknown_class_and_missing_label_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.bin"
    path.write_bytes(bytes([1, 200, 32]))
    with refused(r"labels.bin: label ids \[32, 200\] are unknown to the vocabulary 'nuscenes' \(allowed: 0 to 31\)"):
        read_labels(path, 3, NUSCENES)
    with refused(r"missing label file"):
        read_labels(tmp_path / "nowhere.bin", 3, NUSCENES)


def _jpeg(mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_image_is_rgb_height_first(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(_jpeg(mode))
    image = read_image(path, width=40, height=24)
    assert (image.shape, image.dtype) == ((24, 40, 3), np.uint8)
    with Image.open(path) as expected:
        np.testing.assert_array_equal(image, np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("lost", [1, 2, 10, 500, "half", "all"])
def test_truncated_jpeg(tmp_path: Path, lost: int | str) -> None:
    data = _jpeg()
    count = {"half": len(data) // 2, "all": len(data)}.get(lost, lost) if isinstance(lost, str) else lost
    path = tmp_path / "image.jpg"
    path.write_bytes(data[: len(data) - int(count)])
    with refused(r"image.jpg: truncated or damaged image"):
        read_image(path, 40, 24)


def test_missing_image_no_image_and_image_of_another_size(tmp_path: Path) -> None:
    with refused(r"nowhere.jpg: missing image"):
        read_image(tmp_path / "nowhere.jpg", 40, 24)
    (tmp_path / "text.jpg").write_text("not an image")
    with refused(r"truncated or damaged image \(cannot identify"):
        read_image(tmp_path / "text.jpg", 40, 24)
    (tmp_path / "image.jpg").write_bytes(_jpeg())
    with refused(r"the image has 40 x 24 pixels, the index says 24 x 40"):
        read_image(tmp_path / "image.jpg", 24, 40)
