"""The kernels as torch operators, namespace `apex4`: for eager code, torch.compile and CUDA graphs alike.

    quantize(x [M, K], ...)                     -> codes, scales   transform, then quantize
    rms_norm_quantize(x, gain, ...)             -> codes, scales   of RMSNorm(x) * (gain + gain_offset)
    silu_mul_quantize(gate, up, ...)            -> codes, scales   of SiLU(gate) * up
    gemm(codes, scales, weight_packed, ...)     -> y [M, N]
    linear, rms_norm_linear, silu_mul_linear    -> y [M, N]        the quantizer of that name and the GEMM in one call
    add_rms_norm_linear(x, residual, gain, ...) -> y, x + residual rms_norm_linear of the sum as it is rounded

Here are the schemas, and what is known of the results without computing them; cpu_ops.py and cuda_ops.py compute. Operands are
those of operands.py and of the layout of the same name; what does not fit is refused with an Apex4Error that names the
argument. The last arguments are those of activation_quantization.py: K is padded with zeros to `k_padded` before the transform,
which is `matrix` or the Hadamard matrix or none. How a GPU computes the Hadamard transform of a row, and so its last bits before
they become codes, may depend on the number of rows. On a GPU `matrix` is what quantize.configs.prepack_matrix makes, of x's
dtype, where groups are of 128 or the format is `s8`; otherwise, and on a CPU, float16 [k_padded / 128, 128, 128] as stored, or with
error feedback, to 4 bits in groups of 128, [k_padded / 128, 184, 128] or, with sixteen levels, [k_padded / 128, 185, 128].
With a `weight_unit`, and only so, activations have 8 bits: the format is `s8`, `weight_scale` the int16 ratio of folding.py, the
layout `sm90`, and for the quantizers `group` is `k_padded` and `clip` 1.
On a GPU they launch the kernels on the current stream and wait for nothing. Weights, gains and matrices may be read before
the kernel in front has ended: they must not be what that one writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import cpu_ops, cuda_ops
from .activation_quantization import OperatorArguments
from .cuda_ops import prepare
from .operands import (
    Operands,
    empty_operands,
    require_add_rms_norm_linear,
    require_gemm,
    require_quantizer,
    require_weights,
)

__all__ = [
    "add_rms_norm_linear", "gemm", "linear", "prepare", "quantize", "rms_norm_linear", "rms_norm_quantize", "silu_mul_linear",
    "silu_mul_quantize",
]  # fmt: skip

_HOW = "Tensor? matrix, int k_padded, int group, float clip, bool hadamard, str format"
_WEIGHTS = "Tensor weight_packed, Tensor weight_scale, Tensor? weight_unit, Tensor? bias, int n"
_NORM = "Tensor x, Tensor gain, float eps, float gain_offset"
_ADD_NORM = _NORM.replace("Tensor x", "Tensor x, Tensor residual")
_GATE = "Tensor gate, Tensor up"
_SCHEMAS = {
    "quantize": f"(Tensor x, {_HOW}) -> (Tensor, Tensor)",
    "rms_norm_quantize": f"({_NORM}, {_HOW}) -> (Tensor, Tensor)",
    "silu_mul_quantize": f"({_GATE}, {_HOW}) -> (Tensor, Tensor)",
    "gemm": "(Tensor codes, Tensor scales, Tensor weight_packed, Tensor weight_scale, Tensor? weight_unit, Tensor? bias, "
    "int m, int n, ScalarType out) -> Tensor",
    "linear": f"(Tensor x, {_WEIGHTS}, {_HOW}) -> Tensor",
    "rms_norm_linear": f"({_NORM}, {_WEIGHTS}, {_HOW}) -> Tensor",
    "silu_mul_linear": f"({_GATE}, {_WEIGHTS}, {_HOW}) -> Tensor",
    "add_rms_norm_linear": f"({_ADD_NORM}, {_WEIGHTS}, {_HOW}) -> (Tensor, Tensor)",
}


# ---- shapes alone ----------------------------------------------------------------------------------------------------


def _fake_quantize(x: torch.Tensor, *how: *OperatorArguments) -> Operands:
    require_quantizer("quantize", x.is_cuda, x, *how)
    return empty_operands(x, *how)


def _fake_rms_norm_quantize(
    x: torch.Tensor, gain: torch.Tensor, eps: float, offset: float, *how: *OperatorArguments
) -> Operands:
    require_quantizer("rms_norm_quantize", x.is_cuda, x, *how, gain=gain)
    return empty_operands(x, *how)


def _fake_silu_mul_quantize(gate: torch.Tensor, up: torch.Tensor, *how: *OperatorArguments) -> Operands:
    require_quantizer("silu_mul_quantize", gate.is_cuda, gate, *how, up=up)
    return empty_operands(gate, *how)


def _fake_gemm(
    codes: torch.Tensor, scales: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, m: int, n: int, out: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    require_gemm("gemm", codes, scales, packed, scale, unit, bias, m, n)
    return codes.new_empty((m, n), dtype=out)


def _fake_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    unit: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    *how: *OperatorArguments,
) -> torch.Tensor:
    require_quantizer("linear", x.is_cuda, x, *how)
    require_weights("linear", x, packed, scale, unit, bias, n, *how)
    return x.new_empty((x.shape[0], n))


def _fake_rms_norm_linear(
    x: torch.Tensor, gain: torch.Tensor, eps: float, offset: float, packed: torch.Tensor, scale: torch.Tensor,
    unit: torch.Tensor | None, bias: torch.Tensor | None, n: int, *how: *OperatorArguments,
) -> torch.Tensor:  # fmt: skip
    require_quantizer("rms_norm_linear", x.is_cuda, x, *how, gain=gain)
    require_weights("rms_norm_linear", x, packed, scale, unit, bias, n, *how)
    return x.new_empty((x.shape[0], n))


def _fake_silu_mul_linear(
    gate: torch.Tensor, up: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, n: int, *how: *OperatorArguments,
) -> torch.Tensor:  # fmt: skip
    require_quantizer("silu_mul_linear", gate.is_cuda, gate, *how, up=up)
    require_weights("silu_mul_linear", gate, packed, scale, unit, bias, n, *how)
    return gate.new_empty((gate.shape[0], n))


def _fake_add_rms_norm_linear(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    require_add_rms_norm_linear(x.is_cuda, x, residual, *rest)
    return _fake_rms_norm_linear(x, *rest), torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("apex4", "DEF")
_fakes: dict[str, Callable[..., Any]] = {
    "quantize": _fake_quantize,
    "rms_norm_quantize": _fake_rms_norm_quantize,
    "silu_mul_quantize": _fake_silu_mul_quantize,
    "gemm": _fake_gemm,
    "linear": _fake_linear,
    "rms_norm_linear": _fake_rms_norm_linear,
    "silu_mul_linear": _fake_silu_mul_linear,
    "add_rms_norm_linear": _fake_add_rms_norm_linear,
}
for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"apex4::{_name}", _fakes[_name], lib=_library)
    _library.impl(_name, getattr(cpu_ops, _name), "CPU")
    _library.impl(_name, getattr(cuda_ops, _name), "CUDA")

quantize = torch.ops.apex4.quantize.default
rms_norm_quantize = torch.ops.apex4.rms_norm_quantize.default
silu_mul_quantize = torch.ops.apex4.silu_mul_quantize.default
gemm = torch.ops.apex4.gemm.default
linear = torch.ops.apex4.linear.default
rms_norm_linear = torch.ops.apex4.rms_norm_linear.default
add_rms_norm_linear = torch.ops.apex4.add_rms_norm_linear.default
silu_mul_linear = torch.ops.apex4.silu_mul_linear.default
