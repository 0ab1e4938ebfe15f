"""What quantized linears read: a tensor, or one that its quantizer computes too.

    Plain(x)            x
    Normed(norm, x)     RMSNorm(x)          one kernel with the quantizer
    Gated(gate, up)     SiLU(gate) * up     one kernel with the quantizer

Each knows the operators of kernels/ops.py that read it, so that a linear asks all of them the same. Normed and Gated are no
tensors, and that is intended: only quantized linears know them (deferring.py makes them, where nobody else reads them). Anybody
else who meets one stops with an error and never goes on with a wrong number. Results are rounded where the modules' own are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..kernels import ops
from ..kernels.activation_quantization import OperatorArguments
from ..kernels.operands import Operands


class KernelWeights(NamedTuple):
    """What the operators multiply by, in the layout of the kernels: of one linear, or of several one behind the other."""

    packed: torch.Tensor  # uint8
    scale: torch.Tensor  # float16, or with 8-bit activations the ratio, int16
    unit: torch.Tensor | None  # float32, with 8-bit activations
    bias: torch.Tensor | None  # float32 [out_features]
    out_features: int


class LinearInput:
    """[..., K]: an input of quantized linears, of the shape, dtype and device of the tensor `x`."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    @property
    def shape(self) -> torch.Size:
        return self._x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def device(self) -> torch.device:
        return self._x.device

    def tensor(self) -> torch.Tensor:
        """[..., K], of x's dtype."""
        raise NotImplementedError

    def quantize(self, how: OperatorArguments) -> Operands:
        """Codes and scales of the rows [M, K]."""
        raise NotImplementedError

    def linear(self, weights: KernelWeights, how: OperatorArguments) -> torch.Tensor:
        """y [..., N]: quantized and multiplied."""
        raise NotImplementedError

    def multiply(self, operands: Operands, weights: KernelWeights) -> torch.Tensor:
        """y [..., N] of what `quantize` returned."""
        shape = self._x.shape[:-1]
        y: torch.Tensor = ops.gemm(*operands, *weights[:4], shape.numel(), weights.out_features, self._x.dtype)
        return y.reshape(*shape, weights.out_features)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[-1])

    def _shaped(self, y: torch.Tensor) -> torch.Tensor:
        return y.view(*self._x.shape[:-1], y.shape[-1])


class Plain(LinearInput):
    def tensor(self) -> torch.Tensor:
        return self._x

    def quantize(self, how: OperatorArguments) -> Operands:
        operands: Operands = ops.quantize(self._rows(self._x), *how)
        return operands

    def linear(self, weights: KernelWeights, how: OperatorArguments) -> torch.Tensor:
        return self._shaped(ops.linear(self._rows(self._x), *weights, *how))


class Normed(LinearInput):
    """RMSNorm(x) * (gain + offset), of the module `norm`."""

    def __init__(self, norm: nn.Module, x: torch.Tensor, eps: float, offset: float) -> None:
        super().__init__(x)
        self._norm, self._eps, self._offset = norm, eps, offset

    def tensor(self) -> torch.Tensor:
        y: torch.Tensor = type(self._norm).forward(self._norm, self._x)
        return y

    def quantize(self, how: OperatorArguments) -> Operands:
        rows = self._rows(self._x)
        operands: Operands = ops.rms_norm_quantize(rows, self._norm.weight, self._eps, self._offset, *how)
        return operands

    def linear(self, weights: KernelWeights, how: OperatorArguments) -> torch.Tensor:
        rows = self._rows(self._x)
        return self._shaped(ops.rms_norm_linear(rows, self._norm.weight, self._eps, self._offset, *weights, *how))


class Gated(LinearInput):
    """SiLU(gate) * up, both [..., K]."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__(up)
        self._gate = gate

    def tensor(self) -> torch.Tensor:
        return nn.functional.silu(self._gate) * self._x

    def quantize(self, how: OperatorArguments) -> Operands:
        operands: Operands = ops.silu_mul_quantize(self._rows(self._gate), self._rows(self._x), *how)
        return operands

    def linear(self, weights: KernelWeights, how: OperatorArguments) -> torch.Tensor:
        return self._shaped(ops.silu_mul_linear(self._rows(self._gate), self._rows(self._x), *weights, *how))


class Gate:
    """SiLU(gate), which waits for `up`: the product is a `Gated`."""

    def __init__(self, gate: torch.Tensor) -> None:
        self._gate = gate

    def __mul__(self, up: torch.Tensor) -> Gated:
        return Gated(self._gate, up)
