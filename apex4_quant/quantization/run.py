"""`apex4 quantize`: one decoder layer at a time, restartable after each. DESIGN §4.

where the recipe asks for it, gradients of the float model's predictions by what leaves each layer (predictions.py)
source shards -> load one layer, rewritten as the recipe wants it (rewriter.py)
-> for every input group, in the order the layer computes them:
    run the calibration hidden states up to it (through what is already quantized; collector.py)
    -> quantize the linears that read it -> put them into the layer
-> write the layer's shard -> run the quantized layer to get the next hidden states -> commit -> drop the layer
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..calib.errors import CalibrationError
from ..calib.probes import evenly_spaced
from ..calib.samples import draw_samples
from ..calib.text import load_text
from ..checkpoint.load import REPORT_NAME
from ..errors import Apex4Error, Stopped, UsageError
from ..format.layouts import get_layout
from ..format.number_format import GroupSize, parse_group_size
from ..format.quant_config import QuantConfig
from ..format.storage import copy_file, require_free_space, sha256, write_json, write_tensors
from ..format.transform_kind import TransformKind
from ..hardware.devices import DTYPES, resolve_device, resolve_dtype
from ..hardware.gpus import resolve_target
from ..models.families import expert_of
from ..models.layer_runner import LayerRunner
from ..models.source import INDEX_NAME, ModelSource, hub_revision
from ..models.tokenizers import load_tokenizer
from ..nn.linear import Apex4Linear
from ..nn.shared_input import share_input
from ..progress import Progress
from ..recipes import DEFAULT_RECIPE, GRADIENTS, get_recipe, named_recipes
from ..rounding.activation_clip import ROWS as CLIP_ROWS
from ..rounding.activation_clip import search_activation_clip
from ..rounding.gptq import drift_correction, inverse_factor, quantize_weight_gptq
from ..rounding.nearest import quantize_weight_rtn, require_quantizable
from ..transforms.block_transforms import pad_input_features, transform_input, transform_weight
from ..transforms.importance import scale_by_readers
from ..transforms.learned_transform import learn_transform
from ..transforms.rewriter import Rewriter, require_rotatable
from .collector import CollectedGroup, Collector
from .gradients import InputGradients, gradients_through
from .plan import Plan, PlannedLinear, build_plan, estimate_peak_memory, estimate_seconds, plan_as_dict
from .plan_file import plan_given, read_plan_file
from .predictions import LeavingGradients, disk_bytes
from .run_state import RunState, Streams, other_setting, require_empty, stored_settings

MEASURED_ROWS = 1024  # of an input, to tell a linear's error

# What a quantized model takes over unchanged from the original's folder, besides config.json.
COMPANION_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizeSettings:
    """What the user asks for. `auto` and None are decided by `resolve`, and the decision is what is recorded.

    `plan` is the path of a plan file; resolved, it is what the file says by full module name: {"group_size": ...} and,
    where the file names one, "transform". From Python it may also be given so, or as group sizes alone.
    """

    model: str
    recipe: str | dict[str, Any] = DEFAULT_RECIPE
    group_size: GroupSize = 128
    plan: str | dict[str, Any] | None = None
    target: str = "auto"
    layout: str | None = None
    transform: str | None = None
    calib: str = "bundled"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    ignore: tuple[str, ...] = ()

    def resolve(self, source: ModelSource) -> QuantizeSettings:
        """Check every value and decide the open ones. Raises UsageError."""
        recipe = get_recipe(self.recipe)
        require_rotatable(source, recipe)
        target = resolve_target(self.target)
        transform = self.transform or recipe.transform
        if transform not in list(TransformKind):
            raise UsageError(f"transform {transform!r} is not known: give one of {', '.join(TransformKind)}")
        for name, value in (("samples", self.samples), ("seq-len", self.seq_len)):
            if value < 1:
                raise UsageError(f"--{name} is {value}: give a positive number")
        context = source.config.get("max_position_embeddings") or self.seq_len
        plan = self.plan
        if plan is not None and parse_group_size(self.group_size) != 128:
            raise UsageError("--plan decides every group size: leave --group-size away")
        if plan is not None:
            read = read_plan_file(Path(plan).expanduser()) if isinstance(plan, str) else plan_given(plan)
            # Resolved once, the transform is the recipe's and the plan no path any more.
            if read.names_transforms and self.transform not in (None, *([] if read.is_file else [recipe.transform])):
                raise UsageError(
                    f"plan {read.path} decides transforms: leave --transform away, or remove them from the plan"
                )
            plan = read.for_model(source, transform)
        return replace(
            self,
            # A file may change before a resume: its content is what is recorded.
            recipe=self.recipe if self.recipe in list(named_recipes()) else recipe.as_dict(),
            plan=plan,
            group_size=parse_group_size(self.group_size),
            target=target.gpu or target.arch or "none",
            layout=get_layout(self.layout or target.layout).name,
            transform=str(transform),
            seq_len=min(self.seq_len, context),
            device=resolve_device(self.device),
            dtype=resolve_dtype(self.dtype, source.config),
        )


@dataclass
class QuantizeResult:
    """What the run did; `as_dict` is the object of --json."""

    out: Path
    plan: Plan
    source: ModelSource
    records: list[dict[str, Any]] = field(default_factory=list)
    bytes_after: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        errors = [record["error"] for record in self.records]
        return {
            "model": self.source.name,
            "output": str(self.out),
            "linears_quantized": len(self.plan.linears),
            "tensors_kept": len(self.plan.kept),
            "bytes_before": self.source.total_bytes,
            "bytes_after": self.bytes_after,
            "bits_per_weight": round(self.plan.bits_per_weight, 4),
            "mean_relative_error": sum(errors) / len(errors),
            "max_relative_error": max(errors),
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class Preview:
    """What --dry-run shows."""

    plan: Plan
    source: ModelSource
    settings: QuantizeSettings
    peak_memory: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return plan_as_dict(self.plan, self.source) | {
            "settings": _jsonable(self.settings),
            "peak_memory_estimate": self.peak_memory,
            "seconds_estimate": round(self.seconds, 1),
        }


def _jsonable(settings: QuantizeSettings) -> dict[str, Any]:
    return asdict(settings) | {"ignore": list(settings.ignore)}


def plan_of(source: ModelSource, settings: QuantizeSettings) -> Plan:
    """What a run with resolved `settings` will do. Raises UsageError."""
    target = resolve_target(settings.target)
    return build_plan(
        source,
        recipe=get_recipe(settings.recipe),
        transform=TransformKind(settings.transform or TransformKind.NONE),
        group_size=settings.group_size,
        layout=settings.layout or target.layout,
        target={"gpu": target.gpu, "arch": target.arch},
        ignore=settings.ignore,
        entries=settings.plan if isinstance(settings.plan, dict) else None,
    )


def preview(settings: QuantizeSettings) -> Preview:
    """Everything --dry-run shows, from headers alone (and two short timings)."""
    source = ModelSource(settings.model)
    settings = settings.resolve(source)
    plan = plan_of(source, settings)
    tokens = settings.samples * settings.seq_len
    width = DTYPES[settings.dtype].itemsize
    hessians = get_recipe(settings.recipe).rounding == "gptq"
    LayerRunner(source, settings.device, DTYPES[settings.dtype])  # refuses tensors that are not those of the model
    peak = estimate_peak_memory(source, plan, tokens, settings.seq_len, width, hessians)
    return Preview(plan, source, settings, peak, estimate_seconds(source, plan, tokens, settings.device, hessians))


def settings_to_resume(out: Path, asked: dict[str, Any]) -> QuantizeSettings:
    """The settings of the run in `out`. `asked` are those given explicitly now. Raises UsageError if they differ."""
    stored = stored_settings(out)
    known = {name: stored[name] for name in QuantizeSettings.__dataclass_fields__ if name in stored}
    first = QuantizeSettings(**known | {"ignore": tuple(stored.get("ignore", ()))})
    # `auto` was decided by the first run; everything else is compared as the first run decided it.
    asked = {name: value for name, value in asked.items() if value != "auto"}
    # Beside a plan --transform is an option of its own only if it is given.
    again = replace(first, **({"transform": None} if "plan" in asked else {}) | asked)
    if again.model == first.model:
        again = again.resolve(ModelSource(first.model))
    for name, value in asked.items():
        if getattr(first, name) != getattr(again, name):
            raise other_setting(out, name, getattr(first, name), getattr(again, name) if name == "recipe" else value)
    return first


def quantize(
    settings: QuantizeSettings,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> QuantizeResult:
    """Quantize `settings.model` into the folder `out`.

    `should_stop` is asked after every decoder layer; if it says yes, Stopped is raised and `resume=True` goes on from
    there. Raises UsageError or Apex4Error, with one sentence each; `out` is never left looking complete when it is not.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    out = Path(out)
    if not resume:
        require_empty(out)
    source = ModelSource(settings.model)
    asked_seq_len = settings.seq_len
    settings = settings.resolve(source)
    plan = plan_of(source, settings)
    samples = draw_calibration(source, settings, asked_seq_len, progress)
    hidden_bytes = samples.numel() * int(source.config["hidden_size"]) * DTYPES[settings.dtype].itemsize
    if not resume:
        needed = plan.bytes_after + (4 if plan.recipe.gptaq else 2) * hidden_bytes
        if plan.recipe.importance == GRADIENTS:
            needed += disk_bytes(source, samples.shape, DTYPES[settings.dtype])
        require_free_space(out, needed)
    runner = LayerRunner(source, settings.device, DTYPES[settings.dtype])
    with progress.stage("checking weights", source.total_bytes, "B") as advance:
        digests = source.verify(advance)
    inputs = {
        f"weights of {source.name}": digests,
        f"config.json of {source.name}": sha256(source.folder / "config.json"),
        f"calibration text {settings.calib!r}": hashlib.sha256(samples.numpy().tobytes()).hexdigest(),
        # A named one may be another in another checkout of the same version.
        f"recipe {plan.recipe.name!r}": hashlib.sha256(json.dumps(plan.recipe.as_dict()).encode()).hexdigest(),
    }
    recorded = _jsonable(settings) | {"apex4_version": __version__, "inputs": inputs}
    state = RunState.resume(out, recorded) if resume else RunState.begin(out, recorded)
    try:
        run = _Run(source, settings, plan, samples, runner, state, progress, should_stop)
        result = run.execute()
    finally:
        state.close()
    state.finish()
    result.seconds = time.perf_counter() - started
    return result


