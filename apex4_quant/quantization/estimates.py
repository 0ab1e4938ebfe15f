"""What a run will take, from shapes alone and some short timings: memory, seconds, room on the disk. `preview` is --dry-run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from ..calib.hessian import HessianAccumulator, panels
from ..calib.probes import PROBE_ROWS
from ..distillation.distill import STEP_TOKENS
from ..format.layout_name import LayoutName
from ..format.layouts import get_layout
from ..format.number_format import BITS, BLOCK
from ..format.quant_config import LinearFormat
from ..format.transform_kind import TransformKind
from ..hardware.devices import DTYPES
from ..hardware.memory import MemoryBudget, resident_now
from ..kernels import torch_backend
from ..kernels.torch_backend import quantize_transformed
from ..models.families import expert_of
from ..models.layer_runner import LayerRunner, batch_tokens
from ..models.source import ModelSource
from ..recipes import Importance, Rounding
from ..rounding.activation_clip import ACTIVATION_CLIP_RATIOS, CLIP_SEARCH_ROWS
from ..rounding.gptq import quantize_weight_gptq
from ..rounding.nearest import search_scales
from ..transforms.learned_transform import learn_transform
from .calibration import windows_needed
from .distilling import windows_read
from .layer import MEASURED_ROWS
from .memory import MemoryAccount, MemoryEstimate, Windows, fit
from .plan import Plan, PlannedLinear, plan_as_dict, plan_of
from .predictions import GRADIENT_TOKENS, gradient_bytes_on_disk
from .run_state import seconds_to_keep
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
    """Everything --dry-run shows, from headers alone (and some short timings). Raises UsageError, also where the `budget` of
    memory is too small, or Apex4Error."""
    source = ModelSource(settings.model)
    resolved = settings.resolve(source)
    plan = plan_of(source, resolved)
    dtype = DTYPES[resolved.dtype]
    LayerRunner(source, resolved.device, dtype)  # refuses tensors that are not those of the model
    count = windows_needed(plan, resolved)
    windows = Windows(count, resolved.seq_len, count)
    account, resident = MemoryAccount(source, plan, windows, dtype, resolved.device), resident_now()
    kept_to = fit(account, budget or MemoryBudget(), resident, resolved.device)
    at_once = kept_to.experts_at_once if kept_to.experts_at_once < account.experts else None
    seconds = estimate_seconds(source, plan, count * resolved.seq_len, resolved.device, at_once)
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
    distilling = 0
    if plan.recipe.distill_steps:  # its state is four float32 numbers a parameter, beside its text
        distilling = 16 * sum(linear.elements for linear in plan.linears)
        distilling += 4 * windows[1] * sum(windows_read(plan.recipe, windows[1]))
    return plan.bytes_after + 2 * streams * hidden + kept + distilling


@dataclass(frozen=True)
class Rates:
    """Seconds, on this machine: of a multiply-add of a quantized linear and of a float32 product, of an element whose scale
    is searched, of a block in a step of learning its transform, of a column that is rounded once those before it are, and of an
    element of an activation that makes up for the rounding of others.

    On a GPU small work takes as long as the calls that start it, and products of 16-bit numbers are faster: `input_once` is of
    an input whose transform is learned, `step_once` of a step whatever the number of blocks, `column_row` of a row of a column,
    `half` of a multiply-add of 16-bit numbers (None: as of float32), `moment` of one of a Hessian (likewise), `byte` of a byte
    between host and GPU, `call` of an operation that is small.
    """

    linear: float
    product: float
    scale: float
    step: float
    column: float
    activation: float = 0.0
    input_once: float = 0.0
    step_once: float = 0.0
    column_row: float = 0.0
    half: float | None = None
    moment: float | None = None
    byte: float = 0.0
    call: float = 0.0


def estimate_seconds(
    source: ModelSource, plan: Plan, tokens: int, device: str, experts_at_once: int | None = None
) -> tuple[float, float]:
    """(least, most), from short measurements on this machine."""
    least, most = (
        sum(seconds_by_part(source, plan, tokens, device, rates, experts_at_once).values())
        for rates in _rates_here(device, torch.get_num_threads())
    )
    return least, most


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: `least` on a machine that does nothing else, `typical` as it was."""

    least: float
    typical: float

    def per(self, count: float) -> Timing:
        return Timing(self.least / count, self.typical / count)


TIMED_CALLS = 3
# A machine so busy that a call takes longer than this many times its best says nothing about a run of minutes.
MOST_BUSY = 4.0


def timing_of(walls: Sequence[float], computing: Sequence[float] | None = None) -> Timing:
    """From the wall-clock seconds of several calls and, on a CPU, what the process computed in them.

    What a process computed does not grow while others have its cores: where that is less than the shortest call, it is
    what the call takes on a free machine. Of the calls the median counts, at most MOST_BUSY times the least.
    """
    least = min(walls) if computing is None else min(min(walls), min(computing))
    return Timing(least, min(max(least, statistics.median(walls)), MOST_BUSY * least))


