"""What a run will take, from shapes alone and two short timings: memory, seconds, room on the disk. `preview` is --dry-run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..distillation.distill import STEP_TOKENS
from ..format.number_format import BLOCK
from ..hardware.devices import DTYPES
from ..hardware.memory import MemoryBudget, resident_now
from ..kernels import torch_backend
from ..models.families import expert_of
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..recipes import Importance, Rounding
from ..rounding.nearest import search_scales
from ..transforms.learned_transform import INPUT_ROWS_PER_STEP, WEIGHT_ROWS_PER_STEP
from .calibration import windows_needed
from .memory import MemoryAccount, MemoryEstimate, Windows, fit
from .plan import Plan, plan_as_dict, plan_of
from .predictions import GRADIENT_TOKENS, gradient_bytes_on_disk
from .settings import QuantizeSettings, ResolvedSettings


@dataclass(frozen=True)
class Preview:
    """What --dry-run shows."""

    plan: Plan
    source: ModelSource
    settings: ResolvedSettings
    memory: MemoryEstimate
    resident: int  # what the program itself takes of the host, bytes
    budget: MemoryBudget
    states_on_disk: bool
    experts_at_once: int | None  # None: all
    disk: int  # bytes, at most
    seconds: tuple[float, float]  # on a machine that does nothing else, and as busy as it was while it was timed

    @property
    def peak_memory(self) -> int:
        """Bytes of tensors, on host and GPU."""
        return self.memory.gpu + self.memory.on_host(self.states_on_disk)

    @property
    def peak_host(self) -> int:
        """Bytes of the process."""
        return self.resident + self.memory.on_host(self.states_on_disk)

    def as_dict(self) -> dict[str, Any]:
        return plan_as_dict(self.plan, self.source) | {
            "settings": self.settings.as_dict(),
            "peak_memory_estimate": self.peak_memory,
            "peak_host_memory_estimate": self.peak_host,
            "peak_gpu_memory_estimate": self.memory.gpu,
            "memory_budget": self.budget.as_dict(),
            "states_on_disk": self.states_on_disk,
            "experts_at_once": self.experts_at_once,
            "disk_estimate": self.disk,
            "seconds_estimate": round(self.seconds[0], 1),
            "seconds_estimate_if_busy": round(self.seconds[1], 1),
        }


def preview(settings: QuantizeSettings | ResolvedSettings, budget: MemoryBudget | None = None) -> Preview:
    """Everything --dry-run shows, from headers alone (and two short timings). Raises UsageError, also where the `budget` of
    memory is too small, or Apex4Error."""
    source = ModelSource(settings.model)
    resolved = settings.resolve(source)
    plan = plan_of(source, resolved)
    dtype = DTYPES[resolved.dtype]
    LayerRunner(source, resolved.device, dtype)  # refuses tensors that are not those of the model
    count = windows_needed(plan, resolved)
    tokens = count * resolved.seq_len
    seconds = estimate_seconds(source, plan, tokens, resolved.device)
    windows = Windows(count, resolved.seq_len, count)
    account, resident = MemoryAccount(source, plan, windows, dtype, resolved.device), resident_now()
    kept_to = fit(account, budget or MemoryBudget(), resident, resolved.device)
    at_once = kept_to.experts_at_once if kept_to.experts_at_once < account.experts else None
    disk = estimate_disk(source, plan, (count, resolved.seq_len), dtype)
    return Preview(
        plan,
        source,
        resolved,
        kept_to.expected,
        resident,
        kept_to.budget,
        kept_to.streamed,
        at_once,
        disk,
        seconds,
    )


def estimate_disk(source: ModelSource, plan: Plan, windows: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a run on windows [S, L] has on the disk at most: the checkpoint, the hidden states that enter and leave a
    layer, for GPTAQ of the original model too, and gradients."""
    streams = 2 if plan.recipe.gptaq else 1
    hidden = windows[0] * windows[1] * int(source.config["hidden_size"]) * dtype.itemsize
    gradients = plan.recipe.importance is Importance.GRADIENTS
    kept = gradient_bytes_on_disk(source, windows, dtype) if gradients else 0
    # The state of a distillation is four float32 numbers a parameter.
    distilling = 16 * sum(linear.elements for linear in plan.linears) if plan.recipe.distill_steps else 0
    return plan.bytes_after + 2 * streams * hidden + kept + distilling