def draw_calibration(
    source: ModelSource, settings: QuantizeSettings, asked_seq_len: int, progress: Progress
) -> torch.Tensor:
    """Token windows int64 [S, L] for resolved settings. Raises UsageError for text that is absent or too short."""
    tokenizer = load_tokenizer(source.folder)
    try:
        text = load_text(settings.calib)
        what = f"calibration text {settings.calib!r}"
        samples = draw_samples(tokenizer.encode, text, settings.samples, settings.seq_len, settings.seed, what)
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    if settings.seq_len < asked_seq_len:
        progress.line(f"calibration windows are {settings.seq_len} tokens, the model's context ({asked_seq_len} asked)")
    if len(samples) < settings.samples:
        progress.line(
            f"calibration text has {len(samples)} windows of {settings.seq_len} tokens ({settings.samples} asked)"
        )
    if int(samples.max()) >= int(source.config["vocab_size"]):
        raise Apex4Error(
            f"the tokenizer of {source.name} makes token {int(samples.max())} and the model knows "
            f"{source.config['vocab_size']}: tokenizer and model do not belong together"
        )
    return samples


def _return_free_memory() -> None:
    """glibc keeps freed blocks between live ones: over the layers of a model that adds up to hundreds of MB."""
    with contextlib.suppress(OSError, AttributeError):  # another libc has no such call, and no such habit
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Run:
    def __init__(
        self,
        source: ModelSource,
        settings: QuantizeSettings,
        plan: Plan,
        samples: torch.Tensor,
        runner: LayerRunner,
        state: RunState,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.source, self.settings, self.plan, self.samples = source, settings, plan, samples
        self.state, self.out, self.progress, self.should_stop = state, state.out, progress, should_stop
        self.runner = runner
        self.family, self.recipe = source.family, get_recipe(settings.recipe)
        self.shard_count = source.num_layers + 2  # embedding, layers, the rest
        self.name_width = max(len(linear.name) for linear in plan.linears)
        gptq = self.recipe.rounding == "gptq"
        # The layers before quantization, on hidden states of their own.
        self.original = LayerRunner(source, settings.device, runner.dtype) if self.recipe.gptaq else None
        self.collector = Collector(runner, self.family, source.config, gptq, progress.line, self.original)
        self.rewriter = Rewriter(source, runner, self.recipe, settings.seed, progress.line)
        by_gradients = self.recipe.importance == GRADIENTS
        self.predictions = LeavingGradients(source, runner, state, samples) if by_gradients else None

    def execute(self) -> QuantizeResult:
        for runner in filter(None, (self.runner, self.original)):
            runner.prepare(self.samples.shape[1])
        embedding = f"{self.family.embedding}.weight"
        if self.state.record(1) is None:
            tensors = self.rewriter.embedding(self.source.read([embedding]))
            self._write_shard(1, tensors)
            embedded = self.runner.embed(self.samples, tensors[embedding])
            self.state.save_hidden(0, Streams(embedded, embedded.clone() if self.original else None))
            del tensors, embedded
            self._commit(1, [])
        layers = range(self.source.num_layers)
        if self.predictions is not None:
            first = next((layer for layer in layers if self.state.record(layer + 2) is None), len(layers))
            self.predictions.take(first, self.settings.seed, self.progress, self.should_stop)
            _return_free_memory()
        total = sum(linear.elements for linear in self.plan.linears)
        with self.progress.stage("quantizing", total, "w") as advance:
            streams: Streams | None = None
            for layer in layers:
                if self.state.record(layer + 2) is not None:
                    advance(sum(linear.elements for linear in self.plan.of_layer(layer)))
                    self.state.drop_all(layer)
                    continue
                if self.should_stop():
                    raise Stopped(
                        f"stopped before layer {layer} of {self.source.num_layers}, nothing is lost: "
                        f"'apex4 quantize --resume -o {self.out}' goes on"
                    )
                streams = streams or self.state.load_hidden(layer, original=self.original is not None)
                streams = self._layer(layer, streams, advance)
        rest = [name for name in self.source.outer_tensors if name != embedding]
        self._write_shard(self.shard_count, self.rewriter.outer(self.source.read(rest)))
        self._commit(self.shard_count, [])
        return self._finish()

    def _layer(self, layer: int, streams: Streams, advance: Callable[[int], None]) -> Streams:
        prefix = self.family.layer_prefix(layer)
        stored = self.rewriter.layer(layer, self.source.read(self.source.layer_tensors(layer)), streams.hidden)
        module = self.runner.load_layer(layer, stored)
        if self.original is not None:
            self.original.load_layer(layer, stored)
        planned = self.plan.of_layer(layer)
        self.gradients = self._gradients(layer, streams.hidden)
        records: dict[str, dict[str, Any]] = {}
        for group in self.collector.groups_of(layer, module, planned, streams):
            matrix = self._dense_transform(layer, group, stored)
            clip = self._clip(layer, group, stored, matrix) if self.recipe.search_clip else None
            _return_free_memory()
            # The linear that stores the transform comes first: the others use it from there.
            group.parts.sort(key=lambda part: part.planned[0].format.transform_from is not None)
            readers = tuple(linear.name[len(prefix) :] for part in group.parts for linear in part.planned)
            first: Apex4Linear | None = None
            for part in group.take_parts():
                inputs, hessian = part.statistics.inputs(), part.statistics.take_hessian(matrix)
                factor = correction = None
                if hessian is not None:
                    factor = inverse_factor(part.reader, hessian, warn=self.progress.line)
                    if not self.recipe.refinement:
                        hessian = None
                drift = part.statistics.take_drift(matrix)
                if factor is not None and drift is not None:
                    correction = drift_correction(part.reader, drift, factor, self.recipe.gptaq)
                    del drift
                for linear in part.planned:
                    if clip is not None:
                        linear = replace(linear, format=replace(linear.format, activation_clip=clip))
                    weight = stored.pop(f"{linear.name}.weight").to(self.runner.device)
                    local = module.get_submodule(linear.name[len(prefix) :])
                    quantized = self._quantize(linear, weight, local, factor, matrix, correction, hessian)
                    if linear.format.transform_from is not None:
                        assert first is not None
                        quantized.take_transform_from(first)
                    first = first or quantized
                    record = self._measure(linear, weight, quantized, inputs)
                    module.set_submodule(linear.name[len(prefix) :], quantized)
                    for name in ("weight_packed", "weight_scale", "input_transform"):
                        if getattr(quantized, name) is not None:
                            stored[f"{linear.name}.{name}"] = getattr(quantized, name)
                    records[linear.name] = record | part.record_of(linear)
                    advance(linear.elements)
                hessian = factor = correction = None  # not while the next inputs are collected
            share_input(module, readers)
        self._write_shard(layer + 2, stored)
        del stored
        after = Streams(self.runner.run_layer(layer, streams.hidden))
        if self.original is not None and streams.original is not None:
            after = after._replace(original=self.original.run_layer(layer, streams.original))
        self.state.save_hidden(layer + 1, after)
        self._commit(layer + 2, [records[linear.name] for linear in planned if linear.name in records])
        self.state.drop_all(layer)
        for runner in filter(None, (self.runner, self.original)):
            runner.drop_layer(layer)
        _return_free_memory()
        return after

    def _gradients(self, layer: int, hidden: torch.Tensor) -> dict[str, InputGradients]:
        """Of the layer's inputs that are read by planned linears, by those linears' full names.

        Experts see too few of the tokens for gradients of their own, and those whose gradients say nothing are left away
        too: the weights that read them have to do.
        """
        if self.predictions is None:
            return {}
        prefix = self.family.layer_prefix(layer)
        planned = {linear.name for linear in self.plan.of_layer(layer)}
        groups = [
            names
            for group in self.family.groups(self.source.config, layer)
            if (names := tuple(name for name in group.linears if prefix + name in planned))
            and expert_of(names[0]) is None
        ]
        leaving = self.rewriter.stream_gradients(self.predictions.leaving(layer))
        found, _ = gradients_through(self.runner, layer, groups, hidden[self.predictions.windows], leaving)
        for names in groups:
            if names[0] not in found:
                self.progress.line(f"{prefix}{names[0]}: its gradients say nothing, weights are used in their place")
        _return_free_memory()
        return {prefix + name: found[names[0]] for names in groups if names[0] in found for name in names}

    def _gradients_of(self, group: CollectedGroup) -> InputGradients | None:
        return self.gradients.get(group.parts[0].planned[0].name)

    def _weighed(self, layer: int, group: CollectedGroup, stored: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        """The weights that read an input, float32 [N_i, padded K], rows scaled by how much their errors matter."""
        prefix = self.family.layer_prefix(layer)
        gradients = self._gradients_of(group)
        for linear in (linear for part in group.parts for linear in part.planned):
            weight = pad_input_features(stored[f"{linear.name}.weight"].to(self.runner.device), linear.format)
            require_quantizable(linear.name, weight)
            if gradients is not None:
                yield weight * gradients.outputs[linear.name[len(prefix) :]].sqrt()[:, None]
                continue
            for produced in self.family.groups(self.source.config, layer):
                if produced.producer is not None and prefix + produced.producer.linear == linear.name:
                    readers = [stored[f"{prefix}{name}.weight"].to(self.runner.device) for name in produced.linears]
                    heads = self.source.config.get("num_key_value_heads") or self.source.config["num_attention_heads"]
                    weight = weight.clone()  # it may be what is stored
                    scale_by_readers(weight, produced.producer, readers, heads)
            yield weight

    def _dense_transform(
        self, layer: int, group: CollectedGroup, stored: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """The transform learned for all linears of an input together, where the plan wants one, by block."""
        format = group.parts[0].planned[0].format
        if not format.transform.is_learned:
            return None
        inputs, weights = pad_input_features(group.statistics.inputs(), format), self._weighed(layer, group, stored)
        found = self._gradients_of(group)
        gradients = None if found is None else pad_input_features(found.rows, format)
        shared, steps = format.transform is TransformKind.SHARED, self.recipe.transform_steps
        return learn_transform(inputs, weights, steps, shared, gradients)

    def _clip(
        self, layer: int, group: CollectedGroup, stored: dict[str, torch.Tensor], matrix: torch.Tensor | None
    ) -> float:
        """The activation clip ratio that suits all linears of an input together: it is quantized once."""
        format = group.parts[0].planned[0].format
        found = self._gradients_of(group)
        amplifying = self._weighed(layer, group, stored) if found is None else [found.rows]  # an error of the input
        bases = (transform_weight(weight, format, matrix) for weight in amplifying)
        inputs = transform_input(evenly_spaced(group.statistics.inputs(), CLIP_ROWS), format, matrix)
        return search_activation_clip(inputs, bases, format.group_length)

    def _quantize(
        self,
        linear: PlannedLinear,
        weight: torch.Tensor,
        module: nn.Module,
        factor: torch.Tensor | None,
        matrix: torch.Tensor | None,
        correction: torch.Tensor | None,
        hessian: torch.Tensor | None,
    ) -> Apex4Linear:
        if factor is None:
            codes, scales = quantize_weight_rtn(linear.name, weight, linear.format, matrix)
        else:
            codes, scales = quantize_weight_gptq(
                linear.name, weight, linear.format, factor, matrix, correction, hessian, self.recipe.refinement
            )
        return Apex4Linear.from_codes(linear.format, codes, scales, module.bias, matrix)

    def _measure(
        self, linear: PlannedLinear, weight: torch.Tensor, quantized: Apex4Linear, inputs: torch.Tensor
    ) -> dict[str, Any]:
        """The record of a linear: what was decided, and its relative output error on `inputs` float32 [T, K].

        The error is that of the linear alone, also where GPTAQ aims at what the original model computes.
        """
        inputs = evenly_spaced(inputs, MEASURED_ROWS)
        exact = inputs @ weight.float().t()
        if quantized.bias is not None:
            exact += quantized.bias.float()
        # By the reference: the kernels do not compute in float32, and they would reorder tensors that are to be stored.
        error = float((quantized.reference(inputs) - exact).norm() / exact.norm().clamp_min(1e-30))
        shape = f"{linear.format.out_features} x {linear.format.in_features}"
        self.progress.line(
            f"{linear.name:{self.name_width}}  {shape:>15}  group {linear.format.group_size}  output error {error:.4f}"
        )
        return {
            "name": linear.name,
            "shape": [linear.format.out_features, linear.format.in_features],
            "group_size": linear.format.group_size,
            "activation_clip": linear.format.activation_clip,
            "error": error,
        }

    def _shard_path(self, shard: int) -> Path:
        return self.out / f"model-{shard:05}-of-{self.shard_count:05}.safetensors"

    def _write_shard(self, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(self._shard_path(shard), tensors)
        self._written = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}

    def _commit(self, shard: int, records: list[dict[str, Any]]) -> None:
        path = self._shard_path(shard)
        self.state.commit(
            shard,
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "tensors": self._written,
                "linears": records,
            },
        )

    def _finish(self) -> QuantizeResult:
        shards = [self.state.record(shard) for shard in range(1, self.shard_count + 1)]
        if any(shard is None for shard in shards):
            raise Apex4Error(f"{self.out} has unfinished shards: run again with --resume")
        records = [record for shard in shards for record in shard["linears"]]
        if [record["name"] for record in records] != [linear.name for linear in self.plan.linears]:
            raise Apex4Error(
                f"{len(records)} linears were quantized and {len(self.plan.linears)} were planned: "
                f"{self.out} is not complete and was not marked so"
            )
        weight_map = {name: shard["file"] for shard in shards for name in shard["tensors"]}
        total = sum(sum(shard["tensors"].values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        for pattern in COMPANION_PATTERNS:
            for path in sorted(self.source.folder.glob(pattern)):
                if path.is_file():
                    copy_file(path, self.out / path.name)
        write_json(self.out / INDEX_NAME, index)
        write_json(self.out / REPORT_NAME, self._report(shards, records))
        # Last: without config.json no reader takes the folder for a model.
        section = {"quantization_config": self._config(records).to_dict()}
        write_json(self.out / "config.json", self.source.config | self.rewriter.config_changes() | section)
        return QuantizeResult(self.out, self.plan, self.source, records, bytes_after=total)

    def _config(self, records: list[dict[str, Any]]) -> QuantConfig:
        """The plan's, with the clip ratios that were found on the way."""
        config = self.plan.config
        modules = {name: dict(entry) for name, entry in config.modules.items()}
        for record in records:
            if record["activation_clip"] != config.activation_clip:
                modules.setdefault(record["name"], {})["activation_clip"] = record["activation_clip"]
        return replace(config, modules=modules)

    def _report(self, shards: list[dict[str, Any]], records: list[dict[str, Any]]) -> dict[str, Any]:
        """Depends on the input alone, so that a resumed run writes the same bytes: no times, no host."""
        import transformers

        plan = plan_as_dict(self.plan, self.source)
        for entry, record in zip(plan["quantized"], records, strict=True):
            entry |= {
                key: record[key]
                for key in ("error", "activation_clip", "calibration_tokens", "fallback")
                if key in record
            }
        revision = hub_revision(self.source.folder)
        plan |= {"model_revision": revision} if revision else {}
        return plan | {
            "versions": {
                "apex4": __version__,
                "torch": torch.__version__.partition("+")[0],
                "transformers": transformers.__version__,
            },
            "settings": _jsonable(self.settings),
            "calibration_tokens": self.samples.numel(),
            "files": {shard["file"]: {"bytes": shard["bytes"], "sha256": shard["sha256"]} for shard in shards},
        }
