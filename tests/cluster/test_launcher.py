"""The files of Ray's launcher, by Ray's own validation, and by what a stranger must not find in them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "cluster" / "launcher"
NAMES = ("aws", "onprem")


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCHER / f"{name}.yaml").read_text(encoding="utf-8"))


def _validate(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it talks to a machine."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def _start_commands(config: dict[str, Any]) -> list[list[str]]:
    """Words of every `ray start`, with the variables before it."""
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    words = [shlex.split(command.split(";")[-1]) for command in commands]
    return [command for command in words if "start" in command]


@pytest.mark.parametrize("name", NAMES)
def test_ray_takes_the_file(name):
    prepared = _validate(_load(name))
    assert prepared["cluster_name"] == "clip2scene"
    assert prepared["max_workers"] == 2
    workers = [node for kind, node in prepared["available_node_types"].items() if kind != "head"]
    assert [node["min_workers"] for node in workers] == [2]


@pytest.mark.parametrize("name", NAMES)
def test_rays_validation_would_find_a_mistyped_field(name):
    from jsonschema import ValidationError

    config = _load(name) | {"head_start_commands": []}
    with pytest.raises(ValidationError, match="head_start_commands"):
        _validate(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_starts_with_the_token_and_the_dashboard_stays_on_loopback(name):
    from ray.scripts.scripts import start

    head, worker = _start_commands(_load(name))
    for words in (head, worker):
        assert words[0] == "RAY_AUTH_MODE=token"
        assert words[1].split("/")[-1] == "ray"
    options = [start.make_context("start", words[3:], resilient_parsing=False).params for words in (head, worker)]
    assert options[0]["head"]
    assert options[0]["dashboard_host"] == "127.0.0.1"
    assert options[0]["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert options[1]["address"] == f"$RAY_HEAD_IP:{options[0]['port']}"


@pytest.mark.parametrize("name", NAMES)
def test_the_token_reaches_every_node_as_a_file(name):
    config = _load(name)
    sources = list(config["file_mounts"].values())
    assert {"~/.ray/auth_token", "~/.mlflow/credentials"} <= set(sources)
    for target, source in config["file_mounts"].items():
        if source.startswith("~/."):
            assert target.endswith(source.removeprefix("~"))
        else:
            assert (REPOSITORY / source).exists()
    text = (LAUNCHER / f"{name}.yaml").read_text(encoding="utf-8")
    assert not re.search(r"RAY_AUTH_TOKEN|PASSWORD|SECRET|ssh_private_key|[0-9a-f]{24,}", text)


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_shell(name):
    config = _load(name)
    lists = [value for key, value in config.items() if key.endswith("_commands")]
    assert len(lists) == 3
    for command in (command for commands in lists for command in commands):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_what_the_machines_of_ones_own_get_is_what_pip_needs():
    config = _load("onprem")
    copied = {source for target, source in config["file_mounts"].items() if target.startswith("~/clip2scene/")}
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "platform"}
    assert all(
        target == f"~/clip2scene/{source}" for target, source in config["file_mounts"].items() if source in copied
    )


def test_the_aws_nodes_are_what_ec2_takes():
    loaders = pytest.importorskip("botocore.loaders", reason="needs clip2scene[server]")
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    shape = ServiceModel(loaders.Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances")
    nodes = _load("aws")["available_node_types"]
    for node in nodes.values():
        report = ParamValidator().validate(node["node_config"] | {"MinCount": 1, "MaxCount": 1}, shape.input_shape)
        assert not report.has_errors(), report.generate_report()
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert node["node_config"]["SecurityGroupIds"]  # else Ray makes one that opens SSH to the world
        assert all(device["Ebs"]["Encrypted"] for device in node["node_config"]["BlockDeviceMappings"])
    assert set(nodes["gpu"]["node_config"]) <= set(shape.input_shape.members)


def test_the_aws_image_is_the_one_of_the_manifests():
    docker = _load("aws")["docker"]
    manifest = (REPOSITORY / "cluster" / "kuberay" / "raycluster.yaml").read_text(encoding="utf-8")
    assert f"image: {docker['image']}\n" in manifest
    assert "--env=RAY_AUTH_MODE=token" in docker["run_options"]
    dockerfile = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"HOME=/home/ray\b", dockerfile)  # where the launcher puts what it copies; /root when not told
