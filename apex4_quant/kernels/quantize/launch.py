"""Launching the activation quantizers on raw pointers: what cuda_ops.py and the checks on a GPU share. Knows no torch.

Operands and their shapes are those of the kernels' headers (cuda/quantize/quantize_rows.cu, cuda/quantize/quantize_dense.cu).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from ...format.number_format import BLOCK, CODE_MAX, round_up
from ..runtime import launcher
from ..runtime.launcher import Kernel, Launch
from .configs import (
    CLIP_CHUNKS,
    FEEDBACK_CHUNKS,
    FEEDBACKS,
    MATRIX_CHUNKS,
    TOKEN_FORMAT,
    QuantizePlan,
    board_bytes,
    choose_dense,
    choose_row_rms,
    choose_row_scales,
    choose_rows,
    choose_whole_rows,
    measuring_config,
)

VECTOR_BYTES = 16  # of the fast loads
VECTOR_ELEMENTS = 8
_int, _float = ctypes.c_int, ctypes.c_float


def most_between_bytes(m: int, k_blocks: int) -> int:
    """Enough for `Quantizer.between_bytes` of every quantizer of m rows."""
    return 4 * round_up(m, VECTOR_BYTES) * (1 + k_blocks)


def rows_are_aligned(k: int, *operands: tuple[int, int]) -> bool:
    """`operands`: (address, row stride in elements). Whether the kernels may load their rows 16 bytes at a time."""
    return k % VECTOR_ELEMENTS == 0 and all(
        address % VECTOR_BYTES == 0 and stride % VECTOR_ELEMENTS == 0 for address, stride in operands
    )


@dataclass(frozen=True)
class Quantizer:
    """What quantizes inputs of one shape: a kernel, and others before it where one does not have whole rows.

    `statistics` works out 1 / RMS for a dense transform, and adds if the quantizer does. To eight bits such a transform has two more: `measure`, and for many rows
    `row_scales`. What they tell each other is in `between_bytes` of memory, for each call its own; or, where `board_bytes` is
    not 0, on a board, which serves one call after the other.
    """

    launch: Launch
    dense: bool
    statistics: Launch | None = None
    board_bytes: int = 0
    between_bytes: int = 0
    statistics_bytes: int = 0  # of those, before what `measure` writes
    measure: Launch | None = None
    row_scales: Launch | None = None
    adds: bool = False

    def __call__(
        self, stream: int, codes: int, scales: int, x: int, second: int = 0, matrix: int = 0, between: int = 0,
        board: int = 0, residual: int = 0, total: int = 0,
    ) -> None:  # fmt: skip
        """Pointers, 0 where there is none: see `run_quantize`."""
        if self.statistics is not None and self.adds:
            self.statistics(stream, between, x, residual, total)
            x = total
        elif self.statistics is not None:
            self.statistics(stream, between, x)
        elif self.adds:
            self.launch(stream, codes, scales, x, second, residual, total)
            return
        if not self.dense:
            self.launch(stream, codes, scales, x, second)
            return
        given = between if self.statistics is not None else board if self.board_bytes else 0
        if self.measure is None:
            self.launch(stream, codes, scales, x, second, given, matrix)
            return
        block_absmax = between + self.statistics_bytes
        self.measure(stream, 0, block_absmax, x, second, given, matrix, 0)
        if self.row_scales is not None:
            self.row_scales(stream, scales, block_absmax)
            block_absmax = 0
        self.launch(stream, codes, scales, x, second, given, matrix, block_absmax)


def chunks_of_block(feedback: str) -> int:
    """16-byte units of a block's prepacked matrix and what is behind it; `feedback`: one of FEEDBACKS."""
    return MATRIX_CHUNKS + FEEDBACK_CHUNKS * bool(feedback) + CLIP_CHUNKS * (feedback == "feedback16")


class QuantizerShape(NamedTuple):
    """All that a quantizer depends on but pointers. `aligned`: see `rows_are_aligned`; the rest: `run_quantize`.

    A NamedTuple and no dataclass: it is made, hashed and compared in every call of an operator, in C.
    """

    device: int
    m: int  # at least 1
    k: int
    k_blocks: int
    m_stride: int
    ldx: int
    ld_second: int
    aligned: bool
    dtype: str
    format: str
    sm_count: int
    blocks_per_group: int = 1
    transform: str = "hadamard"
    clip: float = 1.0
    input: str = "plain"
    eps: float = 0.0
    gain_offset: bool = False
    matrix_is_shared: bool = False
    matrix_factor: float = 1.0
    programmatic: bool = False
    sm_90: bool = False  # of the GPU; the format s8 does not say it


def quantizer(shape: QuantizerShape) -> Quantizer:
    """Made once for a shape."""
    return _quantizer(launcher.kernel, shape)


