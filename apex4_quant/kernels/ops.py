"""The kernels as torch operators, namespace `apex4`: for eager code, torch.compile and CUDA graphs alike.

    quantize(x [M, K], ...)                     -> codes, scales   transform, then quantize
    rms_norm_quantize(x, gain, ...)             -> codes, scales   of RMSNorm(x) * (gain + gain_offset)
    silu_mul_quantize(gate, up, ...)            -> codes, scales   of SiLU(gate) * up
    gemm(codes, scales, weight_packed, ...)     -> y [M, N]
    linear, rms_norm_linear, silu_mul_linear    -> y [M, N]        the quantizer of that name and the GEMM in one call

Operands are those of operands.py and of the layout of the same name. K is padded with zeros to `k_padded` before the
transform, which is `matrix` or the Hadamard matrix or none. How a GPU computes the Hadamard transform of a row, and so its last
bits before they become codes, may depend on the number of rows. On a GPU `matrix` is what quantize_configs.prepack_matrix
makes, of x's dtype, where groups are of 128; otherwise, and on a CPU, float16 [k_padded / 128, 128, 128] as stored.
On a GPU they launch the kernels on the current stream and wait for nothing. Weights, gains and matrices may be read before
the kernel in front has ended: they must not be what that one writes. On a CPU they compute the same operands
with PyTorch, slowly: for tests, and to trace.
"""

from __future__ import annotations

import os
from ctypes import c_int
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..format.layouts import get_layout
from ..format.number_format import BLOCK
from . import torch_backend
from .gemm.fused_linear import MOST_TOKENS, fused_launch
from .hadamard import signs
from .operands import ROW_BYTES, format_of_codes, pack_activations, row_stride, unpack_activations
from .quantize.configs import FEW_ROWS, product_is_faster
from .quantize.launch import Quantizer, quantizer, rows_are_aligned
from .runtime import launcher, workspace

if TYPE_CHECKING:
    from .gemm.configs import GemmPlan
    from .runtime.launcher import Launch

