from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from clip2scene.cluster import auth
from clip2scene.errors import ConfigError
from commands import REPOSITORY


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    """A user who has never used Ray."""
    for name in (auth.AUTH_MODE, auth.AUTH_TOKEN, auth.AUTH_TOKEN_PATH):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_secret_is_made_once_and_for_its_owner_only(tmp_path):
    before = os.umask(0)
    try:
        secret = auth.secret_file(tmp_path / "cluster" / "token")
    finally:
        os.umask(before)
    assert len(secret) == 64
    assert stat.S_IMODE((tmp_path / "cluster" / "token").stat().st_mode) == 0o600
    assert auth.secret_file(tmp_path / "cluster" / "token") == secret
    assert auth.secret_file(tmp_path / "cluster" / "other") != secret


@pytest.mark.parametrize(
    ("mode", "text", "sentence"),
    [
        (0o644, "secret", r"token: mode 644 lets others read a secret; allowed: 600 \(chmod 600 .*token\)$"),
        (0o620, "secret", "mode 620 lets others"),
        (0o600, " \n", "token: holds no secret"),
        (0o600, None, r"token: cannot read the secret \(No such file or directory\)"),
    ],
)
def test_an_unusable_secret_is_refused(tmp_path, mode, text, sentence):
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=sentence):
        auth.read_private(path)


def test_the_token_that_is_named_is_sent(no_token, monkeypatch):
    auth.use_token()
    assert auth.AUTH_MODE not in os.environ
    auth.secret_file(no_token / "token")
    monkeypatch.setenv(auth.AUTH_TOKEN_PATH, str(no_token / "token"))
    auth.use_token()
    assert os.environ[auth.AUTH_MODE] == "token"
    (no_token / "token").chmod(0o640)
    with pytest.raises(ConfigError, match="lets others read"):
        auth.use_token()


def test_an_embedded_ray_gets_a_token_of_its_own(no_token, monkeypatch):
    auth.token_for_this_process()
    assert len(os.environ[auth.AUTH_TOKEN]) == 64
    for name, chosen in ((auth.AUTH_TOKEN, "mine"), (auth.AUTH_MODE, "disabled")):
        monkeypatch.delenv(auth.AUTH_TOKEN, raising=False)
        monkeypatch.setenv(name, chosen)
        auth.token_for_this_process()
        assert os.environ[name] == chosen
        assert os.environ.get(auth.AUTH_TOKEN, "mine") == "mine"
        monkeypatch.delenv(name)


EMBEDDED = """
import sys
import psutil
import ray  # before the session begins, as for a sweep
from clip2scene.cluster.session import ray_session
from clip2scene.jobfile import load_job
with ray_session(load_job(sys.argv[1])):
    assert ray.get(ray.remote(lambda: 1 + 1).remote()) == 2
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                print(connection.laddr.ip, connection.laddr.port)
"""


def test_an_embedded_ray_listens_on_this_machine_only_and_knows_its_user(no_token):
    job = REPOSITORY / "jobs" / "demo.yaml"
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED, str(job)], capture_output=True, text=True, cwd=no_token, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    listening = [line.rpartition(" ")[0] for line in done.stdout.splitlines()]
    assert len(listening) > 3
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert not (no_token / ".ray").exists()
