"""The documents in cluster/kuberay, as the tests of this folder read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from commands import REPOSITORY

KUBERAY = REPOSITORY / "cluster" / "kuberay"
LONG_LIVED = ("Deployment", "StatefulSet", "Job")


def _documents() -> list[dict[str, Any]]:
    files = [file for file in sorted(KUBERAY.glob("*.yaml")) if file.name != "kustomization.yaml"]
    return [document for file in files for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


DOCUMENTS = _documents()


def of(*kinds: str) -> list[dict[str, Any]]:
    """The documents of these kinds, in the order of their files."""
    return [document for document in DOCUMENTS if document["kind"] in kinds]


def one(kind: str, name: str) -> dict[str, Any]:
    """The only document of this kind and name."""
    [found] = [document for document in of(kind) if document["metadata"]["name"] == name]
    return found


def ray_clusters() -> list[dict[str, Any]]:
    """The specifications of the lasting cluster and of the job's own."""
    return [d["spec"] for d in of("RayCluster")] + [d["spec"]["rayClusterSpec"] for d in of("RayJob")]


def _pods() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Every pod's owner, labels and spec; Ray's pods carry the label that KubeRay gives them."""
    for document in of(*LONG_LIVED):
        template = document["spec"]["template"]
        yield document["metadata"]["name"], template["metadata"]["labels"], template["spec"]
    for cluster in ray_clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield "ray", {"ray.io/is-ray-node": "yes"}, group["template"]["spec"]


PODS = list(_pods())


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document that is neither a mapping nor a list, with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value
