"""The kernels as torch operators, namespace `apex4`: for eager code, torch.compile and CUDA graphs alike.

    quantize(x [M, K], ...)                     -> codes, scales   transform, then quantize
    rms_norm_quantize(x, gain, ...)             -> codes, scales   of RMSNorm(x) * (gain + gain_offset)
    silu_mul_quantize(gate, up, ...)            -> codes, scales   of SiLU(gate) * up
    gemm(codes, scales, weight_packed, ...)     -> y [M, N]

Operands are those of operands.py and of the layout of the same name. K is padded with zeros to `k_padded` before the
transform, which is `matrix` or the Hadamard matrix or none. On a GPU `matrix` is what quantize_configs.prepack_matrix
makes, of x's dtype, where groups are of 128; otherwise, and on a CPU, float16 [k_padded / 128, 128, 128] as stored.
On a GPU they launch the kernels on the current stream and wait for nothing. On a CPU they compute the same operands
with PyTorch, slowly: for tests, and to trace.
"""

from __future__ import annotations

from ctypes import c_int, c_void_p
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..layouts import get_layout
from ..number_format import BLOCK
from . import torch_backend, workspace
from .operands import ROW_BYTES, format_of_codes, pack_activations, row_stride, unpack_activations

if TYPE_CHECKING:
    from .gemm_configs import GemmPlan
    from .launcher import Kernel

