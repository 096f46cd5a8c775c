"""Builds the index from ScanNet's folders: one frame per scene, with the mesh as cloud and the images as cameras.

``scans/sceneXXXX_YY`` holds ``sceneXXXX_YY_vh_clean_2.ply`` (the mesh, with its true colours) and, where labels are
known, ``sceneXXXX_YY_vh_clean_2.labels.ply``. The images are those that ScanNet's own SensReader exports to the same
folder or, if it has no folder ``color``, those of ScanNet's archive ``scannet_frames_25k`` (every 100th frame), in
``scannet_frames_25k/sceneXXXX_YY``: ``color/N.jpg``, ``depth/N.png`` (millimetres), ``pose/N.txt``
(world_from_camera), and ``intrinsic/intrinsic_color.txt`` (SensReader) or ``intrinsics_color.txt`` (the archive). N is
the image's number, like ``60`` (SensReader) or ``000060`` (the archive), the same in all three files.

World coordinates are those of mesh and poses: ``axisAlignment`` of ``sceneXXXX_YY.txt`` is not applied, so walls may
stand at any angle to x and y (z is up). Intrinsics of the depth maps are not read, as these are registered to the
colour images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from clip2scene.data.clouds import image_size
from clip2scene.data.dataroot import DataRoot, DatasetFiles
from clip2scene.data.index import Camera, Frame, Index
from clip2scene.data.poses import check_pinhole, is_rotation
from clip2scene.errors import DataError

FOLDER = "scans"
TEST_FOLDER = "scans_test"
"""Where ScanNet's download puts the scans of its test split."""
FRAMES_FOLDER = "scannet_frames_25k"
_INTRINSICS = ("intrinsic/intrinsic_color.txt", "intrinsics_color.txt")
_RATE_HZ = 30
"""Images per second, which turn an image's number into its time."""


def build_index(
    root: Path,
    *,
    folder: str = FOLDER,
    images_per_scene: int | None = None,
    linked_folders: Iterable[Path] = (),
) -> Index:
    """Index every scene of a ScanNet folder: mesh, posed images with depth, and labels if there are any.

    A scene without a mesh is left out, and so is an image without a finite pose (ScanNet writes -inf where tracking was
    lost). A scene without images is kept for supervised training, though it has no pairs. The images of a scene without
    a folder ``depth`` have no depth maps, so that its pairs include hidden points. ``Index.left_out`` reports all four.

    Args:
        root: the dataset's folder, which may also hold ``scannet_frames_25k``.
        folder: the scenes' folder in it, ``scans`` or ``scans_test``.
        images_per_scene: at most this many images per scene, spread evenly over those with a finite pose; all images if
            not given.
        linked_folders: folders outside of the root to which links in it may lead.

    Returns:
        The index, with one frame per scene, ordered by scene. ``frame_id`` is the scene's name; cameras are named and
        ordered by image number (``000060``).

    Raises:
        DataError: there is no scene; a pose, an intrinsic matrix or the first image of a scene is damaged; an image has
            no pose, or no depth file in a scene that has a folder of them; a JPEG's name is not a number, or has the
            number of another; or a path leaves the root.
    """
    data_root = DataRoot.at(root, linked_folders)
    frames: list[Frame] = []
    left_out: list[str] = []
    without_depth: list[str] = []
    for scene in _scenes(data_root.path / folder):
        scene_folder = f"{folder}/{scene}"
        files = DatasetFiles(data_root)  # one per scene, as it keeps all names, and ScanNet has ten million
        present = files.names(scene_folder, rf"{scene}_vh_clean_2(\.labels)?\.ply")
        mesh, labels = f"{scene}_vh_clean_2.ply", f"{scene}_vh_clean_2.labels.ply"
        if mesh not in present:
            left_out.append(f"{scene}: left out, as its mesh {mesh} is missing")
            continue
        places = (scene_folder, f"{FRAMES_FOLDER}/{scene}")
        images = next((place for place in places if (data_root.path / place / "color").is_dir()), scene_folder)
        cameras, unposed = _cameras(data_root, images, files, images_per_scene)
        if any(camera.depth_path is None for camera in cameras):
            without_depth.append(images)
        if unposed:
            left_out.append(
                f"{scene}: {len(unposed)} of its images left out, as their poses are not finite "
                f"({', '.join(unposed[:5])}{', ...' if len(unposed) > 5 else ''})"
            )
        if not cameras:
            left_out.append(
                f"{scene}: kept for supervised training, but without pairs, as color has no image with a finite pose"
            )
        frame = Frame(
            frame_id=scene,
            scene=scene,
            timestamp_us=0,
            cloud_path=files.existing(f"{scene_folder}/{mesh}", scene),
            world_from_lidar=np.eye(4),
            sweeps=(),
            cameras=cameras,
            label_path=files.existing(f"{scene_folder}/{labels}", scene) if labels in present else None,
        )
        frames.append(frame)
    if without_depth:
        left_out.append(
            f"{len(without_depth)} of {len(frames)} scenes have no folder depth (the first is {without_depth[0]}), so "
            "their pairs are not tested for occlusion"
        )
    return Index("scannet", data_root, folder, tuple(frames), tuple(left_out))


