"""The names of the layouts (layouts.py), without torch: what config.json and --layout say, and which GPUs read each."""

from __future__ import annotations

from enum import StrEnum

KERNEL_TILE_N = 64  # output features of a tile in the layouts that kernels read, SM80 and SM90


class LayoutName(StrEnum):
    ROWMAJOR = "rowmajor"  # plain order, for no GPU in particular; every reader can repack from it
    SM80 = "sm80"  # the B operand of mma.m16n8k64 with 4-bit elements, which exists from sm_80 to sm_89
    SM90 = "sm90"  # the A operand of wgmma, which exists on sm_90 only

    @classmethod
    def of_gpu(cls, sm: int) -> LayoutName:
        """What the kernels of an architecture read; 86 for sm_86."""
        if sm == 90:
            return cls.SM90
        return cls.SM80 if 80 <= sm <= 89 else cls.ROWMAJOR