def estimate_seconds(source: ModelSource, plan: Plan, tokens: int, device: str) -> tuple[float, float]:
    """(least, most), from short measurements on this machine: of a quantized linear, and of the scale search."""
    elements = sum(linear.elements for linear in plan.linears)
    multiplies = _multiplies(source, plan, tokens, device)
    least, most = (elements * per_element + multiplies * per_multiply for per_multiply, per_element in _rates(device))
    return least, most


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: `least` on a machine that does nothing else, `typical` as it was."""

    least: float
    typical: float


TIMED_CALLS = 7
# A machine so busy that a call takes longer than this many times its best says nothing about a run of minutes.
MOST_BUSY = 4.0


def timing_of(walls: Sequence[float], computing: Sequence[float] | None = None) -> Timing:
    """From the wall-clock seconds of several calls and, on a CPU, what the process computed in them.

    What a process computed does not grow while others have its cores: where that is less than the shortest call, it is
    what the call takes on a free machine. Of the calls the median counts, at most MOST_BUSY times the least.
    """
    least = min(walls) if computing is None else min(min(walls), min(computing))
    return Timing(least, min(max(least, statistics.median(walls)), MOST_BUSY * least))


def _rates(device: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds a multiply-add of a quantized linear and an element of the scale search: the least, and as it was."""
    size = 1024
    weight = torch.randn(size, size, device=device)
    codes, scales = torch.ones(size, size, dtype=torch.int8, device=device), torch.ones(size, 8, device=device).half()

    def timed(function: Callable[[], Any]) -> Timing:
        walls, computing = [], []
        function()  # allocates, and starts the threads
        for _ in range(TIMED_CALLS):
            started, computed = time.perf_counter(), time.process_time()
            function()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            walls.append(time.perf_counter() - started)
            computing.append((time.process_time() - computed) / torch.get_num_threads())
        return timing_of(walls, None if device.startswith("cuda") else computing)

    product = timed(lambda: torch_backend.linear(weight, codes, scales))
    search = timed(lambda: search_scales(weight, 128))
    return (
        (product.least / size**3, search.least / size**2),
        (product.typical / size**3, search.typical / size**2),
    )


def _multiplies(source: ModelSource, plan: Plan, tokens: int, device: str) -> float:
    """Multiply-adds of a run but for the scale search, which is counted by elements."""
    recipe, linears = plan.recipe, plan.linears
    experts = source.family.experts
    share = 1.0 if experts is None else experts.token_share(source.config)

    def seen(expert: int | None) -> float:
        return tokens if expert is None else tokens * share

    elements = sum(linear.elements for linear in linears)
    of_tokens = sum(seen(expert_of(linear.name)) * linear.elements for linear in linears)
    of_columns = sum(linear.elements * linear.format.padded_k for linear in linears)
    inputs = {(p.layer, p.input_group, expert_of(p.name)): p.format.padded_k for p in linears}
    learned = {(p.layer, p.input_group): p.format.padded_k for p in linears if p.format.transform.is_learned}
    # A GPU runs a linear again for every later input of its layer and once at the end; a CPU remembers most of it.
    multiplies = (1.25 if device == "cpu" else 3) * of_tokens
    rows = 2 * INPUT_ROWS_PER_STEP + 2 * WEIGHT_ROWS_PER_STEP + 5 * BLOCK
    multiplies += recipe.transform_steps * BLOCK * rows * sum(learned.values())
    if recipe.importance is Importance.GRADIENTS:
        # Forwards; back through every layer, for what enters it and for its linears: each again forwards, and two products.
        multiplies += 7 * min(tokens, GRADIENT_TOKENS) * elements
    if (
        recipe.rounding is Rounding.GPTQ
    ):  # a good half of K^2 a token and input for the Hessian, N K^2 a linear for GPTQ
        multiplies += 0.6 * sum(seen(expert) * k * k for (_, _, expert), k in inputs.items())
        multiplies += (1 + recipe.refinement) * of_columns
    # Forwards of both models, and back through one: of every step.
    multiplies += 4 * recipe.distill_steps * STEP_TOKENS * elements
    if recipe.gptaq:  # the original's linears, a second matrix a token, its products with factors and weights
        multiplies += 3 * of_tokens + of_columns
        multiplies += sum((seen(expert) + 2 * k) * k * k for (_, _, expert), k in inputs.items())
    return multiplies
