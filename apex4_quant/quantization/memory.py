"""The memory of a run: what it will take, from shapes alone, and how it keeps to a budget.

A run has one decoder layer in memory. The tensors of its worst moments, K the padded inputs and N the outputs of a linear:

    predicting    the head in float32, and logits with what goes back through them
    gradients     the layer, and the graph of one window through it
    collecting    the layer, a batch on its way through it, the Hessians K x K of a stage, and rows of what is read
    deciding      the Hessians; what a transform is learned from; sums for its error feedback; W^T W, K x K, for the activation clip,
                  or its blocks for those of blocks
    factoring     a Hessian and two more K x K: its factor (rounding/gptq.py)
    rounding      a Hessian if codes are gone over, its factor, and some N x K

Those stand on the device. On the host there are the layer as it is stored, and the calibration text's hidden states before
and after it; where these are too many, they stay on the disk (models/states.py). Where the Hessians of all experts of a layer are
too many, experts are collected in portions (collector.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..calib.probes import PROBE_ROWS, rows_to_learn_from
from ..errors import UsageError
from ..format.number_format import BLOCK
from ..format.storage import format_bytes
from ..hardware.memory import MemoryBudget
from ..models.families import expert_of
from ..models.layer_runner import HEAD_TOKENS, batch_tokens
from ..models.replaying import KEPT_BYTES
from ..models.source import ModelSource
from ..recipes import Importance, Rounding
from ..rounding.activation_clip import CLIP_SEARCH_ROWS
from ..transforms.error_feedback import ROWS_AT_ONCE
from ..transforms.learned_transform import WEIGHT_ROWS_KEPT
from .collector import EXPERT_ROWS
from .distilling import distilling_bytes
from .plan import Plan, PlannedLinear
from .predictions import gradient_windows


@dataclass(frozen=True)
class Windows:
    """The calibration text of a process: `count` windows of `length` tokens, `of_all` those of all processes."""

    count: int
    length: int
    of_all: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the worst moment: `gpu` on the device, 0 on a CPU; `host` without, and `states` of, hidden states."""

    gpu: int
    host: int
    states: int
    streamed: int  # what is there of the states where they stay on the disk

    def on_host(self, streamed: bool) -> int:
        return self.host + (self.streamed if streamed else self.states)


class MemoryAccount:
    """What a run has at most, of tensors: without what Python, torch and a GPU's driver take.

    `experts`: how many a layer of the model has, 0 if it has none.
    """

    def __init__(self, source: ModelSource, plan: Plan, windows: Windows, dtype: torch.dtype, device: str) -> None:
        self._source, self._plan, self._windows, self._dtype = source, plan, windows, dtype
        self._account = _Account(source, plan, windows, dtype.itemsize, device.startswith("cuda"))
        numbers = {expert_of(linear.name) for linear in plan.linears} - {None}
        self.experts = len(numbers)

    def estimate(self, experts_at_once: int | None = None) -> MemoryEstimate:
        """Where statistics are there of so many experts of a layer together; None: of all."""
        account, windows, itemsize = self._account, self._windows, self._dtype.itemsize
        outer = max(self._source.infos[name].bytes for name in self._source.outer_tensors)
        stream = windows.tokens * account.hidden * itemsize
        widest = windows.tokens * account.widest * itemsize
        remembered = 0 if account.on_gpu else min(max(KEPT_BYTES, stream), widest)
        states = 2 * pinned(stream) if account.on_gpu else 3 * stream
        # On a GPU weights of the next layer are there too, unless states are on the disk.
        streams = account.streams * (states + remembered) + account.read_ahead
        at_once = 2 * account.streams * batch_tokens(windows.length, account.on_gpu) * account.hidden * itemsize
        working, distilling = account.working(experts_at_once), distilling_bytes(self._plan)
        if not account.on_gpu:
            return MemoryEstimate(0, max(working, 2 * outer, distilling), streams, at_once)
        # The layer as it is stored, its shard on the way to the disk, or the embedding; gradients rest there in float32.
        resting = account.layer + account.shard + account.leaving
        return MemoryEstimate(max(working, distilling), max(resting, 2 * outer), streams, at_once)


def pinned(size: int) -> int:
    """What so many bytes take in pinned memory, which comes in powers of two."""
    return 1 << (size - 1).bit_length()


