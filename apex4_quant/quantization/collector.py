"""What linears are quantized with: inputs and Hessians, seen by running the calibration text through a layer.

One pass over the calibration hidden states serves all input groups (the linears that read one tensor) of a stage. The
experts of a layer see different tokens, so each has its own statistics, unless too few tokens reached it:

    gate_proj, up_proj    the rows of the MLP's input that the router sends to the expert; else all rows
    down_proj             what the expert makes of those rows; else what it makes of all rows

The statistics of all experts of a layer may be more than there is memory for. Then experts are collected in portions, with
a pass for each: what reaches an expert does not depend on which others are quantized already, so the same is collected.

For GPTAQ the original layer runs beside the one that is being quantized, on hidden states of its own, and both inputs of
the same token are seen together. An expert's tokens are then those of the quantized model's router in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..calib.errors import CalibrationError
from ..calib.finite import all_finite
from ..calib.hessian import HessianAccumulator
from ..calib.probes import PROBE_ROWS, InputProbe, rows_to_learn_from
from ..distributed.group import Group
from ..errors import Apex4Error
from ..format.quant_config import LinearFormat
from ..hardware.dtype_names import wider_than
from ..models.experts import Expert, UnfusedExperts, routed
from ..models.families import Experts, Family, InputGroup, expert_of
from ..models.layer_runner import LayerRunner
from ..progress import step
from ..transforms.block_transforms import transform_hessian
from .plan import PlannedLinear
from .run_state import Streams

SHARED_STATISTICS = "shared statistics"  # what reports say of an expert that has none of its own

# GPTQ fits the tokens it sees. With as many tokens as features or fewer, its error on other tokens of the same kind was
# above that with the statistics of all tokens, even where those lie in other directions; at twice as many the two are
# about even (docs/log.md).
TOKENS_PER_FEATURE = 2

EXPERT_ROWS = 1024  # kept of what an expert reads: a layer may have hundreds of experts


class Statistics:
    """Of what one set of linears reads: a sample of the rows and, with `format`, the Hessian.

    If the inputs of the original model are given too, how they differ is kept as E[(x~ - x) x^T].
    """

    def __init__(self, reader: str, probe: InputProbe, dtype: torch.dtype, format: LinearFormat | None) -> None:
        self._reader, self._probe, self._dtype, self._format = reader, probe, dtype, format
        self._hessian = HessianAccumulator() if format is not None else None
        self._drift: HessianAccumulator | None = None
        self._rows: torch.Tensor | None = None
        self._inputs: torch.Tensor | None = None
        self.tokens = 0

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """x [..., K], as the linears read it, and the same tokens in the original model."""
        self._probe.add(x)
        if self._hessian is not None and self._format is not None:
            with step("Hessians"):
                padded = self._padded(x)
                self._hessian.add(padded)
                if original is not None:
                    self._drift = self._drift or HessianAccumulator()
                    # In float32: a difference is no number of 16 bits.
                    self._drift.add(padded, self._padded(original).float() - padded.float())
        self.tokens += x.numel() // x.shape[-1]

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype seen, in which a GPU multiplies it."""
        assert self._format is not None
        more = self._format.padded_k - x.shape[-1]
        return nn.functional.pad(x, (0, more)) if more else x

    def forget_moments(self) -> None:
        """Those that nobody asks for."""
        self._hessian = self._drift = None

    def combine_rows(self, group: Group, none: torch.Tensor) -> None:
        """Have the rows of all processes, and none but those that one process would keep. `none` [0, K]: if none came here."""
        seen = self.tokens
        (self.tokens,) = group.sum(torch.tensor([seen])).tolist()
        self._rows = group.gather_rows(self._probe.rows(self.tokens) if seen else none)

    def combine_moments(self, group: Group, device: torch.device) -> None:
        """Have the moments of the tokens of all processes. Drift, which some may not have seen, must be known to all."""
        if self._hessian is None or self._format is None:
            return
        k = self._format.padded_k

        def zeros() -> torch.Tensor:
            return torch.zeros(k, k, device=device)

        self._hessian.combine(group.sum, zeros, True)
        if group.any(self._drift is not None):
            self._drift = self._drift or HessianAccumulator()
            self._drift.combine(group.sum, zeros, False)

    def inputs(self) -> torch.Tensor:
        """The rows kept, float32 [T, K]. Raises Apex4Error if one is not finite."""
        if self._inputs is None:
            rows = self._probe.rows() if self._rows is None else self._rows
            self._inputs = rows.float()
            if not all_finite(self._inputs):
                dtype = str(self._dtype).removeprefix("torch.")
                raise Apex4Error(f"the input of {self._reader} is not finite in {dtype}: {wider_than(dtype)}")
        return self._inputs

    def take_hessian(self, matrix: torch.Tensor | None) -> torch.Tensor | None:
        """The Hessian in the quantization basis, float32 [padded K, padded K], and forget it.

        `matrix` is the dense transform, where the format has one. Raises Apex4Error if the Hessian cannot be used.
        """
        return self._take(self._hessian, matrix)

    def take_drift(self, matrix: torch.Tensor | None) -> torch.Tensor | None:
        """E[(x~ - x) x^T] of inputs x and the original model's x~, in the same basis, and forget it. Raises Apex4Error."""
        return self._take(self._drift, matrix)

    def _take(self, moments: HessianAccumulator | None, matrix: torch.Tensor | None) -> torch.Tensor | None:
        if moments is None or self._format is None:
            return None
        try:
            return transform_hessian(moments.take_matrix(), self._format, matrix)
        except CalibrationError as error:
            raise Apex4Error(
                f"the Hessian of {self._reader} cannot be used, {error}: {wider_than(self._dtype)}"
            ) from error


