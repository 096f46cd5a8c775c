"""CPUs and threads of a process, and workers that fit on a node."""

from __future__ import annotations

import os

import pytest
import torch

from clip2scene import machine


@pytest.fixture
def process(monkeypatch, tmp_path):
    """A process with that many CPUs, in a container with that quota."""

    def make(cpus: int, quota: str = "max 100000") -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
        monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
        (tmp_path / "cpu.max").write_text(f"{quota}\n")

    return make


def test_cpus_are_limited_by_the_container(process, tmp_path):
    for quota, cpus in (("max 100000", 8), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1)):
        process(8, quota)
        assert machine.num_cpus() == cpus
    process(2, "400000 100000")
    assert machine.num_cpus() == 2
    (tmp_path / "cpu.max").unlink()
    assert machine.num_cpus() == 2


def test_no_more_threads_than_cpus(process, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    process(4)
    for threads in (1, 4, 8):
        machine.use_threads(threads)
    assert taken == [1, 4, 4]


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "fit"),
    [
        ({"CPU": 8.0}, 1, 0, 8),
        ({"CPU": 8.0}, 3, 0, 2),
        ({"CPU": 0.3}, 0.1, 0, 3),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 1, 2),
        ({"CPU": 1.0, "GPU": 2.0}, 1, 1, 1),
        ({"GPU": 3.0}, 0, 0.6, 3),
        ({"GPU": 1.0}, 0, 1 / 3, 3),
        ({"GPU": 5.0}, 0, 2, 2),
        ({"CPU": 8.0}, 1, 1, 0),
        ({}, 0, 0, float("inf")),
    ],
)
def test_workers_that_fit_on_a_node(node, cpus, gpus, fit):
    assert machine.workers_on(node, cpus=cpus, gpus=gpus) == fit
