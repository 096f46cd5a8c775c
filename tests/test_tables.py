"""Tables: what a file may say, how it becomes jobs, that the shipped ones hold the paper's numbers, and running one."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

from clip2scene.cli import main
from clip2scene.errors import ConfigError, DataError
from clip2scene.jobfile import kind_of, load_job
from clip2scene.scores import class_scores_of, mean_scores_of
from clip2scene.stages import Stages
from clip2scene.tables import runner
from clip2scene.tables.runner import Done, TableJob, run_table
from clip2scene.tables.spec import expand, jobs_of, load_table
from clip2scene.teacher.extract import ExtractReport
from clip2scene.tracking.table.page import table_figures
from clip2scene.tracking.table.record import table_run
from clip2scene.tracking.tracker import connect
from commands import REPOSITORY
from tiny_world import TINY_WORLD

JOBS = REPOSITORY / "jobs"
DATASETS = ("streetworld", "nuscenes", "semantickitti", "scannet")
TINY = {
    "table": "tiny",
    "title": "Tiny",
    "dataset": "streetworld",
    "seeds": [7],
    "reference": "full",
    "rows": [
        {"group": "a", "name": "full", "paper": {"nuscenes": 20.8}},
        {"group": "b", "name": "the same", "set": {"distill.num_sweeps": 2}, "score": "miou/teacher_2d"},
    ],
    "jobs": {
        "streetworld": {
            "stage": "evaluate",
            "dataset": {"kind": "streetworld", "train_split": "train", "eval_split": "val"},
            "distill": {"num_sweeps": 2},
        }
    },
}


def written(folder, values):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def shipped(name, dataset="streetworld"):
    overrides = [] if dataset == "streetworld" else [f"jobs.{dataset}.dataset.root=/data"]
    table = load_table(JOBS / f"{name}.yaml", [f"dataset={dataset}", *overrides])
    return table, expand(table, name)


def changed(**changes):
    return copy.deepcopy(TINY) | changes


def with_row(**row):
    values = copy.deepcopy(TINY)
    values["rows"].append({"group": "c", "name": "new"} | row)
    return values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (changed(colour="red"), r"tiny\.yaml: colour: unknown key; allowed here: .*reference.*rows"),
        (with_row(sets={}), r"tiny\.yaml: row 3 \('new'\): sets: unknown key; allowed here: group, name, paper, "),
        (with_row(name="full"), "rows: 'full' is there twice"),
        (changed(seeds=[1, 1]), "seeds: 1 is there twice"),
        (with_row(set={"distill.nun_sweeps": 3}), "row 'new': distill.nun_sweeps: unknown key; allowed here: .*num_sw"),
        (with_row(set={"distill.num_sweeps": 99}), "row 'new': distill.num_sweeps=99: "),
        (with_row(set={"distill.num_sweeps.x": 1}), "row 'new': distill.num_sweeps.x: num_sweeps is a value"),
        (with_row(set={"seed": 3}), "row 'new': seed: the table sets it"),
        (with_row(paper={"nuscenes": [1.0, 2.0]}), "row 'new': paper.nuscenes has 2 numbers for 1 columns"),
        (with_row(paper={"kitti": 1.0}), "row 3 .*paper.kitti"),
        (changed(reference="best"), "reference='best': no row has this name"),
        (changed(dataset="scannet"), "dataset=scannet: no job for it; jobs has: streetworld"),
        (changed(rows="full"), "rows: a list of mappings"),
        (changed(columns={"streetworld": [{"name": "a"}, {"name": "b"}]}), "columns.streetworld must be as many as"),
        (
            changed(score="miou/student3d"),
            r"row 'full' \(score of the table\): score=miou/student3d: a job with stage=evaluate, .* writes no such "
            r"score; allowed: miou/teacher_2d, .*, and iou_METHOD/CLASS.*mean miou/student_3d\?",
        ),
        (with_row(score="miou"), "row 'new': score=miou: "),
        (with_row(score="miou/ensemble"), "row 'new': score=miou/ensemble: "),
        (with_row(score="miou/finetuned_scratch"), "row 'new': score=miou/finetuned_scratch: "),
        (with_row(score="iou_student_3d/tram"), "row 'new': score=iou_student_3d/tram: "),
        (with_row(set={"stage": "distill"}), r"row 'new' \(score of the table\): .*stage=distill.*; allowed: none"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, values, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_table(written(tmp_path, values))
    assert "\n" not in str(caught.value)


def test_a_table_is_distinguished_from_a_job(tmp_path):
    assert kind_of(written(tmp_path, TINY)) == "table"
    assert kind_of(JOBS / "demo.yaml") == kind_of(tmp_path / "nowhere.yaml") == "job"


def test_a_base_job_is_a_file_beside_the_table_and_its_name_and_storage_are_the_tables(tmp_path):
    (tmp_path / "street.yaml").write_text(
        "{name: street, storage: elsewhere, seed: 5, stage: evaluate, distill: {epochs: 9, num_sweeps: 3},"
        " dataset: {kind: streetworld, train_split: train, eval_split: val}}"
    )
    values = changed(jobs={"streetworld": {"base": "street.yaml", "distill": {"num_sweeps": 2}}})
    table = load_table(written(tmp_path, values), ["jobs.streetworld.distill.batch_size=6"])
    job = expand(table, "tiny")[0].job
    assert (job.name, job.seed, job.storage) == ("tiny-streetworld", 7, "tables-output")
    assert (job.distill.epochs, job.distill.num_sweeps, job.distill.batch_size) == (9, 2, 6)
    with pytest.raises(ConfigError, match=r"jobs\.nuscenes\.seed=1': changes nothing with dataset=streetworld"):
        load_table(written(tmp_path, values), ["jobs.nuscenes.seed=1"])
    with pytest.raises(ConfigError, match=r"dataset\.kind=scannet: jobs\.streetworld must be of streetworld"):
        load_table(written(tmp_path, values), ["jobs.streetworld.dataset={kind: scannet, root: /data}"])
    values["jobs"]["streetworld"]["storage"] = "mine"
    with pytest.raises(ConfigError, match="storage: the table sets it"):
        load_table(written(tmp_path, values))


def test_overrides_reach_rows_by_index_and_leave_rows_out(tmp_path):
    values = changed(rows=[{"group": "a", "name": name, "set": {"distill.epochs": 3}} for name in ("full", "b", "c")])
    for row in values["rows"]:
        row["set"] = values["rows"][0]["set"]  # yaml.safe_dump writes an anchor
    path = written(tmp_path, values)
    assert "&id001" in path.read_text()
    table = load_table(path, ["rows.1=null", "rows.2.set.distill.epochs=5", "rows.2.score=miou/teacher_2d"])
    assert [(row.name, row.score, row.set_["distill.epochs"]) for row in table.rows] == [
        ("full", None, 3),
        ("c", "miou/teacher_2d", 5),
    ]
    for override in ("rows.3.score=x", "rows.x=1", "rows.-1=null"):
        with pytest.raises(ConfigError, match=r"rows is a list; allowed after it: an index from 0 to 2$"):
            load_table(path, [override])
    with pytest.raises(ConfigError, match="reference='full': no row has this name"):
        load_table(path, ["rows.0=null"])
    path.write_text(path.read_text().replace("- group: a\n  name: b", "- null\n- group: a\n  name: b"))
    with pytest.raises(ConfigError, match="rows: a list of mappings"):  # null is for the command line
        load_table(path)


def test_the_row_wins_over_the_column_and_both_over_the_base(tmp_path):
    values = with_row(set={"distill.epochs": 3})
    values["columns"] = {
        name: [{"name": "x", "set": {"distill.epochs": 2, "distill.batch_size": 8}}]
        for name in ("streetworld", "nuscenes")
    }
    table = load_table(written(tmp_path, values), ["jobs.streetworld.distill.batch_size=6", "storage=/tmp/elsewhere"])
    jobs = {cell.row.name: cell.job for cell in expand(table, "tiny")}
    assert (jobs["full"].distill.epochs, jobs["full"].distill.batch_size) == (2, 8)
    assert jobs["new"].distill.epochs == 3
    assert {job.storage for job in jobs.values()} == {"/tmp/elsewhere"}
    assert {job.seed for job in jobs.values()} == {7}


def test_cells_with_the_same_settings_share_a_job(tmp_path):
    cells = expand(load_table(written(tmp_path, TINY), ["seeds=[0, 1]"]), "tiny")
    assert len(cells) == 4
    assert len(jobs_of(cells)) == 2
    assert [cell.score for cell in cells] == ["miou/student_3d"] * 2 + ["miou/teacher_2d"] * 2


def test_a_rerun_with_more_seeds_is_the_same_table(tmp_path):
    path = written(tmp_path, TINY)
    first = load_table(path).run_digest()
    assert load_table(path, ["seeds=[7, 8]", "storage=x"]).run_digest() == first
    assert load_table(path, ["jobs.streetworld.distill.epochs=3"]).run_digest() != first


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(
    ("name", "cells", "jobs"),
    [("table1_finetune", 36, 30), ("table2_annotation_free", 21, 9), ("table3_ablation", 48, 42)],
)
def test_shipped_tables_become_jobs_on_every_data_set(name, cells, jobs, dataset):
    table, found = shipped(name, dataset)
    assert {cell.job.dataset.kind for cell in found} == {dataset}
    assert len(found) == cells
    # On ScanNet, K is 1: there "3 sweeps" is not the full method; and its own prompts are not nuScenes'.
    by_row = {(cell.row.name, cell.seed): cell.job.digest() for cell in found if cell.column.name in ("mIoU", "100%")}
    if name == "table3_ablation":
        shared = Counter(by_row[row.name, table.seeds[0]] for row in table.rows)
        own = {"streetworld": 2, "nuscenes": 2, "semantickitti": 2, "scannet": 1}[dataset]
        assert sum(count - 1 for count in shared.values()) == own
        assert len(jobs_of(found)) == cells - 3 * own
    else:
        assert len(jobs_of(found)) == jobs


def paper(name, dataset):
    table, cells = shipped(name, dataset)
    columns = [column.name for column in table.columns_of(dataset)]
    return {
        row.name: tuple(
            next(cell.paper for cell in cells if cell.row is row and cell.column.name == column) for column in columns
        )
        for row in table.rows
        if dataset in row.paper
    }


def test_table_1_has_the_papers_numbers():
    expected = {
        "random": (42.2, 69.1, 32.5, 52.1, 46.1, 63.3),
        "PPKT": (48.0, 70.1, 39.1, 53.1, 47.5, 64.2),
        "SLidR": (48.2, 70.4, 39.6, 54.3, 47.9, 64.9),
        "PointContrast": (47.2, 69.2, 37.1, 52.3, 47.6, 64.5),
        "CLIP2Scene": (56.3, 71.5, 42.6, 55.0, 48.4, 65.1),
    }
    found = [paper("table1_finetune", dataset) for dataset in DATASETS[1:]]
    assert {row: sum((numbers[row] for numbers in found), ()) for row in found[0]} == expected
    fractions = {
        dataset: [column.set_["finetune.label_fraction"] for column in shipped("table1_finetune")[0].columns[dataset]]
        for dataset in DATASETS[1:]
    }
    assert fractions == {"nuscenes": [0.01, 1.0], "semantickitti": [0.01, 1.0], "scannet": [0.05, 1.0]}


def test_table_2_has_the_papers_numbers():
    assert paper("table2_annotation_free", "nuscenes") == {"CLIP2Scene, every point": (20.8,)}
    assert paper("table2_annotation_free", "scannet") == {"CLIP2Scene, every point": (25.08,)}


def test_table_3_has_the_papers_numbers_and_settings():
    assert paper("table3_ablation", "nuscenes") == {
        "full": (20.8,),
        "one sweep, SCR only": (15.1,),
        "nuScenes prompts": (15.1,),
        "SemanticKITTI prompts": (13.9,),
        "Cityscapes prompts": (11.3,),
        "all prompts": (15.3,),
        "without StCR": (19.8,),
        "without SCR": (16.8,),
        "KL only": (0.0,),
        "without S3": (18.8,),
        "own predictions only (ST)": (10.1,),
        "1 sweep": (18.7,),
        "3 sweeps": (20.8,),
        "5 sweeps": (20.6,),
        "3 sweeps merged into one cloud": (18.6,),
    }
    table, cells = shipped("table3_ablation")
    distill = {cell.row.name: cell.job.distill for cell in cells}
    baseline = distill["one sweep, SCR only"]
    assert (baseline.num_sweeps, baseline.scr.weight, baseline.stcr.weight, baseline.s3.probability) == (1, 1, 0, 0)
    assert distill["own predictions only (ST)"].s3.probability == 1
    assert distill["full"].num_sweeps == 3
    assert distill["3 sweeps merged into one cloud"].merge_sweeps
    released_row = "full, released code"
    released = next(cell.job for cell in cells if cell.row.name == released_row)
    assert not released.distill.stcr.pixel_term
    assert not released.student.use_position
    on_nuscenes = shipped("table3_ablation", "nuscenes")[1]
    assert not next(cell.job for cell in on_nuscenes if cell.row.name == released_row).teacher.clip_normalisation
    # The paper has no number for streetworld: that of nuScenes stands beside ours.
    assert table.paper_dataset == "nuscenes"
    assert next(cell.paper for cell in cells if cell.row.name == "KL only") == 0.0


def test_a_table_that_is_run_again_after_another_of_its_name_is_read_from_its_own_run(tmp_path, uri):
    path, tracker = written(tmp_path, TINY), connect(uri, "again")
    first, second = (load_table(path, [f"reference={name}", f"storage={tmp_path}"]) for name in ("full", "the same"))
    (digest,) = jobs_of(expand(first, "tiny"))
    with tracker.run("job", tags={"table": "tiny", "job_digest": digest}, system_metrics=False) as run:
        run.log_metrics({"miou/student_3d": 0.2, "miou/teacher_2d": 0.3})
    records = [run_table(table, tracker, str(path), "clip2scene run") for table in (first, second, first)]
    assert records[0].run_id == records[2].run_id != records[1].run_id
    assert [record.about["reference"] for record in records] == ["full", "the same", "full"]


def test_a_finished_job_without_its_score_is_a_failure(tmp_path, uri, monkeypatch, capsys):
    path, tracker = written(tmp_path, TINY), connect(uri, "unscored")
    words = [f"storage={tmp_path}", "score=iou_student_3d/bus"]
    (digest,) = jobs_of(expand(load_table(path, words), "tiny"))
    with tracker.run("job", tags={"table": "tiny", "job_digest": digest}, system_metrics=False) as run:
        run.log_metrics({"miou/student_3d": 0.2, "miou/teacher_2d": 0.3})
    monkeypatch.setattr("clip2scene.cli.run.session", lambda *_: contextlib.nullcontext(lambda: tracker))
    assert main(["run", str(path), *words]) == 1
    sentence = "clip2scene: tiny: full, mIoU: iou_student_3d/bus: no value in the finished job of seed 7"
    assert capsys.readouterr().err.splitlines()[-1] == sentence
    assert main(["run", str(path), words[0]]) == 0


def test_images_are_counted_over_all_attempts(tmp_path, uri, monkeypatch):
    from mlflow import MlflowClient

    table = load_table(written(tmp_path, TINY), ["seeds=[0, 1]", f"storage={tmp_path}"])
    jobs, tracker = runner._jobs(table, expand(table, "tiny")), connect(uri, "counts")
    # Images that were encoded and found, for each of the two worlds; the first attempt ends in the second world.
    made = iter([(6, 0), KeyboardInterrupt(), (0, 6), (4, 2)])

    def make_inputs(stages):
        did = next(made)
        if isinstance(did, KeyboardInterrupt):
            raise did
        return ExtractReport(*did, broken=())

    def attempt():
        with table_run(tracker, "counted", "streetworld", "d") as parent:
            assert runner._prepare(jobs, tracker, parent) == {}
        return parent

    monkeypatch.setattr(Stages, "omissions", ())
    monkeypatch.setattr(Stages, "make_inputs", make_inputs)
    with pytest.raises(KeyboardInterrupt):
        attempt()
    metrics = MlflowClient(uri).get_run(attempt().run_id).data.metrics
    assert metrics == {"images_encoded": 10, "images_cached": 8}


def test_what_an_index_leaves_out_is_said_once_and_a_bad_data_set_ends_only_its_jobs(tmp_path, monkeypatch, capsys):
    values = with_row(set={"distill.num_sweeps": 1})
    table = load_table(written(tmp_path, values), ["seeds=[0, 1]", f"storage={tmp_path}"])
    jobs = runner._jobs(table, expand(table, "tiny"))

    def omissions(stages):
        if stages.job.seed == 1:
            raise DataError("a damaged world")
        return ("2 frames have no pose",)

    monkeypatch.setattr(Stages, "omissions", property(omissions))
    monkeypatch.setattr(Stages, "make_inputs", lambda stages: ExtractReport(6, 0, broken=()))
    monkeypatch.setattr(runner, "metrics_of", lambda tracker, parent: {})
    failed = runner._prepare(jobs, None, SimpleNamespace(log_metrics=lambda values: None))
    assert failed == {job.digest: "a damaged world" for job in jobs if job.settings.seed == 1}
    assert len(failed) == 2
    assert capsys.readouterr().err.splitlines() == [
        "index: 2 frames have no pose",
        "cannot run, 2 of the jobs: a damaged world",
    ]


def on_world(world, storage, values, num_workers):
    """A table that runs in seconds."""
    root, version = world
    values |= {"storage": str(storage), "score": "miou/student_3d_all_points"}
    values["jobs"]["streetworld"] |= {
        "dataset": {
            "kind": "streetworld",
            "root": str(root),
            "version": version,
            "train_split": "train",
            "eval_split": "val",
            "streetworld": TINY_WORLD,
        },
        "teacher": {"model": "streetworld", "image_height_px": 112, "image_width_px": 208},
        "extract": {"num_actors": 1},
        "student": {"voxel_size_m": 1.0, "channels": [8, 8]},
        "distill": {"epochs": 1, "num_sweeps": 2, "sweep_window_s": 0.1},
        "resources": {"num_workers": num_workers},
    }
    return values


def test_a_worker_that_dies_ends_only_its_own_jobs(ray_cluster, monkeypatch):
    def run_group(jobs, tracker, parent):
        for job in jobs:
            if job.digest == "dies":
                time.sleep(1)  # what it yielded before is sent meanwhile
                os._exit(1)
            yield Done(job, 1.0, {"miou/student_3d": 0.5})

    job = load_job(JOBS / "demo.yaml", ["resources.num_workers=0"])
    groups = {"first": ["a", "dies", "b"], "second": ["c", "d"]}
    named = [(job.model_copy(update={"name": group}), digest) for group, of in groups.items() for digest in of]
    jobs = [TableJob(digest, settings, (), {}) for settings, digest in named]
    monkeypatch.setattr(runner, "_run_group", run_group)
    monkeypatch.setattr(runner, "Stages", lambda settings: SimpleNamespace(distill_digest=settings.name))
    ends = {done.job.digest: done.error for done in runner._side_by_side(jobs, None, None, 2)}
    lost = "its worker ended early (WorkerCrashedError)"
    assert ends == {"a": None, "dies": lost, "b": lost, "c": None, "d": None}


@pytest.fixture(scope="module")
def at_once(streetworld_root, ray_cluster, uri, tmp_path_factory):
    """A table whose two jobs have a worker each: its record, its jobs' runs, and its storage."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("at-once")
    values = with_row(set={"distill.num_sweeps": 1})
    path = written(folder, on_world(streetworld_root, folder / "storage", values, num_workers=1))
    record = run_table(load_table(path), tracker := connect(uri, "workers"), str(path), "clip2scene run tiny.yaml")
    found = MlflowClient(uri).search_runs([tracker.experiment_id])
    return record, [run.info for run in found if run.info.run_id != record.run_id], folder / "storage"


