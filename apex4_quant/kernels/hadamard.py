"""The group transforms, applied to every 128 consecutive input features: H_128 / sqrt(128), or a matrix of each block's own.

The Hadamard matrix is orthonormal and symmetric, so it is its own inverse and its own inverse transpose: x H times (W H)^T is
x W^T.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..format.number_format import BLOCK


@lru_cache(maxsize=8)
def hadamard_128(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[128, 128], Sylvester's construction, entries +-1/sqrt(128)."""
    matrix: torch.Tensor = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < BLOCK:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    matrix = matrix / BLOCK**0.5
    return matrix.to(device=device, dtype=dtype)


def apply_block_hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] with K a multiple of 128 -> the transformed x, same shape and dtype."""
    blocks: torch.Tensor = x.unflatten(-1, (-1, BLOCK))
    return (blocks @ hadamard_128(x.dtype, x.device)).flatten(-2)


def apply_block_matrix(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [..., K] and matrix [K / 128, 128, 128] of one dtype -> [..., K]: block g of the result is x_g matrix_g."""
    blocks, width, _ = matrix.shape
    if x.device.type == "cpu" and not (torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad)):
        # Into one piece of memory at once; a batched product would have to be copied together.
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block, rows, out in zip(matrix, x.split(width, -1), y.split(width, -1), strict=True):
            torch.mm(rows.reshape(-1, width), block, out=out.view(-1, width))
        return y
    rows = x.reshape(-1, blocks, width).transpose(0, 1)  # [G, R, 128]
    return (rows @ matrix).transpose(0, 1).reshape(x.shape)
