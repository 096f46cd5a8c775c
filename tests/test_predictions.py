"""Predictions as files: what evaluate counts, in the benchmark's format, without labels, and after an interruption."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from clip2scene.config import ResourceSettings
from clip2scene.data.benchmarks import LABEL_FORMATS, prediction_file
from clip2scene.data.clouds import read_labels
from clip2scene.data.index import Frame
from clip2scene.data.splits import nuscenes_scenes
from clip2scene.data.vocabulary import vocabulary, vocabulary_of
from clip2scene.errors import DataError
from clip2scene.pipeline import Pipeline
from clip2scene.predictions import predict
from clip2scene.stages import Stages
from clip2scene.tracking.report import summary_text
from clip2scene.tracking.run import client_of
from clip2scene.tracking.tracker import connect
from clip2scene.training.launch import worker_group
from clip2scene.training.metrics import confusion
from clip2scene.training.samples import SampleSource
from predicting import job_of, network_file, predicted

WORDS = vocabulary("nuscenes")
TWO = ResourceSettings(num_workers=2)


@pytest.fixture(scope="module")
def labelled_job(streetworld_root, tmp_path_factory):
    """``labelled_job(*words)``: jobs on the labelled street world with one storage."""
    root, version = streetworld_root
    storage = tmp_path_factory.mktemp("predictions") / "storage"
    words = [f"dataset.version={version}", "finetune.initialisations=[scratch]", "finetune.epochs=2"]
    return lambda *more: job_of("nuscenes", root, storage, *words, "finetune.label_fraction=0.5", *more)


@pytest.fixture(scope="module")
def on_two(labelled_job, ray_cluster):
    """By two workers: stages, a fine-tuned network, its counts, its predictions."""
    stages = Stages(labelled_job("resources.num_workers=2"))
    scored = Stages(labelled_job("resources.num_workers=2", "stage=finetune"))
    with worker_group(stages.job.resources):
        network = scored.finetune("scratch", lambda epoch, metrics: None)
        counts = scored.score_finetuned({"scratch": network}).counts["scratch"]["all"]
        return stages, network, counts, predict(stages)


@pytest.fixture
def network(tmp_path):
    return network_file(tmp_path / "network.safetensors", num_classes=16)


@pytest.fixture
def bare(streetworld_root, tmp_path):
    """The street world without its labels, as an official test split comes."""
    root, version = streetworld_root
    folder = Path(shutil.copytree(root, tmp_path / "bare"))
    shutil.rmtree(folder / "lidarseg")
    remove_labels(folder / version)
    return folder, version


def remove_labels(tables: Path) -> None:
    (tables / "lidarseg.json").unlink()
    categories = json.loads((tables / "category.json").read_text())
    for category in categories:
        category.pop("index", None)
    (tables / "category.json").write_text(json.dumps(categories))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def reads(monkeypatch):
    """Ids of the keyframes that are read, as they are to be predicted."""
    ids, read = [], SampleSource.read

    def counted(source, frame, *rest):
        ids.append(frame.frame_id)
        return read(source, frame, *rest)

    monkeypatch.setattr(SampleSource, "read", counted)
    return ids


def test_the_files_hold_what_evaluate_counts(on_two):
    stages, _, counts, done = on_two
    from_files, points_C = np.zeros((16, 16), dtype=np.int64), np.zeros(16, dtype=np.int64)
    for frame in stages.eval_frames:
        label_path = stages.index.root.path_of(frame.label_path)
        file = done.folder / "lidarseg" / "val" / label_path.name  # labels have the same names
        labels_N = np.fromfile(file, np.uint8)
        assert labels_N.min() > 0
        from_files += confusion(read_labels(label_path, len(labels_N), WORDS), labels_N.astype(int) - 1, 16)
        points_C += np.bincount(labels_N, minlength=17)[1:]
    np.testing.assert_array_equal(from_files, counts)
    assert from_files.sum() > 0
    assert list(done.manifest["points"].values()) == points_C.tolist()
    assert len(contents(done.folder)) == done.manifest["frames"] + 1
    assert not done.cached


def test_the_devkit_accepts_them(on_two, streetworld_root, monkeypatch):
    from nuscenes.eval.lidarseg import utils
    from nuscenes.eval.lidarseg.validate_submission import validate_submission
    from nuscenes.nuscenes import NuScenes

    root, version = streetworld_root
    stages, _, _, done = on_two
    ours = {"val": sorted({frame.scene for frame in stages.eval_frames})}
    monkeypatch.setattr(utils, "create_splits_scenes", lambda **named: ours)
    nusc = NuScenes(version, str(root), verbose=False)
    validate_submission(nusc, str(done.folder), "val")
    (done.folder / "val" / "submission.json").rename(done.folder / "val" / "other.json")
    with pytest.raises(AssertionError, match="does not exist"):
        validate_submission(nusc, str(done.folder), "val")
    (done.folder / "val" / "other.json").rename(done.folder / "val" / "submission.json")
    index_of = utils.LidarsegClassMapper(nusc).coarse_name_2_coarse_idx_mapping
    assert tuple(index_of[name] for name in WORDS.classes) == LABEL_FORMATS["nuscenes"].id_C


def test_a_given_network_predicts_the_same_alone_and_without_labels(on_two, bare, tmp_path):
    _, network, _, done = on_two
    root, version = bare
    alone = predicted(
        "nuscenes", root, tmp_path / "new", f"dataset.version={version}", f"predict.checkpoint={network.path}"
    )
    assert contents(alone.folder) == contents(done.folder)
    assert alone.manifest == done.manifest
    assert not (tmp_path / "new" / "features").exists()


def test_what_is_there_is_not_predicted_again(labelled_job, network, reads, monkeypatch):
    def again():
        reads.clear()
        return predict(Stages(labelled_job(f"predict.checkpoint={network}")))

    first = again()
    manifest_path = first.folder.with_suffix(".json")
    expected, ids = contents(first.folder), list(reads)
    assert len(ids) == len(set(ids)) == first.manifest["frames"] == 4
    second = again()
    assert second.cached
    assert reads == []
    files = sorted(first.folder.rglob("*.bin"))
    aside = files[0].with_name(f".{files[0].name}.1234abcd")
    aside.write_bytes(b"half")
    for manifest_is_there in (True, False):
        files[1].unlink()
        if not manifest_is_there:
            manifest_path.unlink()
        done = again()
        assert not done.cached
        assert len(reads) == 1
        assert (contents(done.folder), done.manifest) == (expected, first.manifest)
    monkeypatch.setattr(SampleSource, "read", lambda *_: pytest.fail("predicted again"))
    (first.folder / "val" / "submission.json").unlink()
    assert contents(again().folder) == expected


def test_an_interrupted_run_leaves_whole_files_and_no_manifest(labelled_job, network, tmp_path, monkeypatch):
    job = labelled_job(f"predict.checkpoint={network}", f"storage={tmp_path}")
    read, ids = SampleSource.read, []

    def interrupted(source, frame, *rest):
        ids.append(frame.frame_id)
        if len(ids) == 3:
            raise KeyboardInterrupt
        return read(source, frame, *rest)

    monkeypatch.setattr(SampleSource, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(Stages(job))
    monkeypatch.setattr(SampleSource, "read", read)
    (folder,) = (path for path in (tmp_path / "predictions").iterdir() if path.is_dir())
    before = contents(folder)
    assert len(before) == 2
    assert not folder.with_suffix(".json").exists()
    after = predict(Stages(job))
    assert len(contents(after.folder)) == 5
    assert contents(after.folder).items() > before.items()
    next(after.folder.rglob("*.bin")).write_bytes(b"")  # as after a power failure
    after.folder.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"_lidarseg\.bin: not a file of predictions .*; remove it\Z"):
        predict(Stages(job))


def test_a_student_predicts_by_the_texts_of_the_classes(labelled_job, tmp_path):
    path = network_file(tmp_path / "student.safetensors", dim=64)
    words = (f"predict.checkpoint={path}", f"storage={tmp_path}", "prompts.templates=plain")
    stages = Stages(labelled_job(*words))
    done = predict(stages)
    assert done.manifest["network"] == "distilled"
    text_CD = stages.text(WORDS, "plain")
    from clip2scene.student.checkpoint import load_checkpoint
    from clip2scene.training.methods import StudentMethod

    weights = load_checkpoint(path, stages.job.student).weights
    frame = stages.eval_frames[0]
    with torch.inference_mode():
        classes_N = StudentMethod(stages.job.student, weights, text_CD, 16).prepare(torch.device("cpu"))(
            SampleSource(stages.index.root).read(frame)
        )
    file = done.folder / "lidarseg" / "val" / f"{frame.cloud_token}_lidarseg.bin"
    np.testing.assert_array_equal(np.fromfile(file, np.uint8), classes_N.numpy() + 1)
    other = predict(Stages(labelled_job(*words[:2], "prompts={names: official, templates: plain}")))
    assert other.folder != done.folder


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ({"num_classes": 19}, "fine-tuned on 19 classes, and nuscenes has 16; allowed: a network fine-tuned on this"),
        ({"dim": 12}, "distilled from another teacher than this job's (teacher.model=streetworld); allowed: "),
        (
            {"dim": 64, "about": {"teacher": "x"}},
            "distilled from another teacher than this job's (teacher.model=streetworld)",
        ),
        ({"dim": 64, "about": {"method": "pointcontrast"}}, "has no classes before it is fine-tuned (distill.method="),
    ],
)
def test_a_network_that_cannot_predict_this_data_set(labelled_job, tmp_path, made, sentence):
    path = network_file(tmp_path / "network.safetensors", **made)
    job = labelled_job(f"predict.checkpoint={path}", f"storage={tmp_path}/new", "prompts.templates=plain")
    with pytest.raises(DataError, match=re.escape(f"{path}: {sentence}")) as caught:
        predict(Stages(job))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / "predictions").exists()


def test_a_checkpoint_of_another_architecture(labelled_job, network):
    with pytest.raises(DataError, match="a student of another architecture: trained with student"):
        predict(Stages(labelled_job(f"predict.checkpoint={network}", "student.voxel_size_m=0.5")))


def test_the_official_test_split_has_tables_of_its_own(bare, streetworld_root, network, tmp_path):
    root, version = bare
    shutil.copytree(root / version, root / "v1.0-test")
    scenes = json.loads((root / "v1.0-test" / "scene.json").read_text())
    for scene, name in zip(scenes, sorted(nuscenes_scenes("test")), strict=False):
        scene["name"] = name
    (root / "v1.0-test" / "scene.json").write_text(json.dumps(scenes))
    words = (f"dataset.version={version}", "dataset.train_split=train", "dataset.eval_split=test")
    training = Stages(job_of("nuscenes", root, tmp_path / "s", *words))
    assert {frame.scene for frame in training.train_frames} <= nuscenes_scenes("train")
    assert {frame.scene for frame in training.eval_frames} <= nuscenes_scenes("test")
    assert set(training.frames) == {frame.frame_id for frame in training.train_frames}  # no image of the test split
    assert [index.version for index in training.indexes.values()] == [version, "v1.0-test"]
    with pytest.raises(DataError, match="split 'test' has no keyframe in the index"):
        Stages(job_of("nuscenes", root, tmp_path / "s", *words, "stage=evaluate")).eval_frames  # noqa: B018
    shutil.rmtree(root / version)  # a given network needs no training split
    done = predicted("nuscenes", root, tmp_path / "s", *words, f"predict.checkpoint={network}")
    assert done.manifest["frames"] == 8
    assert len(list((done.folder / "lidarseg" / "test").iterdir())) == 8
    assert (done.folder / "test" / "submission.json").is_file()


@pytest.mark.parametrize("token", [None, "", "../up", "a/b", "a.b"])
def test_a_token_that_is_no_file_name(token):
    frame = Frame("f", "scene-0003", 0, "cloud", np.eye(4), (), (), None, token)
    with pytest.raises(DataError, match=r"\Aframe f: its cloud has the token .*; allowed: letters, digits, - and _\Z"):
        prediction_file("nuscenes", "val", frame)


def test_a_job_predicts_in_a_run_of_its_own(bare, network, uri, tmp_path):
    root, version = bare
    words = (f"dataset.version={version}", "name=predicts", f"predict.checkpoint={network}")
    job = job_of("nuscenes", root, tmp_path / "s", *words)
    tracker = connect(uri, "predictions", tmp_path / "outbox")
    report = Pipeline(job).run(tracker)
    folder = Path(report["predictions"])
    assert folder.parent == tmp_path / "s" / "predictions"
    assert f"predictions of 4 keyframes: {folder}\n" in summary_text(report)
    assert json.loads((tmp_path / "s" / "report.json").read_text())["predictions"] == str(folder)
    assert set(report["seconds"]) == {"index", "predict"}
    client = client_of(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "predictions"]
    runs = {run.info.run_name: run.data for run in client.search_runs([experiment.experiment_id])}
    run = runs["predict"]
    assert run.tags["predictions"] == str(folder)
    assert run.metrics["predicted_frames"] == 4
    points = {name: run.metrics[f"predicted_points/{name}"] for name in WORDS.classes}
    assert sum(points.values()) == sum(file.stat().st_size for file in folder.rglob("*.bin"))
    assert {"predict.checkpoint", "dataset.eval_split", "student.voxel_size_m"} <= set(run.params)


@pytest.mark.parametrize("dataset", LABEL_FORMATS)
def test_ids_are_the_benchmarks(dataset):
    words, labels = vocabulary_of(dataset), LABEL_FORMATS[dataset]
    classes_N = np.random.default_rng(0).integers(0, len(words.classes), 1000)
    written = labels.encode(classes_N)
    np.testing.assert_array_equal(labels.count(written, "file"), np.bincount(classes_N, minlength=len(words.classes)))
    if dataset == "nuscenes":
        return
    raw_N = np.array(written.split(), int) if dataset == "scannet" else np.frombuffer(written, "<u4")
    np.testing.assert_array_equal(words.labels(raw_N, "file"), classes_N + 1)


def test_semantickittis_ids_are_learning_map_inv():
    expected = (10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81)
    assert LABEL_FORMATS["semantickitti"].id_C == expected
