"""Columns of a weight one after the other, in one kernel for 128 of them: GPTQ's rounding and descent on its codes.

What gptq.py and coordinate_descent.py do by operations of PyTorch is a dozen launches a column, tens of thousands of columns
a layer. Matrices are transposed as there: a column of the weight is a row of n. Operands: cuda/sweeps/gptq_sweep.cu,
cuda/sweeps/descent_sweep.cu; of codes that are worth the numbers of a grid (folded_grid.py), cuda/sweeps/gptq_grid_sweep.cu,
cuda/sweeps/descent_grid_sweep.cu.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ...format.number_format import BLOCK, CODE_MAX, WEIGHT_SCALE_MAX, WEIGHT_SCALE_MIN
from .. import dispatch
from ..runtime import launcher
from ..runtime.configuration import Configuration
from .configs import DESCENT, DESCENT_GRID, GPTQ, GPTQ_GRID, WARPS


def run_on(device: torch.device) -> bool:
    """Whether this device computes with kernels (dispatch.py)."""
    return dispatch.kernel_format(device) is not None


def round_columns(
    weights: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor,
    ratios: tuple[float, ...] = (),
) -> None:
    """GPTQ of weights float32 [128, n] by their block of U [128, 128]: writes codes int8 and errors float32 [128, n].

    `scale` float32 [n] is given, or searched over the clip `ratios` and written.
    """
    n, ld = weights.shape[1], _leading(factor, weights, codes, errors, scale)
    numbers = (n, ld, len(ratios), WEIGHT_SCALE_MIN, WEIGHT_SCALE_MAX)
    steps = _steps(ratios, weights.device) if ratios else scale  # which is not read as such
    _launch(GPTQ, n, numbers, codes, errors, scale, weights, factor, steps)


def descend_columns(
    codes: torch.Tensor,
    change: torch.Tensor,
    slope: torch.Tensor,
    hessian: torch.Tensor,
    curvature: torch.Tensor,
    step: torch.Tensor,
    added: float,
) -> None:
    """Visit codes float32 [128, n] with their `slope` by their block of H [128, 128]: changes both, writes `change`."""
    n, ld = codes.shape[1], _leading(hessian, codes, change, slope, curvature, step)
    _launch(DESCENT, n, (n, ld, added), codes, change, slope, hessian, curvature, step)


def round_columns_to_grid(
    weights: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor, levels: torch.Tensor, factor: torch.Tensor
) -> None:
    """`round_columns` to what codes are worth: `levels` float32 [8, n], of the codes 0 to 7 of each row, not falling."""
    n, ld = weights.shape[1], _leading(factor, weights, codes, errors, levels)
    _launch(GPTQ_GRID, n, (n, ld), codes, errors, weights, factor, levels)


def descend_columns_on_grid(
    codes: torch.Tensor,
    worth: torch.Tensor,
    change: torch.Tensor,
    slope: torch.Tensor,
    hessian: torch.Tensor,
    curvature: torch.Tensor,
    levels: torch.Tensor,
    added: float,
) -> None:
    """`descend_columns` by what codes are worth, float32 [128, n], which changes too; `change` is that of it."""
    n, ld = codes.shape[1], _leading(hessian, codes, worth, change, slope, curvature, levels)
    _launch(DESCENT_GRID, n, (n, ld, added), codes, worth, change, slope, hessian, curvature, levels)


def _leading(block: torch.Tensor, *others: torch.Tensor) -> int:
    """The row stride of a block of a K x K matrix; what the kernels ask of it and of the other operands."""
    assert block.shape == (BLOCK, BLOCK) and block.stride(1) == 1
    assert block.stride(0) % 4 == 0 and block.data_ptr() % 16 == 0
    assert all(each.is_contiguous() for each in others)
    return block.stride(0)


def _launch(config: Configuration, n: int, numbers: tuple[float, ...], *tensors: torch.Tensor) -> None:
    device = tensors[0].device
    # Not kept: of a group's work it is little, and `added` is another for every input.
    kernel = launcher.kernel(config.source, config.entry, config.defines, device.index or 0)
    typed: list[launcher.Number] = [
        ctypes.c_int(number) if isinstance(number, int) else ctypes.c_float(number) for number in numbers
    ]
    launch = kernel.bind((-(-n // WARPS), 1, 1), 32 * WARPS, len(tensors), typed)
    launch(_stream(device), *(tensor.data_ptr() for tensor in tensors))


@cache
def _steps(ratios: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([ratio / CODE_MAX for ratio in ratios], device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
