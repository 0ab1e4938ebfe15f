"""Inputs that are computed where they are quantized: RMSNorm(x) and SiLU(gate) * up, each one kernel with the quantizer.

Inside a decoder layer the norm in front of quantized linears returns a `Normed` in the place of a tensor, and in a gated
MLP the activation function a `Gate`, whose product with `up` is a `Gated`. The quantized linears that read them know
what they are. Nobody else does, and that is intended: these are no tensors, so that a model that does anything else with
them stops with an error and never goes on with a wrong number. Outside a layer's call, and where no kernel computes,
norm and activation function return tensors as ever. Results are rounded where the modules' own are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..kernels import ops

if TYPE_CHECKING:
    from .linear import Apex4Linear

Pair = tuple[torch.Tensor, torch.Tensor]


class Deferred:
    """What quantized linears ask of an input: its shape, dtype and device, its codes, and if need be itself."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def _is_like(self, x: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device

    def tensor(self) -> torch.Tensor:
        raise NotImplementedError

    def quantize(self, *how: Any) -> Pair:
        """Codes and scales. `how`: the arguments of `ops.quantize` behind x."""
        raise NotImplementedError

    def linear(self, *weights_and_how: Any) -> torch.Tensor:
        """y [M, n]. The arguments of `ops.linear` behind x."""
        raise NotImplementedError


class Normed(Deferred):
    """RMSNorm(x) * (gain + offset), of the module `norm`."""

    def __init__(self, norm: nn.Module, x: torch.Tensor, eps: float, offset: float) -> None:
        self._norm, self._x, self._eps, self._offset = norm, x, eps, offset
        self._is_like(x)

    def tensor(self) -> torch.Tensor:
        return type(self._norm).forward(self._norm, self._x)

    def quantize(self, *how: Any) -> Pair:
        return ops.rms_norm_quantize(*self._operands(), *how)

    def linear(self, *weights_and_how: Any) -> torch.Tensor:
        return ops.rms_norm_linear(*self._operands(), *weights_and_how)

    def _operands(self) -> tuple[Any, ...]:
        return self._x.reshape(-1, self.shape[-1]), self._norm.weight, self._eps, self._offset


class Gated(Deferred):
    """SiLU(gate) * up."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        self._gate, self._up = gate, up
        self._is_like(up)

    def tensor(self) -> torch.Tensor:
        return nn.functional.silu(self._gate) * self._up

    def quantize(self, *how: Any) -> Pair:
        return ops.silu_mul_quantize(*self._operands(), *how)

    def linear(self, *weights_and_how: Any) -> torch.Tensor:
        return ops.silu_mul_linear(*self._operands(), *weights_and_how)

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.shape[-1]
        return self._gate.reshape(-1, width), self._up.reshape(-1, width)


class Gate:
    """SiLU(gate), which waits for `up`."""

    def __init__(self, gate: torch.Tensor) -> None:
        self._gate = gate

    def __mul__(self, up: torch.Tensor) -> Gated:
        return Gated(self._gate, up)


class Deferring:
    """Makes `module` return what is deferred while one of the parents given to `attach` is being called."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        self.readers: tuple[Apex4Linear, ...] = ()
        self.open = False
        self._hooks: tuple[RemovableHandle, ...] = ()
        module.deferring = self
        module.forward = partial(forward, module)

    def attach(self, parent: nn.Module, readers: Sequence[Apex4Linear]) -> None:
        """Only `readers` read, during a call of `parent`, what is made of the module's output."""
        self.readers += tuple(readers)
        self._hooks += (
            parent.register_forward_pre_hook(self._enter),
            parent.register_forward_hook(self._leave, always_call=True),
        )

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        del self.module.deferring, self.module.forward

    def _enter(self, *_: Any) -> None:
        self.open = True

    def _leave(self, *_: Any) -> None:
        self.open = False

    def applies(self, x: torch.Tensor) -> bool:
        if not self.open or x.dtype not in (torch.bfloat16, torch.float16):
            return False
        return all(reader.kernel is not None for reader in self.readers)


def defer_norm(layer: nn.Module, name: str, offset: float, readers: Sequence[nn.Module]) -> None:
    """Let the RMSNorm `name` of a decoder layer, which only `readers` read, be computed by their quantizer."""
    norm = layer.get_submodule(name)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or not _is_usual(norm, eps, offset):
        return
    Deferring(norm, partial(_norm_forward, eps, offset)).attach(layer, readers)


def _norm_forward(eps: float, offset: float, self: Any, x: torch.Tensor) -> torch.Tensor | Normed:
    if self.deferring.applies(x) and self.weight.dtype == x.dtype:
        return Normed(self, x, eps, offset)
    return type(self).forward(self, x)


@torch.no_grad()
def _is_usual(norm: nn.Module, eps: float, offset: float) -> bool:
    """Whether the module computes what the kernel does: tried out, as class names say nothing of it."""
    gain = norm.weight
    if gain.device.type == "meta" or gain.dim() != 1:
        return False
    x = torch.linspace(-3, 5, 2 * len(gain), device=gain.device).reshape(2, -1)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + gain.float())
    return torch.allclose(type(norm).forward(norm, x).float(), expected, rtol=1e-2, atol=1e-5)


def defer_gating(mlp: nn.Module) -> None:
    """Let SiLU(gate) * up of a gated MLP be computed by the quantizer of `down_proj`, its only reader."""
    act_fn = getattr(mlp, "act_fn", None)
    if not isinstance(act_fn, nn.Module) or not hasattr(mlp, "gate_proj"):
        return
    if not isinstance(act_fn, nn.SiLU) and type(act_fn).__name__ != "SiLUActivation":
        return
    deferring = getattr(act_fn, "deferring", None) or Deferring(act_fn, _silu_forward)  # experts have one in common
    deferring.attach(mlp, (mlp.down_proj,))


def _silu_forward(self: Any, x: torch.Tensor) -> torch.Tensor | Gate:
    # torch.compile does not trace products of objects with tensors, and makes one kernel of SiLU(gate) * up by itself.
    if self.deferring.applies(x) and not torch.compiler.is_compiling():
        return Gate(x)
    return type(self).forward(self, x)
