"""The dense group transform: every block of 128 channels times a matrix of its own."""

from __future__ import annotations

import torch


def apply_block_matrix(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [..., K] and matrix [K / 128, 128, 128] of one dtype -> [..., K]: block g of the result is x_g matrix_g."""
    blocks, width, _ = matrix.shape
    rows = x.reshape(-1, blocks, width).transpose(0, 1)  # [G, R, 128]
    return (rows @ matrix).transpose(0, 1).reshape(x.shape)
