"""Where a model's numbers stop being finite: an evaluation that is no number is an error, and names the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.load import entered_on
from ..errors import Apex4Error
from ..hardware.dtype_names import wider_than

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def not_finite(model: PreTrainedModel, window: torch.Tensor) -> Apex4Error:
    """The error for a model whose predictions on `window`, int64 [L], are not finite."""
    dtype = str(model.dtype).removeprefix("torch.")
    where = first_not_finite(model, window)
    what = "its predictions are" if where is None else f"the output of {where} is"
    return Apex4Error(f"the model cannot be evaluated in {dtype}, {what} not finite: {wider_than(dtype)}")


@torch.no_grad()
def first_not_finite(model: PreTrainedModel, window: torch.Tensor) -> str | None:
    """The first module, in the order in which calls end, that returns NaN or infinity; None if none does."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and name and any(not bool(torch.isfinite(tensor).all()) for tensor in _floats(output)):
            found.append(name)

    def hook(name: str) -> Any:
        return lambda module, arguments, output: look(name, output)

    hooks = [_register(module, hook(name)) for name, module in model.named_modules()]
    try:
        model(input_ids=window[None].to(entered_on(model)), use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    return found[0] if found else None


def _register(module: nn.Module, hook: Any) -> Any:
    return module.register_forward_hook(hook)


def _floats(output: Any) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
