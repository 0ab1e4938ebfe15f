"""`quantization_config` of config.json: what a checkpoint says of itself. Normative text: docs/format.md §3."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from ..errors import Apex4Error, UsageError
from .layout_name import LayoutName
from .layouts import Layout, get_layout
from .number_format import (
    ACTIVATION_BITS,
    BITS,
    BLOCK,
    LARGEST_K_OF_TOKENS,
    GroupSize,
    arithmetic_name,
    group_count,
    group_length,
    padded_in_features,
    parse_activation_bits,
    parse_group_size,
)
from .transform_kind import TransformKind

QUANT_METHOD = "apex4"
FORMAT_VERSION, EIGHT_BIT_VERSION = 1, 2  # the second where a linear has 8-bit activations: else the first is written
# The keys of a `modules` entry; those of version 1 stand first.
_OVERRIDES = ("group_size", "transform", "activation_clip", "shape", "transform_from", "activation_bits")


@dataclass(frozen=True)
class LinearFormat:
    """Everything needed to store and compute one quantized linear."""

    out_features: int
    in_features: int
    group_size: GroupSize
    layout: Layout
    transform: TransformKind
    activation_clip: float
    transform_from: str | None = None  # the linear that stores the dense transform of the input both read
    activation_bits: int = BITS  # 4, or 8: then `activation_clip` is 1

    def __post_init__(self) -> None:
        # A plain string compares equal to a kind and is none: `is` would take the wrong branch without a word.
        object.__setattr__(self, "transform", TransformKind(self.transform))

    @property
    def may_have_eight_bits(self) -> bool:
        """Whether an integer of 32 bits holds the sums of 8-bit activations."""
        return self.padded_k <= LARGEST_K_OF_TOKENS

    @cached_property
    def padded_k(self) -> int:
        return padded_in_features(self.in_features, self.group_size)

    @cached_property
    def group_length(self) -> int:
        return group_length(self.in_features, self.group_size)

    @cached_property
    def groups(self) -> int:
        return group_count(self.in_features, self.group_size)

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        return self.layout.packed_shape(self.out_features, self.padded_k)

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        return self.layout.scale_shape(self.out_features, self.groups)

    @property
    def transform_shape(self) -> tuple[int, int, int] | None:
        """Of the tensor `input_transform`, if this linear stores one."""
        if not self.transform.is_learned or self.transform_from is not None:
            return None
        return self.transform.matrix_count(self.padded_k // BLOCK), self.transform.matrix_rows, BLOCK

    @property
    def stored_bytes(self) -> int:
        half_words = prod(self.scale_shape) + (prod(self.transform_shape) if self.transform_shape else 0)
        return prod(self.packed_shape) + 2 * half_words

    @property
    def is_padded(self) -> bool:
        return (self.out_features, self.in_features) != (
            self.layout.padded_out_features(self.out_features),
            self.padded_k,
        )


def _check_clip(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise Apex4Error(f"quantization_config.{name} is {value!r} and must be a positive number")


def _check_activation_bits(name: str, value: object, version: object) -> None:
    try:
        bits = parse_activation_bits(value)
    except UsageError as error:
        known = " or ".join(map(str, ACTIVATION_BITS))
        raise Apex4Error(f"quantization_config.{name} is {value!r} and this format has {known}") from error
    if bits != BITS and version == FORMAT_VERSION:
        raise Apex4Error(
            f"quantization_config.{name} is {bits} in a file of format version {FORMAT_VERSION}, which has {BITS} only: "
            "config.json is damaged"
        )


@dataclass
class QuantConfig:
    """Field by field the JSON object. `modules` holds what differs for single linears: `group_size`, `transform`,
    `activation_clip`, `activation_bits`, `transform_from` (the linear that stores the dense transform of the input both read),
    and `shape` [out, in] where the stored tensors are padded."""

    group_size: GroupSize = 128
    layout: str = LayoutName.ROWMAJOR
    transform: TransformKind = TransformKind.HADAMARD
    activation_clip: float = 1.0
    target: dict[str, str | None] = field(default_factory=lambda: {"gpu": None, "arch": None})
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: list[str] = field(default_factory=list)
    recipe: str = ""
    quant_method: str = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    bits: int = BITS
    activation_bits: int = BITS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def keeps(self, name: str) -> bool:
        """Whether the linear `name` is stored as it was: it, or a module that it is in, is named."""
        parts = name.split(".")
        return any(".".join(parts[:count]) in self.modules_to_not_convert for count in range(1, len(parts) + 1))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Read and check. Raises Apex4Error for a version, key or value this release does not understand."""
        version = values.get("format_version")
        if version not in (FORMAT_VERSION, EIGHT_BIT_VERSION):
            raise Apex4Error(
                f"the checkpoint has format version {version!r} and this apex4 reads versions {FORMAT_VERSION} and "
                f"{EIGHT_BIT_VERSION}: use the release that wrote it, or quantize again"
            )
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise Apex4Error(f"quantization_config has unknown fields {', '.join(unknown)}: use a newer apex4")
        for name, kind in (
            ("activation_clip", int | float),
            ("target", dict),
            ("modules", dict),
            ("modules_to_not_convert", list),
            ("layout", str),
            ("recipe", str),
            ("transform", str),
        ):
            if name in values and not isinstance(values[name], kind):
                raise Apex4Error(f"quantization_config has {name} = {values[name]!r}: config.json is damaged")
        target = values.get("target", {})
        if not set(target) <= {"gpu", "arch"} or not all(isinstance(v, str | None) for v in target.values()):
            raise Apex4Error(f"quantization_config has target = {target!r}: config.json is damaged")
        config = cls(**values)
        config.target = {name: target.get(name) for name in ("gpu", "arch")}
        for name, given, needed in (
            ("quant_method", config.quant_method, QUANT_METHOD),
            ("bits", config.bits, BITS),
        ):
            if given != needed:
                raise Apex4Error(f"quantization_config says {name} = {given!r} and this format needs {needed!r}")
        _check_activation_bits("activation_bits", config.activation_bits, version)
        if config.transform not in list(TransformKind):
            raise Apex4Error(f"quantization_config has an unknown transform {config.transform!r}: use a newer apex4")
        config.transform = TransformKind(config.transform)
        get_layout(config.layout)
        parse_group_size(config.group_size)
        _check_clip("activation_clip", config.activation_clip)
        config._check_clip_of_bits(None)
        for name, override in config.modules.items():
            if not isinstance(override, dict):
                raise Apex4Error(f"quantization_config.modules[{name!r}] is {override!r} and must be an object")
            if override.get("transform", config.transform) not in list(TransformKind):
                raise Apex4Error(
                    f"quantization_config.modules[{name!r}] has an unknown transform {override['transform']!r}: "
                    "use a newer apex4"
                )
        for name, override in config.modules.items():
            if not isinstance(override.get("shape", []), list):
                raise Apex4Error(f"quantization_config.modules[{name!r}] has a shape that is not a list of two numbers")
            _check_clip(f"modules[{name!r}].activation_clip", override.get("activation_clip", config.activation_clip))
            unknown = sorted(set(override) - set(_OVERRIDES))
            if unknown:
                raise Apex4Error(
                    f"quantization_config.modules[{name!r}] has unknown fields {', '.join(unknown)}: use a newer apex4"
                )
            parse_group_size(override.get("group_size", config.group_size))
            if "activation_bits" in override:
                _check_activation_bits(f"modules[{name!r}].activation_bits", override["activation_bits"], version)
            config._check_clip_of_bits(name)
            owner = override.get("transform_from")
            if owner is not None and not config._stores_transform_of(name, owner):
                raise Apex4Error(
                    f"quantization_config.modules[{name!r}] takes its transform from {owner!r}, which stores none "
                    "of its kind: config.json is damaged"
                )
        return config

    @property
    def name(self) -> str:
        """ "W4A4", "W4A8", or both where linears differ."""
        overrides = (int(entry.get("activation_bits", self.activation_bits)) for entry in self.modules.values())
        return arithmetic_name(self.bits, (self.activation_bits, *overrides))

    def activation_bits_of(self, name: str) -> int:
        """4 or 8, of one linear."""
        return int(self.modules.get(name, {}).get("activation_bits", self.activation_bits))

    def _check_clip_of_bits(self, name: str | None) -> None:
        """Of a linear, or of all without an override."""
        override = {} if name is None else self.modules[name]
        clip = override.get("activation_clip", self.activation_clip)
        if override.get("activation_bits", self.activation_bits) != BITS and clip != 1:
            where = "" if name is None else f".modules[{name!r}]"
            raise Apex4Error(
                f"quantization_config{where} has activation_clip {clip!r} with 8-bit activations, which are not clipped: "
                "config.json is damaged"
            )

    def transform_of(self, name: str) -> TransformKind:
        """The group transform of one linear."""
        return TransformKind(self.modules.get(name, {}).get("transform", self.transform))

    def _stores_transform_of(self, name: str, owner: object) -> bool:
        """Whether the linear `owner` stores a learned transform of the kind that `name` has."""
        return (
            isinstance(owner, str)
            and self.transform_of(name).is_learned
            and self.transform_of(owner) == self.transform_of(name)
            and "transform_from" not in self.modules.get(owner, {})
        )

    def linear_format(self, name: str, out_features: int, in_features: int) -> LinearFormat:
        """The format of one linear of true shape [out_features, in_features].

        Raises Apex4Error if the checkpoint records another true shape for it.
        """
        override = self.modules.get(name, {})
        shape = override.get("shape")
        if shape is not None and list(shape) != [out_features, in_features]:
            raise Apex4Error(f"{name} is {out_features} x {in_features} in the model but {shape} in the checkpoint")
        format = LinearFormat(
            out_features=out_features,
            in_features=in_features,
            group_size=parse_group_size(override.get("group_size", self.group_size)),
            layout=get_layout(self.layout),
            transform=self.transform_of(name),
            activation_clip=float(override.get("activation_clip", self.activation_clip)),
            transform_from=override.get("transform_from"),
            activation_bits=self.activation_bits_of(name),
        )
        if format.transform.has_feedback and (format.group_size != BLOCK or format.activation_bits != BITS):
            raise Apex4Error(
                f"{name} has the transform {format.transform} with groups of {format.group_size} and {format.activation_bits}-bit "
                f"activations, and that is for groups of {BLOCK} and {BITS} bits: config.json is damaged"
            )
        if format.transform.has_block_clips and format.activation_clip != 1:
            raise Apex4Error(
                f"{name} has activation_clip {format.activation_clip!r} with the transform {format.transform}, whose blocks have clip "
                "ratios of their own: config.json is damaged"
            )
        if format.activation_bits != BITS and not format.may_have_eight_bits:
            raise Apex4Error(
                f"{name} has {format.padded_k} input features with 8-bit activations, and at most {LARGEST_K_OF_TOKENS} can be "
                "summed: config.json is damaged"
            )
        return format
