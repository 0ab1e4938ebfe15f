"""The operators on a GPU: which kernels a call launches, with which pointers. Signatures are the schemas of ops.py.

A model's linears come here thousands of times a second, and while Python works a GPU with little to do waits. So what depends on
shapes alone is worked out once and found by its key: what was checked of the operands (operands.py), the quantizer
(quantize/launch.py), the GEMM's plan and its launch.
"""

from __future__ import annotations

from ctypes import c_int
from functools import lru_cache
from typing import Any

import torch

from ..errors import Apex4Error
from ..format.number_format import BLOCK
from ..private_names import current_cuda_stream
from . import cpu_ops
from .activation_quantization import OperatorNumbers
from .gemm.configs import GemmPlan, PlanSource, choose_gemm, plan_source
from .gemm.eight_bit import EightBitPlan, choose_eight_bit_gemm
from .gemm.fused_linear import FUSED_INPUTS, FUSED_INPUTS_S8, MOST_TOKENS, MOST_TOKENS_S8, FusedShape, fused_launch
from .operands import (
    GROUPED_FORMATS,
    ROW_BYTES,
    TOKEN_FORMAT,
    Operands,
    empty_operands,
    feedback_of_matrix,
    require_add_rms_norm_linear,
    require_gemm,
    require_quantizer,
    require_weights,
    row_stride,
)
from .quantize.configs import FEW_ROWS, FORMATS, LONG_BLOCKS, dense_adds, product_is_faster, token_adds
from .quantize.hadamard_product import signs
from .quantize.launch import Quantizer, QuantizerShape, quantizer, rows_are_aligned
from .runtime import launcher, workspace
from .runtime.launcher import Launch

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@lru_cache(maxsize=64)
def gpu(index: int) -> tuple[int, int]:
    """sm and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def prepare(device: torch.device) -> None:
    """Make what the operators find ready on a GPU, so that a CUDA graph may be captured first. Not during a capture."""
    workspace.prepare(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if gpu(index)[0] >= 90:
        for dtype in _NAMES:
            signs(index, dtype)


class _Source:
    """What a quantizer reads: x [M, K] with its rows in one piece each; `second`: the gain, or up [M, K].

    "add_rms_norm": x + `residual`, which it stores in `total` [M, K].
    """

    def __init__(
        self,
        input: str,
        x: torch.Tensor,
        second: torch.Tensor | None = None,
        eps: float = 0.0,
        gain_offset: bool = False,
        residual: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
    ) -> None:
        self.input, self.eps, self.gain_offset = input, eps, gain_offset
        self.x = x = _with_dense_rows(x)
        self.ld_second = 0
        if second is not None and input == "silu_mul":
            second = _with_dense_rows(second)
            self.ld_second = second.stride(0)
        self.second = second
        operands = [(x.data_ptr(), x.stride(0))]
        if second is not None:
            operands.append((second.data_ptr(), self.ld_second))
        self.sums = 0, 0
        if residual is not None and total is not None:
            self.residual = residual = _with_dense_rows(residual)
            self.ld_second = residual.stride(0)
            self.sums = residual.data_ptr(), total.data_ptr()
            operands += [(self.sums[0], self.ld_second), (self.sums[1], total.stride(0))]
        self.aligned = rows_are_aligned(x.shape[1], *operands)

    def quantizer(
        self, matrix: torch.Tensor | None, k_padded: int, group: int, clip: float, hadamard: bool, format: str
    ) -> tuple[Quantizer, torch.Tensor | None]:
        """And the matrix that it reads: `matrix`, or the Hadamard matrix where that is the faster way."""
        x, factor = self.x, 1.0
        index, (m, k) = x.device.index, x.shape
        sm, sm_count = gpu(index)
        if format not in FORMATS:
            raise Apex4Error(
                f"there is no kernel that quantizes to the format {format} for sm_{sm}: quantize with 4-bit activations, or set "
                "APEX4_KERNEL=reference"
            )
        if matrix is None and hadamard and group == BLOCK and m > FEW_ROWS and product_is_faster(
            m, k_padded // BLOCK, input=self.input, aligned=self.aligned, format=format, sm_count=sm_count
        ):  # fmt: skip
            matrix, factor = signs(index, x.dtype), BLOCK**-0.5
        shape = QuantizerShape(
            index, m, k, k_padded // BLOCK, row_stride(m), x.stride(0), self.ld_second, self.aligned, _NAMES[x.dtype], format,
            sm_count, group // BLOCK, _transform(matrix, hadamard), clip, self.input,
            self.eps, self.gain_offset, matrix is not None and len(matrix) == 1, factor, _is_programmatic(sm, format),
            sm == 90,
        )  # fmt: skip
        return quantizer(shape), matrix

    def fused(self, n: int, k_padded: int, group: int, clip: float, hadamard: bool, format: str) -> Launch | None:
        """The kernel that quantizes and multiplies, where the shape gets it. `group`: of the weights."""
        x = self.x
        eight_bit = format == TOKEN_FORMAT
        if (
            x.shape[0] > (MOST_TOKENS_S8 if eight_bit else MOST_TOKENS)
            or self.input not in (FUSED_INPUTS_S8 if eight_bit else FUSED_INPUTS)
            or format not in ("sm90", TOKEN_FORMAT)
            or group != BLOCK
            or not hadamard
        ):
            return None
        index = x.device.index
        shape = FusedShape(
            index, *gpu(index), x.shape[0], n, x.shape[1], k_padded // BLOCK, x.stride(0), self.ld_second, self.aligned,
            _NAMES[x.dtype], self.input, clip, plan_source(), 8 if eight_bit else 4, self.eps, self.gain_offset,
        )  # fmt: skip
        return fused_launch(launcher.kernel, shape)


def _quantize(source: _Source, matrix: torch.Tensor | None, *how: *OperatorNumbers) -> Operands:
    x = source.x
    codes, scales = empty_operands(x, matrix, *how)
    if x.shape[0]:
        run, matrix = source.quantizer(matrix, *how)
        between = torch.empty(run.between_bytes, dtype=torch.uint8, device=x.device) if run.between_bytes else None
        stream = current_cuda_stream(x.device.index)
        run(
            stream, codes.data_ptr(), scales.data_ptr(), x.data_ptr(), _address(source.second), _address(matrix),
            _address(between), _board(run, x.device.index, stream),
        )  # fmt: skip
    return codes, scales


def _linear(
    source: _Source, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None, bias: torch.Tensor | None, n: int,
    matrix: torch.Tensor | None, *how: *OperatorNumbers,
) -> torch.Tensor:  # fmt: skip
    """As `_quantize` and `_multiply`, in one kernel or with one piece of memory for all that is gone afterwards."""
    x = source.x
    m, device = x.shape[0], x.device
    y = torch.empty((m, n), dtype=x.dtype, device=device)
    if m == 0:
        return y
    stream = current_cuda_stream(device.index)
    k_padded, group, clip, hadamard, format = how
    of_weights = k_padded // scale.shape[1]
    fused = source.fused(n, k_padded, of_weights, clip, hadamard, format) if matrix is None else None
    if fused is not None:
        weights = [packed.data_ptr(), scale.data_ptr(), *([] if unit is None else [unit.data_ptr()])]
        sums = source.sums if source.input == "add_rms_norm" else ()
        fused(stream, y.data_ptr(), x.data_ptr(), _address(source.second), *weights, _address(bias), *sums)
        return y
    m_stride = row_stride(m)
    code_bytes = k_padded // BLOCK * m_stride * ROW_BYTES[format]
    scale_bytes = 4 * (k_padded // group) * m_stride
    # Codes of whole blocks and scales of 16 rows each are multiples of 64 bytes: what follows them is aligned.
    run, matrix = source.quantizer(matrix, *how)
    memory = torch.empty(code_bytes + scale_bytes + run.between_bytes, dtype=torch.uint8, device=device)
    codes = memory.data_ptr()
    scales = codes + code_bytes
    run(
        stream, codes, scales, x.data_ptr(), _address(source.second), _address(matrix), scales + scale_bytes,
        _board(run, device.index, stream), *source.sums,
    )  # fmt: skip
    _multiply(y, codes, scales, packed, scale, unit, bias, k_padded // BLOCK, m_stride, stream)
    return y


def _transform(matrix: torch.Tensor | None, hadamard: bool) -> str:
    """As a `QuantizerShape` has it."""
    if matrix is None:
        return "hadamard" if hadamard else "none"
    return feedback_of_matrix(matrix) or "dense"


def _is_programmatic(sm: int, format: str) -> bool:
    """Whether a kernel may start before the one in front of it has ended."""
    return format == "sm90" or (format == TOKEN_FORMAT and sm >= 90)


def _board(run: Quantizer, index: int, stream: int) -> int:
    return workspace.board(index, stream, run.board_bytes).data_ptr() if run.board_bytes else 0


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _by_torch(matrix: torch.Tensor | None) -> bool:
    """Whether PyTorch operations quantize: kernels read a prepacked matrix, and have one for groups of 128 only.

    That linears have wider groups the user was told as the model was prepared (dispatch.warn_of_wide_groups).
    """
    return matrix is not None and matrix.dim() == 3


@lru_cache(maxsize=4096)
def _gemm_launch(
    index: int,
    m: int,
    n: int,
    k_blocks: int,
    blocks_per_group: int,
    m_stride: int,
    out: torch.dtype,
    source: PlanSource,
    eight_bit: bool,
) -> tuple[GemmPlan | EightBitPlan, Launch, int]:
    """The plan, its kernel with all but the pointers, and the bytes for its partial sums."""
    plan: GemmPlan | EightBitPlan
    if eight_bit:
        plan = chosen = choose_eight_bit_gemm(*gpu(index), m, n, k_blocks, blocks_per_group, _SHORT_NAMES[out], source)
        pointers, programmatic, words = 9, chosen.programmatic, chosen.workspace_words
    else:
        plan = four = choose_gemm(*gpu(index), m, n, k_blocks, blocks_per_group, _SHORT_NAMES[out], source=source)
        pointers, programmatic, words = 8, four.config.family == "sm90", four.workspace_floats
    kernel = launcher.kernel(plan.config.source, plan.config.entry, plan.config.defines, index)
    numbers = (m, n, k_blocks, blocks_per_group, m_stride, n, *plan.arguments)
    launch = kernel.bind(
        plan.grid, plan.block, pointers, [c_int(number) for number in numbers],
        shared_bytes=plan.config.shared_bytes, cluster=plan.cluster, programmatic=programmatic,
    )  # fmt: skip
    return plan, launch, 4 * words


def _multiply(
    y: torch.Tensor, codes: int, scales: int, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, k_blocks: int, m_stride: int, stream: int,
) -> None:  # fmt: skip
    """y [m, n] = the product. `codes` and `scales` are addresses."""
    (m, n), device = y.shape, y.device
    blocks_per_group = k_blocks // scale.shape[1]
    plan, launch, workspace_bytes = _gemm_launch(
        device.index, m, n, k_blocks, blocks_per_group, m_stride, y.dtype, plan_source(), unit is not None
    )
    partial = counter = 0
    if plan.parts > 1:
        # Not kept: what it holds is read by this kernel alone, and the allocator orders its reuse by the stream.
        sums = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        partial = sums.data_ptr()
        counter = workspace.counters(device.index, stream, 4 * plan.counters).data_ptr()
    weights = [packed.data_ptr(), scale.data_ptr()]
    if unit is not None:
        weights.append(unit.data_ptr())
    launch(stream, y.data_ptr(), codes, scales, *weights, _address(bias), partial, counter)


# ---- the operators ---------------------------------------------------------------------------------------------------


def quantize(x: torch.Tensor, matrix: torch.Tensor | None, *how: *OperatorNumbers) -> Operands:
    if _by_torch(matrix):
        return cpu_ops.quantize(x, matrix, *how)
    require_quantizer("quantize", True, x, matrix, *how)
    return _quantize(_Source("plain", x), matrix, *how)


def rms_norm_quantize(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    gain_offset: float,
    matrix: torch.Tensor | None,
    *how: *OperatorNumbers,
) -> Operands:
    if _by_torch(matrix):
        return cpu_ops.rms_norm_quantize(x, gain, eps, gain_offset, matrix, *how)
    require_quantizer("rms_norm_quantize", True, x, matrix, *how, gain=gain)
    return _quantize(_Source("rms_norm", x, gain, eps, bool(gain_offset)), matrix, *how)


def silu_mul_quantize(
    gate: torch.Tensor, up: torch.Tensor, matrix: torch.Tensor | None, *how: *OperatorNumbers
) -> Operands:
    if _by_torch(matrix):
        return cpu_ops.silu_mul_quantize(gate, up, matrix, *how)
    require_quantizer("silu_mul_quantize", True, gate, matrix, *how, up=up)
    return _quantize(_Source("silu_mul", gate, up), matrix, *how)


def gemm(
    codes: torch.Tensor, scales: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, m: int, n: int, out: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    require_gemm("gemm", codes, scales, packed, scale, unit, bias, m, n)
    y = torch.empty(m, n, dtype=out, device=codes.device)
    if m:
        k_blocks, m_stride, _ = codes.shape
        _multiply(
            y, codes.data_ptr(), scales.data_ptr(), packed, scale, unit, bias, k_blocks, m_stride,
            current_cuda_stream(codes.device.index),
        )  # fmt: skip
    return y


def linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None, bias: torch.Tensor | None, n: int,
    matrix: torch.Tensor | None, *how: *OperatorNumbers,
) -> torch.Tensor:  # fmt: skip
    if _by_torch(matrix):
        return gemm(*cpu_ops.quantize(x, matrix, *how), packed, scale, unit, bias, x.shape[0], n, x.dtype)
    require_quantizer("linear", True, x, matrix, *how)
    require_weights("linear", x, packed, scale, unit, bias, n, matrix, *how)
    return _linear(_Source("plain", x), packed, scale, unit, bias, n, matrix, *how)


def rms_norm_linear(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, packed: torch.Tensor, scale: torch.Tensor,
    unit: torch.Tensor | None, bias: torch.Tensor | None, n: int, matrix: torch.Tensor | None, *how: *OperatorNumbers,
) -> torch.Tensor:  # fmt: skip
    if _by_torch(matrix):
        operands = cpu_ops.rms_norm_quantize(x, gain, eps, gain_offset, matrix, *how)
        return gemm(*operands, packed, scale, unit, bias, x.shape[0], n, x.dtype)
    require_quantizer("rms_norm_linear", True, x, matrix, *how, gain=gain)
    require_weights("rms_norm_linear", x, packed, scale, unit, bias, n, matrix, *how)
    source = _Source("rms_norm", x, gain, eps, bool(gain_offset))
    return _linear(source, packed, scale, unit, bias, n, matrix, *how)


def silu_mul_linear(
    gate: torch.Tensor, up: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, n: int, matrix: torch.Tensor | None, *how: *OperatorNumbers,
) -> torch.Tensor:  # fmt: skip
    if _by_torch(matrix):
        operands = cpu_ops.silu_mul_quantize(gate, up, matrix, *how)
        return gemm(*operands, packed, scale, unit, bias, gate.shape[0], n, gate.dtype)
    require_quantizer("silu_mul_linear", True, gate, matrix, *how, up=up)
    require_weights("silu_mul_linear", gate, packed, scale, unit, bias, n, matrix, *how)
    return _linear(_Source("silu_mul", gate, up), packed, scale, unit, bias, n, matrix, *how)


def add_rms_norm_linear(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    require_add_rms_norm_linear(not _by_torch(rest[-6]), x, residual, *rest)
    gain, eps, gain_offset, *weights_and_how = rest
    if not _by_torch(rest[-6]) and len(x):
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        source = _Source("add_rms_norm", x, gain, eps, bool(gain_offset), residual, total)
        if _a_kernel_adds(source, rest[-6:]):
            return _linear(source, *weights_and_how), total
    total = (x + residual).contiguous()
    return rms_norm_linear(total, *rest), total


def _a_kernel_adds(source: _Source, how: Any) -> bool:
    """Whether the addition is a quantizer's, or that of a kernel in front of it which it has anyway.

    Also for many rows, where a Hadamard transform of normalised rows is faster as a product: that costs more than is saved.
    """
    matrix, k_padded, _, _, _, format = how
    x = source.x
    sm, sm_count = gpu(x.device.index)
    if matrix is None and format == TOKEN_FORMAT:
        return token_adds(sm)
    if matrix is None:
        return format in GROUPED_FORMATS and k_padded <= LONG_BLOCKS * BLOCK
    return dense_adds(
        len(x), k_padded // BLOCK,
        aligned=source.aligned, format=format, sm_count=sm_count, feedback=feedback_of_matrix(matrix),
    )  # fmt: skip
