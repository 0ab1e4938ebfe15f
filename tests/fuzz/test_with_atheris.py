"""Inputs that coverage leads to: headers of safetensors files, and calibration text."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: it has no wheel here"
)
@pytest.mark.parametrize("reader", ["header", "text"])
def test_what_coverage_finds(reader: str, request: pytest.FixtureRequest) -> None:
    factor = int(request.config.getoption("--fuzz"))
    seed = [] if factor > 1 else ["-seed=1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.with_atheris", reader, f"-runs={20_000 * factor}", *seed],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(rf"Done {20_000 * factor} runs", done.stderr), done.stderr[-4000:]
