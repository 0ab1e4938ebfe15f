"""Which kernel multiplies 8-bit activations (format `s8`) by folded weights. Torch-free.

An 8-bit kernel `apex4_gemm` has one pointer more than a W4A4 one, the unit behind the ratio that stands in the place of the
scales, and the same numbers:

    y, codes, scales, weight_packed, ratio, unit, bias, partial, counters;
    m, n, k_blocks, blocks_per_group (of the ratio), m_stride, ldy, *plan.arguments

`partial` is memory of `workspace_words` 32-bit words for what thread blocks of one tile add up, `counters` zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ...errors import Apex4Error
from ..runtime.architectures import eight_bit_family
from . import s8_configs, sm90_s8_configs
from .configs import PlanSource, plan_source


class Cubin(Protocol):
    """What a plan says of its kernel."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def entry(self) -> str: ...
    @property
    def defines(self) -> dict[str, int]: ...
    @property
    def shared_bytes(self) -> int: ...


class EightBitPlan(Protocol):
    """How one shape is computed; members as those of configs.GemmPlan."""

    @property
    def config(self) -> Cubin: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def block(self) -> int: ...
    @property
    def cluster(self) -> int: ...
    @property
    def programmatic(self) -> bool:
        """Whether the kernel may start before the one in front of it has ended (sm_90)."""

    @property
    def arguments(self) -> tuple[int, ...]: ...
    @property
    def parts(self) -> int: ...
    @property
    def counters(self) -> int: ...
    @property
    def workspace_words(self) -> int: ...


class Chooser(Protocol):
    """As configs.choose_gemm, with all arguments given."""

    def __call__(
        self, sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, out: str, source: PlanSource
    ) -> EightBitPlan: ...


CHOOSERS: Mapping[str, Chooser] = {  # by the family of architectures.EIGHT_BIT_FAMILIES
    "gemm_sm90_s8": sm90_s8_configs.choose_sm90_s8,
    "gemm_s8": s8_configs.choose_s8,
}


def choose_eight_bit_gemm(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, out: str, source: PlanSource | None = None
) -> EightBitPlan:  # fmt: skip
    """The kernel of an [m, k_blocks * 128] by [n, k_blocks * 128]^T product of 8-bit activations.

    `out`: "bf16" or "fp16". Raises Apex4Error where there is none for the architecture.
    """
    source = source or plan_source()
    family = eight_bit_family(sm)
    if (source.forced or "").startswith(s8_configs.PREFIX) and sm in s8_configs.ARCHITECTURES:
        family = "gemm_s8"  # on sm_90 by name only
    chooser = CHOOSERS.get(family or "")
    if chooser is None:
        raise Apex4Error(
            f"there is no kernel for 8-bit activations for sm_{sm}: quantize with 4-bit activations, or set "
            "APEX4_KERNEL=reference"
        )
    return chooser(sm, sm_count, m, n, k_blocks, blocks_per_group, out, source)