_HOW = "Tensor? matrix, int k_padded, int group, float clip, bool hadamard, str format"
_library = torch.library.Library("apex4", "DEF")
for _schema in (
    f"quantize(Tensor x, {_HOW}) -> (Tensor, Tensor)",
    f"rms_norm_quantize(Tensor x, Tensor gain, float eps, float gain_offset, {_HOW}) -> (Tensor, Tensor)",
    f"silu_mul_quantize(Tensor gate, Tensor up, {_HOW}) -> (Tensor, Tensor)",
    "gemm(Tensor codes, Tensor scales, Tensor weight_packed, Tensor weight_scale, Tensor? bias, int m, int n, "
    "ScalarType out) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

quantize = torch.ops.apex4.quantize.default
rms_norm_quantize = torch.ops.apex4.rms_norm_quantize.default
silu_mul_quantize = torch.ops.apex4.silu_mul_quantize.default
gemm = torch.ops.apex4.gemm.default

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
        padded = torch.nn.functional.pad(x, (0, k_padded - x.shape[1]))
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


for _name, _function in (
    ("quantize", _quantize_cpu),
    ("rms_norm_quantize", _rms_norm_quantize_cpu),
    ("silu_mul_quantize", _silu_mul_quantize_cpu),
    ("gemm", _gemm_cpu),
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


def _launch_quantizer(
    x: torch.Tensor,
    matrix: torch.Tensor | None,
    k_padded: int,
    group: int,
    clip: float,
    hadamard: bool,
    format: str,
    **operands: Any,
) -> Pair:
    from .quantize_launch import run_quantize

    codes, scales = _empty_operands(x, k_padded, group, format)
    index = x.device.index
    run_quantize(
        index, codes=codes.data_ptr(), scales=scales.data_ptr(), x=x.data_ptr(), m=x.shape[0], k=x.shape[1],
        k_blocks=k_padded // BLOCK, m_stride=codes.shape[1], ldx=x.stride(0), dtype=_NAMES[x.dtype], format=format,
        stream=torch.cuda.current_stream(index).cuda_stream, sm_count=_gpu(index)[1], blocks_per_group=group // BLOCK,
        transform="dense" if matrix is not None else "hadamard" if hadamard else "none", clip=clip,
        matrix=0 if matrix is None else matrix.data_ptr(), matrix_is_shared=matrix is not None and len(matrix) == 1,
        programmatic=format == "sm90", **operands,
    )  # fmt: skip
    return codes, scales


def _reads_prepacked(matrix: torch.Tensor | None) -> bool:
    # The dense kernel has groups of 128 only: for others the layer gives the matrix as it is stored (Apex4Linear).
    return matrix is None or matrix.dim() == 2


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _quantize_cuda(x: torch.Tensor, matrix: torch.Tensor | None, *how: Any) -> Pair:
    if not _reads_prepacked(matrix):
        return _quantize_cpu(x, matrix, *how)
    return _launch_quantizer(_with_dense_rows(x), matrix, *how)


def _rms_norm_quantize_cuda(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, matrix: torch.Tensor | None, *how: Any
) -> Pair:
    if not _reads_prepacked(matrix):
        return _rms_norm_quantize_cpu(x, gain, eps, gain_offset, matrix, *how)
    # Between the two kernels of the dense transform.
    scratch = None if matrix is None else torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return _launch_quantizer(
        _with_dense_rows(x), matrix, *how, input="rms_norm", second=gain.data_ptr(), eps=eps,
        gain_offset=bool(gain_offset), inverse_rms=0 if scratch is None else scratch.data_ptr(),
    )  # fmt: skip


def _silu_mul_quantize_cuda(gate: torch.Tensor, up: torch.Tensor, matrix: torch.Tensor | None, *how: Any) -> Pair:
    if not _reads_prepacked(matrix):
        return _silu_mul_quantize_cpu(gate, up, matrix, *how)
    up = _with_dense_rows(up)
    return _launch_quantizer(
        _with_dense_rows(gate), matrix, *how, input="silu_mul", second=up.data_ptr(), ld_second=up.stride(0)
    )


@lru_cache(maxsize=4096)
def _gemm_plan(
    index: int, m: int, n: int, k_blocks: int, blocks_per_group: int, m_stride: int, out: torch.dtype
) -> tuple[GemmPlan, Kernel, tuple[Any, ...]]:
    """The plan, its kernel, and the arguments behind the pointers: the same for every call, and never written to."""
    from . import launcher
    from .gemm_configs import choose_gemm

    plan = choose_gemm(*_gpu(index), m, n, k_blocks, blocks_per_group, _SHORT_NAMES[out])
    kernel = launcher.kernel(plan.config.source, plan.config.entry, plan.config.defines, index)
    return plan, kernel, tuple(map(c_int, (m, n, k_blocks, blocks_per_group, m_stride, n, *plan.arguments)))


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
    if m == 0:
        return y
    index, (k_blocks, m_stride, _) = codes.device.index, codes.shape
    blocks_per_group = k_blocks // scales.shape[0]
    plan, kernel, numbers = _gemm_plan(index, m, n, k_blocks, blocks_per_group, m_stride, out)
    stream = torch.cuda.current_stream(index).cuda_stream
    partial, counter = None, None
    if plan.parts > 1:
        # Not kept: what it holds is read by this kernel alone, and the allocator orders its reuse by the stream.
        sums = torch.empty(plan.workspace_floats, dtype=torch.float32, device=codes.device)
        partial, counter = sums.data_ptr(), workspace.counters(index, stream, 4 * plan.counters).data_ptr()
    pointers = (
        y.data_ptr(), codes.data_ptr(), scales.data_ptr(), weight_packed.data_ptr(), weight_scale.data_ptr(),
        None if bias is None else bias.data_ptr(), partial, counter,
    )  # fmt: skip
    kernel.launch(
        plan.grid, plan.block, [*map(c_void_p, pointers), *numbers],
        shared_bytes=plan.config.shared_bytes, cluster=plan.cluster, stream=stream,
        programmatic=plan.config.family == "sm90",
    )  # fmt: skip
    return y


for _name, _function in (
    ("quantize", _quantize_cuda),
    ("rms_norm_quantize", _rms_norm_quantize_cuda),
    ("silu_mul_quantize", _silu_mul_quantize_cuda),
    ("gemm", _gemm_cuda),
):
    _library.impl(_name, _function, "CUDA")