@dataclass
class Part:
    """Linears of an input group that are quantized with the same statistics.

    `tokens` says for every expert among them how many calibration tokens the router sent to it.
    """

    reader: str
    planned: list[PlannedLinear]
    statistics: Statistics
    tokens: dict[int, int] = field(default_factory=dict)
    shared: bool = False

    def record_of(self, linear: PlannedLinear) -> dict[str, Any]:
        """What the report says of an expert's calibration; nothing for other linears."""
        expert = expert_of(linear.name)
        if expert is None:
            return {}
        return {"calibration_tokens": self.tokens[expert]} | ({"fallback": SHARED_STATISTICS} if self.shared else {})


class CollectedInput:
    """What an input group reads: `statistics` of the tensor itself, and the parts that its linears fall into.

    The part with the linear that stores the learned transform comes first: the others use it from there. `collect` sees to
    it that a part's own statistics are there; it is called before the part is handed out, unless `is_there` says that they are.
    """

    def __init__(
        self,
        statistics: Statistics,
        parts: list[Part],
        collect: Callable[[Part], None] = lambda part: None,
        is_there: Callable[[Part], bool] = lambda part: True,
    ) -> None:
        self.statistics, self._collect, self._is_there = statistics, collect, is_there
        self.parts = sorted(parts, key=lambda part: part.planned[0].format.transform_from is not None)

    @property
    def linears(self) -> tuple[PlannedLinear, ...]:
        """Those of all parts."""
        return tuple(linear for part in self.parts for linear in part.planned)

    @property
    def format(self) -> LinearFormat:
        """Of the first linear: group size and transform are those of all."""
        return self.parts[0].planned[0].format

    def take_parts(self) -> Iterator[Part]:
        """The parts one after the other, each forgotten when the next is asked for."""
        for (part,) in self.take_together(1):
            yield part

    def take_together(self, count: int) -> Iterator[list[Part]]:
        """The same, `count` at a time or fewer: of one portion, and none that has the statistics of all tokens with another."""
        while self.parts:
            self._collect(self.parts[0])
            taken = [self.parts.pop(0)]
            while len(taken) < count and self.parts and self._is_there(self.parts[0]):
                if taken[0].shared or self.parts[0].shared:
                    break
                taken.append(self.parts.pop(0))
            yield taken


