"""scripts/bench/quantize on a CPU, with tiny layers and without the rivals' environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "quantize"
TINY = ("--device", "cpu", "--hidden", "128", "--intermediate", "128", "--heads", "2", "--kv-heads", "1", "--vocabulary", "4096",
        "--samples", "2", "--seq-len", "32", "--threads", "1")  # fmt: skip


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a run whose rivals' interpreter has no llm-compressor."""
    python = tmp_path_factory.mktemp("rivals") / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = bench(*TINY, "--layers", 2, "--recipe", "gptq", "--rivals-python", python)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_apex4_is_measured_alone_and_a_line_says_so(alone: list[str]) -> None:
    assert alone[0].startswith("llm-compressor is not measured: ") and alone[0].endswith("/python cannot import it")
    result: dict[str, Any] = json.loads(alone[-1])
    assert result["llm_compressor"] is None
    (row,) = result["apex4"]
    assert row["recipe"] == "gptq" and row["quantized_linears"] == 2 * 7 and row["peak_gpu_bytes"] is None
    assert 0 < row["seconds_a_layer"] < row["seconds"] - row["seconds_first_layer"] < row["seconds"]
    assert row["peak_rss_bytes"] > 0
    assert alone[-2].split()[:2] == ["apex4", "gptq"]


def test_what_was_measured_is_said(alone: list[str]) -> None:
    assert alone[1].startswith("2 layers, hidden 128, intermediate 128") and "2 windows of 32 tokens; cpu" in alone[1]
    result = json.loads(alone[-1])
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128 + 2 * 128
    assert result["model_bytes"] == 2 * (2 * layer + 2 * 4096 * 128 + 128) and result["windows"] == 2


def test_two_ranks_beside_one_process() -> None:
    done = bench(*TINY, "--layers", 2, "--recipe", "rtn", "--no-rivals", "--gpus", "1,2", "--steps")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert [row.get("error") for row in result["apex4"]] == [None, None]
    assert [row["ranks"] for row in result["apex4"]] == [1, 2]
    assert all(row["quantized_linears"] == 2 * 7 and row["seconds_a_layer"] > 0 for row in result["apex4"])
    assert any(line.split()[:4] == ["apex4", "x", "2", "rtn"] for line in done.stdout.splitlines())
    for row in result["apex4"]:  # of every rank, and no more than there was time
        assert len(row["steps"]) == row["ranks"]
        for seconds in row["steps"]:
            assert {"reading", "collecting inputs", "GPTQ and descent", "packing", "errors"} <= seconds.keys()
            assert 0 < sum(seconds.values()) <= row["seconds_a_layer_in_steps"]


def test_a_recipe_that_is_not_there_is_refused_before_anything_is_made() -> None:
    done = bench(*TINY, "--recipe", "nonsense")
    assert done.returncode == 2 and "recipe 'nonsense' is not known" in done.stderr


def test_the_measuring_process_stays_small() -> None:
    """As in test_bench_rivals.py."""
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "bench")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
