"""The plan file: group size, transform and activation bits of every linear, written by `apex4 plan`, edited by people, read by
`apex4 quantize --plan`.

    apex4_plan: 1
    architecture: LlamaForCausalLM
    linears:
      model.layers.0.self_attn.q_proj: {group_size: 128, transform: dense128, activation_bits: 8, shape: [4096, 4096]}

YAML, or JSON if the name ends so (which is YAML too). `transform` and `activation_bits` may be left away: the run's are used
then. Everything else at the top (model, target, mode, ...) says how the plan came about and binds nobody. Linears that read one
input transform and quantize it once, so they must have one group size, one transform and one number of bits.

A run records how its plan came about, for cards and reports. What was predicted of the plan is recorded only of the plan as
it was made: `checksum` tells whether its linears were edited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, shown
from ..format.number_format import BITS, BLOCK, GroupSize, parse_activation_bits, parse_group_size
from ..format.transform_kind import TransformKind
from ..format.yaml_text import parse_yaml
from ..models.source import ModelSource

PLAN_VERSION = 1
PLAN_SUFFIXES = (".yaml", ".yml", ".json")
_RECORDED = ("recipe", "target", "mode", "mainloop", "tokens", "bos", "budget", "max_loss", "predicted", "front")
_INFORMATIVE = ("model", "checksum", *_RECORDED)
_ENTRY_KEYS = ("group_size", "transform", "activation_bits", "shape")


@dataclass(frozen=True)
class PlanEntry:
    """What a plan says of one linear."""

    group_size: GroupSize
    transform: TransformKind | None = None  # None: that of the run
    shape: tuple[int, int] | None = None  # [out, in] as the file claims it
    activation_bits: int | None = None  # None: those of the run

    def transform_in(self, transform: TransformKind, activation_bits: int) -> TransformKind:
        """What the linear has in a run with this transform and these bits."""
        return (self.transform or transform).fitting(self.group_size, self.activation_bits or activation_bits)

    def as_dict(self) -> dict[str, Any]:
        """What a run records."""
        entry: dict[str, Any] = {"group_size": self.group_size}
        if self.transform is not None:
            entry["transform"] = str(self.transform)
        if self.activation_bits is not None:
            entry["activation_bits"] = self.activation_bits
        return entry


@dataclass(frozen=True)
class PlanFile:
    """A plan file whose own form is right; `for_model` compares it with a model.

    `origin` is what a run records of how the plan came about, None where the planner did not make it. It has "predicted"
    (QuantizationPlan.predicted) only if nobody edited the linears.
    """

    path: Path
    architecture: str | None
    linears: Mapping[str, PlanEntry]
    origin: dict[str, Any] | None = None

    @property
    def names_transforms(self) -> bool:
        return any(entry.transform is not None for entry in self.linears.values())

    @property
    def names_activation_bits(self) -> bool:
        return any(entry.activation_bits is not None for entry in self.linears.values())

    def for_model(
        self, source: ModelSource, transform: TransformKind, activation_bits: int = BITS
    ) -> dict[str, PlanEntry]:
        """The entries by full module name; `transform` and bits are those of linears for which the plan names none.

        Raises UsageError where the plan is not one of this model.
        """
        if self.architecture not in (None, source.family.architecture):
            raise UsageError(
                f"plan {self.path} is for {self.architecture} and {source.name} is {source.family.architecture}: "
                f"make one with 'apex4 plan {source.name}'"
            )
        known = {name.removesuffix(".weight"): info.shape for name, info in source.infos.items()}
        planned = set()
        for layer in range(source.num_layers):
            prefix = source.family.layer_prefix(layer)
            for group in source.family.groups(source.config, layer):
                names = [prefix + part for part in group.linears]
                planned.update(names)
                listed = [name for name in names if name in self.linears]
                for name in listed[1:]:
                    first, other = self.linears[listed[0]], self.linears[name]
                    for what, of_first, of_other in (
                        ("group size", first.group_size, other.group_size),
                        (
                            "activation_bits",
                            first.activation_bits or activation_bits,
                            other.activation_bits or activation_bits,
                        ),
                        (
                            "transform",
                            first.transform_in(transform, activation_bits),
                            other.transform_in(transform, activation_bits),
                        ),
                    ):
                        if of_other != of_first:
                            raise UsageError(
                                f"plan {self.path} has {what} {of_first} for {listed[0]} and {of_other} for {name}, "
                                "which read the same input: give both the same"
                            )
        for name, entry in self.linears.items():
            if name not in planned:
                raise UsageError(f"plan {self.path} names {name}, which is no linear of {source.name}: remove it")
            if entry.shape is not None and entry.shape != known[name]:
                raise UsageError(
                    f"plan {self.path} has {entry.shape[0]} x {entry.shape[1]} for {name}, which is "
                    f"{known[name][0]} x {known[name][1]} in {source.name}: it is the plan of another model"
                )
            bits = entry.activation_bits or activation_bits
            if entry.transform is not None and entry.transform.fitting(entry.group_size, bits) != entry.transform:
                raise UsageError(
                    f"plan {self.path} has transform {entry.transform} for {name} and {bits}-bit activations are asked for, and that "
                    f"makes up for errors of {BITS} bits only: write transform: {TransformKind.DENSE}"
                )
        return dict(self.linears)


def plan_given(linears: Mapping[str, GroupSize | Mapping[str, Any]]) -> PlanFile:
    """A plan that is no file: group sizes, or entries as in a file, by name. Raises UsageError for an illegal one."""
    path = Path("given")
    entries = {
        name: _read_entry(path, name, dict(entry) if isinstance(entry, Mapping) else {"group_size": entry})
        for name, entry in linears.items()
    }
    return PlanFile(path, None, entries)


def read_plan_file(path: Path) -> PlanFile:
    """Read and check the form. Raises UsageError with one sentence that names the file and the entry."""
    if not path.is_file():
        raise UsageError(f"plan {path} does not exist: make one with 'apex4 plan MODEL --target GPU -o {path}'")
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"plan {path} is not valid YAML (not UTF-8): correct it or make a new one") from error
    except ValueError as error:
        raise UsageError(f"plan {path} is not valid YAML ({error}): correct it or make a new one") from error
    if not isinstance(content, dict) or not isinstance(content.get("linears"), dict):
        raise UsageError(f"plan {path} has no mapping 'linears': make a new one with 'apex4 plan'")
    for key in content:
        if key not in ("apex4_plan", "architecture", "linears", *_INFORMATIVE):
            raise UsageError(f"plan {path} has an unknown key {shown(key)}: remove it")
    if content.get("apex4_plan") != PLAN_VERSION:
        raise UsageError(
            f"plan {path} has apex4_plan = {shown(content.get('apex4_plan'))} and this apex4 reads {PLAN_VERSION}: "
            "make a new one with 'apex4 plan'"
        )
    linears = {str(name): _read_entry(path, str(name), entry) for name, entry in content["linears"].items()}
    return PlanFile(path, content.get("architecture"), linears, _origin(path, content))


def _origin(path: Path, content: dict[str, Any]) -> dict[str, Any] | None:
    """Raises UsageError where what was predicted is not in the form in which it was written."""
    predicted, front = content.get("predicted", {}), content.get("front", [])
    if not isinstance(predicted, dict) or not all(map(_is_number, predicted.values())):
        raise UsageError(f"plan {path} has predicted = {predicted!r}, which are no numbers by name: remove it")
    if not isinstance(front, list) or not all(
        isinstance(point, list) and len(point) == 2 and all(map(_is_number, point)) for point in front
    ):
        raise UsageError(f"plan {path} has front = {front!r}, which are no pairs of time and loss: remove it")
    if not predicted and not front:
        return None
    edited = content.get("checksum") != _checksum(content["linears"])
    return {key: content[key] for key in _RECORDED if key in content and not (edited and key == "predicted")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checksum(linears: Mapping[str, Any]) -> str:
    """Of the entries by name, in any order."""
    named = {str(name): entry for name, entry in linears.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def _read_entry(path: Path, name: str, entry: Any) -> PlanEntry:
    if not isinstance(entry, dict) or "group_size" not in entry:
        raise UsageError(f"plan {path} has no group_size for {name}: write {{group_size: 128}}")
    for key in entry:
        if key not in _ENTRY_KEYS:
            raise UsageError(f"plan {path} has an unknown key {shown(key)} for {name}: remove it")
    shape = entry.get("shape")
    if shape is not None and not (
        isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    ):
        raise UsageError(f"plan {path} has shape {shown(shape)} for {name}: write [out features, in features]")
    try:
        group_size = parse_group_size(entry["group_size"])
    except UsageError as error:
        raise UsageError(f"plan {path}, {name}: {error}") from error
    transform = entry.get("transform")
    if transform is not None and transform not in list(TransformKind):
        raise UsageError(
            f"plan {path} has transform {shown(transform)} for {name}: give one of {', '.join(TransformKind)}"
        )
    if transform is not None and TransformKind(transform).is_learned and group_size != BLOCK:
        raise UsageError(
            f"plan {path} has transform {transform} and group size {group_size} for {name}, and kernels have a learned "
            f"transform with groups of {BLOCK} only: change one of them"
        )
    bits = entry.get("activation_bits")
    if bits is not None:
        try:
            bits = parse_activation_bits(bits)
        except UsageError as error:
            raise UsageError(f"plan {path}, {name}: {error}") from error
        if bits != BITS and transform is not None and TransformKind(transform).has_feedback:
            raise UsageError(
                f"plan {path} has transform {transform} and {bits}-bit activations for {name}, and that makes up for errors of "
                f"{BITS} bits only: write transform: {TransformKind.DENSE}"
            )
    return PlanEntry(
        group_size,
        None if transform is None else TransformKind(transform),
        None if shape is None else (shape[0], shape[1]),
        bits,
    )


def require_plan_path(path: Path) -> None:
    """Raise UsageError unless a new plan can be written to `path`: an edited plan is not overwritten."""
    if path.suffix not in PLAN_SUFFIXES:
        raise UsageError(f"plan file {path} must end in {', '.join(PLAN_SUFFIXES)}")
    if path.exists():
        raise UsageError(f"plan file {path} is there already: give another name or remove it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"plan file {path} cannot be written, its folder does not exist: make it first")


def plan_file_text(
    header: dict[str, Any], groups: list[dict[str, dict[str, Any]]], comments: list[str], notes: dict[str, str]
) -> str:
    """The YAML of a plan. `groups`: for every shared input, entries by name; `comments`: on each; `notes`: by name."""
    header = header | {"checksum": _checksum(_linears(groups))}
    lines = [
        "# Change group_size to 128, 256, 512, ... or channel, transform to hadamard128, none, dense128, feedback128 or",
        "# feedback128x16 (the last three are learned, with group_size 128 only; the last two make up for errors of 4 bits, and are",
        "# for those only), activation_bits to 4 (if it is not there) or 8: apex4 quantize MODEL -o OUT --plan THIS_FILE",
        "# Linears that read the same input (no empty line between them) must have the same of all three.",
        "# Predicted: loss of the input in 1/1000 nat a token (divergence from the original), relative error of the linear.",
        f"apex4_plan: {PLAN_VERSION}",
        *(f"{key}: {_flow(value)}" for key, value in header.items()),
        "linears:",
    ]
    for group, comment in zip(groups, comments, strict=True):
        lines.append(f"  # {comment}")
        lines += [f"  {_flow(name)}: {_flow(entry)}  # {notes[name]}" for name, entry in group.items()]
        lines.append("")
    return "\n".join(lines)


def plan_file_json(header: dict[str, Any], groups: list[dict[str, dict[str, Any]]]) -> str:
    """The same as JSON, which has no comments."""
    linears = _linears(groups)
    content = {"apex4_plan": PLAN_VERSION, **header, "checksum": _checksum(linears), "linears": linears}
    return json.dumps(content, indent=2) + "\n"


def _linears(groups: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {name: entry for group in groups for name, entry in group.items()}


class _Dumper(yaml.SafeDumper):
    """Writes enums of text, such as TransformKind, as their text."""


_Dumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(str(value)))


def _flow(value: Any) -> str:
    """One line of YAML."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
