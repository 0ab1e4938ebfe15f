"""A group transform learned from the layer's own weights and inputs: one dense 128 x 128 matrix per block of K.

With x -> x T and W -> W T^-T, a block's rounding errors are about uniform in +- half a step, and a step is a seventh of
the block's largest value. To first order the expected squared output error of a block is then, up to one constant,

    E_x[ max_j |x T|_j^2 ] * tr(T^-1 B T^-T)  +  sum_n max_j |w_n T^-T|_j^2 * tr(T^T A T)

with A = E[x^T x] and B = W^T W of the block: how far the largest value of a token sticks out, times how much the weights
amplify an error, and the same with the sides exchanged. Under a Gaussian model the best T is known in closed form (WUSH,
arXiv 2512.00956) and makes both sides equally spread; here the largest values are those of real rows, which T can make
rarer than a Gaussian's. The minimum is found by Adam from the balanced diagonal times a Hadamard matrix, with the
gradient written out: blocks are independent, and a step costs four products of [rows, 128] with [128, 128]. Where
gradients through the layer are known (gradients.py), B = E[g^T g] of the input's and rows of W scaled by their outputs'
say the same of the decoder layer's output instead of the linears' own.

One matrix can also be learned for all blocks of an input, by the sum of their errors. It starts from the Hadamard matrix
and is best given inputs and weights that a diagonal has balanced already (model_transform.py): that of a block alone
would have to be stored.

The matrix is stored in numbers that bfloat16 and float16 both hold exactly, and the weights are transformed with the
inverse of what is stored, so its rounding costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .kernels.hadamard import apply_block_hadamard
from .number_format import BLOCK
from .threads import few_threads

STEPS = 100
LEARNING_RATE = 0.01  # of T = T_0 (I + D); falls to zero along a cosine
BETAS, EPSILON = (0.9, 0.95), 1e-8
ROWS, WEIGHT_ROWS = 512, 256  # looked at in one step, drawn anew for each
COMPARED_ROWS = 4096  # of the input, to tell whether anything was gained
WEIGHT_SAMPLE = 4096  # rows of all the weights kept to draw from: so many to twice as many
SMALLEST, MANTISSA_BITS = 2.0**-14, 8  # the numbers both 16-bit formats hold: float16's range, bfloat16's precision


@dataclass
class _Blocks:
    """Everything by block: rows [G, T, 128] of the input, weights [G, N', 128] that stand for N rows, A and B."""

    x: torch.Tensor
    w: torch.Tensor
    weight_rows: int  # N: `_peaks` takes a mean over rows, the error of the weights is a sum
    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def of(
        cls, inputs: torch.Tensor, weights: Iterable[torch.Tensor], gradients: torch.Tensor | None = None
    ) -> _Blocks:
        x = _by_block(inputs)
        b = torch.zeros_like(x[:, :1, :1]).expand(-1, BLOCK, BLOCK).clone()
        total, stride = 0, 1
        kept = b.new_zeros(len(x), 0, BLOCK)
        for weight in weights:
            w = _by_block(weight)
            if gradients is None:
                b.baddbmm_(w.transpose(1, 2), w)
            total += w.shape[1]
            kept = torch.cat([kept, w[:, ::stride]], dim=1)
            while kept.shape[1] > 2 * WEIGHT_SAMPLE:  # every row stands for as many
                kept, stride = kept[:, ::2].contiguous(), 2 * stride
        if gradients is not None:
            g = _by_block(gradients)
            b.baddbmm_(g.transpose(1, 2), g)
        return cls(x, kept, total, x.transpose(1, 2) @ x / x.shape[1], b)


def _by_block(matrix: torch.Tensor) -> torch.Tensor:
    """[R, K] -> [K / 128, R, 128]."""
    return matrix.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()


def learn_transform(
    inputs: torch.Tensor,
    weights: Iterable[torch.Tensor],
    steps: int = STEPS,
    shared: bool = False,
    gradients: torch.Tensor | None = None,
) -> torch.Tensor:
    """T float16 [K / 128, 128, 128] for the linears `weights`, float32 [N_i, K] each, that read `inputs` float32 [T, K].

    K is padded to a multiple of 128. Blocks where nothing was gained, or whose inputs or weights are all zero, get the
    scaled Hadamard matrix. The blocks of a `shared` one are equal. The same arguments give the same result.
    `gradients` float32 [R, K], if known, say what errors of the input do (gradients.py): B is then theirs, g^T g, and not
    that of the weights, whose rows have to be scaled by how much their errors matter.
    """
    blocks = _Blocks.of(inputs, weights, gradients)
    with few_threads(2 * ROWS * BLOCK * inputs.shape[1]):
        start = (
            apply_block_hadamard(torch.eye(BLOCK, device=inputs.device))[None] if shared else _balanced_hadamard(blocks)
        )
        learned = _descend(blocks, start, steps)
        before, after = _error(blocks, start), _error(blocks, learned)
    better = torch.isfinite(after) & (after < before)  # False for NaN
    return _storable(torch.where(better[:, None, None], learned, start)).expand(len(blocks.x), -1, -1)


def _balanced_hadamard(blocks: _Blocks) -> torch.Tensor:
    """diag(d) H, d_k = (B_kk / A_kk)^(1/4): both sides get the same energy in every channel (DESIGN 3.1)."""
    a, b = (matrix.diagonal(dim1=1, dim2=2) for matrix in (blocks.a, blocks.b))
    alive = (a.amax(1, keepdim=True) > 0) & (b.amax(1, keepdim=True) > 0)
    # A dead channel is taken for a quiet one: its factor is bounded.
    a, b = (side.clamp_min(1e-6 * side.mean(1, keepdim=True).clamp_min(1e-30)) for side in (a, b))
    log_d = torch.where(alive, (b.log() - a.log()) / 4, 0.0)
    d = (log_d - log_d.mean(1, keepdim=True)).exp()
    return d[..., None] * apply_block_hadamard(torch.eye(BLOCK, device=a.device))


def _descend(blocks: _Blocks, start: torch.Tensor, steps: int) -> torch.Tensor:
    identity = torch.eye(BLOCK, device=start.device)
    change = torch.zeros_like(start)  # D
    first, second = torch.zeros_like(change), torch.zeros_like(change)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x, w = _draw(blocks.x, ROWS, generator), _draw(blocks.w, WEIGHT_ROWS, generator)
        transform = start @ (identity + change)
        gradient = start.transpose(1, 2) @ _gradient(blocks, transform, x, w)
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        size = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
        change.addcdiv_(first, size, value=-rate / (1 - BETAS[0] ** (step + 1)))
    return start @ (identity + change)


def _draw(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    if rows.shape[1] <= count:
        return rows
    chosen = torch.randint(rows.shape[1], (count,), generator=generator).to(rows.device)  # a permutation takes longer
    return rows.index_select(1, chosen)


def _peaks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values [G, R, 128] -> per block the mean over rows of the largest square, and its gradient by the values."""
    sizes = values.abs()
    largest = sizes.amax(-1, keepdim=True)
    # A comparison is several times faster than an argmax and a scatter; ties are as good as never.
    gradient = torch.where(sizes == largest, values * (2 / values.shape[1]), 0.0)
    return largest.square().mean((1, 2)), gradient


def _gradient(blocks: _Blocks, transform: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Of the logarithm of every block's error with respect to its T, [G, 128, 128]; of their sum, if one T is for all."""
    inverse = torch.linalg.inv(transform)
    turned = inverse.transpose(1, 2)
    x_peak, x_slope = _peaks(x @ transform)
    w_peak, w_slope = _peaks(w @ turned)
    w_peak, w_slope = w_peak * blocks.weight_rows, w_slope * blocks.weight_rows
    inverse_b = inverse @ blocks.b
    a_transform = blocks.a @ transform
    b_trace = (inverse_b * inverse).sum((1, 2))
    a_trace = (a_transform * transform).sum((1, 2))
    by_inverse = w_slope.transpose(1, 2) @ w * a_trace[:, None, None] + inverse_b * (2 * x_peak)[:, None, None]
    slope = x.transpose(1, 2) @ x_slope * b_trace[:, None, None] + a_transform * (2 * w_peak)[:, None, None]
    slope -= turned @ by_inverse @ turned  # d(T^-1) = -T^-1 dT T^-1
    error = x_peak * b_trace + w_peak * a_trace
    if len(transform) == 1:
        slope, error = slope.sum(0, keepdim=True), error.sum(0, keepdim=True)
    return torch.where(error[:, None, None] > 0, slope / error.clamp_min(1e-30)[:, None, None], 0.0)


def _error(blocks: _Blocks, transform: torch.Tensor) -> torch.Tensor:
    """The objective per block over the rows kept, [G]; their sum [1], if one T is for all."""
    inverse = torch.linalg.inv(transform)
    x_peak, _ = _peaks(blocks.x[:, :: -(-blocks.x.shape[1] // COMPARED_ROWS)] @ transform)
    w_peak, _ = _peaks(blocks.w @ inverse.transpose(1, 2))
    b_trace = ((inverse @ blocks.b) * inverse).sum((1, 2))
    a_trace = ((blocks.a @ transform) * transform).sum((1, 2))
    error = x_peak * b_trace + w_peak * blocks.weight_rows * a_trace
    return error.sum(0, keepdim=True) if len(transform) == 1 else error


def _storable(transform: torch.Tensor) -> torch.Tensor:
    """Scale each block by a power of two to a largest entry in [1/2, 1) and round to what both 16-bit formats hold."""
    _, exponent = torch.frexp(transform.abs().amax((1, 2), keepdim=True))
    mantissa, exponents = torch.frexp(torch.ldexp(transform, -exponent))
    rounded = torch.ldexp(torch.round(mantissa * 2**MANTISSA_BITS) / 2**MANTISSA_BITS, exponents)
    return torch.where(rounded.abs() < SMALLEST, 0.0, rounded).half()
