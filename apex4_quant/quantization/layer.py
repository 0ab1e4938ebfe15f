"""One decoder layer: the way of its weights from the source's tensors to those of the checkpoint.

    read       the layer's tensors, from the source                             ModelSource.read
    rewrite    changes that leave the model's function as it is                 Rewriter.layer
    load       into the module that calibration text is run through             LayerRunner.load_layer
    then for every input, in the order in which the layer computes them, once what is before it is quantized:
      collect    what the linears that read it are called with                  Collector.inputs_of
      transform  the input's transform T and clip ratio                         decide_input
      round      each weight to codes and scales, in the basis of T             round_weight
      pack       codes and scales, as the linear that computes with them        pack
      measure    that linear's output error                                     measure_error
      replace    the float linear in the module by the packed one
    write      what the packed linears store, and what was kept                 QuantizedLayer.tensors, run.py
    read back  some rows of each, as a reader of the file decodes them           RoundedRows.require_in, run.py

Memory: a float weight is handed out once (LayerTensors.take) and gone when its packed form is there; one part's Hessian and
its factors are there at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..calib.probes import stratified
from ..distributed.group import Group
from ..errors import Apex4Error
from ..format.feedback import clip_row, feedback_of
from ..format.layouts import Layout
from ..format.number_format import BITS, BLOCK
from ..format.quant_config import LinearFormat
from ..format.transform_kind import TransformKind
from ..models.families import expert_of
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..models.states import States, picked
from ..nn.linear import Apex4Linear
from ..nn.prepare import share_input
from ..progress import step
from ..recipes import Recipe, Rounding
from ..rounding.activation_clip import CLIP_SEARCH_ROWS, search_activation_clip, search_block_clips
from ..rounding.gptq import DAMPING, drift_correction, inverse_factor, quantize_weight_gptq
from ..rounding.nearest import quantize_weight_rtn, require_quantizable
from ..transforms.block_transforms import pad_input_features, transform_input, transform_weight
from ..transforms.error_feedback import error_feedback
from ..transforms.importance import scale_by_readers
from ..transforms.learned_transform import learn_transform, round_to_halves
from ..transforms.rewriter import Rewriter
from .collector import CollectedInput, Collector, Part
from .gradients import InputGradients, gradients_through
from .plan import Plan, PlannedLinear
from .predictions import LeavingGradients
from .run_state import Streams

MEASURED_ROWS = 1024  # of an input, to tell a linear's error

Say = Callable[[str], None]


class LayerTensors:
    """The float tensors of one decoder layer, under their full names: their one owner beside the module.

    `loaded`: those of them that the module has on its device in the same dtype, and that need not be sent there again.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor] | None = None) -> None:
        self._tensors, self._loaded = tensors, loaded or {}

    def weight(self, linear: str) -> torch.Tensor:
        """[N, K], of a linear that was not taken yet; on the module's device, if it is there."""
        name = f"{linear}.weight"
        return self._loaded.get(name, self._tensors[name])

    def take_weight(self, linear: str) -> torch.Tensor:
        """[N, K], for good: it is stored in another form, and is not held here any more."""
        name = f"{linear}.weight"
        return self._loaded.pop(name, self._tensors.pop(name))

    def untaken(self) -> dict[str, torch.Tensor]:
        """What is stored as it is."""
        return dict(self._tensors)


@dataclass(frozen=True)
class InputDecision:
    """What the linears of one input share, since it is transformed and quantized once.

    `matrix` float16 [padded K / 128, 128, 128] is the learned transform, with error feedback [padded K / 128, 184, 128], and with the
    clip ratio of every block [padded K / 128, 185, 128]; `clip` is the searched ratio of all blocks. None: there is none.
    """

    matrix: torch.Tensor | None
    clip: float | None


