"""Distillation: the quantized model learns to predict what the original predicts, with the quantizers in the loop.

Learned are codes, weight scales, activation clip ratios, transforms, norm gains and biases: all that is stored of the layers.
The loss is KL(original || quantized) over the vocabulary, as a mean over the tokens of calibration windows. Every
HELD_OUT-th window is kept out of it; what is taken in the end is the state that was the best on those, and that may be the
one before the first step.

The rates are relative ones: v is in units of a code, scales and clips are logarithms. Adam, along a cosine.

Unlike all other work on a model this needs it as a whole, twice: BYTES_A_PARAMETER of device memory for every parameter of
the quantized linears, besides the activations of a step of STEP_TOKENS tokens.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ..format.quant_config import LinearFormat
from .trained_linear import TrainedInput, TrainedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_TOKENS = 8192  # of text in a step, in whole windows
HELD_OUT = 16
COMPARISONS = 8  # how often the state is measured on the windows that were kept out
BYTES_A_PARAMETER = (
    26  # v, its gradient and two moments in float32, the best state, the weights of both models in 16 bits
)
SAVED_EVERY = 600.0  # seconds
LEARNING_RATE = 3e-3  # of v
RELATIVE_RATES = {"v": 1.0, "log_scale": 0.2, "log_clip": 0.2, "matrix": 0.05, "norm": 0.2, "bias": 0.2}
BETAS, EPSILON = (0.9, 0.95), 1e-12
WARM_UP = 0.05  # of all steps
LEAST_RATE = 1e-3

Advance = Callable[[int], object]


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
    tensors (norm gains, biases) in the dtype they had. `before` and `after` are KL on the held-out windows."""

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
        self._model = copy.deepcopy(original)
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
                module.weight = nn.Parameter(gain.detach().float())
                # Learned in float32, read in the model's dtype: the residual stream keeps that.
                parametrize.register_parametrization(module, "weight", _Cast(dtype), unsafe=True)
                self._norms[f"{name}.weight"] = (module.parametrizations["weight"].original, dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is learned, by a name that ends with its kind of RELATIVE_RATES."""
        found: dict[str, nn.Parameter] = {}
        for name, linear in self._linears.items():
            found[f"{name}.v"], found[f"{name}.log_scale"] = linear.v, linear.log_scale
            if linear.bias is not None:
                found[f"{name}.bias"] = linear.bias
        for name, input in self._owners.items():
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

    def distilled(self) -> Distilled:
        result = Distilled()
        clips = {input: input.stored()[1] for input in self._inputs}
        for name, linear in self._linears.items():
            codes, scales = linear.stored()
            result.codes[name], result.scales[name], result.clips[name] = codes, scales, clips[linear.input]
            if linear.bias is not None:
                result.others[f"{name}.bias"] = linear.bias.detach()
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


class Distillation:
    """`steps` steps of learning on token windows int64 [S, L], S at least 2. `saved` is what `state` gave, to go on from."""

    def __init__(
        self,
        original: PreTrainedModel,
        student: Student,
        windows: torch.Tensor,
        steps: int,
        seed: int,
        saved: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._original, self._student, self._steps, self._seed = original, student, steps, seed
        held_out = torch.arange(len(windows)) % HELD_OUT == min(HELD_OUT, len(windows)) - 1
        device = original.device
        self._windows, self._held_out = windows[~held_out].to(device), windows[held_out].to(device)
        self._batch = min(max(1, STEP_TOKENS // windows.shape[1]), len(self._windows))
        self.tokens_a_step = self._batch * windows.shape[1]
        self._parameters = student.parameters()
        kinds: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
        groups = [{"params": found, "base": LEARNING_RATE * RELATIVE_RATES[kind]} for kind, found in kinds.items()]
        self._optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPSILON, foreach=True)
        self.step = 0
        self._best: dict[str, torch.Tensor] = {}
        self._best_loss = math.inf
        self._before = math.nan
        if saved is not None:
            self._restore(saved)

    def run(
        self, advance: Advance, stop: Callable[[], bool], save: Callable[[Mapping[str, torch.Tensor]], None]
    ) -> bool:
        """Do what is left of the steps. False if `stop`, which is asked before every step, said yes: the state was given to
        `save`, as it is from time to time."""
        saved_at = time.monotonic()
        if self.step == 0:
            self._compare()
            self._before = self._best_loss
        while self.step < self._steps:
            if stop() or time.monotonic() - saved_at > SAVED_EVERY:
                save(self.state())
                saved_at = time.monotonic()
                if stop():
                    return False
            self._learn()
            self.step += 1
            advance(1)
            if self.step * COMPARISONS // self._steps > (self.step - 1) * COMPARISONS // self._steps:
                self._compare()
        return True

    def result(self) -> Distilled:
        """The best state."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])
        result = self._student.distilled()
        result.before, result.after = self._before, self._best_loss
        return result

    def state(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on."""
        tensors = {f"best {name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self._parameters.items():
            tensors[f"now {name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self._optimizer.state:
                    tensors[f"{moment} {name}"] = self._optimizer.state[parameter][moment]
        tensors["progress"] = torch.tensor([self.step, self._best_loss, self._before], dtype=torch.float64)
        return tensors

    def _restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        step, self._best_loss, self._before = saved["progress"].tolist()
        self.step = int(step)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(saved[f"now {name}"])
                self._best[name] = saved[f"best {name}"].clone()
                if f"exp_avg {name}" in saved:
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step)),
                        **{m: saved[f"{m} {name}"].to(parameter.device, copy=True) for m in ("exp_avg", "exp_avg_sq")},
                    }

    def _learn(self) -> None:
        ids = self._windows[self._rows_of(self.step)]
        with torch.no_grad():
            wanted = self._original(input_ids=ids, use_cache=False).logits
        logits = self._student.logits(ids)
        total = torch.zeros((), device=logits.device)
        for ours, theirs in zip(logits, wanted, strict=True):  # the vocabulary in float32 for one window at a time
            total = total + checkpoint(_divergence, ours, theirs, use_reentrant=False)
        (total / ids.numel()).backward()
        self._student.forget()
        share = self.step / self._steps
        rate = min(1.0, (self.step + 1) / (WARM_UP * self._steps)) * 0.5 * (1 + math.cos(math.pi * share))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * max(rate, LEAST_RATE)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _rows_of(self, step: int) -> torch.Tensor:
        """Which windows: all of them come once, in a random order, before one comes again."""
        count = len(self._windows)
        places = range(step * self._batch, (step + 1) * self._batch)
        orders = {epoch: _order(count, self._seed + epoch) for epoch in {place // count for place in places}}
        return torch.stack([orders[place // count][place % count] for place in places]).to(self._windows.device)

    @torch.no_grad()
    def _compare(self) -> None:
        loss = 0.0
        for ids in self._held_out.split(self._batch):
            wanted = self._original(input_ids=ids, use_cache=False).logits
            for ours, theirs in zip(self._student.logits(ids), wanted, strict=True):
                loss += float(_divergence(ours, theirs)) / self._held_out.numel()
        self._student.forget()
        if loss < self._best_loss or not self._best:
            self._best_loss = loss
            self._best = {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}


def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63))


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] -> the sum over tokens of KL(theirs || ours), float32."""
    log_q, log_p = torch.log_softmax(ours.float(), -1), torch.log_softmax(theirs.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()
