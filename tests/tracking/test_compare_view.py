"""MLflow's compare page of a sweep in headless Chromium, as a user sees it who follows the link of the report."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from synthetic_sweeps import LAMBDA, TAU, interval, read_sweep, write_sweep

from clip2scene.tracking.sweep.text import compare_url
from clip2scene.tracking.tracker import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1600",
)
VIRTUAL_MS = 15_000
"""Virtual time for the page's scripts; it stops while a request is pending."""


class Drawn(HTMLParser):
    """A page after its scripts have run: the classes of its elements, and their texts."""

    def __init__(self, dom):
        super().__init__()
        self.classes, self.texts = set(), []
        self._silent = False
        self.feed(dom)

    def handle_starttag(self, tag, attrs):
        self.classes |= set((dict(attrs).get("class") or "").split())
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent = False

    def handle_data(self, data):
        if not self._silent and data.strip():
            self.texts.append(data.strip())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_compare_page_shows_all_trials_and_their_parallel_coordinates(uri, tmp_path):
    trials = [
        {
            "values": {TAU: 0.1 * (number + 1), LAMBDA: 2.0 / (number + 1)},
            "state": "finished",
            "epochs": 2,
            "scores": {"miou": 0.3 + 0.01 * number, "label_free": 0.4 - 0.02 * number},
        }
        for number in range(6)
    ]
    parameters = [interval(TAU, "uniform", 0.1, 1.0), interval(LAMBDA, "uniform", 0.1, 10.0)]
    write_sweep(connect(uri, "compared"), "small", parameters, trials, epochs=2)
    address = compare_url(read_sweep(uri, "small"))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--virtual-time-budget={VIRTUAL_MS}"]
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=300)
    page = Drawn(done.stdout)
    assert "Comparing 6 Runs from 1 Experiment" in page.texts, done.stderr[-2000:]
    assert "parcoords" in page.classes  # Plotly's name for parallel coordinates
    names = [text for text in page.texts if re.fullmatch(r"trial \d\d", text)]
    assert sorted(names) == [f"trial {number:02d}" for number in range(6)]
    axes = re.findall(r'class="axis-title"[^>]*>([^<]*)<', done.stdout)
    assert axes == [TAU, LAMBDA, "miou"]  # it opens on what differs, against the objective
