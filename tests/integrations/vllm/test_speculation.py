"""Speculative decoding: tokens are guessed from what stands in front of them, and checked. The same come out.

In a process of its own: vLLM then imports numba, and where that was imported before, vLLM 0.32 for CPUs cannot start an engine
that compiles (its search for Triton kernels stops at an object of llvmlite).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .generating import generate_apart

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def test_guessed_tokens_change_nothing(
    quantized: Callable[..., Path], require_equal: Callable[..., None], tmp_path: Path
) -> None:
    folder = quantized("demo", "gptq")
    require_equal(generate_apart(tmp_path / "generated.json", folder, speculative_config=NGRAM), folder)
