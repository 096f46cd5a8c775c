"""A small job, and sweeps over it."""

from __future__ import annotations

import pytest
import yaml

from clip2scene.sweeps.sweep import load_sweep

JOB = {"name": "job", "seed": 5, "dataset": {"kind": "streetworld"}, "teacher": {"model": "streetworld"}}


@pytest.fixture
def load(tmp_path):
    """Load a sweep of the given space; ``job`` changes keys of a small job."""

    def made(*overrides: str, job=None, **space):
        for name, values in (("space", {"sweep": "test", **space}), ("job", JOB | (job or {}))):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return load_sweep(tmp_path / "space.yaml", tmp_path / "job.yaml", overrides)

    return made
