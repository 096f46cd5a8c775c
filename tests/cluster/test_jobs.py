"""The output of a job when its reader or the cluster goes away; test_up.py follows jobs of a real cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from clip2scene.cluster.jobs import Jobs
from clip2scene.errors import ClusterError


def following(error: Exception | None = None) -> Jobs:
    """A cluster with one job that prints a line; after that its connection may break."""

    async def tail_job_logs(job_id):
        yield f"{job_id} prints\n"
        if error is not None:
            raise error

    jobs = Jobs.__new__(Jobs)
    jobs.address = "http://127.0.0.1:8265"
    status = SimpleNamespace(is_terminal=lambda: True)
    job = SimpleNamespace(submission_id="job", status=status, start_time=1, driver_exit_code=3)
    jobs.client = SimpleNamespace(tail_job_logs=tail_job_logs, list_jobs=lambda: [job])
    return jobs


def test_a_job_is_followed_to_its_end(capsys):
    assert following().follow("job") == 3
    assert capsys.readouterr().out == "job prints\n"


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), RuntimeError("closed")])
def test_a_lost_cluster_is_one_sentence(error):
    sentence = r"^lost the connection to http://127.0.0.1:8265 while following job; the job is probably still running; "
    with pytest.raises(ClusterError, match=sentence):
        following(error).follow("job")


def test_all_living_nodes_of_a_large_cluster_are_counted(monkeypatch):
    nodes = [SimpleNamespace(state="DEAD")] * 120 + [SimpleNamespace(state="ALIVE")] * 150

    def list_nodes(address, filters=(), limit=100):  # as Ray does: it filters before it cuts
        kept = [node for node in nodes if all(getattr(node, key) == value for key, _, value in filters)]
        return kept[:limit]

    monkeypatch.setattr("ray.util.state.list_nodes", list_nodes)
    assert following().nodes() == nodes[120:]


def test_a_closed_output_is_not_a_lost_cluster(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        following().follow("job")


LINES = """
import argparse, sys
from clip2scene import cli
cli._parsed = lambda _: argparse.Namespace(verb=lambda _: print("line\\n" * int(sys.argv[1])) or 0)
sys.exit(cli.main())
"""


@pytest.mark.parametrize("count", [1, 100_000])
def test_a_closed_pipe_ends_a_command_quietly(count):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", LINES, str(count)], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
