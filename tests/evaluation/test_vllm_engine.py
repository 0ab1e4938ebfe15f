"""`apex4 eval --engine vllm` with the real vLLM (scripts/test-vllm), and what it says where there is none."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.evaluation.evaluate import AGREEMENT

Call = Callable[..., Any]  # the fixtures of conftest.py
USAGE = 2
HAS_VLLM = find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM: scripts/test-vllm")
IN_VLLM = ("--engine", "vllm", "--dtype", "float32", "--json")
# Short windows: where one activation lies on a tie between two codes (docs/serving.md), the rest of its window changes.
WINDOWS = ("--seq-len", 32, "--limit", 16, "--dtype", "float32")


@pytest.fixture
def small_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for name, value in usual.items():
        monkeypatch.setenv(name, os.environ.get(name, value))


def test_without_vllm(invoke: Call, one_sentence: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for options in ((), ("--throughput",)):
        one_sentence(invoke("eval", "demo", *options, *IN_VLLM), USAGE, "--engine vllm", "pip install vllm")


def test_an_unknown_engine(invoke: Call, one_sentence: Call) -> None:
    one_sentence(invoke("eval", "demo", "--engine", "sglang"), USAGE, "sglang", "transformers", "vllm")


@needs_vllm
def test_another_device(invoke: Call, one_sentence: Call) -> None:
    one_sentence(invoke("eval", "demo", "--device", "cuda:1", *IN_VLLM), USAGE, "cuda:1", "cpu", "leave --device away")


@needs_vllm
def test_the_same_perplexity_and_tasks_as_transformers(demo_checkpoint: Path, invoke: Call, small_vllm: None) -> None:
    command = ("eval", demo_checkpoint, "--baseline", "demo", *WINDOWS, "--tasks", "apex4_lastword")
    expected = json.loads(invoke(*command, "--device", "cpu", "--json").stdout)
    result = invoke(*command, *IN_VLLM)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found) == set(expected) and found["engine"] == "vllm" and found["tokens"] == 512
    assert found["baseline_perplexity"] == pytest.approx(expected["baseline_perplexity"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=5e-3)  # ties
    assert found["perplexity"] != found["baseline_perplexity"]
    assert found["divergence"] is None
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=0.02)
    for tasks, others in ((found["baseline_tasks"], expected["baseline_tasks"]), (found["tasks"], expected["tasks"])):
        assert tasks["apex4_lastword"]["rows"] == 16 and set(tasks["apex4_lastword"]) == set(others["apex4_lastword"])
    original = expected["baseline_tasks"]["apex4_lastword"]
    assert found["baseline_tasks"]["apex4_lastword"]["acc"] == original["acc"]


@needs_vllm
def test_windows_as_long_as_the_context_and_the_table(demo_checkpoint: Path, invoke: Call, small_vllm: None) -> None:
    command = ("eval", "demo", "--baseline", "demo", "--limit", 1, "--dtype", "float32", "--engine", "vllm")
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "vLLM" in lines[0] and "512 tokens of heldout in windows of 512" in lines[1]
    assert next(line for line in lines if AGREEMENT in line).split()[-2] == "100.00"
    assert lines[-1].endswith("--engine transformers")


@needs_vllm
def test_throughput(demo_checkpoint: Path, invoke: Call, small_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # of vLLM: its graph is run as it is, and not compiled by Inductor
    shape = ("--batch", 2, "--prompt-len", 16, "--gen-len", 4)
    result = invoke("eval", demo_checkpoint, "--throughput", "--baseline", "demo", *shape, *IN_VLLM)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["engine"], found["device"]) == ("vllm", "cpu")
    for part, kernels in ((found["result"], ["reference"]), (found["baseline"], [])):
        assert part["kernels"] == kernels and part["peak_memory_bytes"] is None
        for figures, tokens in ((part, 40), (part["prefill"], 32), (part["decode"], 6)):
            assert (figures["num_requests"], figures["total_num_tokens"]) == (2, tokens)
            assert figures["tokens_per_second"] == pytest.approx(tokens / figures["elapsed_time"])
            assert math.isfinite(figures["elapsed_time"]) and figures["elapsed_time"] > 0


@needs_vllm
def test_a_model_that_vllm_cannot_run(tmp_path: Path, tiny_model: Call, invoke: Call, small_vllm: None) -> None:
    folder = tiny_model("foreign")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    result = invoke("eval", folder, "--limit", 1, "--seq-len", 16, *IN_VLLM)
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith(f"apex4: vLLM cannot run {folder} (")
