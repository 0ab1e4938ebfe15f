"""The block-Hadamard group transform: H_128 / sqrt(128), applied to every 128 consecutive input features.

Orthonormal and symmetric, so it is its own inverse and its own inverse transpose: x H times (W H)^T is x W^T.
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
