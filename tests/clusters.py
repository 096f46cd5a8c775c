"""A cluster of several nodes on this machine, started with ``clip2scene up``, for the tests that need one."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from commands import begin, free_port, wait_for

START_TIMEOUT_S = 300.0
NOBODY = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("RAY_", "MLFLOW_")) or name == "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
}
"""The environment of somebody without any secret."""


class Up(NamedTuple):
    process: subprocess.Popen[str]
    storage: Path
    environment: dict[str, str]
    printed: str

    @property
    def secrets(self) -> tuple[str, str]:
        folder = self.storage / "cluster"
        return (folder / "token").read_text(), (folder / "mlflow_password").read_text()

    def folder(self) -> Path:
        """Ray's folder for sockets and logs."""
        (found,) = {words[words.index("--folder") + 1] for words in map(words_of, self.family()) if "--folder" in words}
        return Path(found)

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


def words_of(process: psutil.Process) -> list[str]:
    """Command line of a process; empty if it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextlib.contextmanager
def up(storage: Path, log: Path, nodes: int) -> Iterator[Up]:
    ports = ["--port", free_port(), "--tracking-port", free_port()]
    process = begin(log, "up", "--nodes", nodes, "--storage", storage, *ports, environment=NOBODY)
    try:
        wait_for("Ctrl-C ends it.", log, process)
        lines = (storage / "cluster" / "environment").read_text().splitlines()
        exported = dict(word.split("=", 1) for line in lines for word in shlex.split(line.removeprefix("export ")))
        yield Up(process, storage, NOBODY | exported, log.read_text())
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(100)
