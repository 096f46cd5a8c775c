"""Small pieces of the real data sets, end to end; skipped where they are not there."""

from __future__ import annotations

import json
import shutil
import sqlite3

import numpy as np
import pytest

from clip2scene.data.clouds import read_cloud
from clip2scene.data.datasets import build_index, ego_half_edge_m
from clip2scene.data.vocabulary import vocabulary
from clip2scene.geometry.pairing import pair
from clip2scene.geometry.registration import without_ego_returns
from clip2scene.inspection import inspect_frame
from clip2scene.jobfile import load_job
from clip2scene.stages import Stages
from clip2scene.training.metrics import mean_iou
from commands import REPOSITORY, fail, succeed

JOBS = REPOSITORY / "jobs"
HERE = ["resources.num_workers=0", "resources.gpus_per_worker=0", "extract={num_actors: 1, gpus_per_actor: 0}"]
SMALL = "student={voxel_size_m: 0.5, channels: [8, 16, 32]}"
QUICK = "{kind: adamw, learning_rate: 0.01}"


def test_index_and_inspect_the_real_keyframe(real_data, tmp_path):
    index, figure = tmp_path / "index.parquet", tmp_path / "frame.png"
    root = real_data / "nuscenes_keyframe"
    succeed("index", "nuscenes", "--root", root, "--version", "v1.0-mini", "--output", index)
    frames = json.loads(succeed("inspect", index, "--json", "--figure", figure))["frames"]
    assert len(frames) == 1
    built = build_index("nuscenes", root, version="v1.0-mini")
    assert frames[0] == inspect_frame(built, built.frames[0], vocabulary("nuscenes"))  # counts: test_inspection.py
    assert figure.stat().st_size > 100_000
    moved = shutil.copytree(root, tmp_path / "moved")
    assert json.loads(succeed("inspect", index, "--root", moved, "--json"))["frames"] == frames
    assert "no-such-frame" in fail("inspect", index, "--frame", "no-such-frame")


def test_an_earlier_sweeps_returns_from_the_car_itself_are_paired_with_nothing(real_data):
    """The real keyframe's cloud, as a sweep taken five metres further back."""
    root = real_data / "nuscenes_keyframe"
    (frame,) = build_index("nuscenes", root, version="v1.0-mini").frames
    cloud_N4 = read_cloud(root / frame.cloud_path)
    behind = np.eye(4)
    behind[1, 3] = -5.0
    pose = frame.world_from_lidar @ behind
    kept_M4 = without_ego_returns(cloud_N4, ego_half_edge_m("nuscenes"))
    every, kept = (pair(points[:, :3], pose, frame.cameras) for points in (cloud_N4, kept_M4))
    assert len(cloud_N4) - len(kept_M4) == 8274  # of 34,688
    assert len(every) - len(kept) == 8274  # every one of them in view of CAM_BACK
    same = pair(cloud_N4[:, :3], frame.world_from_lidar, frame.cameras)
    assert len(same) == len(pair(kept_M4[:, :3], frame.world_from_lidar, frame.cameras))


def test_the_real_keyframe_through_extraction_and_ten_steps(real_data, tmp_path):
    succeed(
        "run",
        "jobs/nuscenes.yaml",
        "stage=distill",
        f"storage={tmp_path}",
        f"dataset.root={real_data / 'nuscenes_keyframe'}",
        "dataset.version=v1.0-mini",
        "dataset.train_split=mini_train",
        "dataset.eval_split=mini_train",
        "teacher.pretrained=random",
        "prompts.templates=plain",
        "student={voxel_size_m: 0.5, channels: [8, 16, 16]}",
        "distill.batch_size=2",
        "distill.max_steps=10",
        "extract={num_actors: 1, gpus_per_actor: 0, threads_per_actor: 1}",
        "resources.gpus_per_worker=0",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images_encoded"] == 6
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as database:
        losses = database.execute("select value, is_nan from metrics where key in ('loss', 'scr', 'stcr')").fetchall()
    assert len(losses) == 30
    assert not any(is_nan for _, is_nan in losses)


@pytest.fixture(scope="module")
def street_student(streetworld_root, ray_cluster, tmp_path_factory):
    """Checkpoint of a student that was distilled on the tiny street world, without a label."""
    root, version = streetworld_root
    storage = tmp_path_factory.mktemp("street")
    words = ["dataset.kind=nuscenes", f"dataset.root={root}", f"dataset.version={version}", f"storage={storage}"]
    words += ["teacher={model: streetworld, image_height_px: 112, image_width_px: 208}"]
    words += [*HERE, SMALL, "distill.epochs=4", "distill.batch_size=2"]
    stages = Stages(load_job(JOBS / "demo.yaml", words))
    stages.extract()
    return stages.distill(lambda epoch, metrics: None).path


def test_semantickitti_fine_tuned_from_a_street_world(real_data, street_student, tmp_path):
    """Six scans of sequence 00 are learnt from, three of sequence 08 are scored."""
    words = [f"dataset.root={real_data / 'semantickitti'}", f"finetune.checkpoint={street_student}", SMALL, *HERE]
    words += ["finetune.label_fraction=1", "finetune.epochs=6", "finetune.batch_size=2", f"finetune.optimiser={QUICK}"]
    stages = Stages(load_job(JOBS / "semantickitti.yaml", [*words, f"storage={tmp_path}"]))
    losses = []
    student = stages.finetune("pretrained", lambda epoch, metrics: losses.append(metrics["loss"]))
    scores = stages.score_finetuned({"pretrained": student}).counts
    points = sum(
        (np.fromfile(p, np.uint32) & 0xFFFF > 1).sum() for p in (real_data / "semantickitti").rglob("08/**/*.label")
    )
    assert 0 < scores["pretrained"]["all"].sum() <= points
    assert losses[-1] < losses[0]
    assert mean_iou(scores["pretrained"]["all"]) > 2 * mean_iou(scores["majority"]["all"])


def test_scannet_from_the_mesh_to_scores(real_data, ray_cluster, tmp_path):
    """Depth-checked pairs, extraction, distillation steps, and both scores against the scene's own labels."""
    root = tmp_path / "scannet"
    shutil.copytree(real_data / "scannet", root)
    for split in ("train", "val"):
        (root / f"scannetv2_{split}.txt").write_text("scene0000_00\n")
    words = [
        f"dataset.root={root}",
        f"storage={tmp_path}",
        *HERE,
        "student.voxel_size_m=0.2",
        "teacher.pretrained=random",
    ]
    words += [
        "prompts.templates=plain",
        "distill.batch_size=1",
        "distill.max_steps=3",
        "evaluate.methods=[teacher_2d, student_3d, ensemble]",
    ]
    stages = Stages(load_job(JOBS / "scannet.yaml", words))
    assert stages.extract().images_encoded == 6
    counts = stages.score_annotation_free(stages.distill(lambda epoch, metrics: None)).counts
    seen = {name: int(both["seen"].sum()) for name, both in counts.items()}
    assert len(set(seen.values())) == 1
    assert 0 < seen["teacher_2d"] < counts["student_3d"]["all"].sum()
    assert all(0 <= mean_iou(both["seen"]) < 1 for both in counts.values())
