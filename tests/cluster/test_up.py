"""A cluster of several nodes on this machine, started as by a user: a job on it, and requests without a token."""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib
import json
import pkgutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from clusters import NOBODY, START_TIMEOUT_S, Up, up, words_of
from commands import begin, clip2scene, wait_for, wait_until

pytestmark = pytest.mark.long

TINY = [
    "stage=evaluate",
    "dataset.streetworld={train_scenes: 2, val_scenes: 1, keyframes_per_scene: 2, sweeps_between_keyframes: 1, "
    "lidar_beams: 16, lidar_azimuth_steps: 180}",
    "student={voxel_size_m: 1.0, channels: [8, 8, 16]}",
    "distill.epochs=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("up")


@pytest.fixture(scope="module")
def cluster(folder) -> Iterator[Up]:
    with up(folder / "cluster", folder / "up.log", nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def local(folder, cluster) -> Iterator[subprocess.Popen[str]]:
    """The job that is submitted later, on an embedded Ray with another storage; it also makes the world of both.

    After the cluster, because Ray gives a node half a minute to come up, however busy the machine is.
    """
    words = ["run", "jobs/demo.yaml", *job(folder), f"storage={folder / 'local'}"]
    process = begin(folder / "local.log", *words, environment=NOBODY)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def submitted(folder, local, cluster) -> Iterator[subprocess.Popen[str]]:
    """The job on the cluster, submitted once its world is there."""
    wait_for("index:", folder / "local.log", local)
    process = begin(folder / "submitted.log", *submission(folder), environment=cluster.environment)
    wait_for("Running entrypoint", folder / "submitted.log", process)
    yield process
    process.kill()


def job(folder: Path) -> list[str]:
    return ["seed=3", f"dataset.root={folder / 'world'}", *TINY]


def submission(folder: Path) -> list[object]:
    return ["submit", "jobs/demo.yaml", *job(folder), f"storage={folder / 'remote'}"]


def test_a_stranger_is_told_that_a_token_is_wanted(cluster):
    address = cluster.environment["RAY_API_SERVER_ADDRESS"]
    for stranger in (NOBODY | {"HOME": "/nowhere"}, NOBODY | {"RAY_AUTH_TOKEN": "guessed"}):
        done = clip2scene("list", "--dashboard", address, environment=stranger)
        assert done.returncode == 1
        assert done.stderr.startswith(f"clip2scene: {address} requires a token; ")
        assert done.stderr.count("\n") == 1


def test_a_job_that_never_fits_is_not_sent(cluster):
    words = ["resources.num_workers=8", "distill.batch_size=8", "finetune.batch_size=8"]
    done = clip2scene("submit", "jobs/demo.yaml", *words, environment=cluster.environment)
    assert done.returncode == 1
    assert "resources.num_workers=8" in done.stderr
    assert "there is room for 6" in done.stderr
    assert "resources.num_workers=8" not in clip2scene("list", environment=cluster.environment).stdout


# --- strangers at the ports ---

GRPC_OF_CPP_ONLY = ("/ray.rpc.ObjectManagerService/Pull", "/ray.rpc.ObjectManagerService/Push")
"""The object manager's, whose definition does not come with Ray's Python package."""
DANGEROUS = ("Shutdown", "Kill", "Drain", "Exit", "Unregister")
"""If one of these were accepted, the cluster would end during the test."""
OPEN_PAGES = {"/": b"<!doctype html>", "/api/local_raylet_healthz": b"success", "/health": b"OK"}
"""All that anybody gets: the dashboard's empty page, which asks for the token, and two health checks."""
PATHS = (
    *OPEN_PAGES,
    "/api/version",
    "/api/jobs/",
    "/api/job_agent/jobs/",
    "/api/v0/nodes",
    "/logs",
    "/metrics",
    "/get_or_create_runtime_env",
    "/api/2.0/mlflow/experiments/get?experiment_id=0",
    "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0",
    "/graphql",
)


def listening(processes: list[psutil.Process]) -> dict[int, tuple[str, str]]:
    """Address and process by port."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    name = " ".join(words_of(process))
                    found[connection.laddr.port] = (connection.laddr.ip, name)
    return found


def grpc_methods() -> list[str]:
    """One unary method per service of Ray; access is decided per port."""
    import ray.core.generated as generated

    methods = list(GRPC_OF_CPP_ONLY)
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            services = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR.services_by_name
            for service in services.values():
                names = [method.name for method in service.methods if not method.client_streaming]
                methods += [f"/{service.full_name}/{name}" for name in names if not name.startswith(DANGEROUS)][:1]
    return methods


def http_answers(port: int) -> dict[str, tuple[int, bytes]] | None:
    """Status and body of every path without a token; None if the port does not speak HTTP/1."""
    answers = {}
    for path in PATHS:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answers[path] = (answer.status, answer.read())
        except (http.client.HTTPException, OSError):
            return None
        finally:
            connection.close()
    return answers


def grpc_answers(port: int, methods: list[str]) -> set[str]:
    """Status codes without a token, of the methods that the port knows."""
    import grpc

    codes = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in methods:
            try:
                channel.unary_unary(method)(b"", timeout=20)
                codes.add(f"{method} was answered")
            except grpc.RpcError as error:
                codes.add(error.code().name)
                if error.code().name == "UNAVAILABLE":
                    break
    return codes - {"UNIMPLEMENTED"}


def is_rendezvous(address: str, name: str) -> bool:
    """torch.distributed's store in a training's first worker: it listens everywhere, without authentication."""
    return name.startswith("ray::RayTrainWorker") and address in ("::", "0.0.0.0")


def test_every_open_port_is_of_this_machine_and_refuses_strangers(cluster, submitted, folder):
    wait_for("extract:", folder / "submitted.log", submitted)
    processes = cluster.family()
    ports = listening(processes)
    everywhere = {
        port: name
        for port, (address, name) in ports.items()
        if address not in ("127.0.0.1", "::ffff:127.0.0.1") and not is_rendezvous(address, name)
    }
    assert everywhere == {}
    methods = grpc_methods()
    kinds: dict[str, set[int]] = {"http": set(), "grpc": set()}
    for port, (address, name) in ports.items():
        if is_rendezvous(address, name):
            continue
        pages = http_answers(port)
        if pages is not None:
            kinds["http"].add(port)
            for path, (status, body) in pages.items():
                is_open = status == 200 and path in OPEN_PAGES and body.lower().startswith(OPEN_PAGES[path].lower())
                assert is_open or status in (401, 403, 404), f"{name} on {port}: {path} got {status} {body[:200]!r}"
            assert {status for path, (status, _) in pages.items() if path not in OPEN_PAGES} <= {401, 403}, name
            continue
        codes = grpc_answers(port, methods)
        if codes == {"UNAVAILABLE"} and port not in listening(cluster.family()):
            continue  # its process has ended: workers come and go while the job runs
        kinds["grpc"].add(port)
        if name.startswith("ray::RayTrainWorker") and codes == {"UNAVAILABLE"}:
            continue  # gloo's connections between the workers of a training, which speak neither
        assert codes == {"UNAUTHENTICATED"}, f"{name} on {port}: {codes}"
    # Three nodes, each with the HTTP servers of an agent and a runtime environment; the dashboard and MLflow; and by
    # gRPC the GCS, and per node the raylet, the object manager and the agent.
    assert len(kinds["http"]) >= 8
    assert len(kinds["grpc"]) >= 10


def test_mlflow_lets_its_user_in(cluster):
    address = cluster.environment["MLFLOW_TRACKING_URI"].removeprefix("http://")
    login = base64.b64encode(f"clip2scene:{cluster.secrets[1]}".encode()).decode()
    connection = http.client.HTTPConnection(address, timeout=20)
    headers = {"Authorization": f"Basic {login}"}
    connection.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", headers=headers)
    assert connection.getresponse().status == 200


# --- jobs ---


def test_the_same_job_is_joined_and_scores_as_it_does_here(cluster, submitted, local, folder):
    joined = clip2scene(*submission(folder), environment=cluster.environment)
    assert submitted.wait(500) == 0, (folder / "submitted.log").read_text()[-3000:]
    assert local.wait(500) == 0, (folder / "local.log").read_text()[-3000:]
    assert joined.returncode == 0, joined.stderr
    assert "is already running at" in joined.stdout
    printed = (folder / "submitted.log").read_text()
    assert "mIoU" in printed
    assert "submitted to" in printed
    here, there = (json.loads((folder / name / "report.json").read_text()) for name in ("local", "remote"))
    for key in ("teacher_2d_miou", "student_3d_miou", "per_class", "images_encoded"):
        assert here[key] == there[key]
    assert here["digests"] | {"job": there["digests"]["job"]} == there["digests"]  # the job's digest covers its storage
    assert clip2scene("list", environment=cluster.environment).stdout.count("SUCCEEDED") == 1


def holders(cluster: Up, variable: str) -> set[str]:
    """What the processes run that have a variable (``NAME=VALUE``); of Ray's, the class."""
    name, value = variable.split("=")
    found = set()
    for process in cluster.family():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value:
                line = " ".join(words_of(process)[:3])
                found.add(line.partition(".")[0].strip() if line.startswith("ray::") else line)
    return found


def test_ctrl_c_detaches_and_stop_ends(cluster, folder):
    variable = f"CLIP2SCENE_CACHE={folder / 'cache'}"
    words = [*submission(folder), "distill.epochs=500", f"storage={folder / 'long'}", "--again", "--env", variable]
    follower = begin(folder / "long.log", *words, environment=cluster.environment)
    wait_for("distill:", folder / "long.log", follower)
    follower.send_signal(signal.SIGINT)
    assert follower.wait(60) == 130
    printed = (folder / "long.log").read_text()
    job_id = printed.split(":", 1)[0]
    assert f"{job_id} goes on; follow it with `clip2scene logs --follow {job_id}" in printed
    assert "RUNNING" in clip2scene("status", job_id, environment=cluster.environment).stdout
    both = {"python -m clip2scene.cli", "ray::RayTrainWorker"}
    wait_until(lambda: both <= holders(cluster, variable), "the job and a worker have the variable", 300)
    assert clip2scene("stop", job_id, environment=cluster.environment).stdout == f"{job_id}: stopped\n"
    followed = clip2scene("logs", "--follow", job_id, environment=cluster.environment)
    assert followed.returncode != 0
    assert "index:" in followed.stdout
    assert not [p for p in cluster.family() if f"storage={folder / 'long'}" in " ".join(words_of(p))]


# --- secrets, and the end ---


def test_no_secret_is_where_others_may_read(cluster, submitted, folder):
    commands = [words_of(process) for process in cluster.family()]
    temporary = cluster.folder()
    shown = [cluster.printed, *(" ".join(words) for words in commands)]
    places = [folder / "cluster", folder / "remote", folder / "submitted.log", temporary]
    files = [
        path for place in places for path in [place, *place.rglob("*")] if path.is_file() and not path.is_symlink()
    ]
    assert [path for path in files if path.name.startswith("job-driver")]
    for secret in cluster.secrets:
        assert len(secret) == 64
        assert not [text for text in shown if secret in text]
        holding = {path for path in files if secret.encode() in path.read_bytes()}
        assert holding <= {
            folder / "cluster" / "cluster" / name for name in ("token", "mlflow_password", "environment")
        }
        assert {stat.S_IMODE(path.stat().st_mode) for path in holding} == {0o600}
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


def test_ctrl_c_takes_everything_down(cluster):
    family, temporary = cluster.family(), cluster.folder()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(100) == 0
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert not temporary.exists()


def test_a_killed_cluster_leaves_no_process(folder):
    with up(folder / "killed", folder / "killed.log", nodes=1) as killed:
        words = [*submission(folder), "distill.epochs=500", f"storage={folder / 'job'}", "--detach"]
        sent = clip2scene(*words, environment=killed.environment)
        assert sent.returncode == 0, sent.stderr
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not (folder / "job").is_dir():
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        family = killed.family()
        assert [p for p in family if f"storage={folder / 'job'}" in " ".join(words_of(p))]
        temporary = killed.folder()
        killed.process.kill()
        assert psutil.wait_procs(family, timeout=60)[1] == []
        assert not temporary.exists()
