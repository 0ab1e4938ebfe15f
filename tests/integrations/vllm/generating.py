"""What vLLM generates greedily for `prompts()`: in this process, or in one of its own."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
LIMIT_SECONDS = 600  # of a process that never ends, not a measure
PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.gpu_worker",
    "torch._inductor.compile_fx",
    "apex4_quant.integrations.vllm.config",
    "apex4_quant.integrations.vllm.fusion",
]


@dataclass
class Generated:
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def prompts(count: int = PROMPTS) -> list[list[int]]:
    ids = torch.randint(5, 4096, (count, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    return ids.tolist()


def generate(
    folder: Path, lora: Any = None, watch: Callable[[Any], Any] | None = None, count: int = PROMPTS, **options: Any
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
        asked = [{"prompt_token_ids": prompt} for prompt in prompts(count)]
        outputs = llm.generate(asked, sampling, lora_request=lora, use_tqdm=False)
        found = []
        for prompt, output in zip(prompts(count), outputs, strict=True):
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
    log = out.with_suffix(".log")
    process = _forks().Process(target=_write_generated, args=(out, log, folder, options, ENVIRONMENT | os.environ))
    process.start()
    process.join(LIMIT_SECONDS)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, f"exit code {process.exitcode}\n" + (log.read_text()[-8000:] if log.exists() else "")
    return [Generated(**one) for one in json.loads(out.read_text())]


@cache
def _forks() -> Any:
    """Processes forked from one that has imported vLLM, which takes longer than a small model. It has not touched the GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, ENVIRONMENT | os.environ):
        forkserver.ensure_running()
    return context


def model_of(llm: Any) -> torch.nn.Module:
    """vLLM's model, in an engine of this process."""
    model: torch.nn.Module = (
        llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    )
    return model


def _keep_linears(llm: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By name, input and output of the first call from now on of every linear that vLLM runs in a decoder layer."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def keep(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, Any]) -> None:
            found.setdefault(name, (arguments[0].detach().cpu().clone(), output[0].detach().cpu().clone()))

        module.register_forward_hook(keep)

    for name, module in model_of(llm).named_modules():
        if name.rpartition(".")[2] in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            watch(name, module)
    return found


def _write_generated(out: Path, log: Path, folder: Path, options: dict[str, Any], environment: dict[str, str]) -> None:
    """`options`: vllm.LLM's; "lora", the folder of an adapter; "linears", a file for what linears read and gave."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    from vllm.model_executor.models import registry

    # So that it need not be imported once more: nothing is forked from this process.
    registry._run_in_subprocess = lambda look: look()
    adapter = options.pop("lora", None)
    lora = None
    if adapter is not None:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("ours", 1, str(adapter))
    linears, kept = options.pop("linears", None), {}

    def watch(llm: Any) -> None:
        nonlocal kept
        kept = _keep_linears(llm)

    start = time.perf_counter()
    found = generate(folder, lora, watch if linears else None, **options)
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    if linears:
        torch.save(kept, linears)
    out.write_text(json.dumps([asdict(one) for one in found]))
