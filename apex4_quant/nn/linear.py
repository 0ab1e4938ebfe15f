"""The quantized linear layer: tensors in the checkpoint's layout, arithmetic from `kernels`.

The way of an activation through a decoder layer, and the module of each step:

    norm, activation function     deferring.py      return a tensor, or what their readers' quantizer will compute
    the linear's call             linear.py         asks for what was computed with a linear that read the same input before it
    linears of one input          shared_input.py   quantize it once, and multiply once
    quantizer and GEMM            fused_inputs.py   the operators of kernels/ops.py for this kind of input

Imports go the other way: shared_input.py and deferring.py know linear.py, that knows fused_inputs.py. prepare.py puts a whole
model in order. What a call has made so far stands in call_scope.py.

On a GPU that has kernels the tensors are put, once, into the order these read (`prepare`). That order is this process's
affair: `state_dict`, and so `save_pretrained`, gives and takes the tensors in the checkpoint's own layout, so that what
is saved is always what config.json says.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import Apex4Error
from ..format.feedback import block_clips_of, transform_of
from ..format.number_format import BITS, BLOCK
from ..format.quant_config import LinearFormat
from ..format.transform_kind import TransformKind
from ..kernels import dispatch, ops, torch_backend
from ..kernels.activation_quantization import ActivationQuantization, OperatorArguments
from ..kernels.operands import HALVES, TOKEN_FORMAT, fold_scales, layout_of_format
from ..kernels.quantize.configs import prepack_matrix
from ..private_names import is_offloaded, offloaded_tensor
from .fused_inputs import KernelWeights, LinearInput, Plain

# Held while tensors are put in order for the kernels, which the first calls of a model may ask for in several threads.
PREPARING = threading.RLock()


class InputSharing(Protocol):
    """What a linear asks of those that read the same input (shared_input.py)."""

    stale: bool

    def output_of(self, member: Any, x: torch.Tensor | LinearInput) -> torch.Tensor | None: ...

    def detach(self) -> None: ...


class Apex4Linear(nn.Module):
    """y = W4A4(x) + bias, or W4A8(x) + bias. Parameters, as stored: `weight_packed` uint8, `weight_scale` float16, `bias` or
    None, and `input_transform` float16 if this linear stores the dense transform of its input (`take_transform_from`: another).

    `activation_bits` is what it computes with, from when it was prepared for its device; `format.activation_bits` what the
    checkpoint says.
    """

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
        self.layout = format.layout  # of the tensors as they are now
        self.kernel: str | None = None  # the activation format of the kernels that compute, None: PyTorch operations
        self.activation_bits = format.activation_bits
        self.keeps_activation_bits = False  # those of the format, on every device
        self.folded: tuple[torch.Tensor, torch.Tensor] | None = None  # ratio and unit, for kernels of 8-bit activations
        self._in_order = False  # whether the tensors are here, as the kernels read them
        self._prepared_on: torch.device | None = None
        self.float_bias: torch.Tensor | None = None  # what the kernels add
        self.prepacked: dict[torch.dtype, torch.Tensor] = {}  # the dense transform stored here, as kernels read it
        self._quantization: ActivationQuantization | None = None  # for `kernel`
        self.shared: InputSharing | None = None  # with the linears that read the same input

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
            of_all = matrix[:1].clone() if format.transform is TransformKind.SHARED else matrix
            module.input_transform = nn.Parameter(of_all, requires_grad=False)
        return module

    def codes(self) -> torch.Tensor:
        """int8 [N, padded K]."""
        return self.layout.unpack(self.weight_packed, self.out_features)

    def scales(self) -> torch.Tensor:
        """float16 [N, G]."""
        return self.layout.unpack_scales(self.weight_scale, self.out_features)

    def forward(self, x: torch.Tensor | LinearInput) -> torch.Tensor:
        if self._prepared_on != x.device:
            self._prepare_late(x.device)
        if self.shared is not None:
            y = self.shared.output_of(self, x)
            if y is not None:
                return y
        if not self.computes_with_kernels(x.dtype):
            return self.reference(x.tensor() if isinstance(x, LinearInput) else x)
        return input_of(x).linear(self.kernel_weights(), self.quantizer_arguments(x.dtype, x.device))

    def computes_with_kernels(self, dtype: torch.dtype) -> bool:
        """Whether an input of this dtype goes to the operators of kernels/ops.py, not to PyTorch operations."""
        if self.kernel is None:
            return False
        if dtype in HALVES:
            return True
        dispatch.warn_of_dtype(dtype)
        return False

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The layer by PyTorch operations, on any device and in any float dtype."""
        return self.references(x, (self,))[0]

    def references(self, x: torch.Tensor, readers: Sequence[Apex4Linear]) -> list[torch.Tensor]:
        """What `readers`, which quantize x as this linear does, make of it; it is quantized once."""
        return torch_backend.linears(
            x,
            [(reader.codes(), reader.scales(), reader.bias) for reader in readers],
            clip=self.format.activation_clip,
            hadamard=self.format.transform is TransformKind.HADAMARD,
            matrix=self.transform_matrix(),
            activation_bits=self.activation_bits,
        )

    def kernel_weights(self) -> KernelWeights:
        """What the operators multiply by."""
        if self._in_order:
            if self.folded is None:
                return KernelWeights(self.weight_packed, self.weight_scale, None, self.float_bias, self.out_features)
            return KernelWeights(self.weight_packed, *self.folded, self.float_bias, self.out_features)
        # Offloaded: the tensors come anew for every call, in the stored order.
        layout = layout_of_format(self.kernel or "")
        as_stored = self.layout.name == layout.name
        packed = self.weight_packed if as_stored else layout.pack(self.codes())
        unit: torch.Tensor | None = None
        if self.kernel == TOKEN_FORMAT:
            scale, unit = fold_scales(self.scales())
        else:
            scale = self.weight_scale if as_stored else layout.pack_scales(self.scales())
        return KernelWeights(packed, scale, unit, self.float_bias, self.out_features)

    def quantizer_arguments(self, dtype: torch.dtype, device: torch.device) -> OperatorArguments:
        """The last arguments of the operators, for an input of this dtype on this device."""
        assert self._quantization is not None
        matrix = self._kernel_matrix(dtype, device) if self.format.transform.is_learned else None
        return self._quantization.arguments(matrix)

    def _kernel_matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """The learned transform as the operators read it."""
        if device.type != "cuda" or self.quantizes_by_torch:
            return self.transform_matrix()
        owner = self.transform_owner
        if is_offloaded(owner):
            matrix = self.transform_matrix()
            return None if matrix is None else prepack_matrix(matrix, dtype)
        found = owner.prepacked.get(dtype)
        if found is None:
            # dynamo traces no lock. Traced code finds the matrix made, or makes it for one thread.
            with contextlib.nullcontext() if torch.compiler.is_compiling() else PREPARING, torch.inference_mode(False):
                matrix = self.transform_matrix()
                assert matrix is not None
                # One matrix for all blocks is read as one: it stays in the GPU's caches.
                one_for_all = self.format.transform is TransformKind.SHARED
                found = prepack_matrix(matrix[:1] if one_for_all else matrix, dtype)
                owner.prepacked[dtype] = found
        return found

    def arithmetic_on(self, device: torch.device) -> tuple[str | None, int]:
        """What `prepare` takes, as the device does best, or as the format says where this linear keeps to it."""
        bits = self.format.activation_bits
        if not self.keeps_activation_bits and self.format.may_have_eight_bits:
            bits = dispatch.activation_bits(device, bits)
        if bits != self.format.activation_bits:
            dispatch.say_of_eight_bits(device)
        return dispatch.kernel_format(device, bits), bits

    @torch.inference_mode(False)  # what it makes outlives the call that may be under it
    def prepare(self, kernel: str | None, activation_bits: int | None = None) -> None:
        """Compute with the kernels of this activation format, or None: with PyTorch operations, from now on.

        `activation_bits`: those of the format, or for PyTorch operations any; None: as the checkpoint says. The tensors are put
        into the layout that the kernels read, one linear's at a time, in the place of the old ones.
        """
        if activation_bits is None:
            activation_bits = self.format.activation_bits
        if kernel is not None:
            activation_bits = 8 if kernel == TOKEN_FORMAT else 4
        with PREPARING:
            device = self.weight_packed.device
            if kernel is not None and device.type == "cuda":
                ops.prepare(device)
            if kernel is not None and self.layout.name != (layout := layout_of_format(kernel)).name:
                packed, scale = layout.pack(self.codes()), layout.pack_scales(self.scales())
                self.weight_packed = nn.Parameter(packed, requires_grad=False)
                self.weight_scale = nn.Parameter(scale, requires_grad=False)
                self.layout = layout
            self.kernel, self.activation_bits = kernel, activation_bits
            self._renew()
            self._prepared_on = device  # last: until then other threads that call this linear wait for the lock

    def _prepare_late(self, device: torch.device) -> None:
        """For a layer that was made on its device, or comes there for the call only (offloaded by accelerate)."""
        with PREPARING:
            if self._prepared_on == device:  # by another thread meanwhile
                return
            kernel, bits = self.arithmetic_on(device)
            if is_offloaded(self):
                self.kernel, self.activation_bits = kernel, bits
                self._renew()
                self._prepared_on = device
            elif self.weight_packed.device == device:
                self.prepare(kernel, bits)
            if self.quantizes_by_torch:
                dispatch.warn_of_wide_groups([f"a linear ({self.extra_repr()})"], self.format.group_length)

    @torch.inference_mode(False)
    def _renew(self) -> None:
        """After the tensors or the kernel changed: what is derived from them."""
        format = self.format
        self._quantization = None
        if self.kernel is not None:
            hadamard = format.transform is TransformKind.HADAMARD
            in_tokens = self.kernel == TOKEN_FORMAT
            group, clip = (format.padded_k, 1.0) if in_tokens else (format.group_length, format.activation_clip)
            self._quantization = ActivationQuantization(format.padded_k, group, clip, hadamard, self.kernel)
        self.folded = None
        # Tensors of an offloaded linear are not there.
        here = self.kernel is not None and self.weight_scale.device.type != "meta" and not is_offloaded(self)
        self._in_order = here and self.layout.name == layout_of_format(self.kernel or "").name
        if self._in_order and self.kernel == TOKEN_FORMAT:
            self.folded = fold_scales(self.scales())
        bias = self.bias if self.kernel is not None else None
        self.float_bias = None if bias is None or bias.device.type == "meta" else bias.detach().float()
        self.prepacked = {}
        if self.shared is not None:
            self.shared.stale = True

    @property
    def quantizes_by_torch(self) -> bool:
        """Whether this linear's input is quantized by PyTorch operations though it has kernels: none takes such groups."""
        wide = self.format.group_length != BLOCK and self.kernel != TOKEN_FORMAT
        return self.kernel is not None and self.format.transform.is_learned and wide

    def take_transform_from(self, owner: Apex4Linear) -> None:
        """Use the dense transform that `owner`, which reads the same input, stores."""
        self._transform_owner = (owner,)

    @property
    def transform_owner(self) -> Apex4Linear:
        """The linear that stores the dense transform of this one's input."""
        return self._transform_owner[0] if self._transform_owner else self

    def transform_matrix(self) -> torch.Tensor | None:
        """The learned transform of the input by block, float16 [padded K / 128, 128, 128], or None.

        With error feedback, which 8-bit activations do without, [padded K / 128, 184, 128], and with clip ratios
        [padded K / 128, 185, 128].
        """
        if not self.format.transform.is_learned:
            return None
        owner = self.transform_owner
        matrix: torch.Tensor | None = owner.input_transform
        if matrix is not None and matrix.device.type == "meta":
            # accelerate has offloaded the owner's tensors, and brings them back only while the owner itself runs.
            matrix = offloaded_tensor(owner, "input_transform")
        if matrix is None:
            raise Apex4Error("a linear is run without the dense transform of its input: load the model as a whole")
        matrix = matrix.to(self.weight_scale.device)
        if self.activation_bits != BITS:
            matrix = transform_of(matrix)
        return (
            matrix.repeat(self.format.padded_k // BLOCK, 1, 1)
            if self.format.transform is TransformKind.SHARED
            else matrix
        )

    def require_legal(self, name: str) -> None:
        """Raise Apex4Error naming the tensor if a code is -8 or a scale is not positive and finite."""
        if self.layout.has_forbidden_code(self.weight_packed):
            raise Apex4Error(f"{name}.weight_packed holds the code -8, which is never written: the file is damaged")
        scale = self.weight_scale.float()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise Apex4Error(f"{name}.weight_scale holds a zero, negative or non-finite scale: the file is damaged")
        if self.input_transform is not None and not bool(torch.isfinite(self.input_transform).all()):
            raise Apex4Error(f"{name}.input_transform holds NaN or infinity: the file is damaged")
        clips = None if self.input_transform is None else block_clips_of(self.input_transform)
        if clips is not None and not bool((clips > 0).all()):
            raise Apex4Error(f"{name}.input_transform holds a clip ratio that is not positive: the file is damaged")

    def _apply(self, fn: Any, recurse: bool = True) -> Apex4Linear:
        # model.to(torch.bfloat16) must not touch the scales: their 11-bit mantissa is part of the format.
        # The same holds for the transform: the weights were multiplied by the inverse of exactly these numbers.
        exact = {name: getattr(self, name) for name in ("weight_scale", "input_transform")}
        # .data, not the Parameter: nn.Module changes that in place
        before = {name: tensor.data for name, tensor in exact.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        for name, data in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float16:
                setattr(self, name, nn.Parameter(data.to(now.device), requires_grad=False))
        device = self.weight_packed.device
        if device.type != "meta" and self._prepared_on is not None and device != self._prepared_on:
            self.prepare(*self.arithmetic_on(device))
        else:
            self._renew()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout.name != self.format.layout.name:
            layout = self.format.layout
            destination[f"{prefix}weight_packed"] = layout.pack(self.codes())
            destination[f"{prefix}weight_scale"] = layout.pack_scales(self.scales())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored, now = self.format.layout, self.layout
        packed, scale = state_dict.get(f"{prefix}weight_packed"), state_dict.get(f"{prefix}weight_scale")
        if now.name != stored.name and packed is not None and scale is not None:
            state_dict = dict(state_dict)
            state_dict[f"{prefix}weight_packed"] = now.pack(stored.unpack(packed, self.out_features))
            state_dict[f"{prefix}weight_scale"] = now.pack_scales(stored.unpack_scales(scale, self.out_features))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._renew()

    def extra_repr(self) -> str:
        group = self.format.group_size
        bits = "" if self.activation_bits == BITS else f", activations={self.activation_bits} bits"
        return f"in={self.in_features}, out={self.out_features}, group={group}{bits}, layout={self.layout.name}"


def input_of(x: torch.Tensor | LinearInput) -> LinearInput:
    return x if isinstance(x, LinearInput) else Plain(x)
