"""Extraction when two jobs want the same at once, and when the storage is full.

A killed driver and a killed actor: ``tests/teacher/test_extract.py``.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip2scene.storage import Storage
from clip2scene.teacher.store import FeatureStore
from commands import TESTS, tell_recovery, wait_until

pytestmark = pytest.mark.long

FRAMES, CAMERAS = 12, 2

EXTRACT = """
import contextlib, json, logging, sys, time
from pathlib import Path
import ray
sys.path.insert(0, sys.argv[1])
from two_cameras import make_index, teacher_settings
from clip2scene.config import ExtractSettings
from clip2scene.errors import DataError
from clip2scene.storage import Storage
from clip2scene.teacher.clip import load_teacher
from clip2scene.teacher import extract as module

root, store, model, name = (Path(word) for word in sys.argv[2:6])

class Waits(logging.Handler):
    def emit(self, record):
        if "waiting for it" in record.getMessage():
            (root / "waits").touch()

logging.getLogger("clip2scene.storage").addHandler(Waits())

@contextlib.contextmanager
def bar(description, total, **_):
    def advance(n):
        (root / f"began-{name}").touch()
        # The first continues only once the second waits for the same store.
        while str(name) == "first" and not (root / "waits").exists():
            time.sleep(0.02)
    yield advance

module.progress = bar
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
index = make_index(root / f"data-{name}", int(sys.argv[6]))
index = type(index)(index.dataset, root / "data-first", index.version, index.frames)
settings = ExtractSettings(num_actors=1, frames_per_batch=1)
try:
    teacher = load_teacher(teacher_settings(model))
    report = module.extract(index, index.frames, teacher, settings, store, storage=Storage(store))
except DataError as error:
    sys.exit(f"clip2scene: {error}")
print(json.dumps([report.images_encoded, report.images_cached]))
"""


def command(root: Path, store: Path, model: Path, name: str) -> list[str]:
    return [sys.executable, "-c", EXTRACT, *map(str, (TESTS, root, store, model, name, FRAMES))]


@pytest.mark.usefixtures("no_orphans")
def test_two_jobs_that_want_the_same_at_once_encode_it_once(tiny_clip, tmp_path):
    store, model = tmp_path / "store", tiny_clip("token")
    first = subprocess.Popen(command(tmp_path, store, model, "first"), stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "began-first").exists, "the first encodes")
    second = subprocess.Popen(command(tmp_path, store, model, "second"), stdout=subprocess.PIPE, text=True)
    reports = [json.loads(process.communicate()[0]) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert reports == [[FRAMES * CAMERAS, 0], [0, FRAMES * CAMERAS]]
    with (store / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if anyone still holds it
    assert len(FeatureStore.open(store, Storage(store)).read("frame-0")) == CAMERAS


@pytest.mark.usefixtures("no_orphans")
def test_a_full_disk_ends_the_extraction_and_the_same_command_goes_on(tiny_clip, tmp_path, small_disk):
    (tmp_path / "waits").touch()
    words = command(tmp_path, small_disk / "store", tiny_clip("token"), "first")
    full = subprocess.run(words, capture_output=True, text=True, check=False)
    assert full.returncode == 1, full.stderr[-2000:]
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("clip2scene: ")
    assert "No space left" in last
    before = len(list((small_disk / "store" / "frames").glob("*.safetensors")))
    assert 0 < before < FRAMES

    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    space_at_s = time.monotonic()
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    tell_recovery(space_at_s)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads(again.stdout) == [(FRAMES - before) * CAMERAS, before * CAMERAS]
    assert not [path for path in (small_disk / "store").rglob(".*") if path.name != ".lock"]
