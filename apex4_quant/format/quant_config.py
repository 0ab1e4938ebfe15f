"""`quantization_config` of config.json: what a checkpoint says of itself. Normative text: docs/format.md §3."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from ..errors import Apex4Error
from .layout_name import LayoutName
from .layouts import Layout, get_layout
from .number_format import (
    BITS,
    BLOCK,
    GroupSize,
    group_count,
    group_length,
    padded_in_features,
    parse_group_size,
)
from .transform_kind import TransformKind

QUANT_METHOD = "apex4"
FORMAT_VERSION = 1
_OVERRIDES = ("group_size", "transform", "activation_clip", "shape", "transform_from")  # the keys of a `modules` entry


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

    def __post_init__(self) -> None:
        # A plain string compares equal to a kind and is none: `is` would take the wrong branch without a word.
        object.__setattr__(self, "transform", TransformKind(self.transform))

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
        return self.transform.matrix_count(self.padded_k // BLOCK), BLOCK, BLOCK

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


@dataclass
class QuantConfig:
    """Field by field the JSON object. `modules` holds what differs for single linears: `group_size`, `transform`,
    `activation_clip`, `transform_from` (the linear that stores the dense transform of the input both read), and `shape`
    [out, in] where the stored tensors are padded."""

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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Read and check. Raises Apex4Error for a version, key or value this release does not understand."""
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise Apex4Error(
                f"the checkpoint has format version {version!r} and this apex4 reads version {FORMAT_VERSION}: "
                "use the release that wrote it, or quantize again"
            )
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise Apex4Error(f"quantization_config has unknown fields {', '.join(unknown)}: use a newer apex4")
        for name, kind in (
            ("activation_clip", int | float),
            ("target", dict),
            ("modules", dict),
            ("modules_to_not_convert", list),
        ):
            if name in values and not isinstance(values[name], kind):
                raise Apex4Error(f"quantization_config has {name} = {values[name]!r}: config.json is damaged")
        config = cls(**values)
        for name, given, needed in (
            ("quant_method", config.quant_method, QUANT_METHOD),
            ("bits", config.bits, BITS),
            ("activation_bits", config.activation_bits, BITS),
        ):
            if given != needed:
                raise Apex4Error(f"quantization_config says {name} = {given!r} and this format needs {needed!r}")
        if config.transform not in list(TransformKind):
            raise Apex4Error(f"quantization_config has an unknown transform {config.transform!r}: use a newer apex4")
        config.transform = TransformKind(config.transform)
        get_layout(config.layout)
        parse_group_size(config.group_size)
        _check_clip("activation_clip", config.activation_clip)
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
            owner = override.get("transform_from")
            if owner is not None and not config._stores_transform_of(name, owner):
                raise Apex4Error(
                    f"quantization_config.modules[{name!r}] takes its transform from {owner!r}, which stores none "
                    "of its kind: config.json is damaged"
                )
        return config

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
        return LinearFormat(
            out_features=out_features,
            in_features=in_features,
            group_size=parse_group_size(override.get("group_size", self.group_size)),
            layout=get_layout(self.layout),
            transform=self.transform_of(name),
            activation_clip=float(override.get("activation_clip", self.activation_clip)),
            transform_from=override.get("transform_from"),
        )
