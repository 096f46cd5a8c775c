"""The manifests in cluster/kuberay: fields exist, names match, no secret is in them, nothing is open to the outside."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifests import DOCUMENTS, KUBERAY, LONG_LIVED, PODS, leaves, of, one, ray_clusters

from commands import REPOSITORY

SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text(encoding="utf-8"))
NAMESPACE = "clip2scene"


def _validate(value: Any, name: str) -> None:
    jsonschema.validate(value, {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})


def test_every_field_is_one_that_kuberay_publishes():
    for kind in ("RayCluster", "RayJob"):
        assert of(kind)
        for document in of(kind):
            assert document["apiVersion"] == "ray.io/v1"
            _validate(document["spec"], kind)
    for document in of(*LONG_LIVED):
        _validate(document["spec"]["template"], "PodTemplate")
    for document in of("Service", "PersistentVolumeClaim"):
        _validate(document["spec"], document["kind"])
    for document in of("StatefulSet"):
        for claim in document["spec"]["volumeClaimTemplates"]:
            _validate(claim["spec"], "PersistentVolumeClaim")
    for document in of("NetworkPolicy"):
        assert set(document["spec"]) <= {"podSelector", "policyTypes", "ingress", "egress"}
        _validate(document["spec"].get("ingress", []), "NetworkPolicyIngress")
        _validate(document["spec"].get("egress", []), "NetworkPolicyEgress")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("authOption",), {"mode": "token"}),
        (("authOptions", "mode"), "tokens"),
        (("workerGroupSpecs", 0, "replica"), 2),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "envs"), []),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_a_mistyped_field_is_found(path, value):
    spec = json.loads(json.dumps(one("RayCluster", "clip2scene")["spec"]))
    place = spec
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        _validate(spec, "RayCluster")


def test_kustomization_lists_every_manifest_but_the_job():
    kustomization = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text(encoding="utf-8"))
    files = {file.name for file in KUBERAY.glob("*.yaml")} - {"kustomization.yaml", "rayjob.yaml"}
    assert sorted(kustomization["resources"]) == sorted(files)
    assert kustomization["namespace"] == NAMESPACE
    assert {document["metadata"].get("namespace", NAMESPACE) for document in DOCUMENTS} == {NAMESPACE}
    assert of("RayJob")[0]["metadata"]["namespace"] == NAMESPACE


def _secrets() -> dict[str, dict[str, str]]:
    text = subprocess.run([KUBERAY / "secrets.sh"], check=True, capture_output=True, text=True).stdout
    documents = list(yaml.safe_load_all(text))
    assert documents[0] == one("Namespace", NAMESPACE)
    assert all(document["metadata"]["namespace"] == NAMESPACE for document in documents[1:])
    return {document["metadata"]["name"]: document["stringData"] for document in documents[1:]}


def test_secrets_are_random_every_time():
    first, second = _secrets(), _secrets()
    assert {name: set(keys) for name, keys in first.items()} == {name: set(keys) for name, keys in second.items()}
    for name, values in first.items():
        for key, value in values.items():
            if key != "username":
                assert re.fullmatch("[0-9a-f]{48}", value)
                assert value != second[name][key]


def test_manifests_use_exactly_the_secrets_that_secrets_sh_makes():
    secrets, used = _secrets(), set()
    for _, _, spec in PODS:
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    source = variable["valueFrom"]["secretKeyRef"]
                    assert source["key"] in secrets[source["name"]], variable
                    used.add((source["name"], source["key"]))
        for volume in spec.get("volumes", []):
            if "secret" in volume:
                used |= {(volume["secret"]["secretName"], key) for key in secrets[volume["secret"]["secretName"]]}
    for cluster in ray_clusters():
        used.add((cluster["authOptions"]["secretName"], "auth_token"))
    assert used == {(name, key) for name, keys in secrets.items() for key in keys}


def test_no_manifest_holds_a_secret():
    assert not of("Secret")
    for file in KUBERAY.parent.rglob("*.yaml"):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            for key, value in leaves(document):
                assert not re.search(r"[0-9a-fA-F]{24,}|://[^/\s]*:[^/\s]*@", str(value)), (file.name, key)
    for _, _, spec in PODS:
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if re.search("PASSWORD$|TOKEN$|KEY$|SECRET", variable["name"]):
                    assert "value" not in variable, variable["name"]


def test_volumes_are_claims_that_exist():
    claims = {document["metadata"]["name"] for document in of("PersistentVolumeClaim")}
    for document in of("StatefulSet"):
        own = {claim["metadata"]["name"] for claim in document["spec"]["volumeClaimTemplates"]}
        _check_mounts(document["spec"]["template"]["spec"], own)
    for _, _, spec in PODS:
        for volume in spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    for cluster in ray_clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            _check_mounts(group["template"]["spec"], set())
    assert one("PersistentVolumeClaim", "clip2scene-storage")["spec"]["accessModes"] == ["ReadWriteMany"]


def _check_mounts(spec: dict[str, Any], own: set[str]) -> None:
    volumes = own | {volume["name"] for volume in spec.get("volumes", [])}
    mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
    assert mounted == volumes


def test_selectors_match_labels_and_ports():
    for document in of("Deployment", "StatefulSet"):
        spec = document["spec"]
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        if document["kind"] == "StatefulSet":
            one("Service", spec["serviceName"])
    for document in of("Service"):
        [pod] = [spec for _, labels, spec in PODS if document["spec"]["selector"].items() <= labels.items()]
        names = {port["name"]: port["containerPort"] for c in pod["containers"] for port in c["ports"]}
        for port in document["spec"]["ports"]:
            assert names[port["targetPort"]] == port["port"]


def test_addresses_name_services_that_exist():
    services = {d["metadata"]["name"]: {port["port"] for port in d["spec"]["ports"]} for d in of("Service")}
    text = "\n".join(str(value) for document in DOCUMENTS for _, value in leaves(document))
    addresses = re.findall(r"http://([a-z-]+):(\d+)", text)
    assert {name for name, _ in addresses} == {"mlflow", "object-store"}
    assert all(int(port) in services[name] for name, port in addresses)
    environment = {
        v["name"]: v.get("value")
        for v in one("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert environment["PGHOST"] in services
    assert "mlflow:5000" in environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_no_pod_has_more_rights_than_it_needs():
    assert len(PODS) == 8
    for owner, _, spec in PODS:
        assert spec["automountServiceAccountToken"] is False, owner
        assert spec["enableServiceLinks"] is False, owner  # else serve.sh takes MLFLOW_PORT=tcp://... for its own
        assert spec["securityContext"]["runAsNonRoot"] is True, owner
        assert spec["securityContext"]["runAsUser"] > 0, owner
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
            assert forbidden not in spec, owner
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), owner
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }, owner
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), owner
            assert "memory" in container["resources"]["limits"], owner
            assert re.fullmatch(r"[\w/-]+:[\w.-]+", container["image"]), owner
            assert not container["image"].endswith(":latest"), owner


def test_only_the_workers_see_gpus():
    for owner, _, spec in PODS:
        for container in spec["containers"]:
            if container["image"].startswith("clip2scene:"):
                gpus = "nvidia.com/gpu" in container["resources"]["limits"]
                hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container["env"]
                assert hidden is not gpus, (owner, container["name"])  # NVIDIA's base image says "all"
    assert {cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] for cluster in ray_clusters()} == {"0"}


def test_a_worker_fits_a_node_of_64_gib():
    for cluster in ray_clusters():
        for group in cluster["workerGroupSpecs"]:
            [container] = group["template"]["spec"]["containers"]
            memory = container["resources"]["requests"]["memory"]
            assert int(memory.removesuffix("Gi")) <= 56, memory  # the node's own processes need the rest


def test_nothing_is_opened_to_the_outside():
    for document in DOCUMENTS:
        keys = {key for key, _ in leaves(document)}
        assert not keys & {"hostPort", "nodePort", "loadBalancerIP", "externalIPs"}
        assert document["kind"] not in ("Ingress", "Gateway", "HTTPRoute")
    assert {document["spec"].get("type", "ClusterIP") for document in of("Service")} == {"ClusterIP"}
    assert {cluster["headGroupSpec"]["serviceType"] for cluster in ray_clusters()} == {"ClusterIP"}


def test_ray_asks_for_the_token_and_is_the_pinned_version():
    pinned = re.search(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    for cluster in ray_clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert cluster["rayVersion"] == pinned[1]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            names = {v["name"] for c in group["template"]["spec"]["containers"] for v in c["env"]}
            assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & names  # KubeRay does not replace them


def test_the_jobs_cluster_equals_the_lasting_one():
    lasting, own = ray_clusters()
    assert own == lasting


def test_clip2scene_accepts_the_jobs_command():
    import open_clip

    from clip2scene.jobfile import load_job

    [job] = of("RayJob")
    command, verb, file, *overrides = shlex.split(job["spec"]["entrypoint"])
    overrides, options = overrides[:-4], overrides[-4:]
    assert (command, verb) == ("clip2scene", "run")
    assert options == ["--address", "auto", "--tracking-uri", "http://mlflow:5000"]
    settings = load_job(str(REPOSITORY / Path(file).relative_to("/opt/clip2scene")), overrides)
    mounts = [
        c["volumeMounts"][0]["mountPath"] for owner, _, spec in PODS if owner == "ray" for c in spec["containers"]
    ]
    assert set(mounts) == {"/storage"}
    file, tag = settings.teacher, load_job(str(REPOSITORY / "jobs" / "nuscenes.yaml"), ["dataset.root=x"]).teacher
    quick_gelu = open_clip.get_pretrained_cfg(tag.model, tag.pretrained)["quick_gelu"]
    assert open_clip.get_model_config(file.model)["quick_gelu"] == quick_gelu
    for path in (settings.storage, settings.dataset.root, settings.teacher.pretrained):
        assert str(path).startswith("/storage/")
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus, cpus = group["replicas"] * resources["nvidia.com/gpu"], group["replicas"] * int(resources["cpu"])
    assert settings.resources.num_workers * settings.resources.gpus_per_worker <= gpus
    assert settings.extract.num_actors * settings.extract.gpus_per_actor <= gpus
    assert max(settings.resources.num_workers, settings.extract.num_actors) < cpus
