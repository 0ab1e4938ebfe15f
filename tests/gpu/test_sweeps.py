"""What quantizes weights: GPTQ's rounding and descent on its codes by kernels, Hessians of 16-bit inputs on tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..kernel_cases import sweeps

CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_kernels_do_what_operations_of_pytorch_do": lambda *_: {
        f"{n} x {k} group {group}": (n, k, group) for n, k, group in sweeps.SHAPES
    },
    "test_kernels_round_to_a_grid_as_operations_of_pytorch_do": lambda *_: {
        f"{n} x {k} group {group}": (n, k, group) for n, k, group in sweeps.SHAPES
    },
    "test_hessian": lambda *_: {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)},
}


def test_kernels_do_what_operations_of_pytorch_do(case: tuple[int, int, Any], gpu: Any) -> None:
    sweeps.check(*case, gpu.device, gpu.seed)


def test_kernels_round_to_a_grid_as_operations_of_pytorch_do(case: tuple[int, int, Any], gpu: Any) -> None:
    sweeps.check(*case, gpu.device, gpu.seed, bits=8)


def test_hessian(case: torch.dtype, gpu: Any) -> None:
    sweeps.check_hessian(case, gpu.device, gpu.seed)
