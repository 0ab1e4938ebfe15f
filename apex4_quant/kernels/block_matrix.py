"""The dense group transform: every block of 128 channels times a matrix of its own."""

from __future__ import annotations

import torch


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
