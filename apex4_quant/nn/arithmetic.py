"""What the quantized linears of a loaded model compute with: for tables, JSON and records."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from .linear import Apex4Linear


class Arithmetic(TypedDict):
    """`activation_bits`: 4, 8 or both; `kernels`: formats of the activations, "reference" for PyTorch operations.

    Both are sorted, and empty for a model that is not quantized.
    """

    activation_bits: list[int]
    kernels: list[str]


def arithmetic_of(model: nn.Module) -> Arithmetic:
    """Of a model that was prepared for its device."""
    linears = [module for module in model.modules() if isinstance(module, Apex4Linear)]
    return {
        "activation_bits": sorted({linear.activation_bits for linear in linears}),
        "kernels": sorted({linear.kernel or "reference" for linear in linears}),
    }
