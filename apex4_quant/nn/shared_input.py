"""Linears that read one tensor: it is quantized once, and one GEMM computes what all of them return.

q/k/v and gate/up read the same input, and the model's class calls them one after the other:

    parent(x):  q = q_proj(x);  k = k_proj(x);  v = v_proj(x)        # one GEMM, inside q_proj; k and v are slices of it

The linears stay modules of their own, and the class's forward stays as it is. A SharedInput lives beside the linears
and remembers, *only while their parent is being called*, which tensor was quantized and what is still to be fetched:

* the parent's forward hooks open and close it, so nothing of a call outlives the call, whatever happens in it;
* it answers only for the very tensor object that it saw, which it keeps alive meanwhile, so that no other can take its
  identity, and which was not written to since (autograd counts that, except for inference tensors);
* every result is handed out once; asked again, or for another tensor, it computes anew;
* outside its parent's call a linear computes alone, with its own slice of the weights.

Why not the obvious caches: one keyed by a pointer or an id confuses a tensor with a later one in the same place, sees
no writes, and keeps the last activations alive; forwards of our own for every attention class break with each release of
transformers. This one is right under any order of calls, and at worst computes something twice.

Where every N is a multiple of the layout's tile, the weights lie one behind the other in one tensor, of which each
linear's parameter is a view: no memory is used twice. Where they cannot, the codes are still made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..kernels import dispatch
from ..models.families import Family, InputGroup
from .fused_inputs import Deferred, Deferring, defer_gating, defer_norm
from .linear import Apex4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED_TILE = 64  # output features of a tile in the layouts that kernels read


class SharedInput:
    """The linears `members` of one parent module, which quantize their common input in the same way."""

    def __init__(self, members: tuple[Apex4Linear, ...], fusing: bool = True) -> None:
        """Without `fusing` the members' tensors are left as they are: only the input is quantized once."""
        self.members, self._fusing = members, fusing
        self.stale = True  # the members' tensors are not, or not any more, views of the fused ones
        self._fused: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        self._hooks: tuple[RemovableHandle, ...] = ()
        self._open = False
        self._x: torch.Tensor | Deferred | None = None
        self._version = 0
        self._operands: tuple[torch.Tensor, torch.Tensor] | None = None
        self._outputs: list[torch.Tensor | None] = []  # of the members, until they are fetched
        self._left: tuple[int, ...] = ()  # members whose result nobody has fetched

    def attach(self, parent: nn.Module) -> None:
        self._hooks = (
            parent.register_forward_pre_hook(self._enter),
            parent.register_forward_hook(self._leave, always_call=True),
        )
        for member in self.members:
            member.shared = self

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        for member in self.members:
            member.shared = None

    def _enter(self, *_: Any) -> None:
        if self.stale and not torch.compiler.is_compiling():
            self.fuse()
        self._open = True

    def _leave(self, *_: Any) -> None:
        self._open = False
        self._forget()

    def _forget(self) -> None:
        self._x = self._operands = None
        self._outputs = []
        self._left = ()

    def output_of(self, member: Apex4Linear, x: torch.Tensor | Deferred) -> torch.Tensor | None:
        """What `member` returns for x, or None if it has to compute that alone."""
        if not self._open or not self._can_compute(member, x):
            return None
        place = self._place(member)
        if x is not self._x or place not in self._left or _version(x) != self._version:
            self._compute(member, x)
        self._left = tuple(other for other in self._left if other != place)
        if self._outputs:
            y, self._outputs[place] = self._outputs[place], None
        else:
            assert self._operands is not None
            y = member.multiply(self._operands, x)
        if not self._left:
            self._forget()
        return y

    def _can_compute(self, member: Apex4Linear, x: torch.Tensor | Deferred) -> bool:
        """By PyTorch operations only with all members' tensors at hand: accelerate may have offloaded the others'."""
        return member.computes_with_kernels(x) or all(other.weight_packed.device == x.device for other in self.members)

    def _place(self, member: Apex4Linear) -> int:
        for place, other in enumerate(self.members):
            if other is member:
                return place
        raise AssertionError("not a member")

    def _compute(self, member: Apex4Linear, x: torch.Tensor | Deferred) -> None:
        self._forget()
        if not member.computes_with_kernels(x):
            self._outputs = [*member.references(x.tensor() if isinstance(x, Deferred) else x, self.members)]
        elif self._fused is None or self.stale:
            self._operands = member.quantize(x)
        else:
            y = member.quantize_and_multiply(x, *self._fused, sum(other.out_features for other in self.members))
            self._outputs = [*y.split([other.out_features for other in self.members], -1)]
        self._x, self._version = x, _version(x)
        self._left = tuple(range(len(self.members)))

    @torch.inference_mode(False)  # the first call of a model is often under it, and parameters live on
    def fuse(self) -> None:
        """Put the members' tensors one behind the other, as far as that can be done. Idempotent."""
        self.stale, self._fused = False, None
        if not self._fusing:
            return
        first = self.members[0]
        weights = [member.weight_packed for member in self.members]
        if (
            first.kernel is None
            or any(member.layout.name != first.kernel for member in self.members)
            or any(member.out_features % FUSED_TILE for member in self.members)
            or any(weight.device != weights[0].device or weight.device.type == "meta" for weight in weights)
        ):
            return
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
        for tensor in (packed, scale, bias):
            if tensor is not None:
                # They are weights: a CUDA graph of torch.compile need not copy them into memory of its own.
                torch._dynamo.mark_static_address(tensor)
        self._fused = packed, scale, bias

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
        idle = {"stale": True, "_fused": None, "_open": False, "_x": None, "_operands": None}
        return self.__dict__ | idle | {"_outputs": [], "_left": ()}


