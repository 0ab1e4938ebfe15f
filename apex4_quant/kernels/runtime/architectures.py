"""The architectures that there are kernels for."""

from __future__ import annotations

import re

from ...errors import UsageError
from .compiler import arch_of

# sm -> the GEMM it runs. Others have no INT4 mma and no wgmma, or nothing written for them: they compute through PyTorch.
FAMILIES = {80: "gemm_sm80", 86: "gemm_sm80", 89: "gemm_sm80", 90: "gemm_sm90"}

# Those whose tensor cores multiply 4-bit integers, and for which there is a GEMM that lets them.
FOUR_BIT_UNITS = (80, 86, 89)
# sm -> the GEMM of 8-bit activations that it runs.
EIGHT_BIT_FAMILIES: dict[int, str] = {
    90: "gemm_sm90_s8",
    **dict.fromkeys((75, 80, 86, 89, 100, 120), "gemm_s8"),
}
ARCHITECTURES = tuple(sorted({*FAMILIES, *EIGHT_BIT_FAMILIES}))
# Families of kernels that were checked and timed on Hopper alone, and never ran on a GPU that they are for.
NEVER_RUN = ("gemm_s8",)


def kernel_family(sm: int) -> str | None:
    """ "gemm_sm80", "gemm_sm90", or None where models compute through PyTorch."""
    return FAMILIES.get(sm)


def eight_bit_family(sm: int) -> str | None:
    """The GEMM of 8-bit activations, or None where they are computed through PyTorch."""
    return EIGHT_BIT_FAMILIES.get(sm)


def gains_by_eight_bits(sm: int) -> bool:
    """Whether `auto` takes 8-bit activations: where no 4-bit products are, so that many tokens are faster with 8 bits.

    On sm_90 about 64 are not (docs/kernel_measurements.md, item 17).
    """
    return sm in EIGHT_BIT_FAMILIES and sm not in FOUR_BIT_UNITS


def sm_of(arch: str) -> int:
    """ "sm_86" -> 86; "sm_90" and "sm_90a" -> 90. Raises UsageError for an architecture without kernels."""
    match = re.fullmatch(r"sm_?(\d+)(a?)", arch.strip().lower())
    if not match or int(match[1]) not in ARCHITECTURES or (match[2] and match[1] != "90"):
        known = ", ".join(arch_of(sm) for sm in ARCHITECTURES)
        raise UsageError(f"there are no kernels for architecture {arch!r}: give one of {known}")
    return int(match[1])
