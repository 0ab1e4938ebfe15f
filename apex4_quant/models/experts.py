"""Mixtures of experts with one linear per expert and projection, as everything here wants them.

transformers holds the experts of a layer in two 3-D parameters. `unfuse_experts` replaces that module by one with the
same forward contract whose children are `0.gate_proj`, `0.up_proj`, `0.down_proj`, `1.gate_proj` and so on: ordinary
linears that can be quantized, ignored, named and stored one by one. Router and block stay the class's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..errors import Apex4Error

# gate [T, I] and up [T, I] -> what down_proj reads.
Gating = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ClampedGating:
    """GPT-OSS: (clamp(up) + 1) * g sigmoid(alpha g), g the gate clamped from above."""

    alpha: float
    limit: float

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class Expert(nn.Module):
    """x [T, H] -> down_proj(act_fn(gate_proj(x)) * up_proj(x)) [T, H]; with a `gating`, that in the place of the product."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        act_fn: Callable[[torch.Tensor], torch.Tensor] | None,
        dtype: torch.dtype,
        bias: bool = False,
        gating: Gating | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype, device="meta")
        self.up_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype, device="meta")
        self.down_proj = nn.Linear(inner, hidden, bias=bias, dtype=dtype, device="meta")
        self.act_fn, self.gating = act_fn, gating

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What down_proj reads: [T, H] -> [T, I]."""
        gate = self.gate_proj(x)
        if self.gating is not None:
            return self.gating(gate, self.up_proj(x))
        assert self.act_fn is not None
        y: torch.Tensor = self.act_fn(gate) * self.up_proj(x)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(self.inner(x))
        return y


class Together(Protocol):
    """What computes all experts at once (nn/experts.py). None: they have to be called one after the other."""

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor | None: ...

    def detach(self) -> None: ...


class UnfusedExperts(nn.ModuleList):
    """The experts of one layer, on the meta device until weights are loaded."""

    def __init__(self, experts: Iterable[Expert]) -> None:
        super().__init__(experts)
        self.together: Together | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H]; top_k_index int64 and top_k_weights, both [T, k] -> the weighted sum [T, H]."""
        if self.together is not None:
            y = self.together(hidden_states, top_k_index, top_k_weights)
            if y is not None:
                return y
        result = torch.zeros_like(hidden_states)
        for expert, tokens, places in routed(top_k_index):
            output = self[expert](hidden_states[tokens]) * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, output.to(result.dtype))
        return result


def routed(top_k_index: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """top_k_index [T, k] -> for every expert that is chosen, in order: its index, its tokens, and their places in k."""
    for expert in top_k_index.unique().tolist():
        places, tokens = torch.where(top_k_index.t() == expert)
        yield expert, tokens, places


# What transformers' experts say of themselves, and whether they are fused [E, outputs, inputs], gate rows first, without
# biases; or the other known kind, which is the opposite in all three.
_USUAL = {"is_concatenated": True, "is_transposed": False, "has_bias": False}


def unfuse_experts(model: nn.Module) -> None:
    """Put UnfusedExperts, without weights, in the place of every fused experts module of a transformers model.

    Raises Apex4Error for fused experts of a form that is not understood.
    """
    for name, module in list(model.named_modules()):
        fused = getattr(module, "gate_up_proj", None)
        if not isinstance(fused, nn.Parameter):
            continue
        form = [getattr(module, key, None) == value for key, value in _USUAL.items()]
        known = len(set(form)) == 1 and fused.dim() == 3 and getattr(module, "has_gate", False)
        if not known or getattr(module, "has_post_expert_norm", False):
            raise _unknown(name)
        usual = all(form)
        count, rows, hidden = fused.shape if usual else (fused.shape[0], fused.shape[2], fused.shape[1])
        act_fn = module.act_fn if usual else None
        gating = None if usual else ClampedGating(module.alpha, module.limit)
        experts = UnfusedExperts(
            Expert(hidden, rows // 2, act_fn, fused.dtype, not usual, gating) for _ in range(count)
        )
        _require_same_gating(name, module, gating or _product(module.act_fn), usual)
        model.set_submodule(name, experts)


def _product(act_fn: Callable[[torch.Tensor], torch.Tensor]) -> Gating:
    return lambda gate, up: act_fn(gate) * up


def _unknown(name: str) -> Apex4Error:
    return Apex4Error(f"the experts in {name} are of a kind that apex4 does not know: use a newer apex4")


@torch.no_grad()
def _require_same_gating(name: str, module: nn.Module, gating: Gating, concatenated: bool) -> None:
    """Raise Apex4Error if the module joins gate and up in another way: tried out, as flags and class names say nothing of it."""
    gate = torch.linspace(-12, 12, 64, dtype=torch.float64, device="cpu").reshape(4, 16)
    up = gate.flip(1) / 3
    joined = torch.cat([gate, up], dim=-1) if concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
    theirs = getattr(module, "_apply_gate", None)
    # Not equal to the bit: a CPU computes exponentials of a row and of a slice by different instructions.
    if theirs is None or not torch.allclose(theirs(joined), gating(gate, up), rtol=1e-9, atol=1e-9):
        raise _unknown(name)
