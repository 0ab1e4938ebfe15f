"""vLLM over two GPUs: what tensor, pipeline and expert parallel ranks generate has the probabilities that transformers gives it.

By the measure of test_one_gpu.py. With 4-bit activations, whose groups no rank cuts, and in a pipeline, ranks compute what one does but
for the order of sums. With 8 bits each has a scale of its own for its part of a token, so that `o_proj` and `down_proj` get other codes:
that moves logprobs as far as the roundings in front of them do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .generating import generate_apart
from .probabilities import COMPILED, SMALL, on_gpu, require_near

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
EXPERTS = TENSOR | {"enable_expert_parallel": True}
PIPELINE: dict[str, Any] = {"pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("name", "recipe", "bits", "dtype", "options"),
    [
        ("demo", "rtn", 4, "float16", TENSOR | COMPILED),
        ("demo", "apex4", 8, "bfloat16", PIPELINE | COMPILED),
        ("mixtral", "rtn", 4, "float16", EXPERTS | COMPILED),
        ("demo", "apex4", 8, "bfloat16", TENSOR | COMPILED),
        ("qwen3moe", "apex4", 8, "float16", EXPERTS | COMPILED),
        ("mixtral", "apex4-fast", 8, "float16", TENSOR | COMPILED),
        ("llama", "apex4", 4, "bfloat16", TENSOR),
        ("llama", "apex4", 4, "bfloat16", PIPELINE),
    ],
    ids=[
        "tensor-4", "pipeline-8", "experts-4", "tensor-8", "experts-8", "experts-cut-8", "tensor-eager-4",
        "pipeline-eager-4",
    ],
)  # fmt: skip
def test_two_gpus(
    name: str, recipe: str, bits: int, dtype: str, options: dict[str, Any],
    original: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:  # fmt: skip
    monkeypatch.setenv("APEX4_ACTIVATIONS", str(bits))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # as under `vllm serve`
    folder = quantized(name, recipe, layout="sm90")
    generated = generate_apart(tmp_path / "generated.json", folder, dtype=dtype, **SMALL | options)
    require_near(generated, on_gpu(folder, dtype), original(name), dtype, record_property)
