"""`apex4 eval --throughput`: what it measures, on a CPU; its steps are those of generation; what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import apex4_quant  # noqa: F401  (registers the quantizer)
from apex4_quant.evaluation.engine import Load
from apex4_quant.evaluation.generation_speed import _Run, measure

Call = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
FIGURES = {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"}
SHORT = ("--batch", 2, "--prompt-len", 16, "--gen-len", 4)


def test_json_with_a_baseline(demo_checkpoint: Path, invoke: Call) -> None:
    result = invoke("eval", demo_checkpoint, "--throughput", "--baseline", "demo", *SHORT, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["batch"], found["prompt_len"], found["gen_len"], found["device"]) == (2, 16, 4, "cpu")
    for part, kernels in ((found["result"], ["reference"]), (found["baseline"], [])):
        assert part["kernels"] == kernels and part["cuda_graph"] is False
        for figures, tokens in ((part, 40), (part["prefill"], 32), (part["decode"], 6)):
            assert set(figures) >= FIGURES
            assert (figures["num_requests"], figures["total_num_tokens"]) == (2, tokens)
            assert figures["tokens_per_second"] == pytest.approx(tokens / figures["elapsed_time"])
            assert figures["requests_per_second"] == pytest.approx(2 / figures["elapsed_time"])
        assert part["elapsed_time"] == pytest.approx(part["prefill"]["elapsed_time"] + part["decode"]["elapsed_time"])
        assert part["peak_memory_bytes"] > 5e6
    assert found["result"]["format"].startswith("W4A4 g128") and found["baseline"]["format"] == "bfloat16"


def test_for_people(demo_checkpoint: Path, invoke: Call) -> None:
    text = invoke("eval", demo_checkpoint, "--throughput", *SHORT, "--device", "cpu").stdout
    assert "prefill tok/s" in text and "decode tok/s" in text and "peak memory" in text and "baseline" not in text


def test_its_tokens_are_those_of_generate(demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    ids = torch.arange(2 * 12).reshape(2, 12) * 37 % 4096
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 12:]
    with torch.inference_mode():
        run = _Run(model, ids, 6)
        for _ in range(2):  # a second run begins anew
            run.prefill()
            found = [run._next.clone()]
            for _ in range(5):
                run._step()
                found.append(run._next.clone())
            assert torch.equal(torch.cat(found, 1), expected)


def test_measure_leaves_the_model_as_it_was(demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    before = model(torch.arange(9)[None]).logits
    measure(model, Load(1, 8, 3))
    assert torch.equal(model(torch.arange(9)[None]).logits, before)


@pytest.mark.parametrize(
    ("options", "nouns"),
    [
        (("--throughput", "--batch", 0), ("--batch", "0")),
        (("--throughput", "--gen-len", 1), ("--gen-len", "2")),
        (("--throughput", "--prompt-len", 4000), ("demo", "512", "--prompt-len")),
        (("--throughput", "--tasks", "apex4_choice"), ("--tasks", "--throughput")),
        (("--throughput", "--seq-len", 128), ("--seq-len", "--throughput")),
        (("--prompt-len", 128), ("--prompt-len", "--throughput")),
    ],
)
def test_refusals(options: tuple[object, ...], nouns: tuple[str, ...], invoke: Call, one_sentence: Call) -> None:
    one_sentence(invoke("eval", "demo", *options, "--device", "cpu", "--json"), 2, *nouns)


def test_the_end_to_end_benchmark_runs_in_small(tmp_path: Path, cli_environment: dict[str, str]) -> None:
    command = [sys.executable, ROOT / "scripts" / "bench" / "end_to_end", "--shape", "tiny", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, env=cli_environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert [(row["batch"], row["prompt_len"]) for row in last["rows"]] == [(2, 32), (1, 16), (4, 16)]
    for row in last["rows"]:
        assert row["result"]["tokens_per_second"] > 0 and row["baseline"]["tokens_per_second"] > 0
