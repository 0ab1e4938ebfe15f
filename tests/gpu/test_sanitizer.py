"""compute-sanitizer's memcheck over a part of the checks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_memcheck_has_nothing_to_say(gpu: Any, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--gpu-no-sanitizer"):
        pytest.skip("--gpu-no-sanitizer")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [tool, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["-p", "no:cacheprovider", "--gpu-quick", "--gpu-only", "extremes", "--gpu-no-emulated"]
    command += ["--gpu-no-sanitizer", "--gpu-seed", str(gpu.seed), "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert " passed" in done.stdout, done.stdout[-600:]
