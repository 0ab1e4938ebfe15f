"""The quantized model as numbers that can be learned, and what is learned as it is stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..format.quant_config import LinearFormat
from ..transforms.error_feedback import feedback_by_moments
from .trained_linear import TrainedInput, TrainedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedLinear:
    """A quantized linear as it is before: `format` with its activation clip, codes int8, scales float16, and its transform
    float16 if it stores one. `input` is the same for linears that read one input."""

    name: str
    input: tuple[int, int]
    format: LinearFormat
    codes: torch.Tensor
    scales: torch.Tensor
    matrix: torch.Tensor | None


@dataclass
class Distilled:
    """What was learned, by full name: codes and scales of linears, transforms of those that store one, clip ratios, and other
    tensors (norm gains) in the dtype they had. `before` and `after` are KL on the held-out windows."""

    codes: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0


class Student:
    """The quantized model as numbers that can be learned: a copy of the original with `linears` in the place of its own."""

    def __init__(self, original: PreTrainedModel, linears: Iterable[PackedLinear]) -> None:
        # Modules are copied, tensors shared: what is learned has tensors of its own.
        self._model = copy.deepcopy(original, {id(each): each for each in original.parameters()})
        self._model.requires_grad_(False)
        self._linears: dict[str, TrainedLinear] = {}
        self._owners: dict[str, TrainedInput] = {}
        inputs: dict[tuple[int, int], TrainedInput] = {}
        for packed in linears:
            plain = self._model.get_submodule(packed.name)
            assert isinstance(plain, nn.Linear)
            if packed.input not in inputs:
                inputs[packed.input] = TrainedInput(packed.format, packed.matrix, plain.weight.device)
                self._owners[packed.name] = inputs[packed.input]
            trained = TrainedLinear(
                packed.format, inputs[packed.input], packed.codes, packed.scales, plain.weight, plain.bias
            )
            self._model.set_submodule(packed.name, trained)
            self._linears[packed.name] = trained
        self._inputs = list(inputs.values())
        self._norms: dict[str, tuple[nn.Parameter, torch.dtype]] = {}
        for name, module in self._model.named_modules():
            gain = getattr(module, "weight", None)
            if "norm" in name.rpartition(".")[2] and isinstance(gain, nn.Parameter):
                dtype = gain.dtype
                module.weight = nn.Parameter(gain.detach().to(torch.float32, copy=True))
                # Learned in float32, read in the model's dtype: the residual stream keeps that.
                parametrize.register_parametrization(module, "weight", _Cast(dtype), unsafe=True)
                self._norms[f"{name}.weight"] = (module.parametrizations["weight"].original, dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned, by a name that ends with its kind of RELATIVE_RATES."""
        found: dict[str, nn.Parameter] = {}
        for name, linear in self._linears.items():
            found[f"{name}.v"], found[f"{name}.log_scale"] = linear.v, linear.log_scale
        for name, input in self._owners.items():
            if not input.of_tokens:
                found[f"{name}.log_clip"] = input.log_clip
            if input.matrix is not None:
                found[f"{name}.matrix"] = input.matrix
        return found | {f"{name.removesuffix('.weight')}.norm": gain for name, (gain, _) in self._norms.items()}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, L] -> [B, L, V]."""
        self.forget()
        logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    def forget(self) -> None:
        for input in self._inputs:
            input.forget()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the student consists of: what is learned, and the error feedback, which is worked out."""
        found: dict[str, torch.Tensor] = {name: each.detach() for name, each in self.parameters().items()}
        return found | {f"{name}.feedback": each for name, each in self._feedback().items()}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Become what `tensors` of another student, or of this one before, gave."""
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])
        for name, feedback in self._feedback().items():
            self._owners[name].set_feedback(tensors[f"{name}.feedback"].to(feedback.device))

    def _feedback(self) -> dict[str, torch.Tensor]:
        return {name: each.feedback for name, each in self._owners.items() if each.feedback is not None}

    @property
    def has_feedback(self) -> bool:
        """Whether errors of an input are made up for."""
        return bool(self._feedback())

    def renew_feedback(self, error_moments: Mapping[str, torch.Tensor]) -> None:
        """`error_moments` by name, float64 [padded K / 128, 128, 128], of all inputs with feedback."""
        for name in self._feedback():
            self._owners[name].set_feedback(feedback_by_moments(error_moments[name]))

    def logits_and_inputs(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As `logits`; and the transformed inputs [B, L, padded K] that have feedback, before they are rounded, by the name of the
        linear that stores their transform."""
        kept = {name: self._owners[name] for name in self._feedback()}
        for input in kept.values():
            input.keeps_unrounded = True
        try:
            logits = self.logits(ids)
            return logits, {name: input.unrounded for name, input in kept.items() if input.unrounded is not None}
        finally:
            for input in kept.values():
                input.keeps_unrounded = False

    def distilled(self) -> Distilled:
        """As it is to be stored."""
        result = Distilled()
        clips = {input: input.stored()[1] for input in self._inputs}
        for name, linear in self._linears.items():
            codes, scales = linear.stored()
            result.codes[name], result.scales[name], result.clips[name] = codes, scales, clips[linear.input]
        for name, input in self._owners.items():
            matrix, _ = input.stored()
            if matrix is not None:
                result.matrices[name] = matrix
        for name, (gain, dtype) in self._norms.items():
            result.others[name] = gain.detach().to(dtype)
        return result


class _Cast(nn.Module):
    """A tensor in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype)