class _Account:
    """Of one run. Bytes everywhere."""

    def __init__(self, source: ModelSource, plan: Plan, windows: Windows, itemsize: int, on_gpu: bool) -> None:
        self.source, self.plan, self.recipe, self.windows = source, plan, plan.recipe, windows
        self.itemsize, self.on_gpu = itemsize, on_gpu
        self.hidden = int(source.config["hidden_size"])
        self.streams = 2 if plan.recipe.gptaq else 1
        self.widest = max(max(linear.format.padded_k, linear.format.out_features) for linear in plan.linears)
        self.layer = max(
            sum(source.infos[name].elements * itemsize for name in source.layer_tensors(index))
            for index in range(source.num_layers)
        )
        self.read_ahead = on_gpu * max(
            sum(pinned(source.infos[name].elements * itemsize) for name in source.layer_tensors(index))
            for index in range(source.num_layers)
        )
        # In pinned memory (hardware/devices.py), which torch keeps for the next one.
        self.shard = on_gpu * max(
            sum(pinned(linear.format.stored_bytes) for linear in plan.of_layer(index))
            for index in range(source.num_layers)
        )
        self.by_gradients = plan.recipe.importance is Importance.GRADIENTS
        tokens = gradient_windows(windows.of_all, windows.length) * windows.length
        share = -(-tokens * windows.count // windows.of_all)
        # As they are kept, in float32, and those by what enters the layer, piece by piece and as a whole.
        self.leaving = (2 + 4 + 8) * share * self.hidden if self.by_gradients else 0

    def working(self, experts_at_once: int | None) -> int:
        stages = self._stages(experts_at_once)
        moments = [self._collecting(stages), self._predicting()]
        if self.by_gradients:
            moments.append(self._gradients())
        if (
            self.recipe.rotation or self.recipe.diagonal
        ):  # the layer in float32, before anything is collected, and loaded
            moments.append(3 * max(self.layer, 1) * max(1, 4 // self.itemsize) // 2 + self._batch())
        moments += [self._of_input(linears, max(stages)) for linears in self._inputs()]
        return max(moments)

    def _inputs(self) -> list[list[PlannedLinear]]:
        """The linears of each input, and of each expert: what is decided and rounded together."""
        found: dict[tuple[int, int, int | None], list[PlannedLinear]] = {}
        for linear in self.plan.linears:
            found.setdefault((linear.layer, linear.input_group, expert_of(linear.name)), []).append(linear)
        return list(found.values())

    def _batch(self) -> int:
        """A batch on its way through a layer: a few tensors of its widest linears, one in float32."""
        tokens = batch_tokens(self.windows.length, self.on_gpu)
        unpacked = 0 if self.on_gpu else 5 * max(linear.elements for linear in self.plan.linears)
        return self.streams * (tokens * self.widest * (3 * self.itemsize + 8) + unpacked)

    def _predicting(self) -> int:
        if not self.by_gradients:
            return 0
        vocabulary = int(self.source.config["vocab_size"])
        head = vocabulary * self.hidden
        stored = 0 if self.on_gpu else head * self.itemsize
        return stored + 4 * head + 16 * HEAD_TOKENS * vocabulary + (0 if self.on_gpu else self.leaving)

    def _gradients(self) -> int:
        """The layer in the dtype of its products, and what goes back through one window."""
        heads = int(self.source.config.get("num_attention_heads") or 1)
        length = self.windows.length
        itemsize = 4 if not self.on_gpu else self.itemsize  # a CPU computes in float32 here
        graph = itemsize * (4 * heads * length**2 + 16 * length * self.widest)
        widened = 0 if itemsize == self.itemsize else 2 * self.layer
        return self.layer + widened + graph + self._gradient_rows() + (0 if self.on_gpu else self.leaving)

    def _gradient_rows(self) -> int:
        """Of a layer's inputs, in float32."""
        if not self.by_gradients:
            return 0
        most = 0
        for layer in range(self.source.num_layers):
            inputs = {
                linear.input_group: linear.format.padded_k
                for linear in self.plan.of_layer(layer)
                if expert_of(linear.name) is None
            }
            most = max(most, 4 * min(self.windows.of_all * self.windows.length, PROBE_ROWS) * sum(inputs.values()))
        return most

    def _collecting(self, stages: list[int]) -> int:
        """Hessians, and rows kept, of the stage that has most."""
        return self.streams * self.layer + self._batch() + self._gradient_rows() + max(stages)

    def _stages(self, experts_at_once: int | None) -> list[int]:
        """Of each stage of each layer, what is collected of it together."""
        return [
            sum(self._statistics(k, rows) for k, rows in stage)
            for layer in range(self.source.num_layers)
            for stage in self._read_in(layer, experts_at_once)
        ]

    def _statistics(self, width: int, rows: int) -> int:
        matrices = self.streams if self.recipe.rounding is Rounding.GPTQ else 0
        return matrices * 4 * width**2 + rows * width * self.itemsize

    def _read_in(self, layer: int, experts_at_once: int | None) -> list[list[tuple[int, int]]]:
        """Of each stage of a layer, the widths of what is read and how many rows of it are kept."""
        readers: dict[tuple[int, int | None], PlannedLinear] = {}
        for linear in self.plan.of_layer(layer):
            readers.setdefault((linear.input_group, expert_of(linear.name)), linear)
        stages, first = [], 0
        for stage in self.source.family.stages(self.source.config, layer):
            last = first + len(stage)
            here = {reader: linear for reader, linear in readers.items() if first <= reader[0] < last}
            first = last
            found = [(linear.format.padded_k, self._rows(linear)) for linear in here.values()]
            if any(expert is not None for _, expert in here):
                if experts_at_once is not None and experts_at_once < len(found):
                    found = sorted(found, reverse=True)[:experts_at_once]
                found.append((max(width for width, _ in found), PROBE_ROWS))  # of all tokens
            stages.append(found)
        return stages

    def _rows(self, linear: PlannedLinear) -> int:
        if expert_of(linear.name) is not None:
            return 2 * EXPERT_ROWS
        most = rows_to_learn_from(linear.format.in_features) if linear.format.transform.is_learned else PROBE_ROWS
        return min(most, self.windows.of_all * self.windows.length)

    def _of_input(self, linears: list[PlannedLinear], collected: int) -> int:
        """Deciding, factoring, rounding. The layer is counted as it was before: what is rounded is small. `collected`: with
        an expert, statistics of others are there."""
        width = linears[0].format.padded_k
        largest = max(linear.elements for linear in linears)
        square, rows = 4 * width**2, self._rows(linears[0])
        gptq = self.recipe.rounding is Rounding.GPTQ
        is_expert = expert_of(linears[0].name) is not None
        hessians = collected if is_expert else self._statistics(width, rows)
        inputs = 4 * rows * width
        deciding = 12 * largest
        if linears[0].format.transform.is_learned:
            deciding = 8 * largest + 4 * width * (2 * rows + 2 * (2 * WEIGHT_ROWS_KEPT) + 12 * BLOCK)
        if self.recipe.search_clip:
            # W^T W, or with clip ratios of blocks its blocks, and what rounding some rows needs.
            searching = square
            if linears[0].format.transform.has_block_clips:
                searching = 4 * width * (BLOCK + 6 * CLIP_SEARCH_ROWS)
            deciding = max(deciding, searching + 12 * largest)
        if linears[0].format.transform.has_feedback:  # moments in float64 and what G is made of, and some rows
            deciding = max(deciding, 12 * largest + 8 * width * (8 * BLOCK + 2 * ROWS_AT_ONCE))
        factoring = (2 + (self.streams - 1)) * square if gptq else 0
        rounding = (1 if gptq else 0) * square + (32 if self.recipe.refinement else 24) * largest
        return (
            self.streams * self.layer + self._gradient_rows() + hessians + inputs + max(deciding, factoring, rounding)
        )


@dataclass(frozen=True)
class MemoryPlan:
    """How a run keeps to its budget: whether hidden states stay on the disk, and of how many experts of a layer statistics
    are there together (all, or fewer; 0 where there are none). `expected`: with that."""

    budget: MemoryBudget
    streamed: bool
    experts_at_once: int
    expected: MemoryEstimate


def fit(account: MemoryAccount, budget: MemoryBudget, resident: int, device: str) -> MemoryPlan:
    """The way that takes the least time of those that keep to the budget: states on the disk cost less than a pass more over
    the text for a portion of the experts. `resident` is what the process has before the run.

    Raises UsageError, with the numbers, where the budget is too small.
    """
    experts = account.experts
    sizes = sorted({-(-experts // passes) for passes in range(1, experts + 1)}, reverse=True) or [0]
    for size in sizes:
        expected = account.estimate(size or None)
        if budget.gpu is not None and device.startswith("cuda") and expected.gpu > budget.gpu:
            continue
        for streamed in (False, True):
            if budget.host is None or resident + expected.on_host(streamed) <= budget.host:
                return MemoryPlan(budget, streamed, size, expected)
    least = account.estimate(sizes[-1] or None)
    portions = " one expert at a time and" if experts else ""
    if budget.gpu is not None and device.startswith("cuda") and least.gpu > budget.gpu:
        computed = " one expert at a time" if experts else ""
        raise UsageError(
            f"--memory allows {format_bytes(budget.gpu)} of the GPU, and a layer with what is computed of it{computed} needs "
            f"about {format_bytes(least.gpu)}: allow more, use --device cpu, or a recipe that needs less (rtn)"
        )
    assert budget.host is not None
    raise UsageError(
        f"--memory allows {format_bytes(budget.host)} of the host, and a run needs about "
        f"{format_bytes(resident + least.on_host(True))} ({format_bytes(resident)} of them the program itself) with"
        f"{portions} hidden states on the disk: allow more"
    )
