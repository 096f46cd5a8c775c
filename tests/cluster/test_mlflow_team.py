"""A team's MLflow, as cluster/mlflow/serve.sh starts it, on a real PostgreSQL: who is let in, no secret is shown."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from commands import REPOSITORY, free_port, wait_until
from postgres import OWNER, running_postgres

MLFLOW = REPOSITORY / "cluster" / "mlflow"
VENV_BIN = Path(sys.executable).parent
NAME = "mlflow.lab"
"""The server's name for browsers and clients elsewhere."""


ACCESS = f"host all {OWNER} 127.0.0.1/32 trust\nhost all mlflow 127.0.0.1/32 scram-sha-256\n"
"""PostgreSQL asks MLflow, and nobody else, for a password."""


class Team(NamedTuple):
    uri: str
    secrets: dict[str, str]
    secrets_file: Path
    log: Path


@contextlib.contextmanager
def _running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, or with this process, even if that is killed."""
    watched = [sys.executable, "-m", "clip2scene.tracking.watchdog", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            watched, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def _environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PG", "AWS_"))}
    return kept | {"PATH": f"{VENV_BIN}{os.pathsep}{os.environ['PATH']}"} | settings


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    pytest.importorskip("flask_wtf", reason="needs clip2scene[server]")
    folder = tmp_path_factory.mktemp("team")
    secrets_file = folder / "mlflow.env"
    subprocess.run([MLFLOW / "secrets.sh", secrets_file], check=True)
    secrets = dict(line.split("=", 1) for line in secrets_file.read_text().splitlines())
    with running_postgres(ACCESS) as postgres:
        # As in cluster/README.md.
        password, port = secrets["PGPASSWORD"], free_port()
        postgres.execute(f"CREATE ROLE mlflow LOGIN PASSWORD '{password}'; CREATE DATABASE mlflow OWNER mlflow;")
        environment = _environment(
            MLFLOW_SECRETS_FILE=str(secrets_file),
            MLFLOW_ARTIFACTS_DESTINATION=str(folder / "artifacts"),
            MLFLOW_PORT=str(port),
            MLFLOW_SERVER_ALLOWED_HOSTS=f"127.0.0.1:{port}, {NAME}:{port}",
            MLFLOW_WORKERS="1",
            PGPORT=str(postgres.port),
        )
        log = folder / "server.log"
        with _running([str(MLFLOW / "serve.sh")], log, environment) as process:
            found = Team(f"http://127.0.0.1:{port}", secrets, secrets_file, log)
            wait_until(lambda: _status(f"{found.uri}/health") == 200, "MLflow answers", process=process, log=log)
            yield found


def _status(
    url: str,
    *,
    login: tuple[str, str] | None = None,
    host: str | None = None,
    origin: str | None = None,
    body: object = None,
) -> int | None:
    """The status of a request (a POST if it has a body), None if nothing answers."""
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(login).encode()).decode()}")
    if host is not None:
        request.add_header("Host", host)
    if origin is not None:
        request.add_header("Origin", origin)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _port(team: Team) -> int:
    return int(team.uri.rpartition(":")[2])


def _search(team: Team) -> str:
    return f"{team.uri}/api/2.0/mlflow/experiments/search?max_results=5"


def _add_user(team: Team, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = _environment(**(team.secrets | {"MLFLOW_TRACKING_URI": team.uri} | changes))
    command = [sys.executable, str(MLFLOW / "add_user.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_only_users_with_a_password_are_let_in(team):
    admin = ("admin", team.secrets["MLFLOW_AUTH_ADMIN_PASSWORD"])
    assert _status(_search(team)) == 401
    assert _status(_search(team), login=("admin", "not-the-password")) == 401
    assert _status(_search(team), login=("admin", "password1234")) == 401
    assert _status(_search(team), login=admin) == 200
    assert _status(f"{team.uri}/") == 401


def test_a_host_name_that_is_not_allowed_is_refused(team):
    admin = ("admin", team.secrets["MLFLOW_AUTH_ADMIN_PASSWORD"])
    assert _status(_search(team), login=admin, host="rebound.example.org") == 403
    assert _status(_search(team), login=admin, host=f"{NAME}:{_port(team)}") == 200


def test_pages_work_under_the_servers_name_and_from_no_other_site(team):
    admin, host = ("admin", team.secrets["MLFLOW_AUTH_ADMIN_PASSWORD"]), f"{NAME}:{_port(team)}"
    search = {"url": f"{team.uri}/ajax-api/2.0/mlflow/runs/search", "body": {"experiment_ids": ["0"]}}
    for origin, status in ((f"http://{host}", 200), (f"https://{host}", 200), ("http://rebound.example.org", 403)):
        assert _status(**search, login=admin, host=host, origin=origin) == status, origin


def test_the_loopback_names_are_allowed_by_default(tmp_path):
    mlflow = tmp_path / "mlflow"
    mlflow.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    mlflow.chmod(0o755)
    environment = _environment(**SECRETS, MLFLOW_PORT="5001") | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    words = subprocess.run([MLFLOW / "serve.sh"], env=environment, check=True, capture_output=True, text=True).stdout
    assert "--allowed-hosts\nlocalhost:5001,127.0.0.1:5001\n" in words


LOG_A_RUN = """
import sys
from clip2scene.tracking.tracker import connect
with connect(sys.argv[1], "shared").run("a run", params={"seed": 1}, system_metrics=False) as run:
    run.log_metrics({"miou": 0.5})
    run.log_text("kept", "note.txt")
