"""Every kernel there is, for one architecture: what `apex4 kernels build` compiles and the tests inspect."""

from __future__ import annotations

from .experts import configs as expert_configs
from .gemm import configs as gemm_configs
from .gemm import fused_linear, s8_configs, sm90_s8_configs
from .quantize import configs as quantize_configs
from .runtime.architectures import ARCHITECTURES, FAMILIES, eight_bit_family, kernel_family, sm_of
from .runtime.configuration import Configuration
from .sweeps import configs as column_sweep_configs
from .training import configs as training_configs

__all__ = ["ARCHITECTURES", "FAMILIES", "Configuration", "configurations", "kernel_family", "sm_of"]


def configurations(arch: str) -> list[Configuration]:
    """All kernels of `arch` ("sm_86", "sm_90a"). Raises UsageError for an architecture without kernels."""
    sm = sm_of(arch)
    by_name_only = eight_bit_family(sm) != "gemm_s8"  # another kernel is faster there
    found = [
        *(
            Configuration(each.name, each.source, each.entry, {**each.defines})
            for each in (() if by_name_only else s8_configs.all_configs(sm))
        ),
        *(Configuration(each.name, each.source, each.entry, {**each.defines}) for each in gemm_configs.all_configs(sm)),
        *(Configuration(each.name, each.source, each.entry, {**each.defines}) for each in fused_linear.all_configs(sm)),
        *(
            Configuration(each.name, each.source, each.entry, {**each.defines})
            for each in sm90_s8_configs.all_configs(sm)
        ),
        *(
            Configuration(each.name, each.source, each.entry, {**each.defines})
            for each in quantize_configs.all_configs(sm)
        ),
        *expert_configs.all_configs(sm),
        *column_sweep_configs.all_configs(sm),
        *training_configs.all_configs(sm),
    ]
    names = [each.name for each in found]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"several kernels of {arch} have the name {', '.join(twice)}")
    return found
