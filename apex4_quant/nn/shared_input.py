"""Linears that read one tensor: it is quantized once, and one GEMM computes what all of them return.

q/k/v and gate/up read the same input, and the model's class calls them one after the other:

    layer(x):  q = q_proj(x);  k = k_proj(x);  v = v_proj(x)        # one GEMM, inside q_proj; k and v are slices of it

The linears stay modules of their own, and the class's forward stays as it is. A SharedInput stands beside the linears. *Only
during a call of their layer*, and for that call alone (call_scope.py), is it remembered which tensor was quantized and what is
still to be fetched:

* nothing of a call outlives the call, whatever happens in it, and calls in other threads see nothing of it;
* it answers only for the very tensor object that it saw, which it keeps alive meanwhile, so that no other can take its
  identity, and which was not written to since (autograd counts that, except for inference tensors);
* every result is handed out once; asked again, or for another tensor, it computes anew;
* outside its layer's call a linear computes alone, with its own slice of the weights.

Why not the obvious caches: one keyed by a pointer or an id confuses a tensor with a later one in the same place, sees
no writes, and keeps the last activations alive; forwards of our own for every attention class break with each release of
transformers. This one is right under any order of calls, and at worst computes something twice.

Where every N is a multiple of the layout's tile, the weights lie one behind the other in one tensor, of which each
linear's parameter is a view: no memory is used twice. Where they cannot, the codes are still made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..format.layout_name import KERNEL_TILE_N
from ..kernels.operands import Operands, layout_of_format
from ..private_names import mark_static_address, written_count
from .call_scope import CallScope
from .fused_inputs import KernelWeights, LinearInput
from .linear import PREPARING, Apex4Linear, input_of


@dataclass
class _Made:
    """Of one input, in one call: its operands or what the members return, and which of them nobody has fetched yet."""

    x: torch.Tensor | LinearInput
    version: int
    left: set[int]  # members by their place
    outputs: list[torch.Tensor | None] | None = None
    operands: Operands | None = None


class SharedInput:
    """The linears `members`, which quantize their common input in the same way."""

    def __init__(self, members: tuple[Apex4Linear, ...], fusing: bool = True) -> None:
        """Without `fusing` the members' tensors are left as they are: only the input is quantized once."""
        self.members, self._fusing = members, fusing
        self.stale = True  # the members' tensors are not, or not any more, views of the fused ones
        self._fused: KernelWeights | None = None
        self._scope: CallScope | None = None
        self._key = 0

    def attach(self, parent: nn.Module) -> None:
        """Share during each call of `parent`, in which all members are called."""
        self._scope = CallScope.of(parent)
        self._key = self._scope.new_key()
        for member in self.members:
            member.shared = self

    def detach(self) -> None:
        self._scope = None
        for member in self.members:
            member.shared = None

    def output_of(self, member: Apex4Linear, x: torch.Tensor | LinearInput) -> torch.Tensor | None:
        """What `member` returns for x, or None if it has to compute that alone."""
        call = None if self._scope is None else self._scope.current()
        if call is None or not self._can_compute(member, x):
            return None
        if self.stale and not torch.compiler.is_compiling():
            self.fuse()
        place = self._place(member)
        made: _Made | None = call.kept.get(self._key)
        if made is None or made.x is not x or place not in made.left or made.version != _version(x):
            made = call.kept[self._key] = self._compute(member, x)
        made.left.remove(place)
        if not made.left:
            del call.kept[self._key]
        if made.outputs is not None:
            y, made.outputs[place] = made.outputs[place], None
            return y
        assert made.operands is not None
        return input_of(x).multiply(made.operands, member.kernel_weights())

    def _can_compute(self, member: Apex4Linear, x: torch.Tensor | LinearInput) -> bool:
        """By PyTorch operations only with all members' tensors at hand: accelerate may have offloaded the others'."""
        if member.computes_with_kernels(x.dtype):
            return True
        return all(other.weight_packed.device == x.device for other in self.members)

    def _place(self, member: Apex4Linear) -> int:
        for place, other in enumerate(self.members):
            if other is member:
                return place
        raise AssertionError("not a member")

    def _compute(self, member: Apex4Linear, x: torch.Tensor | LinearInput) -> _Made:
        made = _Made(x, _version(x), set(range(len(self.members))))
        fused = self._fused
        if not member.computes_with_kernels(x.dtype):
            made.outputs = [*member.references(x.tensor() if isinstance(x, LinearInput) else x, self.members)]
        elif fused is None or self.stale:
            made.operands = input_of(x).quantize(member.quantizer_arguments(x.dtype, x.device))
        else:
            y = input_of(x).linear(fused, member.quantizer_arguments(x.dtype, x.device))
            made.outputs = [*y.split([other.out_features for other in self.members], -1)]
        return made

    @torch.inference_mode(False)  # the first call of a model is often under it, and parameters live on
    def fuse(self) -> None:
        """Put the members' tensors one behind the other, as far as that can be done. Idempotent, and safe in any thread."""
        with PREPARING:
            if not self.stale:  # another thread was first
                return
            self._fused = self._joined_weights() if self._fusing and self._can_join() else None
            self.stale = False

    def _can_join(self) -> bool:
        first = self.members[0]
        device = first.weight_packed.device
        return first.kernel is not None and all(
            member.layout.name == layout_of_format(first.kernel).name
            and member.out_features % KERNEL_TILE_N == 0
            and member.weight_packed.device == device
            and device.type != "meta"
            for member in self.members
        )

    def _joined_weights(self) -> KernelWeights:
        packed = self._joined("weight_packed")
        scale = self._joined("weight_scale")
        bias = None
        if any(member.float_bias is not None for member in self.members):
            parts = [
                torch.zeros(member.out_features, device=packed.device)
                if member.float_bias is None
                else member.float_bias
                for member in self.members
            ]
            bias = torch.cat(parts)
            for member, part in zip(self.members, bias.split([len(part) for part in parts]), strict=True):
                member.float_bias = None if member.float_bias is None else part
        unit = None
        if self.members[0].folded is not None:
            scale, unit = self._joined_folded()
        for tensor in (packed, scale, unit, bias):
            if tensor is not None:
                mark_static_address(tensor)  # they are weights
        return KernelWeights(packed, scale, unit, bias, sum(member.out_features for member in self.members))

    def _joined_folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The members' ratios, and their units: tensors whose parts the members have afterwards."""
        folded = [member.folded for member in self.members]
        ratios, units = ([pair[which] for pair in folded if pair is not None] for which in (0, 1))
        ratio, unit = torch.cat(ratios), torch.cat(units)
        parts = (tensor.split([len(part) for part in each]) for tensor, each in ((ratio, ratios), (unit, units)))
        for member, *pair in zip(self.members, *parts, strict=True):
            member.folded = pair[0], pair[1]
        return ratio, unit

    def _joined(self, name: str) -> torch.Tensor:
        """The members' parameters `name` in one tensor, whose parts they are afterwards."""
        parameters = [getattr(member, name) for member in self.members]
        tensor = _one_storage(parameters)
        if tensor is None:
            tensor = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, tensor.split([len(p) for p in parameters]), strict=True):
                parameter.data = part
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy of the model the parameters are tensors of their own: it is fused again when it is called.
        return self.__dict__ | {"stale": True, "_fused": None}


def _version(x: torch.Tensor | LinearInput) -> int:
    if isinstance(x, LinearInput):
        return 0  # made for this call by what is read from here
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return written_count(x)


def _one_storage(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The tensor whose consecutive parts these are already, or None."""
    place = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != place or not part.is_contiguous():
            return None
        place += part.numel() * part.itemsize
    first = parts[0].detach()
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
