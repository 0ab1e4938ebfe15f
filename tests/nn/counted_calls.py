"""A small model's input and output, and the operators that a call of it runs: for the tests of this folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apex4_quant.models.families import FAMILIES

LLAMA = FAMILIES["LlamaForCausalLM"]
IDS = torch.arange(7)[None] * 5 % 64
Make = Callable[[], Any]


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "apex4":
            self.count[func._opname] += 1
        return func(*args, **kwargs or {})


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits
