"""Launching the activation quantizers on raw pointers: what ops.py and the checks on a GPU share. Knows no torch.

Operands and their shapes are those of the kernels' headers (cuda/quantize_rows.cu, cuda/quantize_dense.cu).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..number_format import BLOCK, CODE_MAX
from . import launcher
from .quantize_configs import (
    MATRIX_CHUNKS,
    QuantizeConfig,
    QuantizePlan,
    choose_dense,
    choose_row_rms,
    choose_rows,
)

VECTOR_BYTES = 16  # of the fast loads
VECTOR_ELEMENTS = 8
_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


def rows_are_aligned(k: int, *operands: tuple[int, int]) -> bool:
    """`operands`: (address, row stride in elements). Whether the kernels may load their rows 16 bytes at a time."""
    return k % VECTOR_ELEMENTS == 0 and all(
        address % VECTOR_BYTES == 0 and stride % VECTOR_ELEMENTS == 0 for address, stride in operands
    )


def run_quantize(
    device: int,
    *,
    codes: int,
    scales: int,
    x: int,
    m: int,
    k: int,
    k_blocks: int,
    m_stride: int,
    ldx: int,
    dtype: str,
    format: str,
    stream: int,
    sm_count: int,
    blocks_per_group: int = 1,
    transform: str = "hadamard",
    clip: float = 1.0,
    input: str = "plain",
    second: int = 0,
    ld_second: int = 0,
    eps: float = 0.0,
    gain_offset: bool = False,
    matrix: int = 0,
    inverse_rms: int = 0,
    matrix_is_shared: bool = False,
    matrix_factor: float = 1.0,
    programmatic: bool = False,
) -> None:
    """Quantize m rows of x into `codes` and `scales`. Pointers are integers; dtype is "float16" or "bfloat16".

    transform: "none", "hadamard", or "dense", which needs the prepacked `matrix` (one for all blocks, times
    `matrix_factor`, if matrix_is_shared) and, with input "rms_norm", float32 [m] of scratch memory at `inverse_rms`.
    input: "plain"; "rms_norm", with the gain at `second`; "silu_mul", x being the gate and `second` the other half.
    """
    if m == 0:
        return
    operands = [(x, ldx)]
    if input != "plain":
        operands.append((second, ld_second if input == "silu_mul" else 0))
    aligned = rows_are_aligned(k, *operands)
    shape = {"dtype": dtype, "format": format, "sm_count": sm_count, "input": input}
    if transform == "dense":
        if blocks_per_group != 1:
            raise ValueError(f"a dense transform needs groups of {BLOCK}, not {blocks_per_group * BLOCK}")
        if input == "rms_norm":
            statistics = choose_row_rms(m, dtype=dtype)
            args = (_pointer(inverse_rms), _pointer(x), _int(m), _int(k), _int(ldx), _float(eps), _int(aligned))
            _launch(device, statistics, args, stream, programmatic)
        plan = choose_dense(m, k_blocks, aligned=aligned, **shape)
        args = (
            *(_pointer(address) for address in (codes, scales, x, second, inverse_rms, matrix)),
            *(_int(number) for number in (m, k, m_stride, ldx, ld_second, plan.rows_per_cta)),
            _int(0 if matrix_is_shared else MATRIX_CHUNKS),
            _float(matrix_factor),
            _float(clip / CODE_MAX),
            _int(gain_offset),
            _int(aligned),
        )  # fmt: skip
    else:
        if transform not in ("none", "hadamard"):
            raise ValueError(f"transform {transform!r} is not none, hadamard or dense")
        plan = choose_rows(m, k_blocks, blocks_per_group, hadamard=transform == "hadamard", **shape)
        integers = (m, k, k_blocks, blocks_per_group, m_stride, ldx, ld_second, plan.rows_log2, plan.blocks_per_cta)
        args = (
            _pointer(codes),
            _pointer(scales),
            _pointer(x),
            _pointer(second),
            *_row_arguments(integers, clip / CODE_MAX, eps, gain_offset, aligned),
        )
    _launch(device, plan, args, stream, programmatic)


@lru_cache(maxsize=4096)
def _row_arguments(
    integers: tuple[int, ...], clip_over_7: float, eps: float, gain_offset: bool, aligned: bool
) -> tuple[Any, ...]:
    """What follows the pointers: the same for every call with one shape, and never written to."""
    return (*map(_int, integers), _float(clip_over_7), _float(eps), _int(gain_offset), _int(aligned))


@lru_cache(maxsize=256)
def _kernel(make: Callable[..., Any], config: QuantizeConfig, device: int) -> Any:
    return make(config.source, config.entry, config.defines, device)


def _launch(device: int, plan: QuantizePlan, args: tuple, stream: int, programmatic: bool) -> None:
    kernel = _kernel(launcher.kernel, plan.config, device)
    kernel.launch(
        plan.grid,
        plan.block,
        args,
        shared_bytes=plan.shared_bytes,
        cluster=plan.cluster,
        stream=stream,
        programmatic=programmatic,
    )
