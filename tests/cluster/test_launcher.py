"""The files of Ray's launcher, read as Ray reads them; they hold no secret."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from commands import REPOSITORY

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
    """The words of every `ray start`, with the variables before it."""
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    words = [shlex.split(command.split(";")[-1]) for command in commands]
    return [command for command in words if "start" in command]


@pytest.mark.parametrize("name", NAMES)
def test_ray_accepts_the_file(name):
    prepared = _validate(_load(name))
    assert prepared["cluster_name"] == "clip2scene"
    assert prepared["max_workers"] == 2
    workers = [node for kind, node in prepared["available_node_types"].items() if kind != "head"]
    assert [node["min_workers"] for node in workers] == [2]


@pytest.mark.parametrize("name", NAMES)
def test_rays_validation_finds_a_mistyped_field(name):
    from jsonschema import ValidationError

    config = _load(name) | {"head_start_commands": []}
    with pytest.raises(ValidationError, match="head_start_commands"):
        _validate(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_starts_with_the_token_and_the_dashboard_listens_on_loopback(name):
    from ray.scripts.scripts import start

    head, worker = _start_commands(_load(name))
    options = []
    for words in (head, worker):
        verb = words.index("start")
        assert words[0] == "RAY_AUTH_MODE=token"
        assert words[verb - 1].split("/")[-1] == "ray"
        options.append(start.make_context("start", words[verb + 1 :], resilient_parsing=False).params)
    assert options[0]["head"]
    assert options[0]["dashboard_host"] == "127.0.0.1"
    assert options[0]["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert options[1]["address"] == f"$RAY_HEAD_IP:{options[0]['port']}"


def test_the_readmes_command_makes_the_token_that_the_launcher_copies(tmp_path):
    text = (REPOSITORY / "cluster" / "README.md").read_text(encoding="utf-8")
    [command] = [line for line in text.splitlines() if "get-auth-token" in line]
    kubernetes = tmp_path / "another-token"
    kubernetes.write_text("of another cluster")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"HOME": str(tmp_path), "PATH": path, "RAY_AUTH_TOKEN_PATH": str(kubernetes)}
    done = subprocess.run(["bash", "-c", command], env=environment, check=True, stdout=subprocess.PIPE)
    assert done.stdout == b""
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


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
    assert not re.search(r"RAY_AUTH_TOKEN|PASSWORD|SECRET|PRIVATE KEY|[0-9a-f]{24,}", text)


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_valid_shell(name):
    config = _load(name)
    lists = [value for key, value in config.items() if key.endswith("_commands")]
    assert len(lists) == 3
    for command in (command for commands in lists for command in commands):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_onprem_machines_get_what_pip_needs():
    config = _load("onprem")
    copied = {source for target, source in config["file_mounts"].items() if target.startswith("~/clip2scene/")}
    assert copied == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "platform"}
    assert all(
        target == f"~/clip2scene/{source}" for target, source in config["file_mounts"].items() if source in copied
    )


def test_onprem_uses_version_1_of_the_autoscaler(tmp_path):
    from ray.autoscaler._private.util import with_envs

    ray = tmp_path / "clip2scene" / ".venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    ray.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import ray; print(ray._config.enable_autoscaler_v2())'\n")
    ray.chmod(0o755)
    [start] = with_envs(_load("onprem")["head_start_ray_commands"][-1:], {"RAY_enable_autoscaler_v2": "1"})
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", start], env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "False\n"


def test_the_onprem_head_gets_the_key_that_starts_the_workers():
    from ray.autoscaler._private.commands import _set_up_config_for_head_node

    config = _load("onprem")
    provider = SimpleNamespace(prepare_for_head_node=lambda remote: remote)
    prepared, bootstrap = _set_up_config_for_head_node(config, provider, no_restart=False)
    key = json.loads(Path(bootstrap.name).read_text(encoding="utf-8"))["auth"]["ssh_private_key"]
    assert prepared["file_mounts"][key] == config["auth"]["ssh_private_key"]


def _ec2_requests(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Ray's RunInstances request for each type of node, in an account that has another public subnet as well."""
    from ray.autoscaler._private.aws import config as ray_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    usable = {"vpc_id": "vpc-0", "state": "available", "map_public_ip_on_launch": True}
    names = ("subnet-00000000000000000", "subnet-other")
    subnets = [SimpleNamespace(subnet_id=name, availability_zone=name, **usable) for name in names]
    ec2 = Mock()
    ec2.subnets.all.return_value = subnets
    ec2.subnets.filter.side_effect = lambda Filters: [s for s in subnets if s.subnet_id in Filters[0]["Values"]]
    ec2.security_groups.filter.return_value = subnets[:1]
    ec2.create_instances.return_value = []
    monkeypatch.setattr(ray_aws, "_resource", lambda *_: ec2)
    config = ray_aws._configure_subnet(_load("aws"))
    provider = SimpleNamespace(cluster_name="clip2scene", provider_config=config["provider"], ec2_fail_fast=ec2)
    requests = {}
    for kind, node in config["available_node_types"].items():
        AWSNodeProvider._create_node(provider, node["node_config"], {}, 1)
        requests[kind] = ec2.create_instances.call_args.kwargs
    return requests


def test_ec2_accepts_what_ray_requests(monkeypatch):
    loaders = pytest.importorskip("botocore.loaders", reason="needs clip2scene[server]")
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    shape = ServiceModel(loaders.Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances")
    requests = _ec2_requests(monkeypatch)
    for request in requests.values():
        report = ParamValidator().validate(request, shape.input_shape)
        assert not report.has_errors(), report.generate_report()
        assert set(request) <= set(shape.input_shape.members)
        assert request["SubnetId"] == "subnet-00000000000000000"
        assert request["MetadataOptions"] == {"HttpTokens": "required"}
        assert request["SecurityGroupIds"]  # else Ray makes one that opens SSH to the world
        assert all(device["Ebs"]["Encrypted"] for device in request["BlockDeviceMappings"])
    assert requests["head"]["IamInstanceProfile"]["Arn"]  # else Ray makes a role with full access to EC2 and S3
    assert "IamInstanceProfile" not in requests["gpu"]


def test_the_aws_image_is_that_of_the_manifests():
    docker = _load("aws")["docker"]
    manifest = (REPOSITORY / "cluster" / "kuberay" / "raycluster.yaml").read_text(encoding="utf-8")
    assert f"image: {docker['image']}\n" in manifest
    assert "--env=RAY_AUTH_MODE=token" in docker["run_options"]
    dockerfile = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"HOME=/home/ray\b", dockerfile)  # where the launcher copies files to; /root by default