"""


def test_users_of_add_user_share_an_experiment(team, tmp_path):
    password = team.secrets["MLFLOW_TRACKING_PASSWORD"]
    credentials = tmp_path / ".mlflow" / "credentials"  # what the launcher copies to its nodes
    credentials.parent.mkdir()
    credentials.write_text(f"[mlflow]\nmlflow_tracking_username = colleague\nmlflow_tracking_password = {password}\n")
    by_environment = {"MLFLOW_TRACKING_USERNAME": "team", "MLFLOW_TRACKING_PASSWORD": password}
    for name, login in (("team", by_environment), ("colleague", {"HOME": str(tmp_path)})):
        added = _add_user(team, MLFLOW_TRACKING_USERNAME=name)
        assert added.returncode == 0, added.stderr
        command = [sys.executable, "-c", LOG_A_RUN, team.uri]
        done = subprocess.run(command, env=_environment(**login), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    notes = list(team.log.parent.glob("artifacts/**/note.txt"))
    assert [note.read_text() for note in notes] == ["kept", "kept"]
    assert len({note.parents[2] for note in notes}) == 1  # EXPERIMENT/RUN/artifacts/note.txt
    delete = {"url": f"{team.uri}/api/2.0/mlflow/experiments/delete", "body": {"experiment_id": notes[0].parts[-4]}}
    assert _status(**delete, login=("colleague", password)) == 403
    assert _status(**delete, login=("admin", team.secrets["MLFLOW_AUTH_ADMIN_PASSWORD"])) == 200


def test_a_client_is_no_admin(team):
    assert _add_user(team).returncode == 0
    login = (team.secrets["MLFLOW_TRACKING_USERNAME"], team.secrets["MLFLOW_TRACKING_PASSWORD"])
    assert _status(_search(team), login=login) == 200
    assert _status(f"{team.uri}/api/2.0/mlflow/users/get?username=admin", login=login) == 403


def test_add_user_again_sets_the_password(team):
    assert _add_user(team, MLFLOW_TRACKING_USERNAME="second").returncode == 0
    changed = _add_user(team, MLFLOW_TRACKING_USERNAME="second", MLFLOW_TRACKING_PASSWORD="another-long-one")
    assert changed.returncode == 0, changed.stderr
    assert _status(_search(team), login=("second", "another-long-one")) == 200
    assert _status(_search(team), login=("second", team.secrets["MLFLOW_TRACKING_PASSWORD"])) == 401


def test_add_user_says_what_is_wrong(team):
    wrong = _add_user(team, MLFLOW_AUTH_ADMIN_PASSWORD="not-the-password")
    assert wrong.returncode == 1
    assert "the admin's password is wrong" in wrong.stderr
    missing = _add_user(team, MLFLOW_TRACKING_USERNAME="")
    assert missing.returncode == 1
    assert "MLFLOW_TRACKING_USERNAME must be set" in missing.stderr


def test_no_secret_is_on_a_command_line_or_in_the_log(team):
    _status(_search(team), login=("admin", "not-the-password"))
    shown = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert any("mlflow" in line for line in shown)
    log = team.log.read_text()
    for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        assert not [line for line in shown if team.secrets[name] in line], name
        assert team.secrets[name] not in log, name


def test_the_server_listens_on_loopback_only(team):
    port = _port(team)
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


SECRETS = dict.fromkeys(("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD"), "0123456789abcdef")
SECRETS |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "0123456789abcdef", "MLFLOW_ARTIFACTS_DESTINATION": "/nowhere"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"PGPASSWORD": ""}, "PGPASSWORD is empty"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": ""}, "MLFLOW_AUTH_ADMIN_PASSWORD is empty"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "password1234"}, "begins like a default password"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "ChangeMe-please"}, "begins like a default password"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "short"}, "shorter than 12 characters"),
        ({"MLFLOW_FLASK_SERVER_SECRET_KEY": ""}, "MLFLOW_FLASK_SERVER_SECRET_KEY is empty"),
        ({"MLFLOW_HOST": "0.0.0.0"}, "MLFLOW_SERVER_ALLOWED_HOSTS must name its hosts"),
        ({"MLFLOW_SERVER_ALLOWED_HOSTS": "*"}, "has a wildcard"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": ""}, "MLFLOW_ARTIFACTS_DESTINATION is empty"),
        ({"MLFLOW_SECRETS_FILE": "/nowhere/mlflow.env"}, "is not a readable file"),
    ],
)
def test_serve_refuses_unsafe_settings(changes, sentence):
    _refused(_environment(**(SECRETS | changes)), sentence)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o666])
def test_serve_refuses_a_secrets_file_that_others_may_read(tmp_path, mode):
    file = tmp_path / "mlflow.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    file.chmod(mode)
    _refused(_environment(MLFLOW_SECRETS_FILE=str(file)), "others may read it")


def test_serve_runs_no_code_from_the_secrets_file(tmp_path):
    file, trace = tmp_path / "mlflow.env", tmp_path / "ran"
    file.write_text(f"PGPASSWORD=$(touch {trace})0123456789\nPATH=/nowhere\n")
    file.chmod(0o600)
    _refused(_environment(MLFLOW_SECRETS_FILE=str(file)), "names 'PATH'")
    assert not trace.exists()


def _refused(environment: dict[str, str], sentence: str) -> None:
    done = subprocess.run([MLFLOW / "serve.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "0123456789abcdef" not in done.stderr


def test_secrets_are_random_private_and_never_overwritten(tmp_path):
    files = [tmp_path / "one.env", tmp_path / "two.env"]
    for file in files:
        subprocess.run([MLFLOW / "secrets.sh", file], check=True)
        assert file.stat().st_mode & 0o777 == 0o600
    texts = [file.read_text() for file in files]
    values = re.findall(r"=([0-9a-f]{48})$", "".join(texts), flags=re.MULTILINE)
    assert len(values) == len(set(values)) == 8
    again = subprocess.run([MLFLOW / "secrets.sh", files[0]], capture_output=True, text=True)
    assert again.returncode == 1
    assert "is not overwritten" in again.stderr
    assert files[0].read_text() == texts[0]
