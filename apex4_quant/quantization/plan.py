"""What a run will do, decided from shapes alone, before any weight is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..calib.probes import PROBE_ROWS, rows_to_learn_from
from ..errors import UsageError
from ..format.layouts import get_layout
from ..format.number_format import BLOCK, GroupSize
from ..format.quant_config import LinearFormat, QuantConfig
from ..format.storage import format_bytes
from ..format.transform_kind import TransformKind
from ..models.families import expert_of
from ..models.source import ModelSource
from ..recipes import GRADIENTS, Recipe, get_recipe

OUTSIDE_LAYERS = "outside the decoder layers"
IGNORED = "--ignore"
NOT_LINEAR = "not a linear weight"
ROUTER = "a router"


@dataclass(frozen=True)
class PlannedLinear:
    """`name` is the module's full name; `input_group` its index among the layer's input groups."""

    name: str
    layer: int
    input_group: int
    format: LinearFormat

    @property
    def elements(self) -> int:
        return self.format.out_features * self.format.in_features


@dataclass(frozen=True)
class KeptTensor:
    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    linears: tuple[PlannedLinear, ...]
    kept: tuple[KeptTensor, ...]
    config: QuantConfig
    recipe: Recipe

    def of_layer(self, layer: int) -> list[PlannedLinear]:
        return [linear for linear in self.linears if linear.layer == layer]

    @property
    def bytes_after(self) -> int:
        return sum(linear.format.stored_bytes for linear in self.linears) + sum(kept.bytes for kept in self.kept)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and padding included."""
        elements = sum(linear.elements for linear in self.linears)
        return 8 * sum(linear.format.stored_bytes for linear in self.linears) / elements if elements else 0.0


