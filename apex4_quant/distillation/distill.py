"""Distillation: the quantized model learns to predict what the original predicts, with the quantizers in the loop.

Learned are codes, weight scales, activation clip ratios, transforms and norm gains. Biases stay: learned, they undid all the
rest on a model that has them (docs/log.md, 2026-11-30).
The loss is KL(original || quantized) over the vocabulary, as a mean over the tokens of windows of text. Every HELD_OUT-th
window is kept out of it; what is taken in the end is the state that was the best on those, and that may be the one before the
first step. Error feedback is in the loop, and worked out anew before every comparison but the first: in the first it is what the
quantized model has.

The rates are relative ones: v is in units of a code, scales and clips are logarithms; but for transforms, whose entries are alike
in all models, and norm gains. Adam, along a cosine.

Unlike all other work on a model this needs it as a whole, twice: BYTES_A_PARAMETER of device memory for every parameter of
the quantized linears, besides the activations of a step of STEP_TOKENS tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from .error_moments import error_moments
from .step import Step, measured
from .student import Distilled, Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_TOKENS = 8192  # of text in a step, in whole windows
HELD_OUT, MOST_HELD_OUT = 16, 32  # every so manieth window of a source, and at most so many
COMPARISONS = 8  # how often the state is measured on the windows that were kept out
FEEDBACK_TOKENS = 16384  # of every source, whose gradients make up error feedback
BYTES_A_PARAMETER = (
    26  # v, its gradient and two moments in float32, the best state, the weights of both models in 16 bits
)
SAVED_EVERY = 600.0  # seconds
LEARNING_RATE = 3e-3  # of v
RELATIVE_RATES = {"v": 1.0, "log_scale": 0.2, "log_clip": 0.2, "matrix": 0.05, "norm": 0.2}
BETAS, EPSILON = (0.9, 0.95), 1e-12
WARM_UP = 0.05  # of all steps
LEAST_RATE = 1e-3

Advance = Callable[[int], object]


def windows_of_step(length: int) -> int:
    return max(1, STEP_TOKENS // length)


@dataclass(frozen=True)
class Text:
    """Windows int64 [S, L] to learn from, by source, which take turns, and those that are kept out of it."""

    sources: tuple[torch.Tensor, ...]
    held_out: torch.Tensor

    @classmethod
    def of(cls, sources: Sequence[torch.Tensor]) -> Text:
        """Each has two windows or more."""
        learned, held_out = [], []
        for windows in sources:
            places = torch.arange(len(windows))
            kept_out = (places % HELD_OUT == min(HELD_OUT, len(windows)) - 1) & (places < HELD_OUT * MOST_HELD_OUT)
            learned.append(windows[~kept_out])
            held_out.append(windows[kept_out])
        return cls(tuple(learned), torch.cat(held_out))

    def to(self, device: torch.device) -> Text:
        return Text(tuple(windows.to(device) for windows in self.sources), self.held_out.to(device))


class Distillation:
    """`steps` steps of learning on `text`. `saved` is what `state` gave, to go on from; `say` is told what is not as it should."""

    def __init__(
        self,
        original: PreTrainedModel,
        student: Student,
        text: Text,
        steps: int,
        seed: int,
        saved: Mapping[str, torch.Tensor] | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._original, self._student, self._steps, self._seed = original, student, steps, seed
        device = original.device
        self._text = text.to(device)
        length = text.held_out.shape[1]
        self._batch = min(windows_of_step(length), sum(map(len, text.sources)))
        self.tokens_a_step = self._batch * length
        self._parameters = student.parameters()
        kinds: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(parameter)
        groups = [{"params": found, "base": LEARNING_RATE * RELATIVE_RATES[kind]} for kind, found in kinds.items()]
        self._optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPSILON, **_fused(device))
        self._gradients = Step(original, student, self._parameters.values(), say)
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
        self._student.take(self._best)
        result = self._student.distilled()
        result.before, result.after = self._before, self._best_loss
        return result

    def state(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on."""
        tensors = {f"best {name}": tensor for name, tensor in self._best.items()}
        tensors |= {f"now {name}": tensor for name, tensor in self._student.tensors().items()}
        for name, parameter in self._parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self._optimizer.state:
                    tensors[f"{moment} {name}"] = self._optimizer.state[parameter][moment]
        tensors["progress"] = torch.tensor([self.step, self._best_loss, self._before], dtype=torch.float64)
        return tensors

    def _restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        step, self._best_loss, self._before = saved["progress"].tolist()
        self.step = int(step)
        now = self._student.tensors()
        self._student.take({name: saved[f"now {name}"] for name in now})
        self._best = {name: saved[f"best {name}"].to(tensor.device, copy=True) for name, tensor in now.items()}
        for name, parameter in self._parameters.items():
            if f"exp_avg {name}" in saved:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step), device=parameter.device),
                    **{m: saved[f"{m} {name}"].to(parameter.device, copy=True) for m in ("exp_avg", "exp_avg_sq")},
                }

    def _learn(self) -> None:
        self._gradients(self._windows_of(self.step))
        share = self.step / self._steps
        rate = min(1.0, (self.step + 1) / (WARM_UP * self._steps)) * 0.5 * (1 + math.cos(math.pi * share))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * max(rate, LEAST_RATE)
        self._optimizer.step()

    def _windows_of(self, step: int) -> torch.Tensor:
        """Sources take turns. Of one all windows come once, in a random order, before one comes again."""
        sources = self._text.sources
        found = []
        for place in range(step * self._batch, (step + 1) * self._batch):
            windows, turn = sources[place % len(sources)], place // len(sources)
            order = _order(len(windows), self._seed + turn // len(windows))
            found.append(windows[order[turn % len(windows)]])
        return torch.stack(found)

    def _compare(self) -> None:
        if self.step and self._student.has_feedback:
            windows = torch.cat([windows[: -(-FEEDBACK_TOKENS // windows.shape[1])] for windows in self._text.sources])
            self._student.renew_feedback(error_moments(self._student, windows, self._batch, self._seed))
        loss = measured(self._original, self._student, self._text.held_out, self._batch)
        if loss < self._best_loss or not self._best:
            self._best_loss = loss
            for name, tensor in self._student.tensors().items():
                self._best.setdefault(name, torch.empty_like(tensor)).copy_(tensor)


def _fused(device: torch.device) -> dict[str, bool]:
    return {"fused": True} if device.type == "cuda" else {"foreach": True}


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63))
