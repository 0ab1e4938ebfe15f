"""Mixtures of experts with one linear per expert and projection, as everything here wants them.

transformers holds the experts of a layer in two 3-D parameters. `unfuse_experts` replaces that module by one with the
same forward contract whose children are `0.gate_proj`, `0.up_proj`, `0.down_proj`, `1.gate_proj` and so on: ordinary
linears that can be quantized, ignored, named and stored one by one. Router and block stay the class's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn

from ..errors import Apex4Error


class Expert(nn.Module):
    """x [T, H] -> down_proj(act_fn(gate_proj(x)) * up_proj(x)) [T, H]."""

    def __init__(
        self, hidden: int, inner: int, act_fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device="meta")
        self.up_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device="meta")
        self.down_proj = nn.Linear(inner, hidden, bias=False, dtype=dtype, device="meta")
        self.act_fn = act_fn

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What down_proj reads: [T, H] -> [T, I]."""
        y: torch.Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
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
    """The experts of one layer, of sizes E, H and I, on the meta device until weights are loaded."""

    def __init__(
        self, count: int, hidden: int, inner: int, act_fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__(Expert(hidden, inner, act_fn, dtype) for _ in range(count))
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


def unfuse_experts(model: nn.Module) -> None:
    """Put UnfusedExperts, without weights, in the place of every fused experts module of a transformers model.

    Raises Apex4Error for fused experts of a form that is not understood (transposed, with biases, without a gate).
    """
    for name, module in list(model.named_modules()):
        fused = getattr(module, "gate_up_proj", None)
        if not isinstance(fused, nn.Parameter):
            continue
        usual = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
        if fused.dim() != 3 or any(getattr(module, name, value) != value for name, value in usual.items()):
            raise Apex4Error(f"the experts in {name} are of a kind that apex4 does not know: use a newer apex4")
        count, rows, hidden = fused.shape
        model.set_submodule(name, UnfusedExperts(count, hidden, rows // 2, module.act_fn, fused.dtype))
