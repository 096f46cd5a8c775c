"""A real PostgreSQL server that a test may crash and start again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import free_port, wait_until

OWNER = "clip2scene"


def programs() -> Path:
    """The folder of PostgreSQL's programs; skips where there is none."""
    on_path = shutil.which("postgres")
    found = [Path(on_path).resolve().parent] if on_path else []
    # Debian keeps them off PATH.
    found += sorted((path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), reverse=True)
    if not found:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    return found[0]


class Postgres:
    """A server on loopback, on its own port, not as root, which it refuses; :data:`OWNER` needs no password."""

    def __init__(self, folder: Path, access: str | None = None) -> None:
        """``access`` are the lines of pg_hba.conf, by default all of them for everybody."""
        self.data, self.port, self._programs = folder / "data", free_port(), programs()
        self._as: list[str] = []
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
            self._as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        self._environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        self._server = ["--host", "127.0.0.1", "--port", str(self.port), "--username", OWNER, "--dbname", "postgres"]
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "--pgdata", self.data, "--username", OWNER, "--auth", "trust", "--no-sync")
        if access is not None:
            (self.data / "pg_hba.conf").write_text(access)
        self.uri = f"postgresql+psycopg2://{OWNER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [sys.executable, "-m", "clip2scene.tracking.watchdog", *self._as, str(self._programs / "postgres")]
        command += ["-D", str(self.data), "-p", str(self.port), "-F"]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        # The watchdog ends it when this process ends in any way.
        log = self.data.parent / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        wait_until(self._answers, "PostgreSQL answers", process=self._process, log=log)

    def crash(self) -> None:
        """End it at once: every connection breaks, and the next start recovers from the log."""
        self._run("pg_ctl", "stop", "--mode", "immediate", "--pgdata", self.data)
        assert self._process is not None
        self._process.wait()

    def execute(self, sql: str) -> None:
        """Execute statements, which are on no command line, as :data:`OWNER`."""
        self._run("psql", "--quiet", "--set=ON_ERROR_STOP=1", *self._server, sql=sql)

    def _answers(self) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("pg_isready", "--quiet", *self._server)
            return True
        return False

    def _run(self, program: str, *arguments: object, sql: str | None = None) -> None:
        command = [*self._as, str(self._programs / program), *map(str, arguments)]
        subprocess.run(
            command, input=sql, text=True, check=True, stdout=subprocess.DEVNULL, cwd="/", env=self._environment
        )


@contextlib.contextmanager
def running_postgres(access: str | None = None) -> Iterator[Postgres]:
    """A server with an empty database; skips where PostgreSQL or its client is not installed."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed (clip2scene[server])")
    programs()
    folder = Path(tempfile.mkdtemp(prefix="clip2scene-postgres-"))  # PostgreSQL's user cannot read pytest's folders
    try:
        server = Postgres(folder, access)
        server.start()
        try:
            yield server
        finally:
            server.crash()
    finally:
        shutil.rmtree(folder)