def _version(x: torch.Tensor | Deferred) -> int:
    if isinstance(x, Deferred):
        return 0  # made for this call by what is read from here
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version


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


def prepare_model(model: PreTrainedModel, family: Family | None, kernel: str | None = None) -> None:
    """Make every Apex4Linear of a loaded model compute as its device does best, and share inputs where linears do.

    `kernel` is the activation format of the operators on a CPU, for tests; otherwise the device decides.
    """
    for module in model.modules():
        if isinstance(module, Apex4Linear) and module.shared is not None:
            module.shared.detach()
        if isinstance(getattr(module, "deferring", None), Deferring):
            module.deferring.detach()
        if isinstance(module, Apex4Linear) and module.weight_packed.device.type != "meta":
            module.prepare(kernel or dispatch.kernel_format(module.weight_packed.device))
    if family is None:
        return
    config = model.config.to_dict()
    prefix = family.layers
    if model.base_model is model:  # a bare base model's names lack the first part
        prefix = prefix.removeprefix(f"{model.base_model_prefix}.")
    for index, layer in enumerate(model.get_submodule(prefix)):
        groups = family.groups(config, index)
        for parent, members in _readers_of_one_tensor(layer, groups):
            shared = SharedInput(members)
            shared.attach(parent)
            shared.fuse()
        for group in groups:
            readers = [layer.get_submodule(name) for name in group.linears]
            if group.also_read_by or not all(isinstance(reader, Apex4Linear) for reader in readers):
                continue
            if group.norm is not None:
                defer_norm(layer, group.norm, family.norm_offset, readers)
            elif group.producer is not None and group.producer.linear.endswith("up_proj"):
                defer_gating(layer.get_submodule(group.linears[0].rpartition(".")[0]))


def share_input(layer: nn.Module, linears: tuple[str, ...]) -> None:
    """Let `linears` of a decoder layer, which read one tensor, quantize it once. Their own tensors stay as they are."""
    for parent, members in _readers_of_one_tensor(layer, [InputGroup(linears)]):
        SharedInput(members, fusing=False).attach(parent)


def _readers_of_one_tensor(
    layer: nn.Module, groups: Iterable[InputGroup]
) -> Iterator[tuple[nn.Module, tuple[Apex4Linear, ...]]]:
    """The parent and those of its linears that read the same tensor and quantize it alike, where there are several.

    Experts read different rows: the gate and up projections of each are on their own.
    """
    alike: dict[tuple[Any, ...], list[Apex4Linear]] = {}
    for position, group in enumerate(groups):
        for name in group.linears:
            module = layer.get_submodule(name)
            if isinstance(module, Apex4Linear):
                how = module.format
                owner = id(module.transform_owner) if how.transform.is_learned else None
                transform = (how.transform, owner, how.activation_clip)
                key = (name.rpartition(".")[0], position, how.padded_k, how.group_length, transform)
                alike.setdefault(key, []).append(module)
    for key, members in alike.items():
        if len(members) > 1:
            yield layer.get_submodule(key[0]), tuple(members)
