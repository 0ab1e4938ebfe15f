"""The kernels of column_sweeps.py. Torch-free, for who only compiles them."""

from __future__ import annotations

from ..runtime.configuration import Configuration

WARPS = 16  # of a CTA, a row of the weight each: cuda/sweeps/column_sweep.cuh
GPTQ = Configuration("gptq_sweep", "sweeps/gptq_sweep.cu", "apex4_gptq_sweep", {"APEX4_BF16": 0})
DESCENT = Configuration("descent_sweep", "sweeps/descent_sweep.cu", "apex4_descent_sweep", {})


def all_configs(sm: int) -> list[Configuration]:
    """They are the same for every architecture."""
    return [GPTQ, DESCENT]
