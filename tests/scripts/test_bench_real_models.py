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
from apex4_quant.models.place import DEMO_PATH

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


def test_a_row_for_every_recipe_and_kind_of_activations(prepared: Path, tmp_path: Path) -> None:
    settings = ("--models-dir", prepared, "--windows", 2, "--samples", 2, "--seq-len", 32, "--tasks", "", "--activations", "4",
                "--device", "cpu", "--append", tmp_path / "rows.jsonl")  # fmt: skip
    done = bench(*settings, "--recipes", "rtn,nonsense", "--activation-bits", "8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("demo: perplexity evaluation ") and "The capital of France is" in lines[1]
    assert lines[4].startswith("apex4 nonsense ") and "does not run" in lines[4] and "is not known" in lines[4]
    original, rtn, _ = rows = json.loads(lines[-1])["rows"]
    # What was quantized for 8 bits is computed with them, whatever is asked of the others.
    assert (rtn["quantized_for"], rtn["activations"], rtn["activation_bits"]) == ("8", "8", [8])
    assert (rtn["recipe"], rtn["tokens"], rtn["seed"]) == ("apex4 rtn", 64, 0)
    assert rtn["baseline_perplexity"] == original["perplexity"]
    assert rtn["divergence"] > 0 and 0 < rtn["top1_agreement"] < 1 and rtn["seconds"] > 0 and rtn["peak_bytes"] > 0

    kept = tmp_path / "rows.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == rows[:2]  # nothing of what does not run
    kept.write_text(kept.read_text() + '{"model": "demo", "rec')  # stopped while it was written
    again = bench(*settings, "--recipes", "rtn", "--activation-bits", "8", "--json")
    assert json.loads(again.stdout)["rows"] == [original, rtn]  # seconds too: it was not quantized again


def test_a_folder_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    done = bench("--models-dir", tmp_path)
    assert done.returncode == 2 and f"{tmp_path} has no models and texts: prepare it with --make" in done.stderr


def test_bad_options_are_refused(prepared: Path) -> None:
    done = bench("--models-dir", prepared, "--texts", "evaluation,other")
    assert done.returncode == 2 and "has no other.txt: there are calibration, evaluation" in done.stderr
    done = bench("--models-dir", prepared, "--activation-bits", "5")
    assert done.returncode == 2 and "--activation-bits is 5: give 4, 8 or 4,8" in done.stderr
    done = bench("--models-dir", prepared, "--models", "demo,another")
    assert done.returncode == 2 and f"{prepared} has no another: there are demo" in done.stderr
