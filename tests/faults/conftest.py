"""A PostgreSQL server, and a check for processes left by a test."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import psutil
import pytest

from commands import wait_until
from postgres import Postgres, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def no_orphans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that every process that the test started has ended, wherever it is in the process tree."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("CLIP2SCENE_TEST", mark)  # child processes inherit it
    yield

    def left() -> list[str]:
        return [name for process in psutil.process_iter() if (name := _marked(process, mark))]

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not left(), "everything has ended", timeout_s=20)
    assert left() == []


def _marked(process: psutil.Process, mark: str) -> str:
    """Command of a process with the mark, else empty."""
    with contextlib.suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("CLIP2SCENE_TEST") == mark:
            command = " ".join(process.cmdline())
            return "" if "multiprocessing." in command else command  # its helpers live as long as we do
    return ""
