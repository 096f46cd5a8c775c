"""cluster/Dockerfile, compose.yaml and README.md, as far as they can be checked without building the image."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import yaml
from manifests import PODS

from commands import REPOSITORY


def _instructions() -> list[tuple[str, list[str]]]:
    text = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines if line.strip()]


def test_the_image_copies_exactly_what_its_ignore_file_lets_through():
    ignore = (REPOSITORY / "cluster" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = set()
    for name, words in _instructions():
        if name == "COPY":
            copied |= {word for word in words[:-1] if not word.startswith("--")}
    assert copied == kept
    assert all((REPOSITORY / source).exists() for source in copied)
    assert {"**/*.env", "**/__pycache__"} <= set(ignore)


def test_the_image_is_cuda_12_python_311_pinned_and_not_root():
    found = _instructions()
    [base] = [words for name, words in found if name == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:12\.\d+\.\d+-runtime-ubuntu22\.04", base[0])
    assert [words for name, words in found if name == "USER"] == [["ray"]]
    runs = [words for name, words in found if name == "RUN"]
    assert any("python3.11" in words for words in runs)
    [install] = [words for words in runs if "pip" in words]
    assert install[install.index("--constraint") + 1] == "constraints.txt"
    uid = next(words for words in runs if "useradd" in words)
    assert uid[uid.index("--uid") + 1] == "1000"
    assert all(spec["securityContext"]["runAsUser"] == 1000 for owner, _, spec in PODS if owner in ("ray", "mlflow"))
    assert not any(name == "EXPOSE" for name, _ in found)


def test_the_image_knows_its_revision():
    found = _instructions()
    assert ("ARG", ["REVISION=unknown"]) in found
    [last] = [words for name, words in found[found.index(("ARG", ["REVISION=unknown"])) :] if name == "RUN"]
    assert last[:3] == ["echo", "$REVISION", ">"]
    assert last[-1].endswith("/REVISION")


def test_the_servers_packages_are_declared_and_pinned():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").lower()
    extra = project["optional-dependencies"]["server"]
    assert {"mlflow[auth]", "psycopg2-binary", "boto3"} <= set(extra)
    for name in ("flask-wtf", "psycopg2-binary", "boto3"):
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name


def test_containers_start_programs_that_the_image_holds():
    for _, _, spec in PODS:
        for container in spec["containers"]:
            if container["image"].startswith("clip2scene:") and "command" in container:
                path = REPOSITORY / Path(container["command"][-1]).relative_to("/opt/clip2scene")
                assert os.access(path, os.X_OK), path


def test_compose_opens_one_port_on_loopback_and_holds_no_password():
    compose = yaml.safe_load((REPOSITORY / "cluster" / "mlflow" / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    [port] = services["mlflow"]["ports"]
    assert re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", port) == "127.0.0.1:5000:5000"
    assert "ports" not in services["postgres"]
    build = services["mlflow"]["build"]
    assert (REPOSITORY / "cluster" / "mlflow" / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / build["dockerfile"]).is_file()
    for service in services.values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD$|KEY$", name):
                assert re.match(r"\$\{[A-Z_]+:\?", value), name
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose["volumes"]


def test_the_readmes_command_names_the_registry_in_every_file_but_compose(tmp_path):
    shutil.copytree(REPOSITORY / "cluster", tmp_path / "cluster")
    text = (tmp_path / "cluster" / "README.md").read_text(encoding="utf-8")
    [command] = [line for line in text.splitlines() if line.startswith("    sed ")]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    files = {file: file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.yaml")}
    assert [file.name for file, text in files.items() if "image: clip2scene:" in text] == ["compose.yaml"]
    assert sum(text.count("image: REGISTRY/clip2scene:0.1.0") for text in files.values()) == 7


def test_the_readme_names_files_that_exist():
    text = (REPOSITORY / "cluster" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bcluster/(?:[a-z]+/)?[\w.]*\w", text))
    assert {"cluster/Dockerfile", "cluster/mlflow/compose.yaml", "cluster/launcher/onprem.yaml"} <= named
    for path in named - {"cluster/README.md"}:
        assert (REPOSITORY / path).exists(), path