@lru_cache(maxsize=4096)
def _quantizer(kernel: Callable[..., Kernel], shape: QuantizerShape) -> Quantizer:
    def bound(plan: QuantizePlan, pointers: int, *numbers: Any) -> Launch:
        config = plan.config
        made = kernel(config.source, config.entry, config.defines, shape.device)
        return made.bind(
            plan.grid, plan.block, pointers, numbers,
            shared_bytes=plan.shared_bytes, cluster=plan.cluster, programmatic=shape.programmatic,
        )  # fmt: skip

    m, k, k_blocks, m_stride, ldx, ld_second = shape[1:7]
    input, dtype, format, sm_count = shape.input, shape.dtype, shape.format, shape.sm_count
    scale_factor, eps, aligned = _float(shape.clip / CODE_MAX), _float(shape.eps), _int(shape.aligned)
    known = "none", "hadamard", "dense", *FEEDBACKS[1:]
    if shape.transform not in known:
        raise ValueError(f"transform {shape.transform!r} is none of {', '.join(known)}")
    feedback = shape.transform if shape.transform in FEEDBACKS[1:] else ""
    dense = bool(feedback) or shape.transform == "dense"
    adds = input == "add_rms_norm"
    if format == TOKEN_FORMAT and not dense:
        plan = choose_whole_rows(
            m, k_blocks,
            input=input, hadamard=shape.transform == "hadamard", aligned=shape.aligned, dtype=dtype, sm_count=sm_count,
            sm_90=shape.sm_90,
        )  # fmt: skip
        numbers_of_rows = m, k, k_blocks, m_stride, ldx, ld_second, plan.rows_log2, plan.blocks_per_cta
        how = eps, _float(1 / k), _int(shape.gain_offset), aligned
        return Quantizer(bound(plan, 6 if adds else 4, *map(_int, numbers_of_rows), *how), dense=False, adds=adds)
    if not dense:
        plan = choose_rows(
            m, k_blocks, shape.blocks_per_group,
            input=input, hadamard=shape.transform == "hadamard", dtype=dtype, format=format, sm_count=sm_count,
        )  # fmt: skip
        integers = m, k, k_blocks, shape.blocks_per_group, m_stride, ldx, ld_second, plan.rows_log2, plan.blocks_per_cta
        behind = scale_factor, eps, _float(1 / k), _int(shape.gain_offset), aligned
        return Quantizer(bound(plan, 6 if adds else 4, *map(_int, integers), *behind), dense=False, adds=adds)
    if shape.blocks_per_group != 1 and format != TOKEN_FORMAT:
        raise ValueError(f"a dense transform needs groups of {BLOCK}, not {shape.blocks_per_group * BLOCK}")
    statistics = None
    eight_bit = format == TOKEN_FORMAT
    if feedback and (eight_bit or (shape.matrix_is_shared and k_blocks > 1)):
        raise ValueError("error feedback is for 4-bit activations, and each block has its own")
    if feedback == "feedback16" and shape.clip != 1:
        raise ValueError("with sixteen levels each block has its own clip ratio, behind its feedback")
    plan = choose_dense(
        m, k_blocks,
        input=input, aligned=shape.aligned, dtype=dtype, format=format, sm_count=sm_count, sm_90=shape.sm_90,
        feedback=feedback,
    )  # fmt: skip
    if plan.needs_statistics:
        strides = (ldx, ld_second) if adds else (ldx,)
        numbers = *map(_int, (m, k, *strides)), eps, aligned
        statistics = bound(choose_row_rms(m, dtype=dtype, adds=adds), 4 if adds else 2, *numbers)
    if adds:  # what follows reads the sum
        ldx, ld_second = k, 0
    statistics_bytes = 4 * round_up(m, VECTOR_BYTES) if plan.needs_statistics else 0
    matrix_stride = 0 if shape.matrix_is_shared else chunks_of_block(feedback)
    numbers = (
        *map(_int, (m, k, m_stride, ldx, ld_second, plan.rows_per_cta, matrix_stride)),
        _float(shape.matrix_factor), scale_factor, eps, _int(shape.gain_offset), aligned,
    )  # fmt: skip
    if not eight_bit:
        board = board_bytes(m) if plan.needs_board else 0
        return Quantizer(bound(plan, 6, *numbers), True, statistics, board, statistics_bytes, adds=adds)
    row_scales = None
    if plan.needs_row_scales:
        row_scales = bound(choose_row_scales(m), 2, *map(_int, (k_blocks, m, m_stride)))
    measure = bound(replace(plan, config=measuring_config(plan.config)), 7, *numbers)
    return Quantizer(
        bound(plan, 7, *numbers), True, statistics, 0, statistics_bytes + 4 * k_blocks * m_stride, statistics_bytes,
        measure, row_scales, adds,
    )  # fmt: skip


def run_quantize(
    device: int,
    *,
    codes: int,
    scales: int,
    x: int,
    m: int,
    k: int,
    ldx: int,
    stream: int,
    input: str = "plain",
    second: int = 0,
    ld_second: int = 0,
    matrix: int = 0,
    between: int = 0,
    board: int = 0,
    residual: int = 0,
    total: int = 0,
    **how: Any,
) -> None:
    """Quantize m rows of x into `codes` and `scales`. Pointers are integers; dtype is "float16" or "bfloat16".

    transform: "none", "hadamard", or "dense", "feedback" and "feedback16", which need the prepacked `matrix` ("dense": one for all blocks, times
    `matrix_factor`, if matrix_is_shared) and memory: `most_between_bytes(m, k_blocks)` at `between`, for this call alone, and, with
    input "rms_norm", `board_bytes(m)` at `board`, zeros before the first call and then for one call after the other.
    input: "plain"; "rms_norm", with the gain at `second`; "silu_mul", x being the gate and `second` the other half;
    "add_rms_norm", with the gain at `second`, the `residual`, whose row stride is ld_second, and room for the sum at `total`; with a
    dense transform where configs.dense_adds says so.
    `how`: what else `QuantizerShape` has.
    """
    if m == 0:
        return
    operands = [(x, ldx)]
    if input != "plain":
        operands.append((second, ld_second if input == "silu_mul" else 0))
    if input == "add_rms_norm":
        operands += [(residual, ld_second), (total, k)]
    aligned = rows_are_aligned(k, *operands)
    shape = QuantizerShape(device, m=m, k=k, ldx=ldx, ld_second=ld_second, aligned=aligned, input=input, **how)
    run = quantizer(shape)
    run(stream, codes, scales, x, second, matrix, between, board, residual, total)
