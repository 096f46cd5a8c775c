"""What a job may ask of the artifacts, and what their digests depend on."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from clip2scene.cluster.plan_data import count_data
from clip2scene.errors import ConfigError, DataError
from clip2scene.jobfile import load_job
from clip2scene.pipeline import Pipeline
from clip2scene.run_log import BriefRunLog
from clip2scene.stages import Stages
from clip2scene.student.checkpoint import save_checkpoint
from clip2scene.student.network import Student
from clip2scene.teacher.store import write_manifest
from clip2scene.training.fit import Fitted
from commands import REPOSITORY

DEMO = REPOSITORY / "jobs" / "demo.yaml"


@pytest.fixture
def stages(streetworld_root, tmp_path):
    root, version = streetworld_root

    def make(*overrides: str) -> Stages:
        words = ["dataset.kind=nuscenes", f"dataset.root={root}", f"dataset.version={version}", f"storage={tmp_path}"]
        return Stages(load_job(DEMO, [*words, *overrides]))

    return make


class Silent:
    """Stands for a run in MLflow; keeps nothing."""

    def __getattr__(self, name):
        return lambda *values, **named: None


def without_labels(root: Path, version: str, folder: Path) -> Path:
    """A copy of the world without lidarseg, which nuScenes has in an archive of its own."""
    bare = shutil.copytree(root, folder / "bare")
    shutil.rmtree(bare / "lidarseg")
    (bare / version / "lidarseg.json").unlink()
    categories = json.loads((bare / version / "category.json").read_text())
    for category in categories:
        category.pop("index", None)
    (bare / version / "category.json").write_text(json.dumps(categories))
    return bare


def test_splits_are_those_of_the_job(stages):
    job = stages()
    assert {f.frame_id for f in job.train_frames} | {f.frame_id for f in job.eval_frames} == {
        f.frame_id for f in job.index.frames
    }
    assert not {f.scene for f in job.train_frames} & {f.scene for f in job.eval_frames}
    with pytest.raises(ConfigError, match=r"dataset\.eval_split='holdout': input should be 'train'"):
        stages("dataset.eval_split=holdout")
    with pytest.raises(DataError, match="has no keyframe"):
        stages("dataset.eval_split=mini_val").eval_frames  # noqa: B018


def test_nothing_that_a_sweep_varies_changes_the_feature_store(stages):
    plain = stages()
    varied = stages(
        "distill.scr.tau=0.1", "distill.stcr.grid_size_m=1", "distill.num_sweeps=5", "prompts.templates=plain"
    )
    assert varied.store_path == plain.store_path
    assert stages("teacher.keep_last_mlp=true").store_path != plain.store_path


def test_labels_and_sweeps_change_only_the_digests_that_depend_on_them(stages, streetworld_root, tmp_path):
    labelled, few = stages(), stages("dataset.max_sweeps=1")
    bare = stages(f"dataset.root={without_labels(*streetworld_root, tmp_path)}")
    assert len({job.index.digest for job in (labelled, few, bare)}) == 3
    assert labelled.store_path == few.store_path == bare.store_path
    assert labelled.distill_digest == bare.distill_digest != few.distill_digest


def changed_copy(root: Path, folder: Path, pattern: str) -> Path:
    """A copy of the world in which the last byte of every file of a pattern is another."""
    copy = shutil.copytree(root, folder)
    files = sorted(copy.glob(pattern))
    assert files
    for file in files:
        contents = bytearray(file.read_bytes())
        contents[-1] ^= 1
        file.write_bytes(contents)
    return copy


def test_a_copy_with_other_contents_is_another_data_set(stages, streetworld_root, tmp_path):
    root, _ = streetworld_root
    first, same = stages(), stages(f"dataset.root={shutil.copytree(root, tmp_path / 'same')}")
    assert (first.index.digests, first.store_path) == (same.index.digests, same.store_path)

    def changed(name: str, pattern: str) -> Stages:
        return stages(f"dataset.root={changed_copy(root, tmp_path / name, pattern)}")

    labels = changed("labels", "lidarseg/*/*.bin")
    assert labels.index.digest != first.index.digest
    assert labels.distill_digest == first.distill_digest
    for number, pattern in enumerate(("samples/LIDAR_TOP/*", "sweeps/LIDAR_TOP/*")):
        clouds = changed(f"clouds{number}", pattern)
        assert clouds.distill_digest != first.distill_digest
        assert clouds.store_path == first.store_path
    images = changed("images", "samples/CAM_*/*")
    assert images.store_path != first.store_path


def test_labels_that_change_in_their_place_are_indexed_again(stages, streetworld_root, tmp_path):
    root = shutil.copytree(streetworld_root[0], tmp_path / "world")
    first = stages(f"dataset.root={root}").index
    file = next((root / "lidarseg").glob("*/*.bin"))
    labels = file.read_bytes()
    file.write_bytes(bytes([labels[0] ^ 1]) + labels[1:])
    again = stages(f"dataset.root={root}").index
    assert again.digests.unlabelled == first.digests.unlabelled
    assert again.digest != first.digest
    index_file = next((tmp_path / "indexes").iterdir())
    written = index_file.stat().st_mtime_ns
    os.utime(file)
    assert stages(f"dataset.root={root}").index.digest == again.digest
    assert index_file.stat().st_mtime_ns == written


def test_a_partial_split_is_said_and_named_in_the_protocol(stages, monkeypatch):
    job = stages()
    pipeline = Pipeline(job.job, brief=True)
    log = BriefRunLog(Silent(), Silent(), pipeline.stages)
    said: list[str] = []
    monkeypatch.setattr(log, "say", said.append)
    pipeline._index(log)
    assert [sentence.endswith("are there") for sentence in said] == [True, True]
    assert log.report["protocol"].startswith("train (2 of 700 scenes)->val (2 of 150 scenes);")
    vars(job)["index"] = job.index
    whole = job.job.dataset.model_copy(update={"kind": "streetworld"})
    job.job = job.job.model_copy(update={"dataset": whole})
    assert job.missing == {}


def test_linked_folders_are_a_setting_that_changes_no_features_and_no_student(stages, streetworld_root, tmp_path):
    plain = stages()
    root = shutil.copytree(streetworld_root[0], tmp_path / "linked" / "world")
    for part in ("samples", "lidarseg"):
        (root / part).rename(tmp_path / "linked" / part)
        (root / part).symlink_to(tmp_path / "linked" / part)
    word, allowed = f"dataset.root={root}", f"dataset.linked_folders=[{tmp_path / 'linked'}]"
    with pytest.raises(DataError, match=r"through a link, to .*; dataset\.linked_folders .* allows other folders"):
        _ = stages(word).index
    job = stages(word, allowed)
    assert job.index.digests == plain.index.digests
    assert (job.store_digest, job.superpixel_path) == (plain.store_digest, plain.superpixel_path)
    assert job.distill_digest == plain.distill_digest
    # The stored index is read with the setting of the job that reads it.
    assert stages(word, allowed)._labelled_source().read(job.eval_frames[0]).labels_N.any()
    with pytest.raises(DataError, match=r"leaves the dataset's root through a link"):
        stages(word)._labelled_source().read(job.eval_frames[0])


def test_scenes_that_are_downloaded_later_are_indexed_and_planned(stages, streetworld_root, tmp_path):
    root = shutil.copytree(streetworld_root[0], tmp_path / "world")
    word = f"dataset.root={root}"
    whole = stages(word).index
    gone = {frame.scene for frame in stages(word).train_frames[:1]}
    (tmp_path / "aside").mkdir()
    files = [
        root / path
        for frame in whole.select(frozenset(gone))
        for path in (frame.cloud_path, *(camera.image_path for camera in frame.cameras))
    ]
    for number, path in enumerate(files):
        path.rename(tmp_path / "aside" / str(number))
    part = stages(word)
    assert len(part.index.frames) == len(whole.frames) - 2
    assert part.omissions[0].startswith("v1.0-trainval: 1 of 4 scenes left out, as no cloud and no image ")
    assert part.missing == {"train": "1 of 700 scenes", "val": "2 of 150 scenes"}
    source = count_data(part.job).source
    assert source.startswith("the index in storage=")
    assert source.endswith(", split train: 1 of 700 scenes are there, split val: 2 of 150 scenes are there")
    for number, path in enumerate(files):
        (tmp_path / "aside" / str(number)).rename(path)
    assert stages(word).index.digest == whole.digest
    assert stages(word).index.left_out == ()


def test_a_window_beyond_the_indexed_sweeps_is_refused_before_the_teacher_is_loaded(stages):
    # The world has a sweep every 125 ms.
    job = stages("distill.num_sweeps=3", "distill.sweep_window_s=0.5", "dataset.max_sweeps=2")
    with pytest.raises(ConfigError, match=r"sweep_window_s=0\.5: the 2 indexed .*dataset\.max_sweeps=4 is needed"):
        job.check_sweeps()
    for allowed in ("dataset.max_sweeps=4", "distill.sweep_window_s=0.25", "distill.sweep_choice=random"):
        stages("distill.num_sweeps=3", "distill.sweep_window_s=0.5", "dataset.max_sweeps=2", allowed).check_sweeps()


def test_a_students_digest_covers_its_teachers_texts(stages, monkeypatch):
    plain, other = stages(), stages()
    monkeypatch.setitem(vars(other.teacher), "text_digest", "another tower")
    assert plain.store_path == other.store_path
    assert plain.distill_digest != other.distill_digest


def test_a_changed_table_is_indexed_again(stages, streetworld_root, tmp_path):
    root = tmp_path / "world"
    shutil.copytree(streetworld_root[0], root)
    first = stages(f"dataset.root={root}").index
    table = next((root / streetworld_root[1]).glob("attribute.json"))
    table.write_text(table.read_text() + "\n")
    again = stages(f"dataset.root={root}").index
    assert again.digest == first.digest
    assert len(list((tmp_path / "indexes").iterdir())) == 2


def test_a_checkpoint_of_another_architecture(stages, tmp_path):
    student = stages("student.channels=[8, 8]").job.student
    path = tmp_path / "student.safetensors"
    save_checkpoint(path, Student(student, embedding_dim=4).state_dict(), student, {"digest": "abc", "history": []})
    with pytest.raises(DataError, match=r"another architecture: trained with student\.channels=\[8, 8\]"):
        stages(f"finetune.checkpoint={path}").pretrained(lambda epoch, metrics: None)


def test_the_same_training_started_twice_is_done_once(stages, monkeypatch, caplog):
    weights = Student(stages().job.student, embedding_dim=4).state_dict()
    started, trained = threading.Event(), []

    def fit(training, *, name, folder, on_epoch, on_steps):
        (folder / name).mkdir(parents=True)
        trained.append(folder / name)
        started.set()
        while "another run trains this; waiting for it" not in caplog.text:
            time.sleep(0.01)
        return Fitted(weights, [{"epoch": 1.0, "loss": 0.5}])

    def train():
        epochs: list[int] = []
        training, on_epoch = SimpleNamespace(steps=1), lambda epoch, metrics: epochs.append(epoch)
        done = stages()._train(training, "distill", "digest", on_epoch)
        return done.path, done.cached, epochs

    monkeypatch.setattr("clip2scene.stages.fit", fit)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(train)
        assert started.wait(timeout=20)
        second = pool.submit(train)
        path = stages().student_path("digest")
        assert (first.result(timeout=20), second.result(timeout=20)) == ((path, False, []), (path, True, [1]))
    assert [folder.exists() for folder in trained] == [False]


def test_distilling_without_any_image_is_refused_before_the_teacher_is_loaded(stages):
    job = stages()
    first = job.train_frames[0]
    bare = tuple(replace(frame, cameras=()) for frame in job.train_frames)
    vars(job)["train_frames"] = bare
    with pytest.raises(DataError, match=r"\Adataset\.train_split='train': none of its 4 keyframes has an image[^\n]*"):
        job.distill(lambda epoch, metrics: None)
    assert "teacher" not in vars(job)
    vars(job)["train_frames"] = (*bare, first)
    job.check_images()


def test_keyframes_without_images_are_not_distilled_from(stages):
    job = stages()
    everything = job.distill_digest
    job.train_frames = (*job.train_frames[:-1], replace(job.train_frames[-1], cameras=()))
    job.__dict__.pop("distilled_frames")
    assert job.distilled_frames == job.train_frames[:-1]
    assert job.distill_digest != everything
    total = len(job.train_frames)
    assert job.omissions[-1] == f"1 of {total} training keyframes have no image to distil from"


def test_a_repaired_image_makes_new_students_and_scores(stages):
    job = stages()
    repaired = job.distill_digest
    frame = job.train_frames[0]
    manifest = {"teacher": "", "grid": [1, 1], "dim": 1, "frames": 0, "images": 0}

    def broken(frame_id: str) -> None:
        image = {"frame_id": frame_id, "camera": frame.cameras[0].name, "reason": "truncated"}
        write_manifest(job.store_path, manifest | {"broken": [image]}, job.storage)

    broken("of another split")
    assert job.distill_digest == repaired
    broken(frame.frame_id)
    assert job.distill_digest != repaired
    assert job.quarantined(job.train_frames) == [(frame.frame_id, frame.cameras[0].name)]


def test_what_is_missing_is_reported_before_the_teacher_is_loaded(stages, streetworld_root, tmp_path):
    bare = without_labels(*streetworld_root, tmp_path)
    for stage in ("evaluate", "finetune"):
        pipeline = Pipeline(stages(f"dataset.root={bare}", f"stage={stage}").job, brief=True)
        with pytest.raises(
            DataError, match=r"dataset\.eval_split='val': frame .* has no label file, which scoring needs"
        ):
            pipeline._run_stages(BriefRunLog(Silent(), Silent(), pipeline.stages))
        assert "teacher" not in vars(pipeline.stages)
    job = stages("stage=finetune")
    vars(job)["labelled_frames"] = (replace(job.train_frames[0], label_path=None),)
    with pytest.raises(DataError, match=r"dataset\.train_split='train': frame .* which fine-tuning needs"):
        job.check_labels()
    vars(job)["eval_frames"] = tuple(replace(frame, cameras=()) for frame in job.eval_frames)
    job.check_images()
    with pytest.raises(DataError, match=r"dataset\.eval_split='val': none of its . keyframes has an image"):
        job.check_images(scored=True)


def test_scores_need_labels(stages, streetworld_root, tmp_path):
    job = stages(f"dataset.root={without_labels(*streetworld_root, tmp_path)}")
    assert job.eval_frames[0].label_path is None
    with pytest.raises(DataError, match="has no label file"):
        job.score_finetuned({})
