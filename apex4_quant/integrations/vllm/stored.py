"""The tensors of linears as they are loaded: this rank's tiles of every member, one behind the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...errors import Apex4Error
from ...format.number_format import BLOCK
from ...format.quant_config import LinearFormat
from ...format.transform_kind import TransformKind
from ...kernels import torch_backend
from ...kernels.operands import TOKEN_FORMAT, fold_scales, layout_of_format

ShardId = str | int | None


@dataclass(frozen=True)
class Member:
    """A linear of the checkpoint, and the part of it that this rank computes.

    `shard`: what vLLM calls it when it loads its tensors. `rows` and `features`: (first, number), without padding.
    """

    name: str
    format: LinearFormat
    shard: ShardId
    rows: tuple[tuple[int, int], ...]
    features: tuple[int, int]

    @property
    def row_count(self) -> int:
        return sum(count for _, count in self.rows)

    @property
    def tiles(self) -> list[slice]:
        """This rank's rows of tiles of the stored tensors, for each range of rows."""
        tile = self.format.layout.tile_n
        return [slice(start // tile, -(-(start + count) // tile)) for start, count in self.rows]

    @property
    def is_whole(self) -> bool:
        """Whether the rank has all input features."""
        return self.features[1] == self.format.in_features

    @property
    def padded_k(self) -> int:
        """The rank's input features with padding: of its blocks of 128."""
        return self.format.padded_k if self.is_whole else self.features[1]

    @property
    def blocks(self) -> slice:
        first = self.features[0] // BLOCK
        return slice(first, first + self.padded_k // BLOCK)

    @property
    def groups(self) -> slice:
        first = self.features[0] // self.format.group_length
        return slice(first, first + self.padded_k // self.format.group_length)

    @property
    def matrices(self) -> slice:
        """This rank's part of the learned transform of the input."""
        return slice(0, 1) if self.format.transform is TransformKind.SHARED else self.blocks


class StoredLinears:
    """Loads the tensors of members that read one input, and gives their codes and scales back.

    The tensors are those of `shapes`; whoever owns them (parameters of a layer) passes them in.
    """

    def __init__(self, members: Sequence[Member], stores_transform: bool = True) -> None:
        """`stores_transform`: whether a member that stores the transform of the input is loaded with it here."""
        self.members = tuple(members)
        _require_alike(self.members)
        self.first = self.members[0]
        self.loaded: set[tuple[ShardId, str]] = set()
        self.by_shard = {member.shard: member for member in self.members}
        self.owner = None
        if stores_transform:
            self.owner = next((member for member in self.members if member.format.transform_shape is not None), None)
        if stores_transform and self.first.format.transform.is_learned and self.owner is None:
            raise Apex4Error(
                f"{self.first.name} takes its transform from {self.first.format.transform_from}, which vLLM runs in another "
                "layer: the checkpoint cannot be served"
            )

    @property
    def out_features(self) -> int:
        return sum(member.row_count for member in self.members)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors, by their names in the checkpoint."""
        layout = self.first.format.layout
        tiles = sum(part.stop - part.start for member in self.members for part in member.tiles)
        member = self.first
        blocks, groups = member.padded_k // BLOCK, member.padded_k // member.format.group_length
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": ((tiles, blocks, layout.tile_n * BLOCK // 2), torch.uint8),
            "weight_scale": ((tiles, groups, layout.tile_n), torch.float16),
        }
        if self.owner is not None:
            count = self.owner.matrices.stop - self.owner.matrices.start
            shapes["input_transform"] = ((count, self.owner.format.transform.matrix_rows, BLOCK), torch.float16)
        return shapes

    def _expected(self) -> Iterator[tuple[Member, str]]:
        for member in self.members:
            yield member, "weight_packed"
            yield member, "weight_scale"
        if self.owner is not None:
            yield self.owner, "input_transform"

    def load(self, part: str, target: torch.Tensor, loaded: torch.Tensor, shard: ShardId = None) -> None:
        """Copy the rank's part of the tensor `part` of the member `shard` to its place in `target`.

        Raises Apex4Error for a tensor that does not belong to the format.
        """
        member = self.by_shard.get(shard)
        if member is None:
            raise Apex4Error(f"vLLM loads {part} of {self.first.name} as part {shard!r}, which apex4 does not know")
        format = member.format
        shape = {
            "weight_packed": format.packed_shape,
            "weight_scale": format.scale_shape,
            "input_transform": format.transform_shape,
        }[part]
        if shape is None:
            raise Apex4Error(
                f"{member.name}.{part} is in the checkpoint and config.json gives the linear none: they do not belong together"
            )
        if tuple(loaded.shape) != shape or loaded.dtype != target.dtype:
            raise Apex4Error(
                f"{member.name}.{part} is {_short(loaded.dtype)} {list(loaded.shape)} in the checkpoint and "
                f"{_short(target.dtype)} {list(shape)} is needed: the checkpoint does not belong to its config.json"
            )
        if part == "input_transform":
            target.copy_(loaded[member.matrices])
        else:
            columns = member.blocks if part == "weight_packed" else member.groups
            for there, here in zip(member.tiles, self._places(member), strict=True):
                target[here].copy_(loaded[there, columns])
        self.loaded.add((shard, part))

    def _places(self, wanted: Member) -> list[slice]:
        """The rows of tiles of the loaded tensors that hold a member."""
        places, start = [], 0
        for member in self.members:
            for part in member.tiles:
                stop = start + part.stop - part.start
                if member is wanted:
                    places.append(slice(start, stop))
                start = stop
        return places

    def require_complete(self) -> None:
        """Raise Apex4Error naming the first tensor that has not come."""
        for member, part in self._expected():
            if (member.shard, part) not in self.loaded:
                raise Apex4Error(f"the checkpoint has no tensor {member.name}.{part}: it is incomplete, get it again")

    def require_legal(self, packed: torch.Tensor, scale: torch.Tensor, transform: torch.Tensor | None) -> None:
        """Raise Apex4Error naming the tensor if a code is -8, or a scale or matrix is none."""
        for member in self.members:
            layout = member.format.layout
            for place in self._places(member):
                if layout.has_forbidden_code(packed[place]):
                    raise Apex4Error(
                        f"{member.name}.weight_packed holds the code -8, which is never written: the file is damaged"
                    )
                part = scale[place].float()
                if not bool((torch.isfinite(part) & (part > 0)).all()):
                    raise Apex4Error(
                        f"{member.name}.weight_scale holds a zero, negative or non-finite scale: the file is damaged"
                    )
        if transform is not None and not bool(torch.isfinite(transform).all()):
            assert self.owner is not None
            raise Apex4Error(f"{self.owner.name}.input_transform holds NaN or infinity: the file is damaged")

    def is_dense(self) -> bool:
        """Whether the tensors hold the rank's rows without padding between two of them."""
        tile = self.first.format.layout.tile_n
        counts = [count for member in self.members for _, count in member.rows]
        return all(count % tile == 0 for count in counts[:-1])

    def codes_and_scales(self, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes [N, padded K] and float16 scales [N, G] of all rows of this rank."""
        codes, scales = [], []
        for member in self.members:
            layout = member.format.layout
            for place, (_, count) in zip(self._places(member), member.rows, strict=True):
                codes.append(layout.unpack(packed[place], count))
                scales.append(layout.unpack_scales(scale[place], count))
        return torch.cat(codes), torch.cat(scales)

    def kernel_operands(
        self, packed: torch.Tensor, scale: torch.Tensor, kernel: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """weight_packed, weight_scale and weight_unit of the operators, for activations of the format `kernel`."""
        codes, scales = self.codes_and_scales(packed, scale)
        layout = layout_of_format(kernel)
        if kernel == TOKEN_FORMAT:
            return layout.pack(codes), *fold_scales(scales)
        return layout.pack(codes), layout.pack_scales(scales), None

    def float_weight(
        self, packed: torch.Tensor, scale: torch.Tensor, activation_bits: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What backend.cached_linear multiplies by."""
        prepare = torch_backend.folded_weight if activation_bits == 8 else torch_backend.grouped_weight
        weight, factor = prepare(*self.codes_and_scales(packed, scale))
        return weight.contiguous(), factor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_alike(members: Sequence[Member]) -> None:
    """Raise Apex4Error, naming two members, if they do not quantize their input in the same way."""
    first = members[0]
    owners = [member.name for member in members if member.format.transform_shape is not None]
    for other in members[1:]:
        for what, ours, theirs in (
            ("group size", first.format.group_size, other.format.group_size),
            ("transform", str(first.format.transform), str(other.format.transform)),
            ("activation_bits", first.format.activation_bits, other.format.activation_bits),
            ("activation_clip", first.format.activation_clip, other.format.activation_clip),
        ):
            if ours != theirs:
                raise Apex4Error(
                    f"{first.name} and {other.name} read one input, which vLLM quantizes once, and have {what} {ours} and "
                    f"{theirs}: quantize them alike"
                )
    if len(owners) > 1:
        raise Apex4Error(
            f"{owners[0]} and {owners[1]} read one input, which vLLM quantizes once, and have a transform each: quantize "
            "them alike"
        )
    if owners:
        for member in members:
            if member.format.transform_from not in (None, *owners):
                raise Apex4Error(
                    f"{member.name} takes its transform from {member.format.transform_from} and {owners[0]} reads the same "
                    "input with a transform of its own: quantize them alike"
                )
