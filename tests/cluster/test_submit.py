"""What is sent to a cluster, and what is refused before that; test_up.py sends to a real one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import clip2scene
from clip2scene.cluster import session, submit
from clip2scene.cluster.jobs import Jobs
from clip2scene.errors import ConfigError
from clip2scene.jobfile import load_job
from clip2scene.tracking.provenance import git_revision
from commands import REPOSITORY

DEMO, NUSCENES, TABLE, SPACE = (
    str(REPOSITORY / path)
    for path in (
        "jobs/demo.yaml",
        "jobs/nuscenes.yaml",
        "jobs/table3_ablation.yaml",
        "search_spaces/temperatures.yaml",
    )
)


def test_the_same_settings_have_the_same_name():
    first = submit.read_submission(DEMO, ["seed=1", "distill.epochs=3"])
    assert re.fullmatch(r"clip2scene-demo-[0-9a-f]{16}", first.job_id)
    assert submit.read_submission(DEMO, ["distill.epochs=3", "seed=1"]).job_id == first.job_id
    assert submit.read_submission(DEMO, ["seed=2", "distill.epochs=3"]).job_id != first.job_id
    assert submit.read_submission(DEMO, ["seed=1", "distill.epochs=3", "storage=/x"]).job_id != first.job_id


def test_tables_and_sweeps_are_submitted_too():
    table = submit.read_submission(TABLE, ["seeds=[2]"])
    assert (table.verb, table.name) == ("run", "table3")
    assert len(table.jobs) > 10
    sweep = submit.read_submission(SPACE, ["job.seed=1"], DEMO)
    assert (sweep.verb, [path.name for path in sweep.files]) == ("sweep", ["temperatures.yaml", "demo.yaml"])
    with pytest.raises(ConfigError, match="a search space varies a job; give --job JOB"):
        submit.read_submission(SPACE)
    with pytest.raises(ConfigError, match="--job JOB belongs to a search space"):
        submit.read_submission(DEMO, (), DEMO)


def test_the_package_is_the_code_and_the_files():
    with submit.package(submit.read_submission(SPACE, (), DEMO)) as folder:
        inside = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        revision = (folder / "clip2scene" / "REVISION").read_text()
    code = Path(clip2scene.__file__).parent
    sources = {f"clip2scene/{path.relative_to(code)}" for path in code.rglob("*.py")}
    # What is not Python must be declared, or a wheel, and so the cluster's image, lacks it.
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    data = {f"clip2scene/{path.relative_to(code)}" for files in declared["clip2scene"] for path in code.glob(files)}
    assert inside == sources | data | {
        "clip2scene/REVISION",
        "files/0/temperatures.yaml",
        "files/1/demo.yaml",
    }
    assert revision == f"{git_revision()}\n"
    assert not folder.exists()


@pytest.mark.parametrize("name", ["streetworld", "table3_ablation"])
def test_the_file_in_the_package_does_not_need_its_bases(name):
    submission = submit.read_submission(str(REPOSITORY / "jobs" / f"{name}.yaml"))
    with submit.package(submission) as folder:
        inside = submit.read_submission(str(folder / submission.names[0]))
    assert inside.settings == submission.settings


@pytest.mark.parametrize(
    ("overrides", "nodes", "sentence"),
    [
        ([], [{"CPU": 1.0}, {"CPU": 1.0}], None),
        (
            [],
            [{"CPU": 1.5}, {"CPU": 0.5}],
            r"resources.num_workers=2 with resources.gpus_per_worker=0: with 1 CPU each",
        ),
        (["resources.num_workers=0"], [{"CPU": 0.0}], None),
        (["stage=extract"], [{"CPU": 1.0}], None),
        (["resources.gpus_per_worker=0.5"], [{"CPU": 4.0, "GPU": 1.0}], None),
        (
            ["resources.gpus_per_worker=0.6"],
            [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 0.0, "GPU": 1.0}],
            r"with 1 CPU and 0.6 GPUs each there is room for 1; .*here: 4 CPUs and 1 GPU, 0 CPUs and 1 GPU",
        ),
        (["resources.num_workers=4", "resources.gpus_per_worker=0.6"], [{"CPU": 8.0, "GPU": 3.0}], r"is room for 3; "),
        (["extract.gpus_per_actor=1"], [{"CPU": 8.0, "GPU": 1.0}], r"extract.num_actors=2 .*room for 1; "),
    ],
)
def test_what_can_never_run_is_refused(overrides, nodes, sentence):
    job = load_job(DEMO, overrides)
    if sentence is None:
        submit.check_fits(job, nodes, "here")
    else:
        with pytest.raises(ConfigError, match=sentence) as caught:
            submit.check_fits(job, nodes, "here")
        assert "\n" not in str(caught.value)


def test_a_job_that_trains_nothing_needs_no_gpu_for_training():
    words = ["dataset.root=/data/nuscenes", "extract.gpus_per_actor=0"]
    for stage in ("index", "extract"):
        job = load_job(NUSCENES, [*words, f"stage={stage}"])
        session.check_workers(job, [])
        submit.check_fits(job, [{"CPU": 8.0}], "here")
    for later in (["stage=distill"], ["stage=predict", "predict.checkpoint=/students/1.safetensors"]):
        with pytest.raises(ConfigError, match=r"^resources\.num_workers=2 .* room for 0; .*Ray: 0 CPUs and 0 GPUs"):
            session.check_workers(load_job(NUSCENES, [*words, *later]), [{"GPU": 0.0}])


def test_a_job_that_encodes_nothing_needs_no_gpu_for_extraction():
    nodes = [{"CPU": 8.0}]
    words = ["dataset.root=/data/nuscenes", "resources.gpus_per_worker=0"]
    for others in (
        ["stage=index"],
        ["finetune.checkpoint=/students/1.safetensors"],
        ["stage=predict", "predict.checkpoint=/students/1.safetensors"],
    ):
        submit.check_fits(load_job(NUSCENES, [*words, *others]), nodes, "here")
    with pytest.raises(ConfigError, match=r"^extract\.num_actors=2 with extract\.gpus_per_actor=1: .* room for 0; "):
        submit.check_fits(load_job(NUSCENES, words), nodes, "here")


def test_an_address_with_too_few_cpus_is_refused_too():
    job = load_job(DEMO)
    session.check_workers(job, [{"CPU": 1.0}, {"CPU": 1.0}])
    with pytest.raises(ConfigError, match=r"^resources\.num_workers=2 .*: with 1 CPU each there is room for 1; "):
        session.check_workers(job, [{"CPU": 1.0}])


def test_relative_paths_and_homes_are_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    words = ["dataset.root=world", "finetune.checkpoint=/other/student.safetensors", "storage=~/out"]
    words += ["teacher.model=ViT-B-16", "teacher.pretrained=~/teacher.safetensors", "predict.checkpoint=n.safetensors"]
    words += ["dataset.linked_folders=[fast, ~/disk, /data]"]
    job = submit.read_submission(DEMO, words)
    assert submit.with_absolute_paths(job, here=True).overrides == (
        *words,
        f"storage={tmp_path}/home/out",
        f"dataset.root={tmp_path}/world",
        f"predict.checkpoint={tmp_path}/n.safetensors",
        f'dataset.linked_folders=["{tmp_path}/fast", "{tmp_path}/home/disk", "/data"]',
        f"teacher.pretrained={tmp_path}/home/teacher.safetensors",
    )
    for given in ("dataset.root=world", "storage=~/out", "teacher.model=local-dir:~/clip"):
        elsewhere = submit.read_submission(DEMO, ["storage=/out", given])
        with pytest.raises(ConfigError, match=rf"^{re.escape(given)}: not absolute, and the cluster is not on this"):
            submit.with_absolute_paths(elsewhere, here=False)
    elsewhere = submit.read_submission(DEMO, ["storage=/out", "dataset.linked_folders=[/data, fast]"])
    with pytest.raises(
        ConfigError, match=r'^dataset\.linked_folders=\["/data", "fast"\]: not absolute, and the cluster'
    ):
        submit.with_absolute_paths(elsewhere, here=False)
    anywhere = submit.read_submission(DEMO, ["storage=s3://bucket/runs"])
    assert submit.with_absolute_paths(anywhere, here=False) == anywhere
    table = submit.with_absolute_paths(submit.read_submission(TABLE), here=True)
    assert table.overrides == (f"storage={tmp_path}/tables-output",)
    sweep = submit.with_absolute_paths(submit.read_submission(SPACE, (), DEMO), here=True)
    assert sweep.overrides == (f"job.storage={tmp_path}/demo-output",)
    assert {job.storage for job in sweep.jobs} == {f"{tmp_path}/demo-output"}


def test_a_relative_path_that_only_a_row_or_a_space_sets_is_refused(tmp_path):
    row = {"group": "a", "name": "given", "set": {"finetune.checkpoint": "student.safetensors"}}
    table = yaml.safe_load(Path(TABLE).read_text()) | {"reference": "plain", "storage": "/tables", "seeds": [1]}
    table["score"] = "miou/finetuned_pretrained"
    table["jobs"] = {"streetworld": {"base": str(REPOSITORY / "jobs" / "streetworld.yaml")}}
    table["rows"] = [{"group": "a", "name": "plain"}, row]
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    submission = submit.read_submission(str(tmp_path / "table.yaml"))
    assert [job.finetune.checkpoint for job in submission.jobs] == [None, "student.safetensors"]
    sentence = r"^finetune\.checkpoint=student\.safetensors: not absolute, in a row or a column, and"
    with pytest.raises(ConfigError, match=sentence) as caught:
        submit.with_absolute_paths(submission, here=True)
    assert "\n" not in str(caught.value)
    row["set"]["finetune.checkpoint"] = "/students/1.safetensors"
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    absolute = submit.read_submission(str(tmp_path / "table.yaml"))
    assert submit.with_absolute_paths(absolute, here=True) == absolute
    space = [
        "job.storage=/sweeps",
        "parameters={teacher.model: {grid: ['local-dir:a', 'local-dir:/b']}}",
        "num_trials=1",
    ]
    sweep = submit.read_submission(SPACE, [*space, "touches_features=true"], DEMO)
    with pytest.raises(ConfigError, match=r"^teacher\.model=local-dir:a: not absolute, in a search space, and"):
        submit.with_absolute_paths(sweep, here=True)


def test_variables_are_as_given_or_as_they_are_here(monkeypatch):
    monkeypatch.setenv("CLIP2SCENE_CACHE", "/cache=1")
    words = ["CLIP2SCENE_CACHE", "AWS_ENDPOINT_URL=http://store:8333", "TOKENIZERS_PARALLELISM=", "A=b", "A=c"]
    assert submit.variables(words) == {
        "CLIP2SCENE_CACHE": "/cache=1",
        "AWS_ENDPOINT_URL": "http://store:8333",
        "TOKENIZERS_PARALLELISM": "",
        "A": "c",
    }


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE: not set in this environment; set it, or give NAME=VALUE$"),
        ("=pa55", "'': not a variable's name; allowed: NAME or NAME=VALUE"),
        ("1A=pa55", "'1A': not a variable's name"),
        ("A B", "'A B': not a variable's name"),
        ("AWS_ACCESS_KEY_ID=pa55", "AWS_ACCESS_KEY_ID: holds a secret, .* the cluster's own machines instead$"),
        ("AWS_SECRET_ACCESS_KEY=pa55", "AWS_SECRET_ACCESS_KEY: holds a secret"),
        ("MLFLOW_TRACKING_PASSWORD=pa55", "MLFLOW_TRACKING_PASSWORD: holds a secret"),
        ("ray_auth_token=pa55", "ray_auth_token: holds a secret"),
        ("SOME_API_KEY=pa55", "SOME_API_KEY: holds a secret"),
        ("HTTP_PROXY=http://ann:pa55@proxy:3128", "HTTP_PROXY: holds a secret"),
        ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL: holds a secret"),
    ],
)
def test_a_variable_that_is_invalid_or_secret(word, sentence, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://ann:pa55@store")
    with pytest.raises(ConfigError, match=rf"^--env {sentence}") as caught:
        submit.variables(["CLIP2SCENE_CACHE=/cache", word])
    assert "pa55" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("sqlite:///mlflow.db", "must be the address of an MLflow server"),
        ("http://", "must be the address of an MLflow server"),
        ("http://ann:pa55@mlflow:5000", "--tracking-uri: holds a password, .* on the cluster's machines instead$"),
        ("mlflow://ann:pa55@mlflow", "--tracking-uri: holds a password"),
    ],
)
def test_a_tracking_uri_that_the_dashboard_must_not_show(uri, sentence):
    jobs = Jobs.__new__(Jobs)  # which is not asked
    with pytest.raises(ConfigError, match=sentence) as caught:
        submit.submit(submit.read_submission(DEMO), jobs, uri)
    assert "pa55" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:6379", "must be the URL of Ray's dashboard"),
        ("http://ann:pa55@127.0.0.1:8265", "holds a password"),
    ],
)
def test_an_address_that_is_no_dashboard(address, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        Jobs(address)
    assert "pa55" not in str(caught.value)
