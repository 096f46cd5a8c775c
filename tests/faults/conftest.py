"""A PostgreSQL server, a check for processes left by a test, and the tiny trainings and CLIPs of the other folders."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from servers import Postgres

from commands import wait_until


def _conftest_of(folder: str) -> ModuleType:
    path = Path(__file__).parents[1] / folder / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"conftest_of_{folder}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


tiny = _conftest_of("training").tiny
tiny_clip = _conftest_of("teacher").tiny_clip


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL; skips where it is not installed."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL server here (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="clip2scene-postgres-"))  # PostgreSQL's user cannot read pytest's folders
    server = Postgres(folder, found[-1].parent)
    server.start()
    try:
        yield server
    finally:
        server.crash()
        shutil.rmtree(folder)


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
