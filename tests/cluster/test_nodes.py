"""The answer of the process that runs the nodes; test_up.py starts real ones."""

from __future__ import annotations

import json
import subprocess
import sys

NOISE = """
import os, sys
from clip2scene.cluster import nodes

def start(options):
    print("a line without its end", end="")
    os.system("echo of a child")
    return {"address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:2"}

nodes._start, nodes._reap_orphans, nodes._end_everything = start, lambda: None, lambda: None
words = ["--nodes", "1", "--cpus-per-node", "1", "--dashboard-port", "2", "--folder", sys.argv[1]]
sys.exit(nodes.main(words))
"""


def test_nothing_that_is_printed_is_taken_for_the_answer(tmp_path):
    done = subprocess.run([sys.executable, "-c", NOISE, tmp_path], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:2"}
    assert "a line without its end" in done.stderr
    assert "of a child" in done.stderr
