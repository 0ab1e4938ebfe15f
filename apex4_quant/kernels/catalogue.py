"""Every kernel there is, for one architecture: what `apex4 kernels build` compiles and the tests inspect."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError
from .runtime.compiler import arch_of

# sm -> the GEMM it runs. Others have no INT4 mma and no wgmma, or nothing written for them: they compute through PyTorch.
FAMILIES = {80: "gemm_sm80", 86: "gemm_sm80", 89: "gemm_sm80", 90: "gemm_sm90"}


@dataclass(frozen=True)
class Configuration:
    """One cubin: a source of kernels/cuda under some macros, and its entry. `name` is unique within an architecture."""

    name: str
    source: str
    entry: str
    defines: dict[str, int | str]


def kernel_family(sm: int) -> str | None:
    """ "gemm_sm80", "gemm_sm90", or None where models compute through PyTorch."""
    return FAMILIES.get(sm)


def sm_of(arch: str) -> int:
    """ "sm_86" -> 86; "sm_90" and "sm_90a" -> 90. Raises UsageError for an architecture without kernels."""
    match = re.fullmatch(r"sm_?(\d+)(a?)", arch.strip().lower())
    if not match or int(match[1]) not in FAMILIES or (match[2] and match[1] != "90"):
        known = ", ".join(arch_of(sm) for sm in FAMILIES)
        raise UsageError(f"there are no kernels for architecture {arch!r}: give one of {known}")
    return int(match[1])


def configurations(arch: str) -> list[Configuration]:
    """All kernels of `arch` ("sm_86", "sm_90a"). Raises UsageError for an architecture without kernels."""
    from .gemm import configs as gemm_configs
    from .gemm import fused_linear
    from .quantize import configs as quantize_configs
    from .sweeps import configs as column_sweep_configs

    sm = sm_of(arch)
    found = [
        Configuration(each.name, each.source, each.entry, dict(each.defines))
        for module in (gemm_configs, fused_linear, quantize_configs, column_sweep_configs)
        for each in module.all_configs(sm)
    ]
    names = [each.name for each in found]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"several kernels of {arch} have the name {', '.join(twice)}")
    return found
