"""vLLM over two GPUs: tensor and pipeline parallel ranks generate what one GPU does. Skipped where there are no two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# In a process of its own: its GPUs are free afterwards, and the workers that it starts find this file's `__main__`.
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, dtype="bfloat16", max_model_len=128, gpu_memory_utilization=0.05, kv_cache_memory_bytes=2**28,
              disable_log_stats=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    print("RESULT", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def generate(tmp_path: Path, folder: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    script = tmp_path / "serve_folder.py"
    script.write_text(SERVE)
    environment = os.environ | {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [sys.executable, str(script), str(folder), json.dumps(prompts), json.dumps(options)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, ran.stderr[-4000:]
    found: list[list[int]] = json.loads(lines[0].removeprefix("RESULT "))
    return found


@pytest.mark.parametrize(
    "parallel", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tensor", "pipeline"]
)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_two_gpus_generate_what_one_does(
    parallel: dict[str, int], eager: bool, quantized: Callable[..., Path], one_gpu: Callable[..., list[list[int]]],
    prompts: list[list[int]], tmp_path: Path,
) -> None:  # fmt: skip
    folder = quantized("demo", "rtn", layout="sm90")
    alone = one_gpu(folder, eager)
    together = generate(tmp_path, folder, prompts, enforce_eager=eager, **parallel)
    # Ranks add float32 sums in another order: an activation that lies between two codes may become the other one.
    equal = sum(one == other for one, other in zip(alone, together, strict=True))
    assert equal >= len(prompts) - 3, f"{equal} of {len(prompts)} prompts: {alone} and {together}"


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Text that demo knows: its predictions are far from ties."""
    from apex4_quant.calib.text import load_text
    from apex4_quant.models.place import DEMO_PATH
    from apex4_quant.models.tokenizers import load_tokenizer

    ids = load_tokenizer(DEMO_PATH).encode(load_text("heldout")[:20000])
    return [ids[start : start + 32] for start in range(0, 8 * 200, 200)]


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> Callable[..., list[list[int]]]:
    """What one GPU generates, made once for each way to execute."""
    made: dict[tuple[Path, bool], list[list[int]]] = {}

    def find(folder: Path, eager: bool) -> list[list[int]]:
        if (folder, eager) not in made:
            made[folder, eager] = generate(tmp_path_factory.mktemp("one"), folder, prompts, enforce_eager=eager)
        return made[folder, eager]

    return find
