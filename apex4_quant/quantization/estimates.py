"""What a run will take, from shapes alone and two short timings: memory, seconds, room on the disk. `preview` is --dry-run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calib.probes import PROBE_ROWS, rows_to_learn_from
from ..distillation.distill import STEP_TOKENS
from ..format.number_format import BLOCK
from ..hardware.devices import DTYPES
from ..kernels import torch_backend
from ..models.families import expert_of
from ..models.layer_runner import HEAD_TOKENS, LayerRunner
from ..models.replaying import KEPT_BYTES
from ..models.source import ModelSource
from ..recipes import Importance, Rounding
from ..rounding.nearest import search_scales
from ..transforms.learned_transform import INPUT_ROWS_PER_STEP, WEIGHT_ROWS_KEPT, WEIGHT_ROWS_PER_STEP
from .calibration import windows_needed
from .collector import EXPERT_ROWS
from .distilling import distilling_bytes
from .plan import Plan, plan_as_dict, plan_of
from .predictions import GRADIENT_TOKENS, gradient_bytes_on_disk, gradient_windows
from .settings import QuantizeSettings, ResolvedSettings


@dataclass(frozen=True)
class Preview:
    """What --dry-run shows."""

    plan: Plan
    source: ModelSource
    settings: ResolvedSettings
    peak_memory: int  # bytes
    seconds: tuple[float, float]  # on a machine that does nothing else, and as busy as it was while it was timed

    def as_dict(self) -> dict[str, Any]:
        return plan_as_dict(self.plan, self.source) | {
            "settings": self.settings.as_dict(),
            "peak_memory_estimate": self.peak_memory,
            "seconds_estimate": round(self.seconds[0], 1),
            "seconds_estimate_if_busy": round(self.seconds[1], 1),
        }


def preview(settings: QuantizeSettings | ResolvedSettings) -> Preview:
    """Everything --dry-run shows, from headers alone (and two short timings). Raises UsageError or Apex4Error."""
    source = ModelSource(settings.model)
    resolved = settings.resolve(source)
    plan = plan_of(source, resolved)
    dtype = DTYPES[resolved.dtype]
    LayerRunner(source, resolved.device, dtype)  # refuses tensors that are not those of the model
    tokens = windows_needed(plan, resolved) * resolved.seq_len
    peak = estimate_peak_memory(source, plan, tokens, resolved.seq_len, dtype.itemsize)
    return Preview(plan, source, resolved, peak, estimate_seconds(source, plan, tokens, resolved.device))


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


def estimate_peak_memory(source: ModelSource, plan: Plan, tokens: int, seq_len: int, compute_bytes: int) -> int:
    """Bytes of tensors alive at the worst moment: one layer, its largest linear's float32 working copies, a batch,
    the Hessians that are collected together with the factors of one, the rows kept of experts' inputs, what a dense
    transform is learned from, and the calibration hidden states (before and after the layer, its attention's outputs,
    and what is kept of a last linear's inputs).
    For GPTAQ the original layer and its hidden states are there too, and a second matrix per Hessian."""
    hidden = int(source.config["hidden_size"])
    layer = max(sum(source.infos[n].bytes for n in source.layer_tensors(i)) for i in range(source.num_layers))
    widest = max(max(linear.format.padded_k, linear.format.out_features) for linear in plan.linears)
    outer = max(source.infos[name].bytes for name in source.outer_tensors)
    streams = 2 if plan.recipe.gptaq else 1
    stream = tokens * hidden * compute_bytes
    states = streams * (3 * stream + min(max(KEPT_BYTES, stream), tokens * widest * compute_bytes))
    quantizing = (
        streams * (layer + 16 * seq_len * widest)
        + 12 * max(linear.elements for linear in plan.linears)
        + _rounding_bytes(plan)
        + _learning_bytes(plan, tokens)
        + _gradient_bytes(source, plan, tokens, seq_len, widest, compute_bytes)
        + _collected_bytes(source, plan, compute_bytes)
    )
    predicting = 0  # the head as stored and in float32, and logits with what goes back through them
    if plan.recipe.importance is Importance.GRADIENTS:
        vocabulary = int(source.config["vocab_size"])
        predicting = outer + 4 * vocabulary * hidden + 16 * HEAD_TOKENS * vocabulary
    rewriting = 0  # the layer in float32, before anything is collected, and loaded
    if plan.recipe.rotation or plan.recipe.diagonal:
        rewriting = 3 * layer + 16 * seq_len * widest
    return max(max(quantizing, rewriting, predicting, 2 * outer) + states, distilling_bytes(plan))


def _rounding_bytes(plan: Plan) -> int:
    """Matrices K x K that GPTQ has of one input at once, in float32."""
    if plan.recipe.rounding is not Rounding.GPTQ:
        return 0
    return (4 if plan.recipe.refinement else 3) * 4 * max(linear.format.padded_k for linear in plan.linears) ** 2


def _learning_bytes(plan: Plan, tokens: int) -> int:
    """What a transform is learned from: rows of inputs and weights, twice, and a dozen matrices by block."""
    learned = [linear.format for linear in plan.linears if linear.format.transform.is_learned]
    rows = 2 * (2 * WEIGHT_ROWS_KEPT) + 12 * BLOCK
    return max(
        (4 * f.padded_k * (rows + 2 * min(tokens, rows_to_learn_from(f.in_features))) for f in learned), default=0
    )


def _gradient_bytes(source: ModelSource, plan: Plan, tokens: int, seq_len: int, widest: int, compute_bytes: int) -> int:
    """Rows by input, gradients that leave and enter a layer, and what a backward pass of one window needs."""
    if plan.recipe.importance is not Importance.GRADIENTS:
        return 0
    inputs = {(linear.layer, linear.input_group): linear.format.padded_k for linear in plan.linears}
    rows = sum(inputs.values()) // source.num_layers * min(tokens, PROBE_ROWS)
    leaving = 12 * gradient_windows(tokens // seq_len, seq_len) * seq_len * int(source.config["hidden_size"])
    heads = int(source.config.get("num_attention_heads") or 1)
    return leaving + 4 * rows + compute_bytes * (4 * heads * seq_len**2 + 16 * seq_len * widest)


def _collected_bytes(source: ModelSource, plan: Plan, compute_bytes: int) -> int:
    """What one stage's statistics take at most: a Hessian per input, and for experts a shared one and rows too."""
    matrices = (2 if plan.recipe.gptaq else 1) if plan.recipe.rounding is Rounding.GPTQ else 0
    most = 0
    for layer in range(source.num_layers):
        readers: dict[tuple[int, int | None], int] = {}
        for linear in plan.of_layer(layer):
            readers[linear.input_group, expert_of(linear.name)] = linear.format.padded_k
        first = 0
        for stage in source.family.stages(source.config, layer):
            last = first + len(stage)
            of_stage = {reader: k for reader, k in readers.items() if first <= reader[0] < last}
            first = last
            experts = [k for (_, expert), k in of_stage.items() if expert is not None]
            widths = [*of_stage.values(), max(experts)] if experts else list(of_stage.values())
            kept = 2 * EXPERT_ROWS * sum(experts) * compute_bytes
            most = max(most, kept + sum(matrices * 4 * k * k for k in widths))
    return most


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
