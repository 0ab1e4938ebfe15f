"""The quantized linear layer: tensors in the checkpoint's layout, arithmetic from `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import Apex4Error
from .kernels import torch_backend
from .layouts import has_forbidden_code
from .quant_config import LinearFormat


class Apex4Linear(nn.Module):
    """y = W4A4(x) + bias. Parameters, as stored: `weight_packed` uint8, `weight_scale` float16, `bias` or None."""

    def __init__(self, format: LinearFormat, bias: bool, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.format = format
        self.in_features, self.out_features = format.in_features, format.out_features

        def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_packed = parameter(format.packed_shape, torch.uint8)
        self.weight_scale = parameter(format.scale_shape, torch.float16)
        self.bias = parameter((format.out_features,), dtype) if bias else None

    @classmethod
    def from_codes(
        cls, format: LinearFormat, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> Apex4Linear:
        """Pack int8 codes [N, padded K] and float16 scales [N, G]."""
        module = cls(format, bias is not None, bias.dtype if bias is not None else torch.float32, device="meta")
        module.weight_packed = nn.Parameter(format.layout.pack(codes), requires_grad=False)
        module.weight_scale = nn.Parameter(format.layout.pack_scales(scales), requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return module

    def codes(self) -> torch.Tensor:
        """int8 [N, padded K]."""
        return self.format.layout.unpack(self.weight_packed, self.out_features)

    def scales(self) -> torch.Tensor:
        """float16 [N, G]."""
        return self.format.layout.unpack_scales(self.weight_scale, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_backend.linear(
            x,
            self.codes(),
            self.scales(),
            self.bias,
            clip=self.format.activation_clip,
            hadamard=self.format.transform == "hadamard128",
        )

    def require_legal(self, name: str) -> None:
        """Raise Apex4Error naming the tensor if a code is -8 or a scale is not positive and finite."""
        if has_forbidden_code(self.weight_packed):
            raise Apex4Error(f"{name}.weight_packed holds the code -8, which is never written: the file is damaged")
        scale = self.weight_scale.float()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise Apex4Error(f"{name}.weight_scale holds a zero, negative or non-finite scale: the file is damaged")

    def _apply(self, fn: Any, recurse: bool = True) -> Apex4Linear:
        # model.to(torch.bfloat16) must not touch the scales: their 11-bit mantissa is part of the format.
        scale = self.weight_scale.data  # not the Parameter: nn.Module changes its .data in place
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float16:
            self.weight_scale = nn.Parameter(scale.to(self.weight_scale.device), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        group = self.format.group_size
        return f"in={self.in_features}, out={self.out_features}, group={group}, layout={self.format.layout.name}"
