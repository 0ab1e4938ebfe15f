"""What the planner chooses among: for every input group its options, each with a predicted time and loss. Torch-free.

The unit of choice is the input group: the linears that read one input share its quantization, hence one group size, one
transform and the bits of its activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from ..format.number_format import ACTIVATION_BITS, BITS, BLOCK, CHANNEL, GroupSize, round_up
from ..format.transform_kind import TransformKind

LADDER: tuple[GroupSize, ...] = (128, 256, 512, CHANNEL)


class Mode(StrEnum):
    """What a plan may choose from. The value is what `--mode` and plan files say.

    AUTO    the least loss within --budget, or the least time within --max-loss, from activations of 4 bits with group
            sizes {128, 256, 512, channel} under hadamard128 and 128 under the recipe's learned transform (dense128 or
            feedback128, feedback128x16), which kernels have with groups of 128 only, and activations of 8 bits with groups of 128 under
            hadamard128 and dense128: feedback is for errors of 4 bits
    W4A4    as AUTO, from activations of 4 bits: the paper's pure INT4
    MIXED   the paper's (arXiv 2606.08761), under hadamard128: sensitive inputs at 128, the others per channel. Sensitive
            are the inputs of the last residual writers (down_proj). With --budget or --max-loss the list of candidates is
            those, most loss first, then all others by loss saved per second; as many are taken as the bound allows or needs
    G128    as W4A4, from 128 under hadamard128 and 128 under the learned transform
    """

    AUTO = "auto"
    W4A4 = "w4a4"
    MIXED = "mixed"
    G128 = "g128"

    @property
    def activation_bits(self) -> tuple[int, ...]:
        """Bits of activations that the mode chooses from."""
        return ACTIVATION_BITS if self is Mode.AUTO else (BITS,)


class Choice(NamedTuple):
    """How the linears of one input are quantized. The names are those of LinearFormat's fields."""

    group_size: GroupSize
    transform: TransformKind
    activation_bits: int = BITS

    @property
    def label(self) -> str:
        """Short, and unique among the choices of one plan: a learned transform and 8 bits have one group size."""
        name = str(self.transform) if self.transform.is_learned else str(self.group_size)
        return name if self.activation_bits == BITS else f"{name} a{self.activation_bits}"


@dataclass(frozen=True)
class Option:
    """One choice for one input group: predicted seconds of its linears, predicted loss in nats a token."""

    choice: Choice
    seconds: float
    loss: float


@dataclass(frozen=True)
class GroupOptions:
    """What an input group may get: 4 bits first, in these finest groups first, learned transforms last.

    `writes`: the group holds the last residual writer of its layer (down_proj), which Mode.MIXED takes first.
    """

    options: tuple[Option, ...]
    writes: bool = False

    @property
    def least(self) -> Option:
        """The least loss, and among equals the finest groups and the cheaper transform."""
        return min(self.options, key=lambda option: option.loss)

    def offered(self, mode: Mode) -> GroupOptions:
        """What `mode` chooses from."""
        options = tuple(o for o in self.options if o.choice.activation_bits in mode.activation_bits)
        if mode is Mode.G128:
            options = tuple(o for o in options if o.choice.group_size == BLOCK)
        if mode is Mode.MIXED:
            options = tuple(o for o in options if not o.choice.transform.is_learned)
        return replace(self, options=options)


def ladder_of(in_features: int) -> tuple[GroupSize, ...]:
    """The group sizes worth considering, finest first: one that covers all of K is the same as "channel".

    512 stays in the ladder of K = 768: it pads, and the cost model charges for that.
    """
    padded = round_up(in_features, BLOCK)
    return tuple(
        size for size in LADDER if size == BLOCK or (padded > BLOCK if size == CHANNEL else int(size) < padded)
    )


def choices_of(
    in_features: int, transforms: Sequence[TransformKind], activation_bits: Sequence[int] = (BITS,)
) -> list[Choice]:
    """What an input of K features may get: 4 bits first; one transform after the other, finest groups first.

    With activations of 8 bits no arithmetic is left to do for a group, so that coarser groups than 128 save no time; and
    dense128 stands for feedback128 and feedback128x16.
    """
    choices = (
        Choice(size, transform.fitting(size, bits), bits)
        for bits in activation_bits
        for transform in transforms
        for size in ((BLOCK,) if transform.is_learned or bits != BITS else ladder_of(in_features))
    )
    return list(dict.fromkeys(choices))
