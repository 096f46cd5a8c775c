"""What a mistake on the command line gets: one sentence and a non-zero exit; and the check of the machine."""

from __future__ import annotations

import argparse
import os
import re

import pytest
import torch

from clip2scene import doctor
from clip2scene.cli import main
from clip2scene.cli.session import session
from clip2scene.jobfile import load_job
from commands import REPOSITORY, clip2scene, fail


def test_doctor_passes(capsys):
    assert main(["doctor"]) == 0
    assert "ok      sparse convolution" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that works")
def test_doctor_tells_of_a_gpu_that_torch_cannot_use(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as NVML does, whatever the driver's age
    assert doctor.check() == 1
    printed = capsys.readouterr().out
    assert "GPUs: 1\nFAILED  GPUs: " in printed
    assert "FAILED  shipped CLIP: " in printed


def test_doctor_tells_of_a_gpu_that_is_older_than_torchs_kernels(monkeypatch, capsys):
    known = {"device_count": 1, "get_device_name": "Tesla V100", "get_device_capability": (7, 0)}
    for name, value in (known | {"get_arch_list": ["sm_75", "sm_80", "compute_120"]}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *number, value=value: value)
    assert doctor.check() == 1
    sentence = "FAILED  GPUs: RuntimeError: Tesla V100 has compute capability 7.0; this torch needs 7.5 or newer"
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "jobs/demo.yaml", "distill.tau=1"], "distill.tau: unknown key"),
        (["run", "jobs/none.yaml"], "cannot read the job file"),
        (
            ["run", "jobs/demo.yaml", "prompts.vocabulary=latin"],
            "prompts.vocabulary='latin': input should be ",
        ),
        (
            ["run", "search_spaces/temperatures.yaml"],
            "`clip2scene sweep search_spaces/temperatures.yaml --job JOB.yaml`",
        ),
        (
            ["settings", "tau"],
            "settings tau: unknown key; `clip2scene settings` lists all; did you mean distill.scr.tau?",
        ),
        (["index", "nuscenes", "--root", "/nowhere", "--version", "v1.0-mini", "--output", "x"], "/nowhere"),
        (
            ["sweep", "search_spaces/temperatures.yaml", "--job", "jobs/demo.yaml", "job.storage=s3://b/x"],
            "storage=s3://b/x: a sweep needs a folder",
        ),
        (
            ["sweep", "search_spaces/temperatures.yaml", "--job", "jobs/demo.yaml", "--storage", "x"],
            "sweep: --storage belongs to --resume",
        ),
        (
            ["sweep", "--resume", "temperatures", "num_trials=7"],
            "sweep --resume temperatures: num_trials=7: settings of a kept sweep cannot be changed",
        ),
        (["sweep", "--resume", "temperatures", "space.yaml"], "takes no FILE and no --job"),
        (["inspect", "/nowhere.parquet"], "no such index file"),
        (["ui", "--storage", "/nowhere"], "no runs there"),
        (["report"], "without a NAME, --storage is required"),
        (["report", "--storage", "/nowhere"], "no readable report there"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, tmp_path):
    if words[0] == "run" and not any(word.startswith("storage=") for word in words):
        words = [*words, f"storage={tmp_path}"]
    assert sentence in fail(*words)