def test_jobs_with_workers_run_at_the_same_time_where_their_workers_fit(at_once):
    record, (first, second), _ = at_once
    assert all(0 < cell.values[7] < 100 for cell in record.cells)
    assert first.start_time < second.end_time
    assert second.start_time < first.end_time


def test_a_table_runs_and_a_second_time_does_nothing(tmp_path, streetworld_root, at_once, uri):
    from mlflow import MlflowClient

    for name in ("indexes", "texts", "features"):  # the same as in that table
        shutil.copytree(at_once[2] / name, tmp_path / "storage" / name)
    values = with_row(set={"teacher.model": "local-dir:/nowhere"}, name="broken")
    values = on_world(streetworld_root, tmp_path / "storage", values, num_workers=0)
    path = written(tmp_path, values)
    table, tracker, client = load_table(path), connect(uri, "table"), MlflowClient(uri)

    def runs():
        found = client.search_runs([tracker.experiment_id], max_results=100)
        return {run.info.run_id: run for run in found}

    record = run_table(table, tracker, str(path), "clip2scene run tiny.yaml")
    first = runs()
    parent = first.pop(record.run_id)
    (job,) = [run for run in first.values() if run.info.status == "FINISHED"]
    assert len(first) == 1
    assert parent.info.run_name == "tiny-streetworld"
    assert parent.info.status == "FINISHED"
    assert job.data.tags["mlflow.parentRunId"] == record.run_id
    assert job.data.tags["row"] == "full | the same"
    assert (job.data.tags["table"], job.data.tags["column"], job.data.tags["seed"]) == ("tiny", "mIoU", "7")
    full, same, broken = record.cells
    settings = expand(table, "tiny")[0].job
    means = {name for name in job.data.metrics if name.startswith(("miou/", "accuracy/"))}
    assert means == set(mean_scores_of(settings))
    assert {name for name in job.data.metrics if name.startswith("iou_")} <= set(class_scores_of(settings))
    assert full.values == {7: pytest.approx(100 * job.data.metrics["miou/student_3d_all_points"])}
    per_class = [iou for iou, _ in full.iou_per_class().values()]
    assert sum(per_class) / len(per_class) == pytest.approx(full.values[7])
    assert {name for name, _, _ in table_figures(record)} == {"classes_1", "scene_1", "scene_2"}
    assert same.values == {7: pytest.approx(100 * job.data.metrics["miou/teacher_2d"])}
    assert same.values[7] > 0
    assert "/nowhere" in broken.failures[0]
    assert not broken.values
    kept = {item.path for item in client.list_artifacts(record.run_id)}
    assert {"table.json", "table.txt", "table.html", "figures"} <= kept
    assert parent.data.metrics["full/mIoU"] == pytest.approx(full.values[7])

    again = run_table(table, tracker, str(path), "clip2scene run tiny.yaml")
    assert set(runs()) == {record.run_id, job.info.run_id}
    assert again.run_id == record.run_id
    assert [cell.values for cell in again.cells] == [cell.values for cell in record.cells]
