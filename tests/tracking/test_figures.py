from __future__ import annotations

import io
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clip2scene.data.nuscenes import build_index
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import DataError
from clip2scene.jobfile import load_job
from clip2scene.run_log import RunLog
from clip2scene.stages import Stages
from clip2scene.tracking.figures import charts
from clip2scene.tracking.figures.keyframe import frame_figure
from clip2scene.tracking.figures.labels import birds_eye, frame_overview
from clip2scene.training.evaluate import Scores
from commands import REPOSITORY

DEMO = REPOSITORY / "jobs" / "demo.yaml"
NUSCENES = vocabulary("nuscenes")
CAR, ROAD, SIDEWALK = (NUSCENES.classes.index(name) + 1 for name in ("car", "driveable_surface", "sidewalk"))
RED, GREY, BLUE = (214, 39, 40), (169, 173, 179), (168, 205, 236)
FIRST, SECOND = (31, 95, 168), (224, 123, 0)
"""Colours of the first two lines or bars of a chart."""


def pixels(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def area(image_HW3, colour) -> int:
    """Number of pixels of a colour, up to rounding."""
    return int((np.abs(image_HW3 - np.asarray(colour)).max(axis=2) <= 3).sum())


def colour(label):
    return NUSCENES.colours[label - 1]


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.fixture
def grid():
    """Points on a regular grid over a 400 x 224 image."""
    u, v = np.meshgrid(np.arange(2.0, 398, 6), np.arange(100.0, 220, 6))
    return np.stack([u.ravel(), v.ravel()], axis=1).astype(np.float32)


def test_labels_are_drawn_where_they_fall(grid):
    image = np.full((224, 400, 3), 128, np.uint8)
    labels = np.where(grid[:, 0] < 200, ROAD, CAR)
    labels[grid[:, 1] > 190] = 0
    drawn = pixels(frame_overview({"CAM_FRONT": image}, {"CAM_FRONT": grid}, {"CAM_FRONT": labels}, NUSCENES))
    left, right = np.array_split(drawn[: drawn.shape[0] * 3 // 4], 2, axis=1)
    assert area(left, colour(ROAD)) > 10 * max(area(right, colour(ROAD)), 1)
    assert area(right, colour(CAR)) > 10 * max(area(left, colour(CAR)), 1)
    assert area(drawn, colour(SIDEWALK)) == 0


def test_the_legend_names_only_what_occurs(grid):
    image = np.zeros((224, 400, 3), np.uint8)
    labels = np.full(len(grid), CAR)
    figure = frame_overview({"CAM_FRONT": image}, {"CAM_FRONT": grid}, {"CAM_FRONT": labels}, NUSCENES)
    assert "car" in texts(figure)
    assert not {"none", "driveable surface", "bus"} & set(texts(figure))


@pytest.mark.parametrize("labelled", [True, False])
def test_frame_overview_has_one_panel_per_camera(grid, labelled):
    names = ["CAM_BACK", "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"]
    images = dict.fromkeys(names, np.full((224, 400, 3), 60, np.uint8))
    labels = dict.fromkeys(names, np.full(len(grid), ROAD)) if labelled else None
    figure = frame_overview(images, dict.fromkeys(names, grid), labels, NUSCENES)
    titles = [axes.get_title() for axes in figure.axes[:6]]
    assert titles[0] == f"CAM_FRONT_LEFT: {len(grid):,} points"
    assert [title.split(":")[0] for title in titles[3:]] == ["CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]
    assert ("driveable surface" in texts(figure)) == labelled
    assert pixels(figure).shape[1] == 1650


def test_frame_overview_of_other_cameras_and_no_points():
    images = {"left": np.zeros((100, 200, 3), np.uint8), "right": np.zeros((100, 200, 3), np.uint8)}
    none = dict.fromkeys(images, np.zeros((0, 2), np.float32))
    figure = frame_overview(images, none, dict.fromkeys(images, np.zeros(0, np.uint8)), NUSCENES)
    assert [axes.get_title() for axes in figure.axes] == ["left: 0 points", "right: 0 points"]
    drawn, pale_black = pixels(figure), (105, 105, 105)
    assert area(drawn, pale_black) > 0.5 * drawn.shape[0] * drawn.shape[1]


@pytest.fixture
def world(streetworld_root, tmp_path):
    """The index of a copy of the street world, in which images may be broken."""
    root = tmp_path / "world"
    shutil.copytree(streetworld_root[0], root)
    return build_index(root, streetworld_root[1])


def broken(index, cameras):
    for camera in cameras:
        path = index.root.path / camera.image_path
        path.write_bytes(path.read_bytes()[:300])


def test_a_keyframe_is_drawn_on_the_images_that_can_be_read(world, caplog):
    frame = world.frames[0]
    broken(world, frame.cameras[1:2])
    with caplog.at_level(logging.WARNING, "clip2scene.tracking.figures.keyframe"):
        figure = frame_figure(world, frame, NUSCENES)
    drawn = {axes.get_title().split(":")[0] for axes in figure.axes} - {""}
    assert drawn == {camera.name for camera in frame.cameras} - {frame.cameras[1].name}
    (record,) = caplog.records
    assert "truncated or damaged image" in record.getMessage()
    for bare in (replace(frame, cameras=()), replace(frame, cameras=frame.cameras[1:2])):
        with pytest.raises(DataError, match=rf"\Aframe {frame.frame_id}: has no readable image"):
            frame_figure(world, bare, NUSCENES)


def test_an_evaluation_goes_on_without_images_to_show(world, tmp_path):
    words = ["dataset.kind=nuscenes", f"dataset.root={world.root.path}", f"dataset.version={world.version}"]
    stages, logged = Stages(load_job(DEMO, [*words, f"storage={tmp_path / 'storage'}"])), []
    frame = stages.eval_frames[0]
    labels_N = np.zeros((world.root.path / frame.cloud_path).stat().st_size // 20, np.uint8)
    scores = Scores({"student_3d": {}}, {"truth": labels_N, "student_3d": labels_N})

    class Recorded:
        run_id = "1"

        def log_figure(self, figure, path):
            logged.append((path, sum(bool(axes.get_title()) for axes in figure.axes)))

    def overview(*, cameras):
        logged.clear()
        vars(stages)["eval_frames"] = (replace(frame, cameras=cameras),)
        RunLog(None, Recorded(), stages).overview(Recorded(), scores)
        return logged

    broken(world, frame.cameras[:2])
    paths = ["figures/images_truth.png", "figures/images_student_3d.png"]
    assert overview(cameras=frame.cameras) == [(path, len(frame.cameras) - 2) for path in paths]
    assert overview(cameras=frame.cameras[:2]) == []
    assert overview(cameras=()) == []


def test_birds_eye_shows_truth_predictions_and_errors():
    x, y = np.meshgrid(np.linspace(-30, 30, 80), np.linspace(-30, 30, 80))
    points = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1)
    truth = np.full(len(points), ROAD)
    truth[points[:, 1] > 20] = 0  # not scored
    wrong = np.where(points[:, 0] > 0, SIDEWALK, ROAD)
    wrong[points[:, 1] < -20] = 0  # no prediction
    figure = birds_eye(points, {"2D-only": wrong, "3D-only": truth}, truth, NUSCENES)
    assert {"ground truth", "2D-only", "3D-only", "errors of 3D-only: 100% right"} <= set(texts(figure))
    right_share = (wrong == truth)[truth > 0].mean()
    assert f"errors of 2D-only: {right_share:.0%} right" in texts(figure)
    drawn = pixels(figure)
    upper, lower = np.array_split(drawn, 2, axis=0)
    first, second, third = (upper[:, i * drawn.shape[1] // 3 : (i + 1) * drawn.shape[1] // 3] for i in range(3))
    assert area(first, colour(ROAD)) == pytest.approx(area(third, colour(ROAD)), rel=0.02)
    assert area(second, colour(ROAD)) < 0.7 * area(first, colour(ROAD))
    assert area(second, colour(SIDEWALK)) > 500
    assert area(first, colour(SIDEWALK)) == 0
    middle, last = (lower[:, i * drawn.shape[1] // 3 : (i + 1) * drawn.shape[1] // 3] for i in (1, 2))
    assert min(area(middle, RED), area(middle, GREY), area(middle, BLUE)) > 500
    assert area(last, RED) == area(last, BLUE) == 0
    assert area(last, GREY) > area(middle, GREY)


def test_birds_eye_without_any_label():
    points = np.random.default_rng(0).uniform(-50, 50, (500, 3))
    nothing = np.zeros(500, np.uint8)
    figure = birds_eye(points, {"3D-only": nothing}, nothing, NUSCENES)
    assert "errors of 3D-only: no point is scored" in texts(figure)
    drawn, faint = pixels(figure), (207, 211, 216)
    left, right = np.array_split(drawn, 2, axis=1)  # on the left the truth and a legend of all colours
    assert min(area(left, faint), area(right, faint)) > 100
    assert area(right, RED) == area(right, BLUE) == 0


def test_confusion_matrix_is_normalised_by_row():
    counts = np.zeros((16, 16), np.int64)
    counts[CAR - 1, CAR - 1], counts[CAR - 1, ROAD - 1] = 3000, 1000
    counts[ROAD - 1, ROAD - 1] = 2_500_000
    figure = charts.confusion_matrix(counts, NUSCENES, "student")
    shown = texts(figure)
    assert {"75", "25", "100", "car  (4.0k)", "driveable surface  (2.5M)", "bus  (0)", "student"} <= set(shown)
    axes = figure.axes[0]
    placed = {tuple(int(v) for v in text.get_position()): text.get_text() for text in axes.texts}
    assert placed == {(CAR - 1, CAR - 1): "75", (ROAD - 1, CAR - 1): "25", (ROAD - 1, ROAD - 1): "100"}
    drawn, whole, absent = pixels(figure), (11, 42, 85), (239, 239, 239)
    cell = axes.get_window_extent().width * axes.get_window_extent().height / 16**2
    assert area(drawn, whole) > 0.5 * cell
    assert area(drawn, absent) > 14 * 16 * 0.9 * cell


def test_loss_curves():
    history = [{"epoch": e, "loss": 1 / e, "loss_scr": 0.5 / e, "learning_rate": 0.1} for e in range(3, 7)]
    history[1].pop("loss_scr")
    figure = charts.loss_curves(history, "distill")
    together, rate = figure.axes
    loss, scr = together.lines
    assert loss.get_xdata().tolist() == [3, 4, 5, 6]
    assert loss.get_ydata().tolist() == pytest.approx([1 / 3, 1 / 4, 1 / 5, 1 / 6])
    assert math.isnan(scr.get_ydata()[1])
    assert rate.get_title() == "learning rate"
    left, right = np.array_split(pixels(figure), 2, axis=1)
    assert min(area(left, FIRST), area(left, SECOND), area(right, FIRST)) > 200
    assert area(right, SECOND) == 0
    one, none = pixels(charts.loss_curves([{"loss": 1.0}])), pixels(charts.loss_curves([]))
    assert area(one, FIRST) > 0
    assert area(none, FIRST) == 0


def test_class_bars():
    scores = {"2D-only": {"car": 0.5, "bus": math.nan}, "3D-only": {"car": 0.75, "bus": None}}
    figure = charts.class_bars(scores, "IoU")
    assert {"2D-only (mean 50.0)", "3D-only (mean 75.0)", "50", "75", "absent"} <= set(texts(figure))
    assert [bar.get_height() for bar in figure.axes[0].patches] == [50, 75]
    drawn = pixels(figure)
    assert area(drawn, SECOND) == pytest.approx(1.5 * area(drawn, FIRST), rel=0.02)


def test_figures_need_no_main_thread_and_no_pyplot():
    code = (
        "import sys; from clip2scene.tracking.figures.charts import loss_curves; "
        "loss_curves([{'loss': 1.0}]).savefig(sys.stdout.buffer); assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {**os.environ, "MPLBACKEND": "TkAgg"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert shown.stdout.startswith(b"\x89PNG")
    made = []
    thread = threading.Thread(target=lambda: made.append(pixels(charts.loss_curves([{"loss": 1.0}]))))
    thread.start()
    thread.join()
    assert len(made) == 1
