"""Job files: overrides, digests and what a mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip2scene.config import ConfigError
from clip2scene.jobfile import load_job

JOBS = Path(__file__).parents[1] / "jobs"
PLAIN = [path for path in sorted(JOBS.glob("*.yaml")) if not path.stem.startswith("table")]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.name)
def test_every_job_file_is_valid(path):
    overrides = ["dataset.root=/data"] if path.stem in ("nuscenes", "semantickitti", "scannet") else []
    assert load_job(path, overrides).name


def test_overrides_reach_every_level():
    job = load_job(JOBS / "demo.yaml", ["seed=3", "distill.stcr.lambda=0.25", "student.channels=[8, 16]"])
    assert (job.seed, job.distill.stcr.lambda_, job.student.channels) == (3, 0.25, (8, 16))


def test_digest_follows_values_only():
    plain, same = load_job(JOBS / "demo.yaml"), load_job(JOBS / "demo.yaml", ["seed=0"])
    assert plain.digest() == same.digest()
    assert plain.digest() != load_job(JOBS / "demo.yaml", ["seed=1"]).digest()


def test_the_released_variant_sets_every_switch_that_is_not_given():
    plain, released = (load_job(JOBS / "demo.yaml", [f"variant={name}"]) for name in ("paper", "released"))
    assert plain.digest() == load_job(JOBS / "demo.yaml").digest()
    assert not released.teacher.clip_normalisation
    stcr = released.distill.stcr
    assert (stcr.grid, stcr.pixel_term, stcr.cell_text) == ("voxel", False, "first")
    assert (stcr.max_points_per_cell, stcr.count_empty_slots) == (8, True)
    assert released.distill.scr.form == "cross_entropy"
    assert not released.distill.normalise_features
    assert (released.distill.s3.granularity, released.distill.s3.synchronised) == ("point", False)  # the first is given
    assert released.distill.sweep_choice == "random"
    assert load_job(JOBS / "demo.yaml", ["variant=released", "distill.stcr.pixel_term=true"]).distill.stcr.pixel_term


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_job(JOBS / "demo.yaml").seed = 4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("distill.scr.tauu=3", r"distill\.scr\.tauu: unknown key; allowed here: form, tau, weight"),
        ("distill.scr.tau=-1", r"distill\.scr\.tau=-1: input should be greater than 0"),
        ("distill.scr.tau=warm", r"distill\.scr\.tau='warm': .*valid number"),
        ("distill.scr.tau=.nan", r"distill\.scr\.tau=nan: .*finite"),
        ("seed=1.5", r"seed=1\.5: .*valid integer"),
        (
            "dataset.kind=waymo",
            r"dataset\.kind='waymo': input should be 'streetworld', 'nuscenes', 'semantickitti' or 'scannet'",
        ),
        ("dataset.kind=nuscenes", r"dataset\.root must name the nuscenes folder"),
        ("resources.num_workers=3", r"distill\.batch_size=\d+ must be a multiple of resources\.num_workers=3"),
        ("distill.scr=3", r"distill\.scr=3: .*dictionary"),
        ("name.first=3", r"override 'name\.first=3': name is a value"),
        ("no-equals", r"override 'no-equals' is not of the form key\.path=value"),
        ("distill.epochs=[", r"override 'distill\.epochs=\[': the value is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_keys_path(override, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_job(JOBS / "demo.yaml", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"), [("- a\n- b\n", "mapping"), ("a: [", "not valid YAML"), ("stage: index\n", "name: required")]
)
def test_a_damaged_job_file(tmp_path, text, sentence):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_job(path)


def test_a_missing_job_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the job file"):
        load_job(tmp_path / "nothing.yaml")
