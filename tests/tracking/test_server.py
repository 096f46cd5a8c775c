from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from clip2scene.errors import ConfigError, TrackingError
from clip2scene.tracking import server
from clip2scene.tracking.server import embedded_server, healthy, serve_ui, starting_server
from clip2scene.tracking.tracker import connect

OWNER = """
import sys, time
from clip2scene.tracking.server import embedded_server
with embedded_server(sys.argv[1]) as uri:
    print(uri, flush=True)
    time.sleep(600)
"""

UI = """
import sys
from clip2scene.tracking.server import serve_ui
serve_ui(sys.argv[1], int(sys.argv[2]))
"""


def test_a_killed_owner_leaves_no_server_and_its_runs_can_be_looked_at(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    uri = owner.stdout.readline().strip()
    family = psutil.Process(owner.pid).children(recursive=True)
    try:
        assert healthy(uri)
        assert len(family) >= 3
        connect(uri, "kept")
        owner.kill()
        owner.wait()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
        assert not healthy(uri, timeout_s=1)
    finally:
        for process in family:
            if process.is_running():
                process.kill()

    port = int(uri.rsplit(":", 1)[1])
    command = [sys.executable, "-c", UI, str(tmp_path), str(port)]
    ui = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ui.stderr is not None
    assert uri in ui.stderr.readline()
    family = psutil.Process(ui.pid).children(recursive=True)
    with urllib.request.urlopen(uri, timeout=10) as answer:
        assert b"<title>MLflow</title>" in answer.read()
    assert connect(uri, "kept").experiment_id == "1"
    ui.send_signal(signal.SIGINT)
    assert ui.wait(30) == 0
    assert psutil.wait_procs(family, timeout=5)[1] == []


def test_a_busy_port_is_one_sentence(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^port {port} on 127\.0\.0\.1 is busy; [^\n]*$"):
            embedded_server(tmp_path / "runs", port).__enter__()
    assert not (tmp_path / "runs").exists()


def test_what_speaks_no_http_is_no_server():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"\x00\x00\x12\x04\x00\x00")  # as gRPC does, which Ray has on many ports

        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(answer)
            assert not healthy(f"http://127.0.0.1:{other.getsockname()[1]}", timeout_s=5)
            answered.result(timeout=5)


def test_an_impossible_port(tmp_path):
    with pytest.raises(ConfigError, match="port 70000 does not exist; allowed: 1 to 65535"):
        embedded_server(tmp_path, 70000).__enter__()


def test_a_server_that_does_not_come_up_tells_why(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(TrackingError, match=r"did not start: .*file is not a database.*server\.log") as caught:
        embedded_server(tmp_path).__enter__()
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"file/runs: cannot keep runs there \(Not a directory\)"):
        embedded_server(tmp_path / "file" / "runs").__enter__()


def test_ui_of_a_folder_without_runs(tmp_path):
    with pytest.raises(ConfigError, match="no runs are kept there"):
        serve_ui(tmp_path)


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("block_fails", [True, False])
def test_a_server_that_starts_in_the_background_ends_with_the_block(starts, asked, block_fails, tmp_path, monkeypatch):
    ended = []

    @contextlib.contextmanager
    def embedded(folder):
        if not starts:
            raise TrackingError("did not come up")
        try:
            yield "http://127.0.0.1:1"
        finally:
            ended.append(folder)

    def use():
        with starting_server(tmp_path) as uri:
            if asked:
                assert uri() == "http://127.0.0.1:1"
            if block_fails:
                raise ValueError("of the block")

    monkeypatch.setattr(server, "embedded_server", embedded)
    error = TrackingError if asked and not starts else ValueError if block_fails else None
    with pytest.raises(error) if error else contextlib.nullcontext():
        use()
    assert ended == [tmp_path] * starts
