"""The operators on a CPU: the operands and results of the kernels, computed with PyTorch. Slow: for tests, and to trace.

Signatures are the schemas of ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import torch_backend
from .activation_quantization import OperatorArguments
from .folding import fold_codes
from .operands import (
    TOKEN_FORMAT,
    Operands,
    format_of_codes,
    layout_of_format,
    pack_activations,
    require_add_rms_norm_linear,
    require_gemm,
    require_quantizer,
    require_weights,
    unpack_activations,
)


def _quantize(
    x: torch.Tensor, matrix: torch.Tensor | None, k_padded: int, group: int, clip: float, hadamard: bool, format: str
) -> Operands:
    with torch.autocast(x.device.type, enabled=False):
        padded = x if x.shape[1] == k_padded else torch.nn.functional.pad(x, (0, k_padded - x.shape[1]))
        if format == TOKEN_FORMAT:
            codes, scales = torch_backend.quantize_token(padded, hadamard, matrix)
        else:
            codes, scales = torch_backend.quantize_activation(padded, group, clip, hadamard, matrix)
        return pack_activations(codes.flatten(1), scales, format)


def _multiply(
    codes: torch.Tensor, scales: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, m: int, n: int, out: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    format = format_of_codes(codes, unit)
    layout = layout_of_format(format)
    codes_w, scale_w = layout.unpack(packed, n), layout.unpack_scales(scale, n)
    codes_a, scale_a = unpack_activations(codes, scales, m, format)
    weight: torch.Tensor
    factor: torch.Tensor | None
    product: Callable[..., torch.Tensor]
    if unit is not None:
        weight, factor, product = fold_codes(codes_w, scale_w).float(), unit[:n], torch_backend.multiply_folded
    else:
        (weight, factor), product = torch_backend.grouped_weight(codes_w, scale_w), torch_backend.multiply
    y = torch.empty(m, n, dtype=out, device=codes.device)
    with torch.autocast(codes.device.type, enabled=False):
        for start in range(0, m, torch_backend.ROWS_AT_ONCE):
            rows = slice(start, start + torch_backend.ROWS_AT_ONCE)
            grouped = codes_a[rows].float().unflatten(1, (len(scales), -1))
            y[rows] = product(grouped, scale_a[rows], weight, factor, bias).to(out)
    return y


def _normed(x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float) -> torch.Tensor:
    # Rounded where the modules of transformers round: Llama's before the gain, Gemma's (1 + gain) behind it.
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if gain_offset:
        return (normed * (gain_offset + gain.float())).to(x.dtype)
    return gain * normed.to(x.dtype)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def quantize(x: torch.Tensor, *how: *OperatorArguments) -> Operands:
    require_quantizer("quantize", False, x, *how)
    return _quantize(x, *how)


def rms_norm_quantize(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, *how: *OperatorArguments
) -> Operands:
    require_quantizer("rms_norm_quantize", False, x, *how, gain=gain)
    return _quantize(_normed(x, gain, eps, gain_offset), *how)


def silu_mul_quantize(gate: torch.Tensor, up: torch.Tensor, *how: *OperatorArguments) -> Operands:
    require_quantizer("silu_mul_quantize", False, gate, *how, up=up)
    return _quantize(_gated(gate, up), *how)


def gemm(
    codes: torch.Tensor, scales: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, m: int, n: int, out: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    require_gemm("gemm", codes, scales, packed, scale, unit, bias, m, n)
    return _multiply(codes, scales, packed, scale, unit, bias, m, n, out)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    unit: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    *how: *OperatorArguments,
) -> torch.Tensor:
    require_quantizer("linear", False, x, *how)
    require_weights("linear", x, packed, scale, unit, bias, n, *how)
    return _multiply(*_quantize(x, *how), packed, scale, unit, bias, x.shape[0], n, x.dtype)


def rms_norm_linear(
    x: torch.Tensor, gain: torch.Tensor, eps: float, gain_offset: float, packed: torch.Tensor, scale: torch.Tensor,
    unit: torch.Tensor | None, bias: torch.Tensor | None, n: int, *how: *OperatorArguments,
) -> torch.Tensor:  # fmt: skip
    require_quantizer("rms_norm_linear", False, x, *how, gain=gain)
    require_weights("rms_norm_linear", x, packed, scale, unit, bias, n, *how)
    operands = _quantize(_normed(x, gain, eps, gain_offset), *how)
    return _multiply(*operands, packed, scale, unit, bias, x.shape[0], n, x.dtype)


def silu_mul_linear(
    gate: torch.Tensor, up: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, n: int, *how: *OperatorArguments,
) -> torch.Tensor:  # fmt: skip
    require_quantizer("silu_mul_linear", False, gate, *how, up=up)
    require_weights("silu_mul_linear", gate, packed, scale, unit, bias, n, *how)
    return _multiply(*_quantize(_gated(gate, up), *how), packed, scale, unit, bias, gate.shape[0], n, gate.dtype)


def add_rms_norm_linear(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    require_add_rms_norm_linear(False, x, residual, *rest)
    total = (x + residual).contiguous()
    return rms_norm_linear(total, *rest), total
