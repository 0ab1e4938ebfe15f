"""Linears of few tokens and 8-bit activations that are one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apex4_quant.kernels.gemm.fused_linear import FUSED_INPUTS_S8, MOST_TOKENS_S8

from ..kernel_cases import fused_s8

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# m, n, k: ragged in all three, one block, all passes of a thread block, tiles that share a thread block, half of a row's blocks.
SHAPES = (
    (1, 64, 128), (1, 4096, 4096), (1, 4096, 14336), (1, 200, 1000), (1, 9, 8192), (1, 72, 16384), (1, 200, 584), (1, 8, 200),
    (MOST_TOKENS_S8, 28672, 4096), (MOST_TOKENS_S8, 1000, 333), (MOST_TOKENS_S8, 10240, 8192),
)  # fmt: skip


def _listed(cases: dict[str, dict[str, Any]]) -> Callable[[int, pytest.Config], dict[str, dict[str, Any]]]:
    return lambda sm, _: cases if sm == 90 else {}


def _one_shape(**more: Any) -> Callable[[int, pytest.Config], dict[str, dict[str, Any]]]:
    return _listed(
        {
            f"{input} {name} {m} rows": {"input": input, "dtype": dtype, "m": m, "n": 328, "k": 1000} | more
            for input in FUSED_INPUTS_S8
            for name, dtype in DTYPES.items()
            for m in (1, MOST_TOKENS_S8)
        }
    )


CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_shapes": _listed(
        {
            f"{input} {name} {m} x {n} x {k}": {"input": input, "dtype": dtype, "m": m, "n": n, "k": k}
            for input in FUSED_INPUTS_S8
            for name, dtype in DTYPES.items()
            for m, n, k in SHAPES
        }
    ),
    "test_rows_of_a_wider_tensor": _one_shape(padding=16),
    "test_unaligned_rows": _one_shape(padding=6),
    "test_damage": _one_shape(damage=float("nan")),
}


def test_shapes(case: dict[str, Any], gpu: Any) -> None:
    fused_s8.check(gpu.generator, **case)


def test_rows_of_a_wider_tensor(case: dict[str, Any], gpu: Any) -> None:
    fused_s8.check(gpu.generator, **case)


def test_unaligned_rows(case: dict[str, Any], gpu: Any) -> None:
    fused_s8.check(gpu.generator, **case)


def test_damage(case: dict[str, Any], gpu: Any) -> None:
    """NaN in an input makes its token's outputs NaN, and no other's."""
    fused_s8.check(gpu.generator, **case)
