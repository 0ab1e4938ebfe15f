"""scripts/bench/real_models on prepared folders, on a CPU; what --make fetches is not tested."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apex4_quant.calib.text import load_text
from apex4_quant.models.source import DEMO_PATH

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "real_models"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(DEMO_PATH, folder / "models" / "demo")
    (folder / "text").mkdir()
    for name, source in (("calibration", "bundled"), ("evaluation", "heldout")):
        (folder / "text" / f"{name}.txt").write_text(load_text(source)[:20000])
    return folder


def test_a_row_for_every_recipe_and_kind_of_activations(prepared: Path) -> None:
    done = bench("--models-dir", prepared, "--recipes", "rtn,nonsense", "--windows", 2, "--samples", 2, "--seq-len", 32,
                 "--tasks", "", "--activations", "4", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("demo: perplexity ") and "The capital of France is" in lines[1]
    assert lines[4].startswith("apex4 nonsense ") and "does not run" in lines[4] and "is not known" in lines[4]
    result = json.loads(lines[-1])
    original, rtn, _ = result["rows"]
    assert (rtn["recipe"], rtn["activations"], rtn["tokens"], rtn["seed"]) == ("apex4 rtn", "4", 64, 0)
    assert rtn["baseline_perplexity"] == original["perplexity"]
    assert rtn["divergence"] > 0 and 0 < rtn["top1_agreement"] < 1 and rtn["seconds"] > 0 and rtn["peak_bytes"] > 0


def test_a_folder_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    done = bench("--models-dir", tmp_path)
    assert done.returncode == 2 and f"{tmp_path} has no models and texts: prepare it with --make" in done.stderr
