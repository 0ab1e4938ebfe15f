"""scripts/bench/rivals: what can be tested without the rivals' environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def test_the_measuring_process_stays_small() -> None:
    """A child's peak memory starts at its parent's, so torch there would be counted for every recipe."""
    code = f"import runpy, sys; runpy.run_path({str(SCRIPTS / 'rivals')!r}); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS.parents[1]), str(SCRIPTS)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"


def test_every_version_is_pinned() -> None:
    lines = (SCRIPTS / "rivals-constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {"torch", "llmcompressor", "compressed-tensors", "transformers"} <= {pin.split("==")[0] for pin in pins}