@dataclass(frozen=True)
class GptqMoments:
    """What GPTQ rounds the linears of a part with, float32 [padded K, padded K] each, in the basis of the transform.

    `factor` is U of (H + damping)^-1 = U^T U; `correction` is GPTAQ's; `hessian` is there only for a refinement.
    """

    factor: torch.Tensor
    correction: torch.Tensor | None
    hessian: torch.Tensor | None


@dataclass(frozen=True)
class RoundedRows:
    """The rows of one tile of a linear, as rounding left them: int8 codes [R, padded K] and float16 scales [R, G].

    Between rounding and a file lie packing, what a device's kernels do to a linear that computes, and the disk. Whatever goes
    wrong there, a reader of the file finds other codes than these.
    """

    layout: Layout
    tile: int
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, format: LinearFormat, codes: torch.Tensor, scales: torch.Tensor) -> RoundedRows:
        """From all of them, [N, padded K] and [N, G]: those of the tile in the middle."""
        tile, size = format.packed_shape[0] // 2, format.layout.tile_n
        rows = slice(tile * size, (tile + 1) * size)
        return cls(format.layout, tile, codes[rows].cpu().clone(), scales[rows].cpu().clone())

    def require_in(self, path: Path, name: str) -> None:
        """Raise Apex4Error unless the linear `name` of the checkpoint's file `path` has these rows."""
        with safe_open(path, "pt") as file:
            packed, scales = (
                file.get_slice(f"{name}.{part}")[self.tile : self.tile + 1]
                for part in ("weight_packed", "weight_scale")
            )
        count = len(self.codes)
        if not (
            torch.equal(self.layout.unpack(packed, count), self.codes)
            and torch.equal(self.layout.unpack_scales(scales, count), self.scales)
        ):
            raise Apex4Error(
                f"{name} has other codes or scales in {path.name} than it was rounded to, so memory or the disk failed, or apex4 "
                "did: the layers before it are kept, go on with --resume, and report it if it comes again"
            )


@dataclass(frozen=True)
class QuantizedLayer:
    """`tensors`: the layer's part of the checkpoint, by full name. `records`: what the report says of each linear.

    `rounded`: by linear, what readers of the file must find.
    """

    tensors: dict[str, torch.Tensor]
    records: list[dict[str, Any]]
    rounded: dict[str, RoundedRows]


