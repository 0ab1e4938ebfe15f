"""Speculative decoding: tokens are guessed from what stands in front of them, and checked. The same come out.

In a file behind the others that start an engine: vLLM then imports numba, and with that in the process vLLM 0.32 for CPUs cannot
start an engine that compiles (its search for Triton kernels stops at an object of llvmlite).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def test_guessed_tokens_change_nothing(
    quantized: Callable[..., Path], serve_here: Callable[..., Any], require_equal: Callable[..., None]
) -> None:
    folder = quantized("demo", "gptq")
    require_equal(serve_here(folder, speculative_config=NGRAM), folder)
