"""The kernels of column_sweeps.py. Torch-free, for who only compiles them."""

from __future__ import annotations

from ..runtime.configuration import Configuration

WARPS = 16  # of a CTA, a row of the weight each: cuda/sweeps/column_sweep.cuh
GPTQ = Configuration("gptq_sweep", "sweeps/gptq_sweep.cu", "apex4_gptq_sweep", {"APEX4_BF16": 0})
DESCENT = Configuration("descent_sweep", "sweeps/descent_sweep.cu", "apex4_descent_sweep", {})
# Of codes that are worth the numbers of a grid: with 8-bit activations.
GPTQ_GRID = Configuration("gptq_grid_sweep", "sweeps/gptq_grid_sweep.cu", "apex4_gptq_grid_sweep", {})
DESCENT_GRID = Configuration("descent_grid_sweep", "sweeps/descent_grid_sweep.cu", "apex4_descent_grid_sweep", {})


def all_configs(sm: int) -> list[Configuration]:
    """They are the same for every architecture."""
    return [GPTQ, DESCENT, GPTQ_GRID, DESCENT_GRID]
