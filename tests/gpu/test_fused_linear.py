"""The operators that quantize and multiply in one call.

They must give what the quantizer and the GEMM give one after the other, bit for bit, with the same plan of the GEMM; those are
checked against the float64 reference. For few tokens on Hopper this is another kernel, which quantizes in shared memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apex4_quant.format.layouts import get_layout
from apex4_quant.format.number_format import BLOCK, CODE_MAX, round_up
from apex4_quant.kernels import ops
from apex4_quant.kernels.gemm import fused_linear

EPS = 1e-5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# m, n, k: ragged in all three, one block, several rounds of a thread block, tiles that share a thread block, clusters.
SHAPES = (
    (1, 64, 128), (1, 4096, 4096), (1, 6144, 4096), (1, 4096, 14336), (1, 8192, 28672), (1, 200, 1000), (1, 9, 8192),
    (2, 28672, 4096), (2, 1000, 333), (3, 4096, 4096), (3, 200, 584), (3, 10240, 8192), (3, 4096, 14336), (3, 8, 200), (4, 8, 200),
    (5, 512, 512), (16, 512, 1024), (100, 200, 1000),
)  # fmt: skip


def _inputs(m: int, k: int, input: str, dtype: torch.dtype, generator: torch.Generator, padding: int) -> tuple:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    x = normal(m, k + padding)[:, padding // 2 : padding // 2 + k]
    if input == "rms_norm":
        return x, normal(k) + 1, EPS, 0.0
    return (x, normal(m, k + padding)[:, :k]) if input == "silu_mul" else (x,)


OPERATORS = {
    "plain": (ops.quantize, ops.linear),
    "rms_norm": (ops.rms_norm_quantize, ops.rms_norm_linear),
    "silu_mul": (ops.silu_mul_quantize, ops.silu_mul_linear),
}


def format_of(sm: int) -> str:
    return "sm90" if sm == 90 else "sm80"


def _check(
    format: str, generator: torch.Generator, *, m: int, n: int, k: int, input: str, dtype: torch.dtype, padding: int = 0,
    clip: float = 1.0, damage: float | None = None, hadamard: bool = True,
) -> None:  # fmt: skip
    layout, padded = get_layout(format), round_up(k, BLOCK)
    codes = torch.randint(-CODE_MAX, CODE_MAX + 1, (n, padded), generator=generator, device="cuda", dtype=torch.int8)
    scale = (torch.rand(n, padded // BLOCK, generator=generator, device="cuda") * 0.01 + 1e-4).half()
    weights = layout.pack(codes), layout.pack_scales(scale)
    bias = torch.randn(n, generator=generator, device="cuda") if n % 3 else None
    inputs = _inputs(m, k, input, dtype, generator, padding)
    if damage is not None:
        inputs[0][m // 2, k // 3] = damage
    how = (None, padded, BLOCK, clip, hadamard, format)
    quantize, linear = OPERATORS[input]
    plans = [None]
    if format == "sm90" and m <= fused_linear.MOST_TOKENS:
        plans = ["sm90_m8n64s10/1", "sm90_m8n64s10/2"]
    for plan in plans:
        before = os.environ.pop("APEX4_GEMM", None)
        if plan:
            os.environ["APEX4_GEMM"] = plan
        try:
            poisoned = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
            del poisoned  # what the operators write to next
            y = linear(*inputs, *weights, None, bias, n, *how)
            expected = ops.gemm(*quantize(*inputs, *how), *weights, None, bias, m, n, dtype)
        finally:
            os.environ.pop("APEX4_GEMM", None)
            if before is not None:
                os.environ["APEX4_GEMM"] = before
        same = (y == expected) | (y.isnan() & expected.isnan())
        assert same.all(), (
            f"{plan}: {int((~same).sum())} of {y.numel()} outputs differ, by up to {(y - expected).abs().max()}"
        )
        if damage is None:
            assert y.isfinite().all()
        else:
            assert y[m // 2].isnan().any() and y[: m // 2].isfinite().all(), "damage reaches its own token"


def _check_replay(format: str, generator: torch.Generator) -> None:
    """A chain of linears, each on the results of the one before, in a CUDA graph: replayed, it gives what eager calls give."""
    k = 2048
    layout = get_layout(format)
    codes = torch.randint(-CODE_MAX, CODE_MAX + 1, (k, k), generator=generator, device="cuda", dtype=torch.int8)
    weights = layout.pack(codes), layout.pack_scales(torch.full((k, k // BLOCK), 0.002, device="cuda").half())
    gain = torch.ones(k, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, k, generator=generator, device="cuda").bfloat16()
    how = (None, k, BLOCK, 1.0, True, format)

    def chain(y: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            z = ops.rms_norm_linear(y, gain, EPS, 0.0, *weights, None, None, k, *how)
            y = ops.silu_mul_linear(z, y, *weights, None, None, k, *how)
            y = ops.linear(y, *weights, None, None, k, *how)
        return y

    expected = chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected), "a replay differs"


def shapes(_: int, __: pytest.Config) -> dict[str, dict[str, Any]]:
    return {
        f"{input} {name} {m} x {n} x {k}": {"input": input, "dtype": dtype, "m": m, "n": n, "k": k}
        for input in OPERATORS
        for name, dtype in DTYPES.items()
        for m, n, k in SHAPES
    }


def one_shape(**more: Any) -> Callable[[int, pytest.Config], dict[str, dict[str, Any]]]:
    return lambda *_: {
        f"{input} {name} {m} rows": {"input": input, "dtype": dtype, "m": m, "n": 328, "k": 1000} | more
        for input in OPERATORS
        for name, dtype in DTYPES.items()
        for m in (1, 3)
    }


CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_shapes": shapes,
    "test_rows_of_a_wider_tensor": one_shape(padding=8, clip=0.9),
    "test_unaligned_rows": one_shape(padding=6),
    "test_extremes": one_shape(damage=float("nan")),
    "test_no_transform": one_shape(hadamard=False),
}


def test_shapes(case: dict[str, Any], gpu: Any) -> None:
    _check(format_of(gpu.sm), gpu.generator, **case)


def test_rows_of_a_wider_tensor(case: dict[str, Any], gpu: Any) -> None:
    _check(format_of(gpu.sm), gpu.generator, **case)


def test_unaligned_rows(case: dict[str, Any], gpu: Any) -> None:
    _check(format_of(gpu.sm), gpu.generator, **case)


def test_extremes(case: dict[str, Any], gpu: Any) -> None:
    _check(format_of(gpu.sm), gpu.generator, **case)


def test_no_transform(case: dict[str, Any], gpu: Any) -> None:
    _check(format_of(gpu.sm), gpu.generator, **case)


def test_a_chain_replayed_in_a_graph(gpu: Any) -> None:
    _check_replay(format_of(gpu.sm), gpu.generator)