@dataclass(frozen=True)
class Clock:
    """What times calls: the wall's seconds, and those that this process's threads computed together."""

    wall: Callable[[], float] = time.perf_counter
    computed: Callable[[], float] = time.process_time

    def timing(self, device: str, function: Callable[[], Any]) -> Timing:
        walls, computing = [], []
        function()  # allocates, and starts the threads
        for _ in range(TIMED_CALLS):
            started, computed = self.wall(), self.computed()
            function()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            walls.append(self.wall() - started)
            computing.append((self.computed() - computed) / torch.get_num_threads())
        return timing_of(walls, None if device.startswith("cuda") else computing)


STEPS_TIMED = (2, 8)  # of learning: what is done once is the same in both


def measured_rates(device: str, clock: Clock | None = None) -> tuple[Rates, Rates]:
    """The least, and as the machine was."""
    if device.startswith("cuda"):
        return _rates_of_gpu(device, clock or Clock())
    size, clock = 1024, clock or Clock()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(device)
    codes, scales = torch.ones(size, size, dtype=torch.int8, device=device), torch.ones(size, 8, device=device).half()
    blocks, square = weight[:, : 2 * BLOCK], weight[:BLOCK, :BLOCK]
    format = LinearFormat(BLOCK, BLOCK, BLOCK, get_layout(LayoutName.ROWMAJOR), TransformKind.NONE, 1.0)
    factor, feedback = torch.eye(BLOCK, device=device), torch.zeros(size // BLOCK, BLOCK, BLOCK, device=device)
    once, more = (clock.timing(device, partial(learn_transform, blocks, [blocks], steps)) for steps in STEPS_TIMED)
    steps = STEPS_TIMED[1] - STEPS_TIMED[0]
    learning = Timing(  # not below what the longer one would be if nothing were done once
        max(more.least - once.least, more.least / 2), max(more.typical - once.typical, more.typical / 2)
    ).per(2 * steps)
    timings = {
        "linear": clock.timing(device, lambda: torch_backend.linear(weight, codes, scales)).per(size**3),
        "product": clock.timing(device, lambda: weight @ weight).per(size**3),
        "scale": clock.timing(device, lambda: search_scales(weight, BLOCK)).per(size**2),
        "step": learning,
        "column": clock.timing(device, lambda: quantize_weight_gptq("", square, format, factor)).per(BLOCK),
        "activation": clock.timing(device, lambda: quantize_transformed(weight, BLOCK, 1.0, feedback)).per(size**2),
    }
    return (
        Rates(**{name: timing.least for name, timing in timings.items()}),
        Rates(**{name: timing.typical for name, timing in timings.items()}),
    )


GPU_SIZE = 4096  # channels and outputs of what is timed on a GPU: as in a large model
GPU_STEPS = (2, 42)  # of learning; in some of them an inverse is computed
GPU_CHANNELS = (256, GPU_SIZE)  # of the inputs whose transforms are learned
GPU_ROWS = (512, GPU_SIZE)  # of the weights whose columns are rounded
GPU_COLUMNS = 1024  # of these
GPU_CALLS = 200  # small operations, one after the other


def _rates_of_gpu(device: str, clock: Clock) -> tuple[Rates, Rates]:
    """From work of the size that a large model has, and from a small one, which says what a call takes."""
    size = GPU_SIZE
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    half = weight.bfloat16()
    here = torch.empty(2**22, dtype=torch.bfloat16, pin_memory=device.startswith("cuda"))
    format = LinearFormat(size, GPU_COLUMNS, BLOCK, get_layout(LayoutName.ROWMAJOR), TransformKind.NONE, 1.0)
    factor, feedback = torch.eye(GPU_COLUMNS, device=device), torch.zeros(size // BLOCK, BLOCK, BLOCK, device=device)
    some, moments, small = half[: size // 2], HessianAccumulator(), torch.zeros(32, device=device)
    learning = {
        (channels, steps): clock.timing(
            device, partial(learn_transform, weight[:, :channels], [weight[:, :channels]], steps)
        )
        for channels in GPU_CHANNELS
        for steps in GPU_STEPS
    }
    rounding = {
        rows: clock.timing(
            device,
            partial(quantize_weight_gptq, "", weight[:rows, :GPU_COLUMNS], replace(format, out_features=rows), factor),
        )
        for rows in GPU_ROWS
    }
    product = clock.timing(device, lambda: weight @ weight).per(size**3)
    sixteen = clock.timing(device, lambda: half @ half).per(size**3)
    scale = clock.timing(device, lambda: search_scales(weight, BLOCK)).per(size**2)
    copied = clock.timing(device, lambda: here.to(device, non_blocking=True)).per(here.nbytes)
    computed = sum((stop - start) * stop for start, stop in panels(size))
    moment = clock.timing(device, lambda: moments.add(some)).per(len(some) * computed)
    activation = clock.timing(device, lambda: quantize_transformed(weight, BLOCK, 1.0, feedback)).per(size**2)
    call = clock.timing(device, lambda: [small.add_(1.0) for _ in range(GPU_CALLS)]).per(GPU_CALLS)

    def rates(which: str) -> Rates:
        def of(timing: Timing) -> float:
            seconds: float = getattr(timing, which)
            return seconds

        (few, many), (short, long), (less, more) = GPU_CHANNELS, GPU_STEPS, GPU_ROWS
        steps = {
            channels: max(0.0, of(learning[channels, long]) - of(learning[channels, short])) / (long - short)
            for channels in GPU_CHANNELS
        }
        block = max(0.0, steps[many] - steps[few]) * BLOCK / (many - few)
        once = max(0.0, steps[few] - block * few / BLOCK)
        row = max(0.0, of(rounding[more]) - of(rounding[less])) / (more - less) / GPU_COLUMNS
        return Rates(
            linear=of(sixteen),
            product=of(product),
            scale=of(scale),
            step=block,
            column=max(0.0, of(rounding[less]) / GPU_COLUMNS - row * less),
            input_once=max(0.0, of(learning[many, short]) - short * steps[many]),
            step_once=once,
            column_row=row,
            activation=of(activation),
            half=of(sixteen),
            moment=of(moment),
            byte=of(copied),
            call=of(call),
        )

    return rates("least"), rates("typical")


@cache
def _rates_here(device: str, threads: int) -> tuple[Rates, Rates]:
    """Once a process: more than one preview is asked for by programs only."""
    return measured_rates(device)


BEGINNING = 1.5  # seconds: the model without weights, the text as tokens
BEGINNING_ON_GPU = 9.0  # seconds more: the GPU's own, its libraries', kernels that are loaded; on a slow processor
READING = 2e-9  # seconds a byte of weights: checksums, NaN, and once more layer by layer
KEEPING = 1e-9  # seconds a byte of hidden states on the disk, most of which pass while the next layer is worked on
WINDOW = 2048  # tokens, as by default: of others there are more or fewer
# Operations on a GPU: of a linear, which is packed and compared with what it was; of a batch on its way through a layer, and
# through an expert; of a window forwards and back.
CALLS_OF_A_LINEAR, CALLS_OF_A_LAYER, CALLS_OF_AN_EXPERT, CALLS_BACK = 400, 150, 12, 600


def seconds_by_part(
    source: ModelSource, plan: Plan, tokens: int, device: str, rates: Rates, experts_at_once: int | None = None
) -> dict[str, float]:
    """Of a run on so many tokens, what each kind of work takes. K are inputs, N outputs of a linear, T tokens."""
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
    searched: dict[tuple[int, int], list[PlannedLinear]] = {}
    for linear in linears if recipe.search_clip else ():
        if linear.format.activation_bits == BITS:
            searched.setdefault((linear.layer, linear.input_group), []).append(linear)
    by_gradients, gptq = recipe.importance is Importance.GRADIENTS, recipe.rounding is Rounding.GPTQ
    half = rates.product if rates.half is None else rates.half
    moment = rates.product if rates.moment is None else rates.moment
    # A GPU runs a linear again for every later input of its layer and once at the end; a CPU remembers most of it.
    passes = 1.25 if device == "cpu" else 3
    parts = {"passes": rates.linear * passes * of_tokens}
    steps = recipe.transform_steps * (rates.step * sum(learned.values()) / BLOCK + rates.step_once * len(learned))
    parts["transforms"] = steps + rates.input_once * len(learned)
    parts["clips"] = rates.product * sum(_products_of_clips(readers, by_gradients) for readers in searched.values())
    parts["scales"] = rates.scale * elements
    # Exact, and as it is quantized.
    parts["errors"] = (rates.product + rates.linear) * MEASURED_ROWS * elements
    parts |= _making_up(plan, rates, tokens * passes if device == "cpu" else 0, by_gradients)
    parts["files"] = BEGINNING + READING * source.total_bytes
    states = tokens * int(source.config["hidden_size"]) * DTYPES["bfloat16"].itemsize * (2 if recipe.gptaq else 1)
    if device != "cpu":
        parts["files"] += BEGINNING_ON_GPU + READING * plan.bytes_after
        parts["linears"] = CALLS_OF_A_LINEAR * rates.call * len(linears)
        stages = sum(len(source.family.stages(source.config, layer)) for layer in range(source.num_layers))
        # Hidden states go to the GPU for every stage while it computes, and come back from the last pass.
        parts["states"] = rates.byte * states * source.num_layers
        # A pass for every stage, up to it, and one through all; calls and what they start go on beside each other.
        batches = -(-tokens // batch_tokens(1, True)) * (stages / 2 + source.num_layers)
        of_experts = 0 if experts is None else experts.count(source.config) * CALLS_OF_AN_EXPERT
        parts["passes"] = max(parts["passes"], rates.call * batches * (CALLS_OF_A_LAYER + of_experts))
    if by_gradients:
        # Forwards; back through every layer, for what enters it and for its linears: each again forwards, and two products.
        head = int(source.config["vocab_size"]) * int(source.config["hidden_size"])
        some = min(tokens, GRADIENT_TOKENS)
        parts["gradients"] = half * some * (7 * elements + 3 * head)
        parts["gradients"] += rates.call * CALLS_BACK * -(-some // WINDOW) * 2 * source.num_layers
    if gptq:
        # A good half of K^2 a token and input for the Hessian; Cholesky, its inverse; N K^2 a linear, column by column.
        parts["Hessians"] = moment * 0.6 * sum(seen(expert) * k * k for (_, _, expert), k in inputs.items())
        parts["factors"] = rates.product * sum(k**3 for k in inputs.values())
        columns = sum(linear.format.padded_k for linear in linears)
        rows = sum(linear.elements for linear in linears) * rates.column_row
        parts["rounding"] = (1 + recipe.refinement) * (rates.product * of_columns + rates.column * columns + rows)
    if recipe.distill_steps:  # forwards of both models, and back through one: of every step
        parts["distilling"] = rates.linear * 4 * recipe.distill_steps * STEP_TOKENS * elements
        # Token by token, which waits for memory.
        parts["writing"] = rates.linear * 4 * recipe.distill_own_tokens * elements
    if recipe.gptaq:  # the original's linears, a second matrix a token, its products with factors and weights
        parts["original"] = rates.product * (
            3 * of_tokens + of_columns + sum((seen(expert) + 2 * k) * k * k for (_, _, expert), k in inputs.items())
        )
    if (
        experts is not None and experts_at_once is not None
    ):  # both stages of a layer, up to the router, once more for each
        dense = sum(linear.elements for linear in linears if expert_of(linear.name) is None)
        portions = -(-experts.count(source.config) // experts_at_once)
        parts["portions"] = rates.linear * 2 * (portions - 1) * tokens * dense
    work = sum(seconds for part, seconds in parts.items() if part != "files")
    # Those that enter the first layer are kept while nothing is worked on, others meanwhile, and not behind every layer.
    waited = max(0.0, KEEPING * states - work / source.num_layers)
    apart = seconds_to_keep() - waited  # of work, from one keeping to the next
    often = min(source.num_layers - 1, work / apart) if apart > 0 else source.num_layers - 1
    parts["keeping"] = KEEPING * states + often * waited
    return parts


def _products_of_clips(readers: list[PlannedLinear], by_gradients: bool) -> float:
    """Multiply-adds: W^T W or g^T g and an error for each ratio, or where W or g has few rows their products alone. Of clip ratios of
    blocks, blocks of W^T W alone."""
    width, rows = readers[0].format.padded_k, PROBE_ROWS if by_gradients else _outputs(readers)
    looked_at = len(ACTIVATION_CLIP_RATIOS) * CLIP_SEARCH_ROWS
    if readers[0].format.transform.has_block_clips:
        return width * BLOCK * (rows + looked_at)
    return width * (width * (rows + looked_at) if rows > width else rows * looked_at)


def _outputs(linears: list[PlannedLinear]) -> int:
    return sum(linear.format.out_features for linear in linears)


def _making_up(plan: Plan, rates: Rates, tokens: float, by_gradients: bool) -> dict[str, float]:
    """Of inputs with error feedback: what it is made of, in float64, and rounding with it, of so many `tokens` among others."""
    inputs: dict[tuple[int, int], list[PlannedLinear]] = {}
    for linear in plan.linears:
        if linear.format.transform.has_feedback:
            inputs.setdefault((linear.layer, linear.input_group), []).append(linear)
    made = rounded = 0.0
    for linears in inputs.values():
        width = linears[0].format.padded_k
        rows = PROBE_ROWS if by_gradients else _outputs(linears)
        searched = len(ACTIVATION_CLIP_RATIOS) * CLIP_SEARCH_ROWS if plan.recipe.search_clip else 0
        made += rows * width * BLOCK
        rounded += width * (tokens + searched + MEASURED_ROWS * len(linears))
    return {"feedback": 2 * rates.product * made + rates.activation * rounded}