def _cameras(
    root: DataRoot, folder: str, files: DatasetFiles, images_per_scene: int | None
) -> tuple[tuple[Camera, ...], list[str]]:
    """The images in a folder of a scene as cameras, and the names of the images without a finite pose."""
    stems = _stems(folder, files)
    measured = (root.path / folder / "depth").is_dir()
    world_from_camera = {
        stem: _matrix(root, files.existing(f"{folder}/pose/{stem}.txt", f"{folder}/color/{stem}.jpg")) for stem in stems
    }
    posed = [stem for stem in stems if np.isfinite(world_from_camera[stem]).all()]
    unposed = [stem for stem in stems if not np.isfinite(world_from_camera[stem]).all()]
    if images_per_scene is not None and len(posed) > images_per_scene:
        # The middles of equal parts, so that neither end of the recording is favoured.
        posed = [posed[(2 * i + 1) * len(posed) // (2 * images_per_scene)] for i in range(images_per_scene)]
    if not posed:
        return (), unposed
    # One camera took all images of a scene, so one header gives their size; read_image refuses any other.
    width, height = image_size(root.path_of(f"{folder}/color/{posed[0]}.jpg"))
    intrinsics = _intrinsics(root, folder, files, width, height)
    cameras = [
        Camera(
            name=f"{int(stem):06d}",
            image_path=files.existing(f"{folder}/color/{stem}.jpg", folder),
            width=width,
            height=height,
            intrinsics=intrinsics,
            camera_from_world=_inverse(world_from_camera[stem], f"{folder}/pose/{stem}.txt"),
            timestamp_us=int(stem) * 1_000_000 // _RATE_HZ,
            depth_path=files.existing(f"{folder}/depth/{stem}.png", f"{folder}/color/{stem}.jpg") if measured else None,
        )
        for stem in posed
    ]
    return tuple(cameras), unposed


def _stems(folder: str, files: DatasetFiles) -> list[str]:
    """Names of a scene's images without ``.jpg``, by number; the pose and depth files have the same.

    A name that is not a number is refused, as a scene that silently has fewer images would teach less, or nothing.
    """
    stem_of: dict[int, str] = {}
    for name in files.names(f"{folder}/color", r".*\.jpg"):
        stem = name.removesuffix(".jpg")
        if not re.fullmatch(r"[0-9]+", stem):
            raise DataError(f"{folder}/color/{name}: not an image's number; allowed: names like 60.jpg or 000060.jpg")
        other = stem_of.setdefault(int(stem), stem)
        if other != stem:
            raise DataError(f"{folder}/color/{name}: has the number of {other}.jpg; allowed: one image per number")
    return [stem for _, stem in sorted(stem_of.items())]


def _intrinsics(root: DataRoot, folder: str, files: DatasetFiles, width: int, height: int) -> np.ndarray:
    known = [f"{folder}/{name}" for name in _INTRINSICS]
    relative = next((path for path in known if files.holds(path)), None)
    if relative is None:
        raise DataError(f"{folder}: its images have no intrinsics; allowed: {' or '.join(known)} below {root.path}")
    relative = files.existing(relative, folder)
    matrix = _matrix(root, relative)[:3, :3]
    check_pinhole(matrix, f"{relative}:")
    if not (0 < matrix[0, 2] < width and 0 < matrix[1, 2] < height):
        raise DataError(
            f"{relative}: the principal point ({matrix[0, 2]:g}, {matrix[1, 2]:g}) lies outside the images of "
            f"{width} x {height} pixels; images and intrinsics of one resolution are needed"
        )
    return matrix


def _inverse(world_from_camera: np.ndarray, source: str) -> np.ndarray:
    if not is_rotation(world_from_camera[:3, :3]) or (world_from_camera[3] != (0, 0, 0, 1)).any():
        raise DataError(f"{source}: not a rigid pose (a rotation, a translation and the last row 0 0 0 1 are needed)")
    return np.linalg.inv(world_from_camera)  # not `inverse`: the file's six digits round the rotation


def _matrix(root: DataRoot, relative: str) -> np.ndarray:
    """(4, 4) float64 of a text file, which may hold infinities."""
    try:
        values = np.array(root.path_of(relative).read_text(encoding="ascii").split(), dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{relative}: not a matrix of 4 x 4 numbers ({error})") from error
    if values.size != 16:
        raise DataError(f"{relative}: {values.size} numbers; a matrix of 4 x 4 is needed")
    return values.reshape(4, 4)


def _scenes(folder: Path) -> list[str]:
    """Names of the scenes' folders, in order."""
    try:
        scenes = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"scene\d{4}_\d{2}", path.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot list the scenes ({error.strerror})") from error
    if not scenes:
        raise DataError(f"{folder}: no folder sceneXXXX_YY; a ScanNet dataset has one per scene")
    return scenes
