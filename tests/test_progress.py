"""Bars where stderr is a terminal; in a file whole lines, and results that no bar runs into."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant import progress
from apex4_quant.progress import TerminalProgress

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
