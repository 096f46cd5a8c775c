"""The arrows point one way: a module imports only from its own room and the rooms before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import clip2scene

PACKAGE = Path(clip2scene.__file__).parent
ROOMS = (
    "errors",
    "config",
    "jobfile",
    "machine",
    "progress",
    "remote",
    "paths",
    "storage",
    "data",
    "geometry",
    "inspection",
    "segments",
    "teacher",
    "streetworld",
    "student",
    "losses",
    "tracking",
    "training",
    "doctor",
    "artifacts",
    "stages",
    "scores",
    "predictions",
    "run_log",
    "pipeline",
    "tables",
    "sweeps",
    "cluster",
    "cli",
)
# Heavy or fixed dependencies have one door each.
DOORS = {"mlflow": "tracking", "spconv": "student", "nuscenes": "data", "embreex": "streetworld"}
LIGHT = {
    "clip2scene.cli": {"torch", "ray", "mlflow", "nuscenes", "matplotlib", "open_clip", "spconv", "pandas"},
    "clip2scene.progress": {"torch", "ray", "mlflow", "numpy"},
    "clip2scene.data.splits, clip2scene.data.clouds, clip2scene.data.nuscenes": {"nuscenes", "torch", "matplotlib"},
    "clip2scene.inspection": {"nuscenes", "torch", "matplotlib"},
    "clip2scene.tracking.tracker, clip2scene.tracking.report": {"mlflow"},
}
"""Modules, and what importing them must not import: it is slow, or not there in every process."""


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("")
        if relative.parts != ("__init__",):
            yield relative.parts[0], path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_in_a_known_room():
    assert {room for room, _ in modules()} <= set(ROOMS)


def test_no_import_runs_back():
    backwards = []
    for room, path in modules():
        for name in imports(path):
            parts = name.split(".")
            if (
                parts[0] == "clip2scene"
                and len(parts) > 1
                and parts[1] in ROOMS
                and ROOMS.index(parts[1]) > ROOMS.index(room)
            ):
                backwards.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not backwards


def test_no_modules_import_each_other_in_a_circle():
    paths = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    # What a module imports, in its functions too; its own package is there anyway.
    needs = {
        name: {other for other in imports(path) if other in paths and not f"{name}.".startswith(f"{other}.")}
        for name, path in paths.items()
    }
    TopologicalSorter(needs).prepare()


def test_training_does_not_know_tracking():
    for room, path in modules():
        if room == "training":
            assert not [name for name in imports(path) if name.startswith("clip2scene.tracking")]


def test_each_dependency_has_one_door():
    for room, path in modules():
        for name in imports(path):
            door = DOORS.get(name.split(".")[0])
            assert door in (None, room), f"{path.relative_to(PACKAGE)} imports {name}; only {door}/ may"


def test_platform_stays_a_folder():
    assert not (PACKAGE.parent / "__init__.py").exists()


@pytest.mark.parametrize("names", LIGHT)
def test_importing_this_does_not_import_that(names):
    code = f"import sys, {names}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(shown.split()) & LIGHT[names]
