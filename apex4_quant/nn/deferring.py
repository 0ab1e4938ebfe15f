"""Norms and activation functions that leave their work to the quantizer behind them.

During a call of a decoder layer, the RMSNorm in front of quantized linears returns a `Normed` in the place of a tensor, and the
activation function of a gated MLP a `Gate`, whose product with `up` is a `Gated` (fused_inputs.py). They do so only

* where nothing but quantized linears reads the result, which models/families.py says,
* where these compute with kernels, and x is of a dtype that the kernels read,
* and where nothing observes it (observers.py): a hook, an adapter or a `forward` of somebody else gets tensors.

Whether that is so is asked in every call of the layer. Everywhere else the modules return tensors as ever.

The module's `forward` is set on the instance, and only where no other stands there; what is taken away again is only ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.operands import HALVES
from .call_scope import CallScope
from .fused_inputs import Gate, Normed
from .linear import Apex4Linear
from .observers import Observers, has_own_forward

ATTRIBUTE = "apex4_deferring"  # of the module


class Deferring:
    """Of one module, whose `forward` it is. `attach` says in whose calls, and who reads what is made of the output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._scope: CallScope | None = None
        self._key = 0
        self._readers: tuple[Apex4Linear, ...] = ()
        self._observers: tuple[Observers, ...] = ()
        setattr(module, ATTRIBUTE, self)
        module.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor | Normed | Gate:
        """In the place of the module's own."""
        raise NotImplementedError

    def class_forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = type(self.module).forward(self.module, x)
        return y

    def attach(self, layer: nn.Module, names: Sequence[str], readers: Sequence[Apex4Linear]) -> None:
        """Only `readers` read, during a call of `layer`, what is made of the module's output.

        `names` are the module and its readers, relative to the layer.
        """
        if self._scope is None:
            self._scope = CallScope.of(layer)
            self._key = self._scope.new_key()
        self._readers += tuple(readers)
        self._observers += (Observers(layer, names, self.module),)

    def detach(self) -> None:
        self._scope = None
        delattr(self.module, ATTRIBUTE)
        if self._is_the_forward():
            del self.module.forward  # else accelerate holds ours behind its own: it computes what the class's does

    def applies(self, x: torch.Tensor) -> bool:
        """Whether to return what is deferred, in this call of the layer."""
        call = None if self._scope is None else self._scope.current()
        if call is None or x.dtype not in HALVES:
            return False
        if self._key not in call.kept:  # experts have one activation function in common: it is asked once a call
            call.kept[self._key] = self._nobody_else_reads()
        applies: bool = call.kept[self._key]
        return applies

    def _nobody_else_reads(self) -> bool:
        if not self._is_the_forward():
            return False
        for observers in self._observers:
            if observers.there_are():
                return False
        return all(reader.kernel is not None for reader in self._readers)

    def _is_the_forward(self) -> bool:
        return getattr(self.module.__dict__.get("forward"), "__self__", None) is self


def _may_set_forward(module: nn.Module) -> bool:
    """Whether nobody else has put a `forward` on the module. One of ours may be left: accelerate held it as we detached."""
    return has_own_forward(module) or isinstance(getattr(module.__dict__["forward"], "__self__", None), Deferring)


class _DeferredNorm(Deferring):
    """RMSNorm(x) * (gain + offset)."""

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        super().__init__(module)
        self._eps, self._offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor | Normed:
        if self.module.weight.dtype == x.dtype and self.applies(x):
            return Normed(self.module, x, self._eps, self._offset)
        return self.class_forward(x)


class _DeferredSilu(Deferring):
    def forward(self, x: torch.Tensor) -> torch.Tensor | Gate:
        # torch.compile does not trace products of objects with tensors, and makes one kernel of SiLU(gate) * up by itself.
        if not torch.compiler.is_compiling() and self.applies(x):
            return Gate(x)
        return self.class_forward(x)


def defer_norm(layer: nn.Module, name: str, offset: float, readers: Sequence[str]) -> None:
    """Let the RMSNorm `name` of a decoder layer, which only `readers` read, be computed by their quantizer.

    `readers` are names of Apex4Linear, relative to the layer. `offset` is added to the stored gain.
    """
    norm = layer.get_submodule(name)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if isinstance(eps, float) and _may_set_forward(norm) and _is_usual(norm, eps, offset):
        _DeferredNorm(norm, eps, offset).attach(layer, (name, *readers), _linears(layer, readers))


@torch.no_grad()
def _is_usual(norm: nn.Module, eps: float, offset: float) -> bool:
    """Whether the module computes what the kernel does: tried out, as class names say nothing of it."""
    gain = getattr(norm, "weight", None)
    if not isinstance(gain, torch.Tensor) or gain.device.type == "meta" or gain.dim() != 1:
        return False
    x = torch.linspace(-3, 5, 2 * len(gain), device=gain.device).reshape(2, -1)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + gain.float())
    return torch.allclose(type(norm).forward(norm, x).float(), expected, rtol=1e-2, atol=1e-5)


def defer_gating(layer: nn.Module, mlp: str) -> None:
    """Let SiLU(gate) * up of the gated MLP `mlp` be computed by the quantizer of its `down_proj`, the only reader."""
    module = layer.get_submodule(mlp)
    act_fn = getattr(module, "act_fn", None)
    if not isinstance(act_fn, nn.Module) or not hasattr(module, "gate_proj"):
        return
    if not isinstance(act_fn, nn.SiLU) and type(act_fn).__name__ != "SiLUActivation":
        return
    deferring: Any = getattr(act_fn, ATTRIBUTE, None)  # experts have one activation function in common
    if deferring is None:
        if not _may_set_forward(act_fn):
            return
        deferring = _DeferredSilu(act_fn)
    down_proj = f"{mlp}.down_proj"
    deferring.attach(layer, (f"{mlp}.act_fn", down_proj), _linears(layer, (down_proj,)))


def _linears(layer: nn.Module, names: Sequence[str]) -> list[Apex4Linear]:
    modules = [layer.get_submodule(name) for name in names]
    return [module for module in modules if isinstance(module, Apex4Linear)]