def test_more_gpus_than_ray_has_are_one_sentence(tmp_path, uri):
    words = ["extract.num_actors=64", "extract.gpus_per_actor=1", f"storage={tmp_path}", "--tracking-uri", uri]
    assert "extract.gpus_per_actor=1: with 1 GPU each there is room for" in fail("run", "jobs/demo.yaml", *words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["storage=/proc/nowhere"], "cannot make this folder"),
        (["--address", "http://127.0.0.1:8265"], "`clip2scene submit --dashboard URL` sends"),
    ],
)
def test_a_mistake_that_is_found_after_the_libraries_are_loaded_is_one_sentence(words, sentence, tmp_path, capsys):
    """In this process, which has them."""
    assert main(["run", str(REPOSITORY / "jobs" / "demo.yaml"), f"storage={tmp_path}", *words]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("clip2scene: ")
    assert sentence in last


@pytest.mark.parametrize("command", ["run", "sweep", "report"])
def test_a_password_in_a_tracking_uri_is_not_repeated(command, tmp_path, capsys):
    job, space = REPOSITORY / "jobs" / "demo.yaml", REPOSITORY / "search_spaces" / "temperatures.yaml"
    words = {
        "run": [job, f"storage={tmp_path}"],
        "sweep": [space, "--job", job, f"job.storage={tmp_path}"],
        "report": ["table3"],
    }
    assert main([command, *map(str, words[command]), "--tracking-uri", "http://ann:pa55@127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == (
        "clip2scene: --tracking-uri: holds a password, which others could see; set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD instead\n"
    )


@pytest.mark.parametrize("command", ["ui", "up"])
def test_a_path_that_is_too_long_is_one_sentence(command, capsys):
    assert main([command, "--storage", name := "x" * 300]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clip2scene: ")
    assert name in line
    assert line.endswith(": cannot be used (File name too long); give another path")


@pytest.mark.skipif(os.geteuid() != 0, reason="not root, who may become somebody else")
def test_a_folder_that_the_user_may_not_enter_is_one_sentence(tmp_path, capsys):
    from clip2scene.tracking import server  # noqa: F401, which somebody else may not read

    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        assert main(["ui", "--storage", str(closed / "runs")]) == 1
    finally:
        os.seteuid(0)
    sentence = f"{closed}/runs/mlflow: cannot be used (Permission denied); give another path"
    assert capsys.readouterr().err == f"clip2scene: {sentence}\n"


def test_a_ray_that_requires_a_token_is_one_sentence(tmp_path, uri):
    words = ["run", "jobs/demo.yaml", f"storage={tmp_path}", "--tracking-uri", uri, "--address", "127.0.0.1:1"]
    nobody = os.environ | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    done = clip2scene(*words, environment=nobody)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("clip2scene: Ray at 127.0.0.1:1 requires a token; set RAY_AUTH_TOKEN_PATH to the file ")


def test_runs_that_an_object_store_does_not_keep_are_told(tmp_path, monkeypatch, capsys):
    """Before anything is started."""
    monkeypatch.setattr("clip2scene.tracking.server.starting_server", lambda folder: 1 / 0)
    job = load_job(REPOSITORY / "jobs" / "demo.yaml", ["storage=s3://bucket/runs"])
    options = argparse.Namespace(address=None, tracking_uri=None)
    with pytest.raises(ZeroDivisionError), session(options, tmp_path, "experiment", job):
        pass
    sentence = f"storage=s3://bucket/runs: MLflow's runs stay on this machine, in {tmp_path}/mlflow; "
    assert capsys.readouterr().err.startswith(sentence)


def test_a_report_that_is_none_is_one_sentence(tmp_path, capsys):
    for text in ("", "[]", '"text"'):
        (tmp_path / "report.json").write_text(text)
        assert main(["report", "--storage", str(tmp_path)]) == 1
        assert "no readable report there" in capsys.readouterr().err
    (tmp_path / "sweeps" / "temperatures").mkdir(parents=True)
    assert main(["report", "--storage", str(tmp_path)]) == 1
    assert "give the NAME of a sweep or table there: temperatures" in capsys.readouterr().err


def test_a_report_without_a_name_also_lists_sweeps_and_tables(tmp_path, capsys):
    (tmp_path / "report.json").write_text('{"majority_miou": 0.1}')
    assert main(["report", "--storage", str(tmp_path)]) == 0
    assert "sweeps" not in capsys.readouterr().out
    (tmp_path / "sweeps" / "temperatures").mkdir(parents=True)
    (tmp_path / "tables" / "table3-streetworld").mkdir(parents=True)
    assert main(["report", "--storage", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"sweeps and tables here: table3-streetworld, temperatures (clip2scene report NAME --storage {tmp_path})"
    )


def test_a_wrong_number_of_nodes_is_one_sentence_and_makes_no_folder(tmp_path, capsys):
    assert main(["up", "--nodes", "0", "--storage", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == "clip2scene: --nodes 0: not possible; allowed: 1 to 16\n"
    assert not (tmp_path / "none").exists()


def test_the_home_of_nobody_is_one_sentence(capsys):
    assert main(["run", "jobs/demo.yaml", "storage=~no-one-has-this-name/x"]) == 1
    assert "~no-one-has-this-name/x: this machine has no such user; allowed: ~/ for" in capsys.readouterr().err


def test_a_cluster_in_a_folder_that_cannot_be_made_is_one_sentence(capsys):
    assert main(["up", "--storage", "/proc/none"]) == 1
    assert "/proc/none/cluster/token: cannot be written (" in capsys.readouterr().err


SCANNET = ["index", "scannet", "--root", "/data", "--output"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*SCANNET, "tests"], "--output: tests is a folder; a file is needed"),
        ([*SCANNET, "x", "--images-per-scene", "0"], "--images-per-scene: 0: must be an integer above 0"),
        ([*SCANNET, "x", "--max-sweeps", "-1"], "--max-sweeps: -1: must be an integer of at least 0"),
        ([*SCANNET, "x", "--max-sweeps", "two"], "--max-sweeps: two: must be an integer of at least 0"),
        (["index", "kitti", "--root", "/data", "--output", "x"], "DATASET: invalid choice: 'kitti' (choose from "),
        (["inspect", "x.parquet", "--figure", "README.md/x"], "--figure: README.md is a file; a folder is needed"),
        (["up", "--storage", "README.md/x"], "README.md is a file; a folder is needed"),
        (["run", "jobs/demo.yaml", "--storage", "x"], "a setting is given without dashes: storage=x"),
        (["list", "--address", "http://127.0.0.1:8265"], "unrecognized arguments: --address http://127.0.0.1:8265"),
    ],
)
def test_a_mistake_in_the_options_is_refused_before_any_work(words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert sentence in capsys.readouterr().err


def test_the_overview_has_every_command_and_each_has_an_example(capsys):
    commands = set()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    for line in capsys.readouterr().out.split("\noptions:")[0].splitlines():
        if match := re.match(r"  ([a-z]+) +[a-z]", line):
            commands.add(match[1])
    assert len(commands) == 15
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"\nexample:\n  clip2scene {command}" in capsys.readouterr().out
