"""Group transforms as quantization applies them: into the basis in which weights and activations are quantized.

x -> x T and W -> W T^-T leave x W^T as it was, and H = E[x^T x] becomes T^T H T. T is block-diagonal, one 128 x 128 block
per 128 channels: the Hadamard matrix (orthonormal and symmetric, so T = T^-T), or the learned `matrix` [K / 128, 128, 128]
of the input; with error feedback, which is no part of the transform, [K / 128, 184, 128].
"""

from __future__ import annotations

import torch

from ..format.feedback import transform_of
from ..format.quant_config import LinearFormat
from ..format.transform_kind import TransformKind
from ..kernels.hadamard import apply_block_hadamard, apply_block_matrix

_ROWS_AT_ONCE = 2048  # of a Hessian


def pad_input_features(x: torch.Tensor, format: LinearFormat) -> torch.Tensor:
    """x [..., K], padded already or not -> float32 [..., padded K]; x itself, if there is nothing to do."""
    x = x.float()
    return x if x.shape[-1] == format.padded_k else torch.nn.functional.pad(x, (0, format.padded_k - x.shape[-1]))


def _apply(x: torch.Tensor, format: LinearFormat, matrix: torch.Tensor | None) -> torch.Tensor:
    assert (matrix is not None) == format.transform.is_learned
    if matrix is not None:
        return apply_block_matrix(x, transform_of(matrix).float())
    return apply_block_hadamard(x) if format.transform is TransformKind.HADAMARD else x


def transform_weight(weight: torch.Tensor, format: LinearFormat, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """weight [N, K] -> float32 [N, padded K], W T^-T."""
    if matrix is not None:
        matrix = torch.linalg.inv(transform_of(matrix).double()).transpose(1, 2).float()
    return _apply(pad_input_features(weight, format), format, matrix)


def transform_input(x: torch.Tensor, format: LinearFormat, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] -> float32 [..., padded K], x T: what the activation quantizer rounds."""
    return _apply(pad_input_features(x, format), format, matrix)


def transform_hessian(hessian: torch.Tensor, format: LinearFormat, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """H float32 [padded K, padded K] of the padded input -> T^T H T, in its place: at K = 28672 a copy would be 3 GB."""
    if matrix is None and format.transform is not TransformKind.HADAMARD:
        return hessian
    for rows in hessian.split(_ROWS_AT_ONCE):
        rows.copy_(_apply(rows, format, matrix))
    for columns in hessian.split(_ROWS_AT_ONCE, 1):
        columns.copy_(_apply(columns.t().contiguous(), format, matrix).t())
    return hessian
