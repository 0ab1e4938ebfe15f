"""scripts/bench/rivals: what can be tested without the rivals' environment."""

from __future__ import annotations

import ast
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


def test_all_that_the_worker_imports_is_pinned() -> None:
    """The rivals' environment is made of these constraints: what they leave open is another rival a month later."""
    pins = dict(
        line.split("==")
        for line in (SCRIPTS / "rivals-constraints.txt").read_text("utf-8").splitlines()
        if line[0] != "#"
    )
    tree = ast.parse((SCRIPTS / "rivals_worker.py").read_text("utf-8"))
    imported = {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    imported |= {
        each.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names
    }
    foreign = {name.replace("_", "-") for name in imported - set(sys.stdlib_module_names) - {"apex4_quant"}}
    assert {"torch", "llmcompressor", "compressed-tensors", "transformers"} <= foreign <= set(pins)
    assert all(re.fullmatch(r"\d[\w.+]*", version) for version in pins.values())