def _modules(stages: Sequence[Sequence[InputGroup]]) -> set[str]:
    """The children of a decoder layer that hold the linears of these stages."""
    return {linear.partition(".")[0] for stage in stages for input_group in stage for linear in input_group.linears}


def _of_part(part: Part) -> CollectedInput:
    return CollectedInput(part.statistics, [part])


def _expert(experts: nn.Module | None, number: int) -> Expert:
    assert isinstance(experts, UnfusedExperts)
    expert = experts[number]
    assert isinstance(expert, Expert)
    return expert


class Collector:
    """`hessians`: whether the recipe needs them. `say` is told of experts that fall back to shared statistics.

    `original` runs the layers as they were before quantization, if their inputs are to be compared. Each process of `group`
    collects on its own windows, and has the statistics of all of them. Of so many experts of a layer statistics are there
    `at_once`; None: of all. It must be the same in all processes.
    """

    def __init__(
        self,
        runner: LayerRunner,
        family: Family,
        config: dict[str, Any],
        hessians: bool,
        say: Callable[[str], None],
        original: LayerRunner | None = None,
        group: Group | None = None,
        at_once: int | None = None,
    ) -> None:
        self._at_once = at_once
        self._runner, self._family, self._config = runner, family, config
        self._hessians, self._say, self._original = hessians, say, original
        self._group = group or Group()
        self._routed: tuple[int, Counter[int]] | None = (
            None  # of a layer: what other processes' tokens reach, see `_before`
        )
        self._settled: tuple[str, ...] = ()
        self._last = False

    def inputs_of(
        self, layer: int, module: nn.Module, planned: list[PlannedLinear], streams: Streams
    ) -> Iterator[CollectedInput]:
        """What the planned linears of decoder layer `module` read, input by input, in the order of computation.

        A stage is collected when the first of its inputs is asked for: by then the linears before it must have been
        replaced by their quantized form. `streams` are the states entering the layer. Raises Apex4Error.
        """
        for inputs in self.inputs_together(layer, module, planned, streams, 1):
            yield from inputs

    def inputs_together(
        self, layer: int, module: nn.Module, planned: list[PlannedLinear], streams: Streams, count: int
    ) -> Iterator[list[CollectedInput]]:
        """The same, `count` of those that do not depend on each other at a time: inside experts."""
        of_input: dict[int, list[PlannedLinear]] = {}
        for linear in planned:
            of_input.setdefault(linear.input_group, []).append(linear)
        first = 0
        stages = self._family.stages(self._config, layer)
        for number, stage in enumerate(stages):
            # Parts of the layer (self_attn) whose linears are all behind us: they need not be computed again.
            self._settled = tuple(sorted(_modules(stages[:number]) - _modules(stages[number:])))
            # Of this module only what is quantized now will change.
            self._last = not _modules(stages[number : number + 1]) & _modules(stages[number + 1 :])
            wanted = [of_input[first + i] for i in range(len(stage)) if first + i in of_input]
            first += len(stage)
            if not wanted:
                continue
            experts = self._family.experts
            if experts is not None and expert_of(stage[0].linears[0]) is not None:
                unfused = module.get_submodule(experts.module)
                assert isinstance(unfused, UnfusedExperts)
                linears = [linear for linears in wanted for linear in linears]
                if stage[0].norm is not None:
                    yield [self._entering(layer, experts, linears, streams)]
                else:
                    yield from self._inside(layer, experts, unfused, linears, streams, count)
            else:
                yield [self._dense(layer, stage[0], wanted[0], streams)]

    def _statistics(self, reader: str, probe: InputProbe, linear: PlannedLinear) -> Statistics:
        return Statistics(reader, probe, self._runner.dtype, linear.format if self._hessians else None)

    def _calls(
        self, layer: int, module: str, streams: Streams, last: bool = False
    ) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        """What `module` is called with (LayerRunner.calls_of), beside its first input in the original model."""
        calls = self._runner.calls_of(layer, module, streams.hidden, self._settled, last)
        if self._original is None or streams.original is None:
            yield from ((call, None) for call in calls)
        else:
            others = self._original.calls_of(layer, module, streams.original, self._settled, last)
            yield from ((call, other[0]) for call, other in zip(calls, others, strict=True))

    @step("collecting inputs")
    def _dense(
        self, layer: int, input_group: InputGroup, planned: list[PlannedLinear], streams: Streams
    ) -> CollectedInput:
        reader = self._family.layer_prefix(layer) + input_group.linears[0]
        format = planned[0].format
        rows = rows_to_learn_from(format.in_features) if format.transform.is_learned else PROBE_ROWS
        statistics = self._statistics(reader, InputProbe(streams.tokens, rows, streams.first_token), planned[0])
        last = self._last and len(input_group.linears) == 1
        for (x,), original in self._calls(layer, input_group.linears[0], streams, last):
            statistics.add(x, original)
        self._combine(statistics, planned[0])
        return CollectedInput(statistics, [Part(reader, planned, statistics)])

    @step("collecting inputs")
    def _entering(self, layer: int, experts: Experts, planned: list[PlannedLinear], streams: Streams) -> CollectedInput:
        """That of the gate and up projections of all experts, with a part for each that saw enough tokens."""
        name = self._family.layer_prefix(layer) + experts.module
        everything = self._statistics(name, InputProbe(streams.tokens, before=streams.first_token), planned[0])
        own = self._own(name, planned, self._before(layer, experts, streams))
        first = set(next(self._portions(list(own))))
        counts = Counter(dict.fromkeys(own, 0))
        for (states, index, _), original in self._calls(layer, experts.module, streams):
            everything.add(states, original)
            for expert, tokens, _ in routed(index):
                if expert in own:
                    counts[expert] += len(tokens)
                if expert in first:
                    own[expert].statistics.add(states[tokens], None if original is None else original[tokens])
        fed, starved = self._split(own, counts)
        for expert, part in fed.items():
            if expert in first:
                self._combine(part.statistics, part.planned[0])
        self._combine(everything, planned[0], moments=bool(starved))
        parts = list(fed.values())
        if starved:
            linears = [linear for part in starved.values() for linear in part.planned]
            seen = {expert: n for part in starved.values() for expert, n in part.tokens.items()}
            parts.append(Part(name, linears, everything, seen, shared=True))
        else:
            everything.forget_moments()
        waiting = {expert: part for expert, part in fed.items() if expert not in first}

        @step("collecting inputs")
        def collect(part: Part) -> None:
            (expert, *_) = part.tokens
            if part.shared or expert not in waiting:
                return
            numbers = next(self._portions([expert, *(other for other in waiting if other != expert)]))
            portion = {number: waiting.pop(number) for number in numbers}
            for (states, index, _), original in self._calls(layer, experts.module, streams):
                for expert, tokens, _ in routed(index):
                    if expert in portion:
                        portion[expert].statistics.add(states[tokens], None if original is None else original[tokens])
            for each in portion.values():
                self._combine(each.statistics, each.planned[0])

        return CollectedInput(everything, parts, collect, lambda part: not waiting.keys() & part.tokens.keys())

    def _inside(
        self,
        layer: int,
        experts: Experts,
        module: UnfusedExperts,
        planned: list[PlannedLinear],
        streams: Streams,
        together: int,
    ) -> Iterator[list[CollectedInput]]:
        """One input per expert: that of its down projection. So many at a time."""
        before_ours = self._before(layer, experts, streams)
        own = self._own(self._family.layer_prefix(layer) + experts.module, planned, before_ours)
        before = None if self._original is None else self._original.layer(layer).get_submodule(experts.module)

        def add(part: Part, number: int, states: torch.Tensor, original: torch.Tensor | None) -> None:
            inner = None if original is None else _expert(before, number).inner(original)
            part.statistics.add(_expert(module, number).inner(states), inner)

        @step("collecting inputs")
        def collect(portion: dict[int, Part]) -> None:
            for (states, index, _), original in self._calls(layer, experts.module, streams):
                for expert, tokens, _ in routed(index):
                    if expert in portion:
                        part = portion[expert]
                        add(part, expert, states[tokens], None if original is None else original[tokens])
            counts = Counter({expert: part.statistics.tokens for expert, part in portion.items()})
            fed, starved = self._split(portion, counts)
            for part in fed.values():
                self._combine(part.statistics, part.planned[0])
            for part in starved.values():
                probe = InputProbe(streams.tokens, EXPERT_ROWS, streams.first_token)
                part.statistics = self._statistics(part.reader, probe, part.planned[0])
                part.shared = True
            if starved:  # a second pass, of these experts on all tokens
                for (states, _, _), original in self._calls(layer, experts.module, streams):
                    for expert, part in starved.items():
                        add(part, expert, states, original)
            for part in starved.values():
                self._combine(part.statistics, part.planned[0])

        for numbers in self._portions(list(own)):
            collect({number: own[number] for number in numbers})
            for start in range(0, len(numbers), together):  # forgotten when the next are asked for
                yield [_of_part(own.pop(number)) for number in numbers[start : start + together]]

    def _portions(self, experts: list[int]) -> Iterator[list[int]]:
        """The experts whose statistics are there together."""
        size = len(experts) if self._at_once is None else self._at_once
        for start in range(0, len(experts), size):
            yield experts[start : start + size]

    def _combine(self, statistics: Statistics, linear: PlannedLinear, moments: bool = True) -> None:
        device = self._runner.device
        none = torch.empty(0, linear.format.in_features, dtype=self._runner.dtype, device=device)
        statistics.combine_rows(self._group, none)
        if moments:
            statistics.combine_moments(self._group, device)

    @step("collecting inputs")
    def _before(self, layer: int, experts: Experts, streams: Streams) -> Counter[int]:
        """By expert, how many tokens of the windows before ours are sent to it: which rows are kept depends on it.

        It takes a pass of its own over our windows, up to the router, where others have windows before or behind them.
        """
        if self._group.size == 1:
            return Counter()
        if self._routed is None or self._routed[0] != layer:
            counts: Counter[int] = Counter()
            for (_, index, _), _ in self._calls(layer, experts.module, streams):
                counts.update({expert: len(tokens) for expert, tokens, _ in routed(index)})
            before: Counter[int] = Counter()
            for others in self._group.gather(counts)[: self._group.rank]:
                before.update(others)
            self._routed = layer, before
        return self._routed[1]

    def _own(self, name: str, planned: list[PlannedLinear], before: Counter[int]) -> dict[int, Part]:
        """A part for every expert that has planned linears, with nothing seen yet."""
        linears: dict[int, list[PlannedLinear]] = {}
        for linear in planned:
            expert = expert_of(linear.name)
            assert expert is not None
            linears.setdefault(expert, []).append(linear)
        parts = {}
        for expert, of_expert in linears.items():
            reader = f"{name}.{expert}"
            probe = InputProbe(None, EXPERT_ROWS, before[expert])
            parts[expert] = Part(reader, of_expert, self._statistics(reader, probe, of_expert[0]))
        return parts

    def _split(self, parts: dict[int, Part], counts: Counter[int]) -> tuple[dict[int, Part], dict[int, Part]]:
        """The parts with enough tokens and those without, which are reported. `counts`: of this process's tokens."""
        fed: dict[int, Part] = {}
        starved: dict[int, Part] = {}
        everyones = self._group.sum(torch.tensor([counts[expert] for expert in parts])).tolist()
        for (expert, part), tokens in zip(parts.items(), everyones, strict=True):
            part.tokens = {expert: tokens}
            # Rounding to nearest uses no statistics: there it takes a token to measure the error with, no more.
            needed = TOKENS_PER_FEATURE * part.planned[0].format.in_features if self._hessians else 1
            if tokens >= needed:
                fed[expert] = part
                continue
            starved[expert] = part
            seen = f"{tokens} calibration tokens" if tokens else "no calibration token"
            names = ", ".join(linear.name.rpartition(".")[2] for linear in part.planned)
            self._say(
                f"{part.reader}: {seen} reached this expert ({needed} needed): {names} use {SHARED_STATISTICS} of all tokens"
            )
        return fed, starved
