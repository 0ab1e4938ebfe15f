"""The quantized linear layer: tensors in the checkpoint's layout, arithmetic from `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import Apex4Error
from .kernels import torch_backend
from .number_format import BLOCK, LEARNED, SHARED
from .quant_config import LinearFormat


class Apex4Linear(nn.Module):
    """y = W4A4(x) + bias. Parameters, as stored: `weight_packed` uint8, `weight_scale` float16, `bias` or None, and
    `input_transform` float16 if this linear stores the dense transform of its input (`take_transform_from`: another)."""

    def __init__(self, format: LinearFormat, bias: bool, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.format = format
        self.in_features, self.out_features = format.in_features, format.out_features

        def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_packed = parameter(format.packed_shape, torch.uint8)
        self.weight_scale = parameter(format.scale_shape, torch.float16)
        self.bias = parameter((format.out_features,), dtype) if bias else None
        shape = format.transform_shape
        self.input_transform = parameter(shape, torch.float16) if shape else None
        self._transform_owner: tuple[Apex4Linear, ...] = ()  # a tuple hides it from nn.Module: it is no child

    @classmethod
    def from_codes(
        cls,
        format: LinearFormat,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        matrix: torch.Tensor | None = None,
    ) -> Apex4Linear:
        """Pack int8 codes [N, padded K] and float16 scales [N, G]; `matrix` if this linear stores its transform."""
        module = cls(format, bias is not None, bias.dtype if bias is not None else torch.float32, device="meta")
        module.weight_packed = nn.Parameter(format.layout.pack(codes), requires_grad=False)
        module.weight_scale = nn.Parameter(format.layout.pack_scales(scales), requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if module.input_transform is not None:
            assert matrix is not None
            of_all = matrix[:1].clone() if format.transform == SHARED else matrix
            module.input_transform = nn.Parameter(of_all, requires_grad=False)
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
            matrix=self.transform_matrix(),
        )

    def take_transform_from(self, owner: Apex4Linear) -> None:
        """Use the dense transform that `owner`, which reads the same input, stores."""
        self._transform_owner = (owner,)

    def transform_matrix(self) -> torch.Tensor | None:
        """The learned transform of the input by block, float16 [padded K / 128, 128, 128], or None."""
        if self.format.transform not in LEARNED:
            return None
        owner = self._transform_owner[0] if self._transform_owner else self
        matrix = owner.input_transform
        if matrix is not None and matrix.device.type == "meta":
            # accelerate has offloaded the owner's tensors, and brings them back only while the owner itself runs.
            offloaded = getattr(getattr(owner, "_hf_hook", None), "weights_map", None)
            matrix = offloaded["input_transform"] if offloaded is not None else None
        if matrix is None:
            raise Apex4Error("a linear is run without the dense transform of its input: load the model as a whole")
        matrix = matrix.to(self.weight_scale.device)
        return matrix.repeat(self.format.padded_k // BLOCK, 1, 1) if self.format.transform == SHARED else matrix

    def require_legal(self, name: str) -> None:
        """Raise Apex4Error naming the tensor if a code is -8 or a scale is not positive and finite."""
        if self.format.layout.has_forbidden_code(self.weight_packed):
            raise Apex4Error(f"{name}.weight_packed holds the code -8, which is never written: the file is damaged")
        scale = self.weight_scale.float()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise Apex4Error(f"{name}.weight_scale holds a zero, negative or non-finite scale: the file is damaged")
        if self.input_transform is not None and not bool(torch.isfinite(self.input_transform).all()):
            raise Apex4Error(f"{name}.input_transform holds NaN or infinity: the file is damaged")

    def _apply(self, fn: Any, recurse: bool = True) -> Apex4Linear:
        # model.to(torch.bfloat16) must not touch the scales: their 11-bit mantissa is part of the format.
        # The same holds for the transform: the weights were multiplied by the inverse of exactly these numbers.
        exact = {name: getattr(self, name) for name in ("weight_scale", "input_transform")}
        # .data, not the Parameter: nn.Module changes that in place
        before = {name: tensor.data for name, tensor in exact.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float16:
                setattr(self, name, nn.Parameter(data.to(now.device), requires_grad=False))
        return self

    def extra_repr(self) -> str:
        group = self.format.group_size
        return f"in={self.in_features}, out={self.out_features}, group={group}, layout={self.format.layout.name}"