_HOW = "Tensor? matrix, int k_padded, int group, float clip, bool hadamard, str format"
_WEIGHTS = "Tensor weight_packed, Tensor weight_scale, Tensor? bias, int n"
_library = torch.library.Library("apex4", "DEF")
for _schema in (
    f"quantize(Tensor x, {_HOW}) -> (Tensor, Tensor)",
    f"rms_norm_quantize(Tensor x, Tensor gain, float eps, float gain_offset, {_HOW}) -> (Tensor, Tensor)",
    f"silu_mul_quantize(Tensor gate, Tensor up, {_HOW}) -> (Tensor, Tensor)",
    "gemm(Tensor codes, Tensor scales, Tensor weight_packed, Tensor weight_scale, Tensor? bias, int m, int n, "
    "ScalarType out) -> Tensor",
    f"linear(Tensor x, {_WEIGHTS}, {_HOW}) -> Tensor",
    f"rms_norm_linear(Tensor x, Tensor gain, float eps, float gain_offset, {_WEIGHTS}, {_HOW}) -> Tensor",
    f"silu_mul_linear(Tensor gate, Tensor up, {_WEIGHTS}, {_HOW}) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

quantize = torch.ops.apex4.quantize.default
rms_norm_quantize = torch.ops.apex4.rms_norm_quantize.default
silu_mul_quantize = torch.ops.apex4.silu_mul_quantize.default
gemm = torch.ops.apex4.gemm.default
linear = torch.ops.apex4.linear.default
rms_norm_linear = torch.ops.apex4.rms_norm_linear.default
silu_mul_linear = torch.ops.apex4.silu_mul_linear.default

Pair = tuple[torch.Tensor, torch.Tensor]


# ---- shapes alone ----------------------------------------------------------------------------------------------------


def _empty_operands(x: torch.Tensor, k_padded: int, group: int, format: str) -> Pair:
    m_stride = row_stride(x.shape[0])
    codes = x.new_empty((k_padded // BLOCK, m_stride, ROW_BYTES[format]), dtype=torch.uint8)
    return codes, x.new_empty((k_padded // group, m_stride), dtype=torch.float32)


@torch.library.register_fake("apex4::quantize", lib=_library)
def _(x, matrix, k_padded, group, clip, hadamard, format):
    return _empty_operands(x, k_padded, group, format)


@torch.library.register_fake("apex4::rms_norm_quantize", lib=_library)
def _(x, gain, eps, gain_offset, matrix, k_padded, group, clip, hadamard, format):
    return _empty_operands(x, k_padded, group, format)


@torch.library.register_fake("apex4::silu_mul_quantize", lib=_library)
def _(gate, up, matrix, k_padded, group, clip, hadamard, format):
    return _empty_operands(gate, k_padded, group, format)


@torch.library.register_fake("apex4::gemm", lib=_library)
def _(codes, scales, weight_packed, weight_scale, bias, m, n, out):
    return codes.new_empty((m, n), dtype=out)


@torch.library.register_fake("apex4::linear", lib=_library)
def _(x, weight_packed, weight_scale, bias, n, *how):
    return x.new_empty((x.shape[0], n))


@torch.library.register_fake("apex4::rms_norm_linear", lib=_library)
def _(x, gain, eps, gain_offset, weight_packed, weight_scale, bias, n, *how):
    return x.new_empty((x.shape[0], n))


@torch.library.register_fake("apex4::silu_mul_linear", lib=_library)
def _(gate, up, weight_packed, weight_scale, bias, n, *how):
    return gate.new_empty((gate.shape[0], n))


# ---- CPU -------------------------------------------------------------------------------------------------------------


def _quantize_cpu(
    x: torch.Tensor,
    matrix: torch.Tensor | None,
    k_padded: int,
    group: int,
    clip: float,
    hadamard: bool,
    format: str,
) -> Pair:
    with torch.autocast(x.device.type, enabled=False):
        padded = x if x.shape[1] == k_padded else torch.nn.functional.pad(x, (0, k_padded - x.shape[1]))
        codes, scales = torch_backend.quantize_activation(padded, group, clip, hadamard, matrix)
        return pack_activations(codes.flatten(1), scales, format)


def _rms_norm_quantize_cpu(x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, *how: Any) -> Pair:
    # Rounded where the modules of transformers round: Llama's before the gain, Gemma's (1 + gain) behind it.
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if gain_offset:
        return _quantize_cpu((normed * (gain_offset + gain.float())).to(x.dtype), *how)
    return _quantize_cpu(gain * normed.to(x.dtype), *how)


def _silu_mul_quantize_cpu(gate: torch.Tensor, up: torch.Tensor, *how: Any) -> Pair:
    return _quantize_cpu(torch.nn.functional.silu(gate) * up, *how)


def _gemm_cpu(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    m: int,
    n: int,
    out: torch.dtype,
) -> torch.Tensor:
    layout = get_layout(format_of_codes(codes))
    codes_w, scale_w = layout.unpack(weight_packed, n), layout.unpack_scales(weight_scale, n)
    codes_a, scale_a = unpack_activations(codes, scales, m)
    weight, scale_w = torch_backend.grouped_weight(codes_w, scale_w)
    y = torch.empty(m, n, dtype=out, device=codes.device)
    with torch.autocast("cpu", enabled=False):
        for start in range(0, m, torch_backend.ROWS_AT_ONCE):
            rows = slice(start, start + torch_backend.ROWS_AT_ONCE)
            grouped = codes_a[rows].float().unflatten(1, (len(scales), -1))
            y[rows] = torch_backend.multiply(grouped, scale_a[rows], weight, scale_w, bias).to(out)
    return y


def _linear_cpu(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int, *how: Any
) -> torch.Tensor:
    return _gemm_cpu(*_quantize_cpu(x, *how), packed, scale, bias, x.shape[0], n, x.dtype)


def _rms_norm_linear_cpu(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, packed: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, n: int, *how: Any,
) -> torch.Tensor:  # fmt: skip
    operands = _rms_norm_quantize_cpu(x, gain, eps, gain_offset, *how)
    return _gemm_cpu(*operands, packed, scale, bias, x.shape[0], n, x.dtype)


def _silu_mul_linear_cpu(
    gate: torch.Tensor, up: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int,
    *how: Any,
) -> torch.Tensor:  # fmt: skip
    return _gemm_cpu(*_silu_mul_quantize_cpu(gate, up, *how), packed, scale, bias, gate.shape[0], n, gate.dtype)


for _name, _function in (
    ("quantize", _quantize_cpu),
    ("rms_norm_quantize", _rms_norm_quantize_cpu),
    ("silu_mul_quantize", _silu_mul_quantize_cpu),
    ("gemm", _gemm_cpu),
    ("linear", _linear_cpu),
    ("rms_norm_linear", _rms_norm_linear_cpu),
    ("silu_mul_linear", _silu_mul_linear_cpu),
):
    _library.impl(_name, _function, "CPU")


# ---- CUDA ------------------------------------------------------------------------------------------------------------


_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@lru_cache(maxsize=64)
def _gpu(index: int) -> tuple[int, int]:
    """sm and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def prepare(device: torch.device) -> None:
    """Make what the operators find ready on a GPU, so that a CUDA graph may be captured first. Not during a capture."""
    workspace.prepare(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if _gpu(index)[0] >= 90:
        for dtype in _NAMES:
            signs(index, dtype)


def _stream(index: int) -> int:
    # What torch's own compiled code asks: a CUstream, without an object around it.
    return torch._C._cuda_getCurrentRawStream(index)


class _Input:
    """What a quantizer reads: x [M, K] with its rows in one piece each; `second`: the gain, or up [M, K]."""

    def __init__(
        self,
        input: str,
        x: torch.Tensor,
        second: torch.Tensor | None = None,
        eps: float = 0.0,
        gain_offset: bool = False,
    ) -> None:
        self.input, self.eps, self.gain_offset = input, eps, gain_offset
        self.x = x = _with_dense_rows(x)
        self.second = second = _with_dense_rows(second) if input == "silu_mul" else second  # type: ignore[arg-type]
        self.ld_second = second.stride(0) if input == "silu_mul" else 0
        operands = [(x.data_ptr(), x.stride(0))]
        if second is not None:
            operands.append((second.data_ptr(), self.ld_second))
        self.aligned = rows_are_aligned(x.shape[1], *operands)

    def quantizer(
        self, matrix: torch.Tensor | None, k_padded: int, group: int, clip: float, hadamard: bool, format: str
    ) -> tuple[Quantizer, torch.Tensor | None]:
        """And the matrix that it reads: `matrix`, or the Hadamard matrix where that is the faster way."""
        x, factor = self.x, 1.0
        if matrix is None and hadamard and group == BLOCK and x.shape[0] > FEW_ROWS and product_is_faster(
            x.shape[0], k_padded // BLOCK, input=self.input, aligned=self.aligned, format=format,
            sm_count=_gpu(x.device.index)[1],
        ):  # fmt: skip
            matrix, factor = signs(x.device.index, x.dtype), BLOCK**-0.5
        made = quantizer(
            x.device.index, x.shape[0], x.shape[1], k_padded // BLOCK, row_stride(x.shape[0]), x.stride(0), self.ld_second,
            self.aligned, _NAMES[x.dtype], format, _gpu(x.device.index)[1], group // BLOCK,
            "dense" if matrix is not None else "hadamard" if hadamard else "none", clip, self.input, self.eps,
            self.gain_offset, matrix is not None and len(matrix) == 1, factor, format == "sm90",
        )  # fmt: skip
        return made, matrix

    def fused(self, n: int, k_padded: int, group: int, clip: float, hadamard: bool, format: str) -> Launch | None:
        """The kernel that quantizes and multiplies, where the shape gets it."""
        x = self.x
        if x.shape[0] > MOST_TOKENS or format != "sm90" or group != BLOCK or not hadamard:
            return None
        index = x.device.index
        return fused_launch(
            launcher.kernel, index, *_gpu(index), x.shape[0], n, x.shape[1], k_padded // BLOCK, x.stride(0), self.ld_second,
            self.aligned, _NAMES[x.dtype], self.input, clip, os.environ.get("APEX4_GEMM"),
        )  # fmt: skip


def _quantize_with(source: _Input, matrix: torch.Tensor | None, *how: Any) -> Pair:
    x = source.x
    k_padded, group, _, _, format = how
    codes, scales = _empty_operands(x, k_padded, group, format)
    if x.shape[0]:
        run, matrix = source.quantizer(matrix, *how)
        between = (
            torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if run.statistics is not None else None
        )  # its two kernels
        stream = _stream(x.device.index)
        run(
            stream, codes.data_ptr(), scales.data_ptr(), x.data_ptr(), _address(source.second), _address(matrix),
            _address(between), _board(run, x.device.index, stream),
        )  # fmt: skip
    return codes, scales


def _linear_with(
    source: _Input, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int,
    matrix: torch.Tensor | None, *how: Any,
) -> torch.Tensor:  # fmt: skip
    """As `_quantize_with` and `_gemm_cuda`, in one kernel or with one piece of memory for all that is gone afterwards."""
    x = source.x
    m, device = x.shape[0], x.device
    y = torch.empty((m, n), dtype=x.dtype, device=device)
    if m == 0:
        return y
    stream = _stream(device.index)
    fused = source.fused(n, *how) if matrix is None else None
    if fused is not None:
        fused(
            stream,
            y.data_ptr(),
            x.data_ptr(),
            _address(source.second),
            packed.data_ptr(),
            scale.data_ptr(),
            _address(bias),
        )
        return y
    k_padded, group, _, _, format = how
    m_stride = row_stride(m)
    code_bytes = k_padded // BLOCK * m_stride * ROW_BYTES[format]
    scale_bytes = 4 * (k_padded // group) * m_stride
    # Codes of whole blocks and scales of 16 rows each are multiples of 64 bytes: what follows them is aligned.
    memory = torch.empty(code_bytes + scale_bytes + 4 * m, dtype=torch.uint8, device=device)
    codes = memory.data_ptr()
    scales = codes + code_bytes
    run, matrix = source.quantizer(matrix, *how)
    run(
        stream, codes, scales, x.data_ptr(), _address(source.second), _address(matrix), scales + scale_bytes,
        _board(run, device.index, stream),
    )  # fmt: skip
    _launch_gemm(y, codes, scales, packed, scale, bias, k_padded // BLOCK, group // BLOCK, m_stride, stream)
    return y


def _board(run: Quantizer, index: int, stream: int) -> int:
    return workspace.board(index, stream, run.board_bytes).data_ptr() if run.board_bytes else 0


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _reads_prepacked(matrix: torch.Tensor | None) -> bool:
    # The dense kernel has groups of 128 only: for others the layer gives the matrix as it is stored (Apex4Linear).
    return matrix is None or matrix.dim() == 2


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _quantize_cuda(x: torch.Tensor, matrix: torch.Tensor | None, *how: Any) -> Pair:
    if not _reads_prepacked(matrix):
        return _quantize_cpu(x, matrix, *how)
    return _quantize_with(_Input("plain", x), matrix, *how)


def _rms_norm_quantize_cuda(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, matrix: torch.Tensor | None, *how: Any
) -> Pair:
    if not _reads_prepacked(matrix):
        return _rms_norm_quantize_cpu(x, gain, eps, gain_offset, matrix, *how)
    return _quantize_with(_Input("rms_norm", x, gain, eps, bool(gain_offset)), matrix, *how)


def _silu_mul_quantize_cuda(gate: torch.Tensor, up: torch.Tensor, matrix: torch.Tensor | None, *how: Any) -> Pair:
    if not _reads_prepacked(matrix):
        return _silu_mul_quantize_cpu(gate, up, matrix, *how)
    return _quantize_with(_Input("silu_mul", gate, up), matrix, *how)


@lru_cache(maxsize=4096)
def _gemm_launch(
    index: int, m: int, n: int, k_blocks: int, blocks_per_group: int, m_stride: int, out: torch.dtype
) -> tuple[GemmPlan, Launch]:
    """The plan, and its kernel with all but the pointers."""
    from .gemm.configs import choose_gemm

    plan = choose_gemm(*_gpu(index), m, n, k_blocks, blocks_per_group, _SHORT_NAMES[out])
    kernel = launcher.kernel(plan.config.source, plan.config.entry, plan.config.defines, index)
    numbers = (m, n, k_blocks, blocks_per_group, m_stride, n, *plan.arguments)
    launch = kernel.bind(
        plan.grid, plan.block, 8, [c_int(number) for number in numbers],
        shared_bytes=plan.config.shared_bytes, cluster=plan.cluster, programmatic=plan.config.family == "sm90",
    )  # fmt: skip
    return plan, launch


def _launch_gemm(
    y: torch.Tensor, codes: int, scales: int, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
    k_blocks: int, blocks_per_group: int, m_stride: int, stream: int,
) -> None:  # fmt: skip
    (m, n), device = y.shape, y.device
    plan, launch = _gemm_launch(device.index, m, n, k_blocks, blocks_per_group, m_stride, y.dtype)
    partial = counter = 0
    if plan.parts > 1:
        # Not kept: what it holds is read by this kernel alone, and the allocator orders its reuse by the stream.
        sums = torch.empty(plan.workspace_floats, dtype=torch.float32, device=device)
        partial = sums.data_ptr()
        counter = workspace.counters(device.index, stream, 4 * plan.counters).data_ptr()
    launch(stream, y.data_ptr(), codes, scales, packed.data_ptr(), scale.data_ptr(), _address(bias), partial, counter)


def _gemm_cuda(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    m: int,
    n: int,
    out: torch.dtype,
) -> torch.Tensor:
    y = torch.empty(m, n, dtype=out, device=codes.device)
    if m:
        k_blocks, m_stride, _ = codes.shape
        _launch_gemm(
            y, codes.data_ptr(), scales.data_ptr(), weight_packed, weight_scale, bias, k_blocks,
            k_blocks // scales.shape[0], m_stride, _stream(codes.device.index),
        )  # fmt: skip
    return y


def _linear_cuda(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int,
    matrix: torch.Tensor | None, *how: Any,
) -> torch.Tensor:  # fmt: skip
    if not _reads_prepacked(matrix):
        return _gemm_cuda(*_quantize_cuda(x, matrix, *how), packed, scale, bias, x.shape[0], n, x.dtype)
    return _linear_with(_Input("plain", x), packed, scale, bias, n, matrix, *how)


def _rms_norm_linear_cuda(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, packed: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, n: int, matrix: torch.Tensor | None, *how: Any,
) -> torch.Tensor:  # fmt: skip
    if not _reads_prepacked(matrix):
        operands = _rms_norm_quantize_cuda(x, gain, eps, gain_offset, matrix, *how)
        return _gemm_cuda(*operands, packed, scale, bias, x.shape[0], n, x.dtype)
    source = _Input("rms_norm", x, gain, eps, bool(gain_offset))
    return _linear_with(source, packed, scale, bias, n, matrix, *how)


def _silu_mul_linear_cuda(
    gate: torch.Tensor, up: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int,
    matrix: torch.Tensor | None, *how: Any,
) -> torch.Tensor:  # fmt: skip
    if not _reads_prepacked(matrix):
        operands = _silu_mul_quantize_cuda(gate, up, matrix, *how)
        return _gemm_cuda(*operands, packed, scale, bias, gate.shape[0], n, gate.dtype)
    return _linear_with(_Input("silu_mul", gate, up), packed, scale, bias, n, matrix, *how)


for _name, _function in (
    ("quantize", _quantize_cuda),
    ("rms_norm_quantize", _rms_norm_quantize_cuda),
    ("silu_mul_quantize", _silu_mul_quantize_cuda),
    ("gemm", _gemm_cuda),
    ("linear", _linear_cuda),
    ("rms_norm_linear", _rms_norm_linear_cuda),
    ("silu_mul_linear", _silu_mul_linear_cuda),
):
    _library.impl(_name, _function, "CUDA")
