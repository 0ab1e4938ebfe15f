"""Bars where stderr is a terminal; in a file whole lines, and results that no bar runs into."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant import progress
from apex4_quant.command_options import BARS_OFF
from apex4_quant.progress import StepTimes, TerminalProgress, step

Call = Callable[..., Any]  # the fixtures of conftest.py
SCRIPT = """
from apex4_quant.progress import TerminalProgress
shown = TerminalProgress()
with shown.stage("working", 10, "w") as advance:
    for number in range(10):
        advance(1)
        if number == 4:
            shown.line("a finding")
print("the result")
"""


def test_a_log_file_has_whole_lines(cli_environment: dict[str, str], tmp_path: Path) -> None:
    """stdout and stderr in one file, as a job has them."""
    log = tmp_path / "log"
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", SCRIPT], stdout=file, stderr=file, env=cli_environment, check=True)
    assert log.read_text() == "working ...\na finding\nthe result\n"


def test_a_terminal_has_a_bar(cli_environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=theirs, env=cli_environment, check=True
    )
    shown = os.read(ours, 100_000).decode()
    assert "working: 100%" in shown and "a finding\r\n" in shown and done.stdout == b"the result\n"


def test_libraries_show_no_bars_in_a_log_file(
    invoke: Call, monkeypatch: pytest.MonkeyPatch, cli_environment: dict[str, str]
) -> None:
    """lm-eval's would be written over and over: a command turns those of all libraries off before they are imported."""
    for name in BARS_OFF:
        monkeypatch.delenv(name, raising=False)
    assert invoke("gpus").exit_code == 0
    off = {name: os.environ.pop(name) for name in BARS_OFF}
    code = "from tqdm import tqdm; list(tqdm(range(3), desc='a bar'))"
    shown = [
        subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, env=cli_environment | more, check=True)
        for more in ({}, off)
    ]
    assert b"a bar" in shown[0].stderr and shown[1].stderr == b""


def test_a_long_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with TerminalProgress().stage("quantizing", 200, "w") as advance:
        for _ in range(10):
            now += 12.0
            advance(20)
    assert capsys.readouterr().err.splitlines() == [
        "quantizing ...",
        "quantizing: 30 % after 36 s",
        "quantizing: 60 % after 72 s",
        "quantizing: 90 % after 108 s",
    ]


def test_a_step_has_the_time_that_no_step_inside_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    waited: list[float] = []

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    @step("inside")
    def work() -> None:
        pass_time(3.0)

    times = StepTimes(lambda: waited.append(now))
    work()  # nobody measures
    with times.measuring():
        with step("outside"):
            pass_time(1.0)
            work()
            with pytest.raises(ValueError), step("outside"):
                pass_time(5.0)
                raise ValueError
            thread = threading.Thread(target=work)  # nobody waits for what it does
            thread.start()
            thread.join()
        pass_time(7.0)
    work()
    assert times.seconds == {"outside": 1.0 + 5.0 + 3.0, "inside": 3.0}
    assert waited == [3.0, 4.0, 7.0, 7.0, 12.0, 15.0]
