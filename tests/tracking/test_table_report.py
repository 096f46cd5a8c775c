"""Tables rebuilt from a real MLflow server: the scores, what the paper says beside them, and the page."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import ConfigError
from clip2scene.tracking.records import find_named, mean_and_deviation
from clip2scene.tracking.table.figures import class_panels, scene_row
from clip2scene.tracking.table.page import table_figures, table_html
from clip2scene.tracking.table.record import (
    FORMAT,
    TableCell,
    difference,
    direction,
    finished_jobs,
    read_table_run,
    table_run,
)
from clip2scene.tracking.table.text import paper_number, table_text
from clip2scene.tracking.tracker import connect

# Row: group, metric, paper, score by seed (None: the job failed).
ROWS = {
    "full": ("method", "miou/student_3d", 20.8, {0: 0.20, 1: 0.22, 2: 0.24}),
    "repeat": ("method", "miou/student_3d", 20.8, None),
    "<baseline> & co": ("baseline", "miou/student_3d", 15.1, {0: 0.15, 1: 0.17, 2: 0.19}),
    "2D-only": ("rivals", "miou/teacher_2d", None, {0: 0.3}),
    "ST": ("strategy", "miou/student_3d", 10.1, {0: 0.25, 1: 0.27, 2: None}),
}
CLASSES = vocabulary("nuscenes").classes


def example(seed):
    generator = np.random.default_rng(seed)
    points = generator.uniform(-30, 30, (500, 3)).astype(np.float32)
    truth = generator.integers(0, 17, 500).astype(np.uint8)
    return {"points": points, "truth": truth, "student_3d": truth, "teacher_2d": np.zeros_like(truth)}


@pytest.fixture(scope="module")
def record(uri, tmp_path_factory):
    """A table of one column; "repeat" reads the runs of "full", and a run that failed is there twice."""
    tracker, aside = connect(uri, "tables"), tmp_path_factory.mktemp("examples")
    cells, failures = [], {}
    with table_run(tracker, "demo", "streetworld", "d1") as parent:
        for row, (group, score, paper, values) in ROWS.items():
            jobs = {str(seed): f"{'full' if values is None else row}-{seed}" for seed in range(3)}
            cells.append({"group": group, "row": row, "column": "mIoU", "score": score, "paper": paper, "jobs": jobs})
            for seed, value in (values or {}).items():
                tags = {"table": "demo", "job_digest": jobs[str(seed)], "protocol": "train->val", "vocabulary": "v1"}
                try:
                    with tracker.run(row, parent=parent, tags=tags, system_metrics=False) as run:
                        if value is None:
                            raise ConfigError("no memory")
                        run.log_metrics({score: value, f"iou_{score[5:]}/car": value, f"iou_{score[5:]}/bus": 0.5})
                        np.savez(aside / "example.npz", **example(seed))
                        run.log_artifact(aside / "example.npz")
                except ConfigError as error:
                    failures[jobs[str(seed)]] = str(error)
        about = {
            "format": FORMAT,
            "table": "demo",
            "title": "A table",
            "dataset": "streetworld",
            "paper_dataset": "nuscenes",
            "vocabulary": "nuscenes",
            "seeds": [0, 1, 2],
            "reference": "full",
            "columns": ["mIoU"],
            "command": "clip2scene run demo.yaml",
            "machine": "4 cores",
            "cells": cells,
            "failures": failures,
        }
        parent.log_dict(about, "table.json")
    return read_table_run(uri, parent.run_id)


def test_scores_are_read_back_from_the_runs(record):
    cells = {cell.row: cell for cell in record.cells}
    assert list(cells) == list(ROWS)
    assert cells["full"].values == pytest.approx({0: 20.0, 1: 22.0, 2: 24.0})
    assert cells["repeat"].values == cells["full"].values
    assert cells["ST"].values == pytest.approx({0: 25.0, 1: 27.0})
    assert cells["ST"].failures == ("seed 2: no memory",)
    assert cells["full"].iou_per_class() == {"car": (pytest.approx(22.0), pytest.approx(2.0)), "bus": (50.0, 0.0)}
    assert cells["2D-only"].iou_per_class() == {"car": (30.0, None), "bus": (50.0, None)}
    assert len(record.git_revision.removesuffix("-dirty")) in (40, len("unknown"))


def test_differences_are_paired_by_seed(record):
    cells = {cell.row: cell for cell in record.cells}
    assert difference(cells["<baseline> & co"], cells["full"]) == (pytest.approx(-5.0), pytest.approx(0.0, abs=1e-9))
    assert difference(cells["ST"], cells["full"])[0] == pytest.approx(5.0)
    assert direction(cells["<baseline> & co"], cells["full"]) == "same"
    assert direction(cells["ST"], cells["full"]) == "opposite"
    assert direction(cells["2D-only"], cells["full"]) == "–"
    assert direction(cells["repeat"], cells["full"]) == "–"


def test_a_difference_within_its_deviation_is_unclear(record):
    run = next(iter(record.cells[0].runs.values()))

    def cell(paper, *scores):
        runs = {seed: type(run)("r", {"miou/a": score}, {}, 1.0) for seed, score in enumerate(scores)}
        return TableCell("g", "r", "c", "miou/a", paper, runs)

    assert direction(cell(10.0, 0.3, 0.1), cell(20.0, 0.2, 0.18)) == "unclear"
    assert direction(cell(10.0, 0.1, 0.1), cell(20.0, 0.2, 0.18)) == "same"
    assert direction(cell(10.0, 0.1), cell(20.0, 0.2)) == "unclear"  # with one seed, noise would decide
    assert direction(cell(10.0, math.nan), cell(20.0, 0.2)) == "–"


def test_mean_and_sample_deviation():
    assert mean_and_deviation([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)))
    assert mean_and_deviation([3.0]) == (3.0, None)
    assert mean_and_deviation([]) == (None, None)


def test_text(record):
    text = table_text(record)
    found = {row: line for row in ROWS for line in text.splitlines() if f" {row} " in line}
    assert re.search(r"full +3 +22\.0 ± 2\.0 +20\.8 +– +– +–", found["full"])
    assert re.search(r"co +3 +17\.0 ± 2\.0 +15\.1 +−5\.0 +−5\.7 +same", found["<baseline> & co"])
    assert re.search(r"2D-only +1 +30\.0 ± – +– +\+10\.0 +– +–", found["2D-only"])
    assert re.search(r"ST +2 +26\.0 ± 1\.4 +10\.1 +\+5\.0 +−10\.7 +opposite", found["ST"])
    assert "paper (nuScenes)" in text
    assert "less than one standard deviation, for which both rows need two seeds" in " ".join(text.split())
    assert "failed: ST: seed 2: no memory" in text
    assert "protocol: train->val" in text
    assert "vocabulary: v1" in text


def test_columns_of_what_differs_shorten_no_score(record):
    cells = []
    for place, cell in enumerate(record.cells):
        tags = {"protocol": f"train->val;clip2scene_frame,{place}", "vocabulary": 4 * f"{place:04x}"}
        runs = {seed: dataclasses.replace(run, tags={**run.tags, **tags}) for seed, run in cell.runs.items()}
        cells.append(dataclasses.replace(cell, row=f"{cell.row}, with a name as long as some have", runs=runs))
    about = {**record.about, "reference": cells[0].row}
    text = table_text(dataclasses.replace(record, about=about, cells=tuple(cells)))
    assert "…" not in text
    assert re.search(r"have +3 +22\.0 ± 2\.0 +20\.8 .* train->val;clip2scene_frame,0 +0000000000000000\n", text)


@pytest.mark.parametrize(("value", "text"), [(20.8, "20.8"), (25.08, "25.08"), (0.0, "0.0"), (None, "–")])
def test_the_papers_numbers_are_printed_as_it_does(value, text):
    assert paper_number(value) == text


def test_the_page_needs_nothing_else(record, parsed):
    page = parsed(table_html(record))
    assert not {"script", "link", "iframe"} & set(page.tags)
    # Scores per class, and a scan for every row that has its own runs: "repeat" shows those of "full".
    assert len(page.sources) == 1 + 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "<baseline> & co" in page.cells
    assert "17.0 ± 2.0" in page.cells
    assert len(page.links) == 3 + 3 + 3 + 1 + 2
    runs = {run.run_id for cell in record.cells for run in cell.runs.values()}
    assert {link.split("/runs/")[1].split("?")[0] for link in page.links} == runs


def test_links_can_go_to_the_ui(record, parsed):
    page = parsed(table_html(record, "http://127.0.0.1:5000"))
    assert {link.split("/#")[0] for link in page.links} == {"http://127.0.0.1:5000"}


def test_figures_of_a_table(record):
    names = [name for name, _, _ in table_figures(record)]
    assert names == ["classes_1", "scene_1", "scene_2", "scene_3", "scene_4"]


def test_a_table_can_be_read_by_its_run(record, uri):
    assert read_table_run(f"{uri}/", record.run_id) == record
    for name in ("demo", "demo-streetworld"):
        assert [run.info.run_id for run in find_named(uri, name)] == [record.run_id]


def test_the_same_table_goes_on_in_its_run_and_closes_what_was_left_open(record, uri):
    from mlflow import MlflowClient

    tracker, client = connect(uri, "tables"), MlflowClient(uri)
    left = {}

    def interrupted():
        with table_run(tracker, "other", "streetworld", "d2") as parent:
            left["parent"] = parent.run_id
            tags = {"mlflow.parentRunId": parent.run_id, "table": "other", "job_digest": "j"}
            left["job"] = client.create_run(tracker.experiment_id, tags=tags).info.run_id
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {client.get_run(run_id).info.status for run_id in left.values()} == {"KILLED"}
    assert finished_jobs(tracker, "other") == {}
    with table_run(tracker, "other", "streetworld", "d2") as parent:
        assert parent.run_id == left["parent"]
    with table_run(tracker, "other", "streetworld", "d3") as parent:
        assert parent.run_id != left["parent"]
    client.delete_run(left["parent"])
    client.delete_run(parent.run_id)


def test_the_command_rebuilds_the_table(record, uri, tmp_path):
    command = [sys.executable, "-m", "clip2scene.cli", "report"]
    page = tmp_path / "demo.html"
    words = ["demo", "--tracking-uri", uri, "--html", str(page)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(table_text(record))
    assert "<h1>A table</h1>" in page.read_text()
    wrong = subprocess.run([*command, "demo"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr == "clip2scene: report demo: give either --storage FOLDER or --tracking-uri URL\n"


def test_a_scan_without_predictions_and_without_labels_is_drawn():
    points = np.random.default_rng(0).uniform(1, 6, (50, 3))
    nothing = np.zeros(50, dtype=np.uint8)
    figure = scene_row(points, nothing, nothing, vocabulary("nuscenes"))
    assert [axes.get_title() for axes in figure.axes][3] == "errors: no point is scored"


def test_the_reference_is_marked_in_every_other_panel():
    ious = {"full": {"car": (40.0, 1.0), "bus": (20.0, None)}, "one": {"car": (30.0, 2.0)}}
    full, one = class_panels(ious, ("car", "bus"), "full").axes
    assert full.get_title() == "full\nmean 30.0"
    assert [bar.get_width() for bar in one.patches] == [30.0]
    marks = one.collections[-1].get_offsets()
    assert marks[:, 0].tolist() == [40.0, 20.0]
    assert "absent" in [text.get_text() for text in one.texts]
