from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from clip2scene import progress as module
from clip2scene.progress import duration, progress, say

ON_A_TERMINAL = """
from clip2scene.progress import progress
with progress("extract [a]", 4, unit="images") as advance:
    for step in range(4):
        advance(loss=0.5 / (step + 1))
    with progress("inner", None, unit="files") as more:
        more(3)
"""


def test_without_a_terminal_a_short_block_prints_one_line(capsys):
    with progress("extract", 192, unit="images") as advance:
        for _ in range(192):
            advance(loss=0.25, device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    pattern = r"extract: 192/192 images, [\d.]+ images/s, 0\.\d s, loss 0\.25, device cpu\n"
    assert re.fullmatch(pattern, captured.err), captured.err


def test_intermediate_lines_are_limited_and_show_the_time_left(capsys, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    with progress("extract", 12, unit="images") as advance:
        for _ in range(12):
            now_s += 1.0
            advance()
    assert capsys.readouterr().err.splitlines() == [
        "extract: 5/12 images, 1 images/s, 7.0 s left",
        "extract: 10/12 images, 1 images/s, 2.0 s left",
        "extract: 12/12 images, 1 images/s, 12 s",
    ]


def test_steps_of_an_earlier_command_are_done_but_make_this_one_no_faster(capsys, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    with progress("distill", 80) as advance:
        advance(60, restored=True)
        for _ in range(4):
            now_s += 5.0
            advance(5)
    assert capsys.readouterr().err.splitlines() == [
        "distill: 65/80 steps, 1 steps/s, 15 s left",
        "distill: 70/80 steps, 1 steps/s, 10 s left",
        "distill: 75/80 steps, 1 steps/s, 5.0 s left",
        "distill: 80/80 steps, 1 steps/s, 20 s",
    ]


def test_a_sentence_is_one_line_with_its_brackets(capsys):
    sentence = f"seeds=[red]: {'/a/long/path' * 20}"
    say(sentence)
    assert capsys.readouterr().err == f"{sentence}\n"


def test_an_unknown_total(capsys):
    with progress("index", None, unit="frames") as advance:
        advance(3)
    assert re.fullmatch(r"index: 3 frames, \d+ frames/s, 0\.0 s\n", capsys.readouterr().err)


def test_a_failure_shows_how_far_it_got(capsys):
    def fail():
        with progress("distill", 8) as advance:
            advance(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err.startswith("distill: stopped at 2/8 steps")


def test_threads_do_not_lose_counts(capsys):
    def work():
        for _ in range(2000):
            advance()

    with progress("extract", 8000) as advance:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "8000/8000" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_no_lines():
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"}
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=terminal, stdout=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "━━━━" in text
    assert re.search(r"extract \[a\] ━+ 4/4 images, .* loss 0\.125", text), text
    assert re.search(r"inner ━+ 3 files", text), text
    assert "extract:" not in text


def test_a_bar_does_not_count_restored_steps_as_speed(monkeypatch):
    counted = []
    monkeypatch.setattr(module, "_counts", lambda done, before, *_: counted.append((done, before)) or "")
    with module._bar("distill", 80, "steps") as advance:
        advance(60, restored=True)
        advance(20)
    assert counted[-1] == (80, 60)


def test_what_a_bar_shows_is_not_changed_while_it_is_drawn(monkeypatch):
    from rich.progress import Progress

    drawn = []
    monkeypatch.setattr(Progress, "update", lambda bars, task, *, shown, **_: drawn.append(shown))
    with module._bar("extract", 2, "images") as advance:
        advance(loss=0.5)
        advance(loss=0.25, device="cpu")
    assert drawn == [{"loss": 0.5}, {"loss": 0.25, "device": "cpu"}]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (7620, "2 h 07 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
