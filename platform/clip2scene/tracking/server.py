"""The embedded MLflow server: sqlite and artifacts in one folder, reachable from this machine only.

Runs are always written through a server, never to sqlite directly: processes that open a new database at the same time
destroy it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clip2scene.errors import ConfigError, TrackingError
from clip2scene.machine import HOST
from clip2scene.progress import console
from clip2scene.storage import locked
from clip2scene.tracking.watchdog import watched

DEFAULT_PORT = 5000
UI_PAGES = f"http://{HOST}:{DEFAULT_PORT}"
"""Where ``clip2scene ui`` shows runs after the embedded server that kept them has ended."""
START_TIMEOUT_S = 300.0
_LOG = "server.log"


@dataclass(frozen=True)
class Login:
    """The one user of a server that asks for a login; may do everything."""

    user: str
    password: str
    folder: Path
    """Where the server keeps its users; another password needs another folder."""


@contextlib.contextmanager
def embedded_server(folder: str | Path, port: int | None = None, login: Login | None = None) -> Iterator[str]:
    """Serve the runs kept in ``folder`` for as long as the block lasts.

    The folder holds ``mlflow.db``, ``artifacts/`` and the server's log ``server.log``. No process of the server
    outlives this one, however it ends.

    Args:
        folder: where the runs are kept; created when missing.
        port: TCP port on 127.0.0.1; a free one when not given.
        login: the only user that it answers; when not given, it answers every user of this machine.

    Yields:
        The tracking URI, ``http://127.0.0.1:PORT``.

    Raises:
        ConfigError: the port is busy or not allowed, or the folder cannot be made.
        StorageError: the folder cannot be written.
        TrackingError: the server did not come up.
    """
    with _running(Path(folder).resolve(), port, login) as (_, uri):
        yield uri


@contextlib.contextmanager
def starting_server(folder: str | Path) -> Iterator[Callable[[], str]]:
    """Start an :func:`embedded_server` in the background; yields a function that waits for it and returns its URI."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as starter:
        yield starter.submit(stack.enter_context, embedded_server(folder)).result


@contextlib.contextmanager
def _running(
    folder: Path, port: int | None, login: Login | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    if port is not None:
        check_port(port)
    try:
        (folder / "artifacts").mkdir(parents=True, exist_ok=True)
        with locked(folder, name=".start.lock"):  # two servers must not create the same database at once
            process, port = _start(folder, port, login)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot keep runs there ({error.strerror})") from error
    try:
        yield process, f"http://{HOST}:{port}"
    finally:
        _stop(process)


def serve_ui(folder: str | Path, port: int = DEFAULT_PORT) -> None:
    """Serve the runs kept in ``folder`` until Ctrl-C (or SIGTERM); ``clip2scene ui``.

    Raises:
        ConfigError: no runs are kept there, or as in :func:`embedded_server`.
        TrackingError: the server did not come up, or ended by itself.
    """
    folder = Path(folder).resolve()
    if not (folder / "mlflow.db").is_file():
        raise ConfigError(f"{folder}: no runs are kept there (no mlflow.db)")
    with until_interrupted(), _running(folder, port) as (process, uri):
        page = f"{uri}/#/experiments?workflowType=machine_learning"  # otherwise it opens on language models
        console().print(f"MLflow shows the runs at [bold]{page}[/bold] (Ctrl-C ends it)", soft_wrap=True)
        process.wait()
        raise TrackingError(f"the MLflow server at {uri} ended ({telling_line(folder / _LOG)})")


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """Run a block until Ctrl-C or SIGTERM, which end it without an error."""
    # SIGINT too: shells ignore it for commands that they start in the background.
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def healthy(uri: str, timeout_s: float = 10.0) -> bool:
    """Whether an MLflow server answers at ``uri``; any HTTP answer counts, it may ask for a login."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError, http.client.HTTPException):  # the last: it speaks, but no HTTP
        return False


def check_uri(uri: str, where: str = "") -> None:
    """Refuse a tracking URI that is no server's, or that holds a login, which logs and ``ps`` would show.

    Args:
        uri: what the user gave.
        where: which processes need the login instead, for the message (`` on the cluster's machines``).

    Raises:
        ConfigError: it is one of these.
    """
    if "@" in uri:
        raise ConfigError(
            "--tracking-uri: holds a password, which others could see; set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD{where} instead"
        )
    if not re.match(r"https?://[^/]", uri):
        raise ConfigError(f"--tracking-uri {uri}: must be the address of an MLflow server, http://HOST:PORT")


def answering(uri: str) -> str:
    """The address of an MLflow server that answers, without a slash at its end.

    Raises:
        ConfigError: as :func:`check_uri`.
        TrackingError: nothing answers there.
    """
    check_uri(uri)
    uri = uri.rstrip("/")
    if not healthy(uri):
        raise TrackingError(f"no MLflow server answers at {uri}")
    return uri


def _start(folder: Path, port: int | None, login: Login | None) -> tuple[subprocess.Popen[bytes], int]:
    for attempts_left in (2, 1, 0):
        chosen = port if port is not None else _free_port()
        process = _launch(folder, chosen, login)
        try:
            _wait_until_healthy(process, chosen, folder)
        except BaseException as error:
            _stop(process)
            # Between choosing a free port and binding it, another process may take it.
            if port is None and attempts_left and "address already in use" in str(error):
                continue
            raise
        return process, chosen
    raise AssertionError("unreachable")


def _launch(folder: Path, port: int, login: Login | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level=warning"]  # no log line per request
    others = ("MLFLOW_", "_MLFLOW_", "RAY_")  # the server must not see Ray's token
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    if login is not None:
        command += ["--app-name", "basic-auth"]
        environment |= _login_environment(login)
    log_path = folder / _LOG
    log_path.unlink(missing_ok=True)  # an older server of this folder keeps writing to its own file
    with log_path.open("wb") as log:
        return watched(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)


def _login_environment(login: Login) -> dict[str, str]:
    """The environment of MLflow's basic-auth app; the password is in no file and in no argument."""
    login.folder.mkdir(parents=True, exist_ok=True)
    settings = login.folder / "basic_auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{login.folder / 'users.db'}\n",
        encoding="utf-8",
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": login.user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": login.password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    log = folder / _LOG
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise TrackingError(f"the MLflow server did not start: {telling_line(log)} (log: {log})")
        if healthy(f"http://{HOST}:{port}", timeout_s=2.0) and _listens(process.pid, port):
            return
        time.sleep(0.1)
    raise TrackingError(
        f"the MLflow server did not answer within {START_TIMEOUT_S:.0f} s: {telling_line(log)} (log: {log})"
    )


def _listens(pid: int, port: int) -> bool:
    """Whether our server listens on the port, and not another that took it first."""
    import psutil

    try:
        for process in psutil.Process(pid).children(recursive=True):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    except psutil.Error:
        pass
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()  # the watchdog ends the whole group
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Refuse a port of 127.0.0.1 that cannot be listened on.

    Raises:
        ConfigError: it is busy, does not exist, or needs administrator rights.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"port {port} does not exist; allowed: 1 to 65535")
    with socket.socket() as probe:
        # As the server does: a connection that is closing does not keep the port busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except PermissionError as error:
            raise ConfigError(f"port {port} needs administrator rights; choose one above 1023") from error
        except OSError as error:
            raise ConfigError(f"port {port} on {HOST} is busy; choose another, or end what listens there") from error


def telling_line(log: Path) -> str:
    """The most informative line of a server's log: the last that names an error, or else the last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "address already in use" in line or re.search(r"(Error|Exception)\W", line)]
    return (errors or lines or ["its log is empty"])[-1]
