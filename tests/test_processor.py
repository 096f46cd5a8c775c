"""How many CPUs and threads a process takes."""

from __future__ import annotations

import os

import pytest
import torch

from clip2scene import processor


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A process with so many CPUs, in a container with such a quota."""

    def make(cpus: int, quota: str = "max 100000") -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
        monkeypatch.setattr(processor, "_QUOTA", tmp_path / "cpu.max")
        (tmp_path / "cpu.max").write_text(f"{quota}\n")

    return make


def test_a_container_has_what_it_was_given(machine, monkeypatch, tmp_path):
    for quota, cpus in (("max 100000", 8), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1)):
        machine(8, quota)
        assert processor.num_cpus() == cpus
    machine(2, "400000 100000")
    assert processor.num_cpus() == 2
    (tmp_path / "cpu.max").unlink()
    assert processor.num_cpus() == 2


def test_no_more_threads_than_cpus(machine, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    machine(4)
    for threads in (1, 4, 8):
        processor.use_threads(threads)
    assert taken == [1, 4, 4]