def build_plan(
    source: ModelSource,
    *,
    recipe: Recipe | str,
    transform: TransformKind,
    group_size: GroupSize,
    layout: str,
    target: dict[str, str | None],
    ignore: tuple[str, ...],
    entries: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Decide every linear of `source`. `entries` of a plan file (PlanFile.for_model) override `group_size` and, where they
    name one, `transform`, by full module name.

    Raises UsageError if an --ignore pattern matches nothing, or everything does, or a plan misses a linear.
    """
    family = source.family
    asked = get_recipe(recipe)
    base = LinearFormat(1, 1, group_size, get_layout(layout), transform, asked.activation_clip)
    linears, quantized_tensors, ignored, unmatched = [], set(), [], set(ignore)
    for layer in range(source.num_layers):
        prefix = family.layer_prefix(layer)
        for position, group in enumerate(family.groups(source.config, layer)):
            owner: str | None = None  # of the dense transform of this input
            for name in (prefix + part for part in group.linears):
                hits = {
                    pattern for pattern in ignore if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
                }
                unmatched -= hits
                if hits:
                    ignored.append(name)
                    continue
                out_features, in_features = source.infos[f"{name}.weight"].shape
                if entries is not None and name not in entries:
                    raise UsageError(f"the plan says nothing of {name}: add it, or keep it with --ignore")
                format = replace(
                    base,
                    out_features=out_features,
                    in_features=in_features,
                    transform_from=owner,
                    **({} if entries is None else entries[name]),
                )
                if format.transform.is_learned:
                    owner = owner or name
                linears.append(PlannedLinear(name, layer, position, format))
                quantized_tensors.add(f"{name}.weight")
    if unmatched:
        example = family.layer_prefix(0) + family.linears(source.config, 0)[-1]
        raise UsageError(f"--ignore {sorted(unmatched)[0]!r} matches no linear: names look like {example}")
    if not linears:
        raise UsageError("--ignore leaves nothing to quantize: give fewer patterns")
    outer, on_request = set(source.outer_tensors), {f"{name}.weight" for name in ignored}

    def reason(name: str) -> str:
        if name in outer:
            return OUTSIDE_LAYERS
        if family.experts is not None and name.endswith(f".{family.experts.router}.weight"):
            return ROUTER
        return IGNORED if name in on_request else NOT_LINEAR

    kept = tuple(
        KeptTensor(name, reason(name), info.bytes)
        for name, info in source.infos.items()
        if name not in quantized_tensors
    )
    head = f"{family.head}.weight"
    if asked.rotation and head not in source.infos:  # tied: after a rotation it is a tensor of its own
        kept += (KeptTensor(head, OUTSIDE_LAYERS, source.infos[f"{family.embedding}.weight"].bytes),)
    config = QuantConfig(
        group_size=group_size,
        layout=layout,
        transform=transform,
        activation_clip=asked.activation_clip,
        target=target,
        modules={linear.name: entry for linear in linears if (entry := _override(linear.format, base))},
        modules_to_not_convert=[family.head, *ignored],
        recipe=asked.name,
    )
    return Plan(tuple(linears), kept, config, asked)


def _override(format: LinearFormat, base: LinearFormat) -> dict[str, Any]:
    """What config.json says of this linear alone."""
    entry: dict[str, Any] = {}
    if format.group_size != base.group_size:
        entry["group_size"] = format.group_size
    if format.transform != base.transform:
        entry["transform"] = str(format.transform)
    if format.is_padded:
        entry["shape"] = [format.out_features, format.in_features]
    if format.transform_from is not None:
        entry["transform_from"] = format.transform_from
    return entry


def estimate_peak_memory(
    source: ModelSource, plan: Plan, tokens: int, seq_len: int, compute_bytes: int, hessians: bool
) -> int:
    """Bytes of tensors alive at the worst moment: one layer, its largest linear's float32 working copies, a batch,
    the Hessians that are collected together with the factors of one, the rows kept of experts' inputs, what a dense
    transform is learned from, and the calibration hidden states (before and after the layer, its attention's outputs,
    and what is kept of a last linear's inputs).
    For GPTAQ the original layer and its hidden states are there too, and a second matrix per Hessian."""
    from ..models.replaying import KEPT_BYTES

    hidden = int(source.config["hidden_size"])
    layer = max(sum(source.infos[n].bytes for n in source.layer_tensors(i)) for i in range(source.num_layers))
    widest = max(max(linear.format.padded_k, linear.format.out_features) for linear in plan.linears)
    largest = max(linear.elements for linear in plan.linears)
    outer = max(source.infos[name].bytes for name in source.outer_tensors)
    streams = 2 if plan.recipe.gptaq else 1
    stream = tokens * hidden * compute_bytes
    states = streams * (3 * stream + min(max(KEPT_BYTES, stream), tokens * widest * compute_bytes))
    working = streams * (layer + 16 * seq_len * widest) + 12 * largest
    if hessians:
        working += (
            (4 if plan.recipe.refinement else 3) * 4 * max(linear.format.padded_k for linear in plan.linears) ** 2
        )
    learned = [linear.format for linear in plan.linears if linear.format.transform.is_learned]
    if learned:  # rows of inputs and weights, twice, and a dozen matrices
        from ..transforms.learned_transform import WEIGHT_SAMPLE

        rows = 2 * (2 * WEIGHT_SAMPLE) + 12 * BLOCK
        working += max(
            4 * format.padded_k * (rows + 2 * min(tokens, rows_to_learn_from(format.in_features))) for format in learned
        )
    if plan.recipe.importance == GRADIENTS:  # rows by input group, and what a backward pass of one window needs
        from .predictions import windows_of

        inputs = {(linear.layer, linear.input_group): linear.format.padded_k for linear in plan.linears}
        rows = sum(inputs.values()) // source.num_layers * min(tokens, PROBE_ROWS)
        working += 12 * windows_of(tokens // seq_len, seq_len) * seq_len * hidden  # leaving, entering, its parts
        heads = int(source.config.get("num_attention_heads") or 1)
        working += 4 * rows + compute_bytes * (4 * heads * seq_len**2 + 16 * seq_len * widest)
    predicting = 0
    if (
        plan.recipe.importance == GRADIENTS
    ):  # the head as stored and in float32, and logits with what goes back through them
        from ..models.layer_runner import HEAD_TOKENS

        head = int(source.config["vocab_size"]) * hidden
        predicting = outer + 4 * head + 16 * HEAD_TOKENS * int(source.config["vocab_size"])
    rewriting = 0
    if plan.recipe.rotation or plan.recipe.diagonal:  # the layer in float32, before anything is collected, and loaded
        rewriting = 3 * layer + 16 * seq_len * widest
    return (
        max(working + _collected_bytes(source, plan, compute_bytes, hessians), rewriting, predicting, 2 * outer)
        + states
    )


def _collected_bytes(source: ModelSource, plan: Plan, compute_bytes: int, hessians: bool) -> int:
    """What one stage's statistics take at most: a Hessian per input, and for experts a shared one and rows too."""
    from .collector import EXPERT_ROWS

    matrices = (2 if plan.recipe.gptaq else 1) if hessians else 0
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


def estimate_seconds(source: ModelSource, plan: Plan, tokens: int, device: str, hessians: bool) -> float:
    """From two short measurements on this machine: a quantized linear, and the scale search."""
    import torch

    from ..kernels import torch_backend
    from ..rounding.nearest import search_scales

    size = 1024
    weight = torch.randn(size, size, device=device)
    codes, scales = torch.ones(size, size, dtype=torch.int8, device=device), torch.ones(size, 8, device=device).half()

    def seconds_of(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            function()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    per_multiply = seconds_of(lambda: torch_backend.linear(weight, codes, scales)) / size**3
    per_element = seconds_of(lambda: search_scales(weight, 128)) / size**2
    elements = sum(linear.elements for linear in plan.linears)
    experts = source.family.experts
    share = 1.0 if experts is None else experts.token_share(source.config)

    def seen(expert: int | None) -> float:
        return tokens if expert is None else tokens * share

    # A GPU runs a linear again for every later input group of its layer and once at the end; a CPU remembers most of it.
    passes = 1.25 if device == "cpu" else 3
    multiplies = passes * sum(seen(expert_of(linear.name)) * linear.elements for linear in plan.linears)
    inputs = {(p.layer, p.input_group, expert_of(p.name)): p.format.padded_k for p in plan.linears}
    learned = {(p.layer, p.input_group): p.format.padded_k for p in plan.linears if p.format.transform.is_learned}
    if learned:
        from ..transforms.learned_transform import ROWS, WEIGHT_ROWS

        multiplies += (
            plan.recipe.transform_steps * BLOCK * (2 * ROWS + 2 * WEIGHT_ROWS + 5 * BLOCK) * sum(learned.values())
        )
    if plan.recipe.importance == GRADIENTS:
        from .predictions import TOKENS

        # Forwards; back through every layer, for what enters it and for its linears: each again forwards, and two products.
        multiplies += 7 * min(tokens, TOKENS) * sum(linear.elements for linear in plan.linears)
    if hessians:  # a good half of K^2 a token and input for the Hessian, N K^2 a linear for GPTQ
        multiplies += 0.6 * sum(seen(expert) * k * k for (_, _, expert), k in inputs.items())
        multiplies += sum(linear.elements * linear.format.padded_k for linear in plan.linears)
        multiplies += plan.recipe.refinement * sum(linear.elements * linear.format.padded_k for linear in plan.linears)
    if plan.recipe.gptaq:  # the original's linears, a second matrix a token, its products with factors and weights
        multiplies += 3 * sum(seen(expert_of(linear.name)) * linear.elements for linear in plan.linears)
        multiplies += sum((seen(expert) + 2 * k) * k * k for (_, _, expert), k in inputs.items())
        multiplies += sum(linear.elements * linear.format.padded_k for linear in plan.linears)
    return elements * per_element + multiplies * per_multiply


def plan_as_dict(plan: Plan, source: ModelSource) -> dict[str, Any]:
    """The plan for --json and for the report in the checkpoint."""
    return {
        "model": source.name,
        "architecture": source.family.architecture,
        "quantized": [
            {
                "name": linear.name,
                "shape": [linear.format.out_features, linear.format.in_features],
                "group_size": linear.format.group_size,
                "transform": str(linear.format.transform),
                "bytes": linear.format.stored_bytes,
            }
            for linear in plan.linears
        ],
        "kept": [{"name": kept.name, "reason": kept.reason, "bytes": kept.bytes} for kept in plan.kept],
        "bytes_before": source.total_bytes,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": round(plan.bits_per_weight, 4),
    }


def plan_as_text(plan: Plan, source: ModelSource) -> str:
    """The plan for people, one line per linear and per reason to keep."""
    width = max(len(linear.name) for linear in plan.linears)
    lines = [source.describe()]
    for linear in plan.linears:
        shape = f"{linear.format.out_features} x {linear.format.in_features}"
        padded = " (padded)" if linear.format.is_padded else ""
        lines.append(
            f"  {linear.name:{width}}  {shape:>15}  group {linear.format.group_size}  {linear.format.transform}  "
            f"{format_bytes(linear.format.stored_bytes):>9}{padded}"
        )
    reasons: dict[str, list[KeptTensor]] = {}
    for kept in plan.kept:
        reasons.setdefault(kept.reason, []).append(kept)
    for reason, tensors in reasons.items():
        size = format_bytes(sum(kept.bytes for kept in tensors))
        names = ", ".join(kept.name for kept in tensors[:3]) + (", ..." if len(tensors) > 3 else "")
        lines.append(f"  kept, {reason}: {len(tensors)} tensors, {size} ({names})")
    lines.append(
        f"  {format_bytes(source.total_bytes)} -> {format_bytes(plan.bytes_after)}, "
        f"{plan.bits_per_weight:.3f} bits per quantized weight"
    )
    return "\n".join(lines)
