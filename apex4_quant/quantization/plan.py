"""What a run will do, decided from shapes alone, before any weight is read: `plan_of` the resolved settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UsageError
from ..format.layouts import get_layout
from ..format.number_format import BITS, LARGEST_K_OF_TOKENS, GroupSize
from ..format.quant_config import EIGHT_BIT_VERSION, FORMAT_VERSION, LinearFormat, QuantConfig
from ..format.storage import format_bytes
from ..format.transform_kind import TransformKind
from ..hardware.gpus import resolve_target
from ..kernels.runtime.architectures import eight_bit_family
from ..models.source import ModelSource
from ..recipes import Recipe, get_recipe
from .plan_file import PlanEntry
from .settings import ResolvedSettings


class KeepReason(StrEnum):
    """Why a tensor is stored as it is. The value is what reports say."""

    OUTSIDE_LAYERS = "outside the decoder layers"
    IGNORED = "--ignore"
    NOT_LINEAR = "not a linear weight"
    ROUTER = "a router"
    GATE = "a linear of a few gates"


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
    """A tensor that is stored as it is."""

    name: str
    reason: KeepReason
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Every linear that is quantized, in the order of the model, and every tensor that is kept."""

    linears: tuple[PlannedLinear, ...]
    kept: tuple[KeptTensor, ...]
    config: QuantConfig
    recipe: Recipe

    def of_layer(self, layer: int) -> list[PlannedLinear]:
        return [linear for linear in self.linears if linear.layer == layer]

    @property
    def learns_from_text(self) -> bool:
        """Whether any stored number depends on the calibration text."""
        return self.recipe.learns_from_text or any(linear.format.transform.is_learned for linear in self.linears)

    @property
    def bytes_after(self) -> int:
        return sum(linear.format.stored_bytes for linear in self.linears) + sum(kept.bytes for kept in self.kept)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and padding included."""
        elements = sum(linear.elements for linear in self.linears)
        return 8 * sum(linear.format.stored_bytes for linear in self.linears) / elements if elements else 0.0


def plan_of(source: ModelSource, settings: ResolvedSettings) -> Plan:
    """What a run with `settings` will do. Raises UsageError."""
    target = resolve_target(settings.target)
    return build_plan(
        source,
        recipe=get_recipe(settings.recipe),
        transform=settings.transform,
        group_size=settings.group_size,
        layout=settings.layout,
        target={"gpu": target.gpu, "arch": target.arch},
        ignore=settings.ignore,
        entries=settings.plan,
        activation_bits=settings.activation_bits,
    )


def build_plan(
    source: ModelSource,
    *,
    recipe: Recipe | str,
    transform: TransformKind,
    group_size: GroupSize,
    layout: str,
    target: dict[str, str | None],
    ignore: tuple[str, ...],
    entries: Mapping[str, PlanEntry] | None = None,
    activation_bits: int = BITS,
) -> Plan:
    """Decide every linear of `source`. `entries` of a plan, by full module name, override `group_size` and, where they name
    one, `transform` and `activation_bits`.

    Raises UsageError if an --ignore pattern matches nothing, or everything does, or a plan misses a linear, or the target has
    no kernel for 8-bit activations that are asked for.
    """
    family, transform = source.family, TransformKind(transform)
    asked = get_recipe(recipe)
    base = LinearFormat(
        1,
        1,
        group_size,
        get_layout(layout),
        transform.fitting(group_size, activation_bits),
        _clip_of(asked, transform.fitting(group_size, activation_bits), activation_bits),
        activation_bits=activation_bits,
    )
    linears: list[PlannedLinear] = []
    quantized_tensors: set[str] = set()
    ignored: list[str] = []
    gates: list[str] = []
    unmatched = set(ignore)
    for layer in range(source.num_layers):
        prefix = family.layer_prefix(layer)
        gates += [prefix + name for name in family.kept_linears(source.config, layer)]
        for position, input_group in enumerate(family.groups(source.config, layer)):
            owner: str | None = None  # the linear that stores the learned transform of this input
            for name in (prefix + part for part in input_group.linears):
                hits = {
                    pattern for pattern in ignore if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
                }
                unmatched -= hits
                if hits:
                    ignored.append(name)
                    continue
                out_features, in_features = source.infos[f"{name}.weight"].shape
                entry = None if entries is None else entries.get(name)
                if entries is not None and entry is None:
                    raise UsageError(f"the plan says nothing of {name}: add it, or keep it with --ignore")
                bits = (entry.activation_bits if entry else None) or activation_bits
                own_size = entry.group_size if entry else group_size
                wanted = (entry.transform if entry else None) or transform
                format = replace(
                    base,
                    out_features=out_features,
                    in_features=in_features,
                    group_size=own_size,
                    transform=wanted.fitting(own_size, bits),
                    transform_from=owner,
                    activation_bits=bits,
                    activation_clip=_clip_of(asked, wanted.fitting(own_size, bits), bits),
                )
                if bits != BITS:
                    _require_eight_bits(name, format, target)
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
    of_gates = {f"{name}.weight" for name in gates}

    def reason(name: str) -> KeepReason:
        if name in outer:
            return KeepReason.OUTSIDE_LAYERS
        if family.experts is not None and name.rpartition(".")[0].endswith(f".{family.experts.router}"):
            return KeepReason.ROUTER
        if name in of_gates:
            return KeepReason.GATE
        return KeepReason.IGNORED if name in on_request else KeepReason.NOT_LINEAR

    kept = tuple(
        KeptTensor(name, reason(name), info.bytes)
        for name, info in source.infos.items()
        if name not in quantized_tensors
    )
    head = f"{family.head}.weight"
    if asked.rotation and head not in source.infos:  # tied: after a rotation it is a tensor of its own
        kept += (KeptTensor(head, KeepReason.OUTSIDE_LAYERS, source.infos[f"{family.embedding}.weight"].bytes),)
    config = QuantConfig(
        group_size=group_size,
        layout=layout,
        transform=base.transform,
        activation_clip=base.activation_clip,
        activation_bits=base.activation_bits,
        format_version=(
            FORMAT_VERSION if all(each.format.activation_bits == BITS for each in linears) else EIGHT_BIT_VERSION
        ),
        target=target,
        modules={linear.name: changed for linear in linears if (changed := _override(linear.format, base))},
        modules_to_not_convert=[family.head, *family.beside, *gates, *ignored],
        recipe=asked.name,
    )
    return Plan(tuple(linears), kept, config, asked)


def _clip_of(recipe: Recipe, transform: TransformKind, activation_bits: int) -> float:
    """Before a search: 1 where there is no clip ratio, and where every block has its own."""
    return recipe.activation_clip if activation_bits == BITS and not transform.has_block_clips else 1.0


def _require_eight_bits(name: str, format: LinearFormat, target: dict[str, str | None]) -> None:
    """Raise UsageError if the linear cannot have 8-bit activations, or the target not compute with them."""
    if not format.may_have_eight_bits:
        raise UsageError(
            f"{name} has {format.padded_k} input features, more than the {LARGEST_K_OF_TOKENS} that can be summed with 8-bit "
            "activations: give it 4 in a plan"
        )
    arch = target["arch"]
    if arch is not None and eight_bit_family(int(arch.removeprefix("sm_"))) is None:
        raise UsageError(
            f"{name} is to have 8-bit activations, and apex4 has no kernel for them for {target['gpu'] or arch}: "
            "use 4 bits, or --target none"
        )


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
    if format.activation_bits != base.activation_bits:
        entry["activation_bits"] = format.activation_bits
    return entry


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
            | ({} if linear.format.activation_bits == BITS else {"activation_bits": linear.format.activation_bits})
            for linear in plan.linears
        ],
        "kept": [{"name": kept.name, "reason": str(kept.reason), "bytes": kept.bytes} for kept in plan.kept],
        **({"left_away": sorted(source.left_away)} if source.left_away else {}),
        "bytes_before": source.total_bytes,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": round(plan.bits_per_weight, 4),
    }


def plan_as_text(plan: Plan, source: ModelSource, verbose: bool = False) -> str:
    """The plan for people: one line per kind of linear, or with `verbose` per linear, and one per reason to keep."""
    kinds: dict[tuple[str, str], list[PlannedLinear]] = {}
    for linear in plan.linears:
        shape = f"{linear.format.out_features} x {linear.format.in_features}"
        padded = " (padded)" if linear.format.is_padded else ""
        bits = "" if linear.format.activation_bits == BITS else f"  A{linear.format.activation_bits}"
        name = linear.name if verbose else re.sub(r"\.\d+\.", ".*.", linear.name)
        described = f"{shape:>15}  group {linear.format.group_size}  {linear.format.transform}{bits}{padded}"
        kinds.setdefault((name, described), []).append(linear)
    width = max(len(name) for name, _ in kinds)
    count = len(str(max(len(linears) for linears in kinds.values())))
    lines = [source.describe()]
    for (name, described), linears in kinds.items():
        times = "" if verbose else f"{len(linears):>{count}} x "
        size = format_bytes(sum(linear.format.stored_bytes for linear in linears))
        lines.append(f"  {times}{name:{width}}  {described}  {size:>9}")
    reasons: dict[str, list[KeptTensor]] = {}
    for kept in plan.kept:
        reasons.setdefault(kept.reason, []).append(kept)
    for reason, tensors in reasons.items():
        size = format_bytes(sum(kept.bytes for kept in tensors))
        names = ", ".join(kept.name for kept in tensors[:3]) + (", ..." if len(tensors) > 3 else "")
        lines.append(f"  kept, {reason}: {len(tensors)} tensors, {size} ({names})")
    if source.left_away:
        size = format_bytes(sum(info.bytes for info in source.left_away.values()))
        lines.append(
            f"  left away, as transformers does not load what predicts further tokens: {len(source.left_away)} tensors, "
            f"{size} ({min(source.left_away)}, ...)"
        )
    lines.append(
        f"  {format_bytes(source.total_bytes)} -> {format_bytes(plan.bytes_after)}, "
        f"{plan.bits_per_weight:.3f} bits per quantized weight"
    )
    return "\n".join(lines)