class LayerQuantizer:
    """Quantizes the layers of one run, one after the other. `say` is told of every linear that is done, `note` of what was not
    done as a reader of the plan expects."""

    def __init__(
        self,
        source: ModelSource,
        plan: Plan,
        runner: LayerRunner,
        original: LayerRunner | None,
        rewriter: Rewriter,
        predictions: LeavingGradients | None,
        say: Say,
        note: Say,
        group: Group | None = None,
        experts_at_once: int | None = None,
    ) -> None:
        """`original` runs the layers before quantization, for GPTAQ; `predictions` are there if the recipe uses gradients.
        Of so many experts of a layer statistics are there `experts_at_once`; None: of all."""
        self._source, self._plan, self._recipe = source, plan, plan.recipe
        self._reader = source.layer_reader(runner.reads_ahead_of)
        self._runner, self._original, self._rewriter, self._predictions = runner, original, rewriter, predictions
        self._say, self._note, self._group = say, note, group or Group()
        self._rounded: dict[str, RoundedRows] = {}  # of the layer in flight
        self._name_width = max(len(linear.name) for linear in plan.linears)
        hessians = self._recipe.rounding is Rounding.GPTQ
        self._collector = Collector(
            runner, source.family, source.config, hessians, note, original, self._group, experts_at_once
        )

    def quantize(self, layer: int, streams: Streams, advance: Callable[[int], None]) -> QuantizedLayer:
        """Quantize decoder layer `layer`, which `streams` enter. The runners hold it afterwards, until it is dropped.

        `advance` is told the elements of each linear that is done. Raises Apex4Error.
        """
        prefix = self._source.family.layer_prefix(layer)
        tensors, module = self._load(layer, streams.hidden)
        gradients = self._gradients(layer, streams.hidden)
        planned = self._plan.of_layer(layer)
        packed: dict[str, Apex4Linear] = {}
        records: dict[str, dict[str, Any]] = {}
        self._rounded = {}
        for inputs in self._collector.inputs_together(layer, module, planned, streams, self._group.size):
            sharing = [tuple(linear.name.removeprefix(prefix) for linear in each.linears) for each in inputs]
            for name, linear, record in self._quantize_inputs(layer, inputs, tensors, module, gradients):
                packed[name], records[name] = linear, record
                advance(linear.format.out_features * linear.format.in_features)
            for readers in sharing:
                share_input(module, readers)
        return QuantizedLayer(
            tensors.untaken()
            | {key: tensor for name, linear in packed.items() for key, tensor in stored(name, linear)},
            [records[linear.name] for linear in planned if linear.name in records],
            self._rounded,
        )

    @step("reading")
    def _load(self, layer: int, hidden: States) -> tuple[LayerTensors, nn.Module]:
        """Read, rewrite, load."""
        tensors = self._rewriter.layer(layer, self._reader.take(layer, layer + 1), hidden)
        if self._original is not None:
            self._original.load_layer(layer, tensors)
        module, prefix = self._runner.load_layer(layer, tensors), self._source.family.layer_prefix(layer)
        named = ((prefix + name, parameter.data) for name, parameter in module.named_parameters())
        return LayerTensors(tensors, {name: data for name, data in named if data.dtype == tensors[name].dtype}), module

    def _quantize_inputs(
        self,
        layer: int,
        inputs: list[CollectedInput],
        tensors: LayerTensors,
        module: nn.Module,
        gradients: Mapping[str, InputGradients],
    ) -> Iterator[tuple[str, Apex4Linear, dict[str, Any]]]:
        """One input, decided by all processes together; or several, each decided and rounded by one of them. Of one input with
        experts each process rounds some of the experts."""
        prefix, group = self._source.family.layer_prefix(layer), self._group

        def decide(collected: CollectedInput, say: Say, together: Group) -> InputDecision:
            weighed = partial(self._weighed, layer, collected.linears, tensors, gradients)
            return decide_input(collected, self._recipe, gradients, weighed, say, together)

        if len(inputs) > 1:
            parts = [part for each in inputs for part in each.parts]
            alone = [partial(decide, each) for each in inputs]
            yield from self._quantize_apart(parts, alone, None, tensors, module, prefix)
            return
        (collected,) = inputs
        decision = decide(collected, self._note, group)
        return_free_memory()
        owner: Apex4Linear | None = None  # of the transform that all use
        for parts in collected.take_together(group.size):
            if len(parts) == 1:
                made = self._quantize_part(parts[0], decision, owner, tensors, module, prefix)
            else:
                made = self._quantize_apart(parts, decision, owner, tensors, module, prefix)
            for name, linear, record in made:
                owner = owner or linear
                yield name, linear, record

    def _quantize_apart(
        self,
        parts: list[Part],
        decide: InputDecision | Sequence[Callable[[Say, Group], InputDecision]],
        owner: Apex4Linear | None,
        tensors: LayerTensors,
        module: nn.Module,
        prefix: str,
    ) -> Iterator[tuple[str, Apex4Linear, dict[str, Any]]]:
        """Parts of experts, at most one for each process, which decides what is not decided and rounds it alone, all rows at once; then
        all have what each made."""
        group, alone = self._group, Group()
        notes: list[str] = []
        decision, rounded = InputDecision(None, None), []
        if group.rank < len(parts):
            part = parts[group.rank]
            own = decide if isinstance(decide, InputDecision) else decide[group.rank]
            decision = own if isinstance(own, InputDecision) else own(notes.append, alone)
            inputs = part.statistics.inputs()
            moments = gptq_moments(part, decision.matrix, self._recipe, notes.append, alone)
            weights = [(each.name, tensors.weight(each.name).to(self._runner.device)) for each in part.planned]
            formats = [  # to measure: each has its transform itself
                replace(_with_clip(each.format, decision), transform_from=None) for each in part.planned
            ]
            codes, scales = self._round(weights, formats[0], decision.matrix, moments, alone)
            counts = [each.out_features for each in formats]
            rows = zip(codes.split(counts), scales.split(counts), strict=True)
            for format, (name, weight), (own_codes, own_scales) in zip(formats, weights, rows, strict=True):
                bias = _replaced(module, name.removeprefix(prefix)).bias
                linear = pack(format, own_codes, own_scales, bias, decision.matrix, None)
                rounded.append((own_codes, own_scales, measure_error(linear, weight, inputs)))
        for part in parts:
            part.statistics.forget_moments()
        everyones = group.gather((notes, decision.clip, [error for _, _, error in rounded]))
        for rank, part in enumerate(parts):
            said, clip, errors = everyones[rank]
            for text in said:
                self._note(text)
            matrix = decide.matrix if isinstance(decide, InputDecision) else self._matrix_of(rank, part, decision)
            of_part = InputDecision(matrix, clip)
            for number, planned in enumerate(part.planned):
                format = _with_clip(planned.format, of_part)
                codes, scales = (rounded[number] if rank == group.rank else _room_for(format, self._runner.device))[:2]
                codes, scales = group.broadcast(codes, rank), group.broadcast(scales, rank)
                tensors.take_weight(planned.name)
                bias = _replaced(module, planned.name.removeprefix(prefix)).bias
                self._rounded[planned.name] = RoundedRows.of(format, codes, scales)
                linear = pack(format, codes, scales, bias, matrix, owner)
                yield self._replace(part, planned, linear, errors[number], module, prefix)
                if isinstance(decide, InputDecision):
                    owner = owner or linear

    def _matrix_of(self, rank: int, part: Part, own: InputDecision) -> torch.Tensor | None:
        """The transform that process `rank` has learned for its part."""
        format = part.planned[0].format
        if not format.transform.is_learned:
            return None
        matrix = own.matrix if rank == self._group.rank else None
        if matrix is None:
            shape = (format.padded_k // BLOCK, format.transform.matrix_rows, BLOCK)
            matrix = torch.empty(shape, dtype=torch.float16, device=self._runner.device)
        return self._group.broadcast(matrix, rank)

    def _quantize_part(
        self,
        part: Part,
        decision: InputDecision,
        owner: Apex4Linear | None,
        tensors: LayerTensors,
        module: nn.Module,
        prefix: str,
    ) -> Iterator[tuple[str, Apex4Linear, dict[str, Any]]]:
        """Round, pack, measure and replace the linears that are quantized with the same statistics."""
        inputs = part.statistics.inputs()
        moments = gptq_moments(part, decision.matrix, self._recipe, self._note, self._group)
        for together in rounded_together(part.planned, self._group.size):
            weights = [(each.name, tensors.take_weight(each.name).to(self._runner.device)) for each in together]
            format = _with_clip(together[0].format, decision)  # but for rows that of all
            codes, scales = self._round(weights, format, decision.matrix, moments, self._group)
            counts = [each.format.out_features for each in together]
            made = list(zip(together, weights, codes.split(counts), scales.split(counts), strict=True))
            del weights, codes, scales
            while made:
                planned, (name, weight), codes, scales = made.pop(0)
                bias = _replaced(module, name.removeprefix(prefix)).bias
                linear = pack(_with_clip(planned.format, decision), codes, scales, bias, decision.matrix, owner)
                error = measure_error(linear, weight, inputs, self._group)
                self._rounded[name] = RoundedRows.of(linear.format, codes, scales)
                owner = owner or linear
                del codes, scales, weight
                yield self._replace(part, planned, linear, error, module, prefix)

    @step("packing")
    def _replace(
        self, part: Part, planned: PlannedLinear, linear: Apex4Linear, error: float, module: nn.Module, prefix: str
    ) -> tuple[str, Apex4Linear, dict[str, Any]]:
        """Let the packed linear compute in the module."""
        name, format = planned.name, linear.format
        module.set_submodule(name.removeprefix(prefix), linear)
        shape = f"{format.out_features} x {format.in_features}"
        self._say(f"{name:{self._name_width}}  {shape:>15}  group {format.group_size}  output error {error:.4f}")
        return name, linear, record_of(planned, format, error) | part.record_of(planned)

    @step("GPTQ and descent")
    def _round(
        self,
        weights: Sequence[tuple[str, torch.Tensor]],
        format: LinearFormat,
        matrix: torch.Tensor | None,
        moments: GptqMoments | None,
        group: Group,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`round_weight` of linears by name, one below the other, each process of `group` a share of the rows, which do not
        depend on each other. `format` is any of theirs."""
        own: dict[str, torch.Tensor] = {}
        first = 0  # of the linear's rows, among all
        share = group.share(sum(len(weight) for _, weight in weights))
        for name, weight in weights:
            rows = weight[max(0, share.first - first) : max(0, share.stop - first)]
            if len(rows):
                own[name] = rows
            first += len(weight)
        if own:
            rows = next(iter(own.values())) if len(own) == 1 else torch.cat(list(own.values()))
            made = round_weight(", ".join(own), rows, format, matrix, moments, self._recipe.refinement)
        else:
            made = _room_for(format, self._runner.device, 0)
        codes, scales = (group.gather_share(part, share.total) for part in made)
        return codes, scales

    @step("gradients")
    def _gradients(self, layer: int, hidden: States) -> dict[str, InputGradients]:
        """Of the layer's inputs that are read by planned linears, by those linears' full names.

        Experts see too few of the tokens for gradients of their own, and those whose gradients say nothing are left away
        too: the weights that read them have to do.
        """
        if self._predictions is None:
            return {}
        family = self._source.family
        prefix = family.layer_prefix(layer)
        planned = {linear.name for linear in self._plan.of_layer(layer)}
        readers = [
            names
            for input_group in family.groups(self._source.config, layer)
            if (names := tuple(name for name in input_group.linears if prefix + name in planned))
            and expert_of(names[0]) is None
        ]
        leaving = self._rewriter.stream_gradients(self._predictions.leaving(layer))
        windows, share = self._predictions.windows, self._predictions.share
        found, _ = gradients_through(
            self._runner, layer, readers, picked(hidden, windows), leaving, self._group, share, keep_entering=False
        )
        for names in readers:
            if names[0] not in found:
                self._note(f"{prefix}{names[0]}: its gradients say nothing, weights are used in their place")
        return_free_memory()
        return {prefix + name: found[names[0]] for names in readers if names[0] in found for name in names}

    def _weighed(
        self,
        layer: int,
        linears: tuple[PlannedLinear, ...],
        tensors: LayerTensors,
        gradients: Mapping[str, InputGradients],
    ) -> Iterator[torch.Tensor]:
        """The weights of linears that read one input, float32 [N_i, padded K], rows scaled by how much their errors matter:
        by gradients of the outputs or, where there are none, by the weights behind, which read them."""
        prefix = self._source.family.layer_prefix(layer)
        config, device = self._source.config, self._runner.device
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        for linear in linears:
            weight = pad_input_features(tensors.weight(linear.name).to(device), linear.format)
            require_quantizable(linear.name, weight)
            if linear.name in gradients:
                squares = gradients[linear.name].outputs[linear.name.removeprefix(prefix)]
                yield weight * squares.sqrt()[:, None]
                continue
            for behind in self._source.family.groups(config, layer):
                if behind.producer is not None and prefix + behind.producer.linear == linear.name:
                    readers = [tensors.weight(prefix + name).to(device) for name in behind.linears]
                    weight = weight.clone()  # it may be what is stored
                    scale_by_readers(weight, behind.producer, readers, heads)
            yield weight


def rounded_together(planned: Sequence[PlannedLinear], processes: int) -> Iterator[list[PlannedLinear]]:
    """Those of one input whose rows are shared by so many processes at once: a column takes as long for a few rows as for thousands.

    No process has more rows than the largest linear, for which there is memory. One process rounds each by itself.
    """
    room = processes * max(each.format.out_features for each in planned)
    together: list[PlannedLinear] = []
    for each in planned:
        if together and (processes == 1 or sum(one.format.out_features for one in (*together, each)) > room):
            yield together
            together = []
        together.append(each)
    yield together


def _replaced(module: nn.Module, linear: str) -> nn.Linear:
    found = module.get_submodule(linear)
    assert isinstance(found, nn.Linear)
    return found


def _with_clip(format: LinearFormat, decision: InputDecision) -> LinearFormat:
    return format if decision.clip is None else replace(format, activation_clip=decision.clip)


def _room_for(format: LinearFormat, device: torch.device, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """For int8 codes [N, padded K] and float16 scales [N, G], N the format's unless told."""
    rows = format.out_features if rows is None else rows
    return (
        torch.empty(rows, format.padded_k, dtype=torch.int8, device=device),
        torch.empty(rows, format.padded_k // format.group_length, dtype=torch.float16, device=device),
    )


def decide_input(
    collected: CollectedInput,
    recipe: Recipe,
    gradients: Mapping[str, InputGradients],
    weighed: Callable[[], Iterator[torch.Tensor]],
    say: Say,
    group: Group | None = None,
) -> InputDecision:
    """Learn the input's transform, where the plan wants one, work out its error feedback, likewise, and search its clip ratio, where
    the recipe does and activations have 4 bits.

    `weighed` gives the weights that read the input, float32 [N_i, padded K], rows scaled by how much their errors matter;
    `gradients` are by full linear name, as far as they are known.
    """
    format, reader = collected.format, collected.linears[0].name
    found = gradients.get(reader)
    matrix = clip = None
    if format.transform.is_learned:
        with step("learned transforms"):
            matrix = learn_transform(
                pad_input_features(collected.statistics.inputs(), format),
                weighed(),
                recipe.transform_steps,
                format.transform is TransformKind.SHARED,
                None if found is None else pad_input_features(found.rows, format),
                format.activation_bits,
                # With 4 bits the error of the input decides, and there is nothing to gain (docs/log.md, 2026-11-29).
                DAMPING if recipe.rounding is Rounding.GPTQ and format.activation_bits == 8 else None,
                warn=lambda text: say(f"{reader}: {text}"),
                group=group,
            )

    def amplifying() -> Iterator[torch.Tensor]:
        """What an error of the input is multiplied by, in the basis of the transform."""
        rows_of = weighed() if found is None else iter([found.rows])
        return (transform_weight(rows, format, matrix) for rows in rows_of)

    feedback = None
    if format.transform.has_feedback:
        assert matrix is not None
        with step("error feedback"):
            matrix = torch.cat((matrix, error_feedback(amplifying(), format.padded_k, group)), 1)
            feedback = feedback_of(matrix.float())
    clips = (
        torch.full((format.padded_k // BLOCK,), recipe.activation_clip) if format.transform.has_block_clips else None
    )
    if recipe.search_clip and format.activation_bits == BITS:
        with step("clip search"):
            inputs = transform_input(stratified(collected.statistics.inputs(), CLIP_SEARCH_ROWS), format, matrix)
            if clips is None:
                clip = search_activation_clip(inputs, amplifying(), format.group_length, group, feedback)
            else:
                assert feedback is not None
                clips = search_block_clips(inputs, amplifying(), feedback, group)
    if clips is not None:
        assert matrix is not None
        matrix = torch.cat((matrix, clip_row(round_to_halves(clips)).to(matrix.device)), 1)
    return InputDecision(matrix, clip)


@step("factors")
def gptq_moments(
    part: Part, matrix: torch.Tensor | None, recipe: Recipe, say: Say, group: Group | None = None
) -> GptqMoments | None:
    """The part's moments, which are forgotten there; None if none were collected. The processes of `group` share the work. Raises
    Apex4Error."""
    hessian = part.statistics.take_hessian(matrix)
    if hessian is None:
        return None
    factor = inverse_factor(part.reader, hessian, warn=say, group=group)
    if not recipe.refinement:
        hessian = None
    drift = part.statistics.take_drift(matrix)
    correction = None if drift is None else drift_correction(part.reader, drift, factor, recipe.gptaq)
    return GptqMoments(factor, correction, hessian)


def round_weight(
    name: str,
    weight: torch.Tensor,
    format: LinearFormat,
    matrix: torch.Tensor | None,
    moments: GptqMoments | None,
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> int8 codes [N, padded K], float16 scales [N, G]: by GPTQ if there are moments, else to nearest.

    `sweeps`: how often GPTQ's codes are gone over again. Raises Apex4Error, naming the tensor.
    """
    if moments is None:
        return quantize_weight_rtn(name, weight, format, matrix)
    return quantize_weight_gptq(
        name, weight, format, moments.factor, matrix, moments.correction, moments.hessian, sweeps
    )


@step("packing")
def pack(
    format: LinearFormat,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    matrix: torch.Tensor | None,
    owner: Apex4Linear | None,
) -> Apex4Linear:
    """The linear that stores `codes` and `scales` in the format's layout; `owner` stores the transform if it does not."""
    linear = Apex4Linear.from_codes(format, codes, scales, bias, matrix)
    linear.keeps_activation_bits = True  # the layers behind are calibrated with the checkpoint's arithmetic
    if format.transform_from is not None:
        assert owner is not None
        linear.take_transform_from(owner)
    return linear


@step("errors")
def measure_error(linear: Apex4Linear, weight: torch.Tensor, inputs: torch.Tensor, group: Group | None = None) -> float:
    """|| y - y~ || / || y || over MEASURED_ROWS of `inputs` float32 [T, K], y by the float `weight` [N, K] and y~ quantized.

    It is the error of the linear alone, also where GPTAQ aims at what the original model computes. Each process of the
    `group` computes a share of the rows.
    """
    inputs, group = stratified(inputs, MEASURED_ROWS), group or Group()
    inputs = inputs[group.share(len(inputs)).slice]
    exact = inputs @ weight.float().t()
    if linear.bias is not None:
        exact += linear.bias.float()
    # By the reference: the kernels do not compute in float32, and they would reorder tensors that are to be stored.
    error, size = group.norms(torch.stack([(linear.reference(inputs) - exact).norm(), exact.norm()]))
    return float(error / size.clamp_min(1e-30))


def record_of(linear: PlannedLinear, format: LinearFormat, error: float) -> dict[str, Any]:
    """What the report says of a linear beside the plan: what was decided on the way, and its relative output error."""
    return {
        "name": linear.name,
        "shape": [format.out_features, format.in_features],
        "group_size": format.group_size,
        "activation_clip": format.activation_clip,
        "error": error,
    }


def stored(name: str, linear: Apex4Linear) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a packed linear that take the place of its weight in the checkpoint, with their full names.

    They are in the checkpoint's layout, also if the linear has computed meanwhile: on a GPU that puts its own tensors into
    the layout that the GPU's kernels read.
    """
    tensors = linear.state_dict()
    for part in ("weight_packed", "weight_scale", "input_transform"):
        if tensors.get(part) is not None:
            yield f"{name}.{part}", tensors[part]


@step("freeing memory")
def return_free_memory() -> None:
    """glibc keeps freed blocks between live ones: over the layers of a model that adds up to hundreds of MB."""
    with contextlib.suppress(OSError, AttributeError):  # another libc has no such call, and no such habit
        ctypes.CDLL("libc.so.6").malloc_trim(0)
