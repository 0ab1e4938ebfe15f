"""What vLLM generates greedily for `prompts()`: in this process, or in one of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# Before vLLM is imported. It binds threads to cores of its own otherwise, and looks a model's files up in the network.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 12, 16
ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 600  # of a process that never ends, not a measure


@dataclass
class Generated:
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def prompts() -> list[list[int]]:
    ids = torch.randint(5, 4096, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    return ids.tolist()


def generate(
    folder: Path, lora: Any = None, watch: Callable[[Any], Any] | None = None, **options: Any
) -> list[Generated]:
    """In this process. `watch` is called with the LLM before it generates; `options` are vllm.LLM's."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    usual = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "disable_log_stats": True}
    llm = None
    try:
        llm = LLM(str(folder), **usual | options)
        if watch is not None:
            watch(llm)
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
        outputs = llm.generate(asked, sampling, lora_request=lora, use_tqdm=False)
        found = []
        for prompt, output in zip(prompts(), outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            steps = zip(tokens, output.outputs[0].logprobs, strict=True)
            found.append(Generated(prompt, tokens, [step[token].logprob for token, step in steps]))
        return found
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate_apart(out: Path, folder: Path, **options: Any) -> list[Generated]:
    """In a process of its own, which this one's imports do not reach and whose imports do not reach this one.

    `out` is the file that it writes what it found to. Raises AssertionError with the end of its log.
    """
    command = [sys.executable, "-m", "tests.integrations.vllm.generating", str(out), str(folder), json.dumps(options)]
    ran = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | os.environ, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return [Generated(**one) for one in json.loads(out.read_text())]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(
        json.dumps([asdict(one) for one in generate(Path(sys.argv[2]), **json.loads(sys.argv[3]))])
    )
