"""The memory of a run: what it will take, from shapes alone, and how it keeps to a budget.

A run has one decoder layer in memory. The tensors of its worst moments, K the padded inputs and N the outputs of a linear:

    predicting    the head in float32, and logits with what goes back through them
    gradients     the layer, and the graph of one window through it
    collecting    the layer, a batch on its way through it, the Hessians K x K of a stage, and rows of what is read
    deciding      the Hessians; what a transform is learned from; W^T W, K x K, for the activation clip
    factoring     a Hessian and two more K x K: its factor (rounding/gptq.py)
    rounding      a Hessian if codes are gone over, its factor, and some N x K

Those stand on the device. On the host there are the layer as it is stored, and the calibration text's hidden states before
and after it; where these are too many, they stay on the disk (models/states.py).
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
from ..models.layer_runner import BATCH_TOKENS, HEAD_TOKENS
from ..models.replaying import KEPT_BYTES
from ..models.source import ModelSource
from ..recipes import Importance, Rounding
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


def estimate_memory(
    source: ModelSource, plan: Plan, windows: Windows, dtype: torch.dtype, device: str
) -> MemoryEstimate:
    """What a run has at most, of tensors: without what Python, torch and a GPU's driver take."""
    account = _Account(source, plan, windows, dtype.itemsize, device.startswith("cuda"))
    outer = max(source.infos[name].bytes for name in source.outer_tensors)
    stream = windows.tokens * account.hidden * dtype.itemsize
    remembered = 0 if account.on_gpu else min(max(KEPT_BYTES, stream), windows.tokens * account.widest * dtype.itemsize)
    # Pinned memory comes in powers of two.
    states = 2 * (1 << (stream - 1).bit_length()) if account.on_gpu else 3 * stream
    streams = account.streams * (states + remembered)
    at_once = 2 * account.streams * max(BATCH_TOKENS, windows.length) * account.hidden * dtype.itemsize
    working = account.working()
    if not account.on_gpu:
        return MemoryEstimate(0, max(working, 2 * outer, distilling_bytes(plan)), streams, at_once)
    # The layer as it is stored, the packed one on its way to the disk, or the embedding; gradients rest there in float32.
    resting = account.layer + max(linear.format.stored_bytes for linear in plan.linears) + account.leaving
    return MemoryEstimate(max(working, distilling_bytes(plan)), max(resting, 2 * outer), streams, at_once)


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
        self.by_gradients = plan.recipe.importance is Importance.GRADIENTS
        tokens = gradient_windows(windows.of_all, windows.length) * windows.length
        share = -(-tokens * windows.count // windows.of_all)
        # As they are kept, in float32, and those by what enters the layer, piece by piece and as a whole.
        self.leaving = (2 + 4 + 8) * share * self.hidden if self.by_gradients else 0

    def working(self) -> int:
        moments = [self._collecting(), self._predicting()]
        if self.by_gradients:
            moments.append(self._gradients())
        if (
            self.recipe.rotation or self.recipe.diagonal
        ):  # the layer in float32, before anything is collected, and loaded
            moments.append(3 * max(self.layer, 1) * max(1, 4 // self.itemsize) // 2 + self._batch())
        moments += [self._of_input(linears) for linears in self._inputs()]
        return max(moments)

    def _inputs(self) -> list[list[PlannedLinear]]:
        """The linears of each input, and of each expert: what is decided and rounded together."""
        found: dict[tuple[int, int, int | None], list[PlannedLinear]] = {}
        for linear in self.plan.linears:
            found.setdefault((linear.layer, linear.input_group, expert_of(linear.name)), []).append(linear)
        return list(found.values())

    def _batch(self) -> int:
        """A batch on its way through a layer: a few tensors of its widest linears, one in float32."""
        tokens = max(BATCH_TOKENS, self.windows.length)
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

    def _collecting(self) -> int:
        """Hessians, and rows kept, of the stage that has most."""
        return self.streams * self.layer + self._batch() + self._gradient_rows() + max(self._stages())

    def _stages(self) -> list[int]:
        return [
            sum(self._statistics(k, rows) for k, rows in stage)
            for layer in range(self.source.num_layers)
            for stage in self._read_in(layer)
        ]

    def _statistics(self, width: int, rows: int) -> int:
        matrices = self.streams if self.recipe.rounding is Rounding.GPTQ else 0
        return matrices * 4 * width**2 + rows * width * self.itemsize

    def _read_in(self, layer: int) -> list[list[tuple[int, int]]]:
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
                found.append((max(width for width, _ in found), PROBE_ROWS))  # of all tokens
            stages.append(found)
        return stages

    def _rows(self, linear: PlannedLinear) -> int:
        if expert_of(linear.name) is not None:
            return 2 * EXPERT_ROWS
        most = rows_to_learn_from(linear.format.in_features) if linear.format.transform.is_learned else PROBE_ROWS
        return min(most, self.windows.of_all * self.windows.length)

    def _of_input(self, linears: list[PlannedLinear]) -> int:
        """Deciding, factoring, rounding. The layer is counted as it was before: what is rounded is small."""
        width = linears[0].format.padded_k
        largest = max(linear.elements for linear in linears)
        square, rows = 4 * width**2, self._rows(linears[0])
        gptq = self.recipe.rounding is Rounding.GPTQ
        is_expert = expert_of(linears[0].name) is not None
        hessians = max(self._stages()) if is_expert else self._statistics(width, rows)
        inputs = 4 * rows * width
        deciding = 12 * largest
        if linears[0].format.transform.is_learned:
            deciding = 8 * largest + 4 * width * (2 * rows + 2 * (2 * WEIGHT_ROWS_KEPT) + 12 * BLOCK)
        if self.recipe.search_clip:
            deciding = max(deciding, square + 12 * largest)
        factoring = (2 + (self.streams - 1)) * square if gptq else 0
        rounding = (1 if gptq else 0) * square + (32 if self.recipe.refinement else 24) * largest
        return (
            self.streams * self.layer + self._gradient_rows() + hessians + inputs + max(deciding, factoring, rounding)
        )


@dataclass(frozen=True)
class MemoryPlan:
    """How a run keeps to its budget: whether hidden states stay on the disk."""

    budget: MemoryBudget
    streamed: bool


def fit(estimate: MemoryEstimate, budget: MemoryBudget, resident: int, device: str) -> MemoryPlan:
    """`resident` is what the process has before the run. Raises UsageError, with the numbers, where the budget is too small."""
    if budget.gpu is not None and device.startswith("cuda") and estimate.gpu > budget.gpu:
        raise UsageError(
            f"--memory allows {format_bytes(budget.gpu)} of the GPU, and a layer with what is computed of it needs about "
            f"{format_bytes(estimate.gpu)}: allow more, use --device cpu, or a recipe that needs less (rtn)"
        )
    if budget.host is None:
        return MemoryPlan(budget, False)
    whole, streamed = (resident + estimate.on_host(streamed) for streamed in (False, True))
    if streamed > budget.host:
        raise UsageError(
            f"--memory allows {format_bytes(budget.host)} of the host, and a run needs about {format_bytes(streamed)} "
            f"({format_bytes(resident)} of them the program itself) with hidden states on the disk: allow more"
        )
    return MemoryPlan(budget, whole > budget.host)
