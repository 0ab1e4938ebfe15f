"""A group transform learned from the layer's own weights and inputs: one dense 128 x 128 matrix per block of K.

With x -> x T and W -> W T^-T, a block's rounding errors are about uniform in +- half a step, and a step is a seventh of
the block's largest value. To first order the expected squared output error of a block is then, up to one constant,

    E_x[ max_j |x T|_j^2 ] * tr(T^-1 B T^-T)  +  sum_n max_j |w_n T^-T|_j^2 * tr(T^T A T)

with A = E[x^T x] and B = W^T W of the block: how far the largest value of a token sticks out, times how much the weights
amplify an error, and the same with the sides exchanged. Under a Gaussian model the best T is known in closed form (WUSH,
arXiv 2512.00956) and makes both sides equally spread; here the largest values are those of real rows, which T can make
rarer than a Gaussian's. Where gradients of the model's predictions are known (gradients.py), B = E[g^T g] of the input's
and rows of W scaled by their outputs' say the same of these predictions instead of the linears' own outputs.

That is for weights that are rounded to nearest. GPTQ lets the columns to come make up for the error of one, and of an error
of variance e in every column it leaves e sum_k 1/U_kk^2 (rounding/gptq.py), not e tr(A'), A' = T^T A T. The product of
the 1/U_kk^2 is det A', which T changes by its own determinant only, and near the optimum they are alike. So in the place of
tr(A') there is then

    C = 128 det(A' + delta I)^(1/128),      delta = GPTQ's damping of the mean of the diagonal of A'

and a transform no longer has to spread what is in A, which the feedback does: it can make the weights easier to round.

The minimum is found by Adam from the balanced diagonal times a Hadamard matrix, with the gradient written out. A step
is T <- T (I + S), and gradients are by S: with y = x T and v = w T^-T, of the logarithm of the error above,

    y^T dx tr(B') - dw^T v tr(A') + 2 max_w A' - 2 max_x B',     A' = T^T A T,  B' = T^-1 B T^-T

(with GPTQ's rounding C in place of tr(A'), and for A' the matrix `after_feedback`, whose trace is C) over the error, where dx
holds twice the largest value of each row of y over the number of rows, dw that of v, and max_x
and max_w are the two means of largest squares. So coordinates are always those of the codes, and the inverse can follow:
(I + S)^-1 = I - S + S^2. Of a row only one value has a slope, so going back costs an addition of rows where the usual
chain rule would take a product. What is left of the noise is that of the rows looked at: twice as many of them for half as
many steps end at the same error (docs/log.md).

With 8-bit activations a step of the input is 1/127 of a token's largest value. The first term is then (7/127)^2 of what it is
above, as if all blocks of a token had largest values of one size: a power of two gives it to them (`with_equal_peaks`).

One matrix can also be learned for all blocks of an input, by the sum of their errors. It starts from the Hadamard matrix
and is best given inputs and weights that a diagonal has balanced already (function_preserving.py): that of a block alone
would have to be stored.

The matrix is stored in numbers that bfloat16 and float16 both hold exactly, and the weights are transformed with the
inverse of what is stored, so its rounding costs nothing. These numbers end at 2^-14 of the largest entry: where a channel's
row lies below, as that of a channel 10^4 times larger than others whose readers are as much smaller, it would be stored as
zeros, and the matrix would have no inverse. The start keeps off that limit. A matrix that steps bring there all the same
is not taken (`is_sound`).

The error above is the same but for a factor if all rows of x, or all of W and g, are multiplied by a number. So rows whose
squares would leave the range of float32 are scaled by powers of two first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from ..distributed.group import Group
from ..distributed.shares import Share
from ..format.number_format import BITS, BLOCK, CODE_MAX, TOKEN_CODE_MAX
from ..hardware.replayed import Replayed
from ..hardware.threads import few_threads
from ..kernels.hadamard import apply_block_hadamard

STEPS = 100
LEARNING_RATE = 0.02  # of S; falls to zero along a cosine
WARM_UP = 10  # steps in which it rises: the first of Adam's have entries of one size, which may add up to more than I
# What an error of the input counts against one of the weights, by activation bits: a step is 1/7 or 1/127 of the largest value.
INPUT_WEIGHT = {4: 1.0, 8: (CODE_MAX / TOKEN_CODE_MAX) ** 2}
MOST_RAISED = 8  # of a stored matrix, as a power of two: the weights' scales fall by it, and float16 ends at 2^-24
EXACT_INVERSE = 20  # steps from one computed inverse to the next
NEWTON_STEPS, CONVERGED = 5, 1e-6  # to it; what I - T X was before the last of them, its squares, in every block
SAME_MOMENTS = 2  # steps that go by the same A' and B', which change slowly
BETAS, EPSILON = (0.8, 0.9), 1e-8
INPUT_ROWS_PER_STEP, WEIGHT_ROWS_PER_STEP = 1024, 512  # looked at in one step; others in the next
COMPARED_ROWS = 4096  # of the input, to tell whether anything was gained
WEIGHT_ROWS_KEPT = 4096  # of all the weights, to draw from: so many to twice as many
SMALLEST, MANTISSA_BITS = 2.0**-14, 8  # the numbers both 16-bit formats hold: float16's range, bfloat16's precision
WIDEST = 2.0**12  # of the start, the largest over the smallest factor of a channel: all are stored
CONDITION = 2.0**24  # of a matrix that is stored, at most: beyond, float32 could not hold the product with its inverse
ORDINARY = 20  # blocks with a largest value within 2^-20 ... 2^20 are not scaled: products of four stay in float32
SCALED_BY = 126  # as powers of two, at most: float32 has more, and not their inverses


@dataclass
class BlockStatistics:
    """What a transform is learned from, by block of 128 channels: rows x [G, T, 128] of the input, rows w [G, N', 128] of
    the weights that stand for N rows, and A and B, [G, 128, 128]. A block of x may be scaled by a power of two, and one of w
    and B by another."""

    x: torch.Tensor
    w: torch.Tensor
    weight_rows: int  # N: `peaks_and_slopes` takes a mean over rows, the error of the weights is a sum
    a: torch.Tensor
    b: torch.Tensor
    input_weight: float = 1.0  # of what errors of the input add
    damping: float | None = None  # of GPTQ; None: weights are rounded to nearest

    @classmethod
    def of(
        cls,
        inputs: torch.Tensor,
        weights: Iterable[torch.Tensor],
        gradients: torch.Tensor | None = None,
        shared: bool = False,
    ) -> BlockStatistics:
        """The arguments of `learn_transform`."""
        x = _by_block(inputs)
        x = _scaled(x, -_exponents(x, shared))
        b = x.new_zeros(len(x), BLOCK, BLOCK)
        exponents = torch.full((len(x),), -SCALED_BY, device=x.device)  # of the largest of weights and gradients so far
        total, stride = 0, 1
        kept = inputs.new_zeros(0, inputs.shape[1])

        def scaled(rows: torch.Tensor) -> torch.Tensor:
            """Rows [R, K] by block, scaled as all that was seen before, which is scaled down if these are larger."""
            nonlocal b, kept, exponents
            blocks = _by_block(rows)
            most = torch.maximum(exponents, _exponents(blocks, shared))
            b = _scaled(b, 2 * (exponents - most))
            kept = _by_row(_scaled(_by_block(kept), exponents - most))
            exponents = most
            return _scaled(blocks, -most)

        for weight in weights:
            rows = scaled(weight)
            if gradients is None:
                _add_products(b, rows)
            total += len(weight)
            kept = torch.cat([kept, _by_row(rows)[::stride]])
            while len(kept) > 2 * WEIGHT_ROWS_KEPT:  # every row stands for as many
                kept, stride = kept[::2].clone(), 2 * stride
        if gradients is not None:
            _add_products(b, scaled(gradients))
        a = _add_products(torch.zeros_like(b), x).div_(len(inputs))
        return cls(x, _by_block(kept), total, a, b)


def _exponents(rows: torch.Tensor, shared: bool) -> torch.Tensor:
    """Rows [G, R, 128] -> per block the power of two to take out of them, integers [G], of one size if `shared`.

    0 for blocks that float32 holds the squares of, and the least there is, -SCALED_BY, for blocks without values.
    """
    if rows.shape[1] == 0:
        return torch.full((len(rows),), -SCALED_BY, device=rows.device)
    largest = torch.maximum(rows.amax((1, 2)), -rows.amin((1, 2)))
    if shared:
        largest = largest.amax().expand(len(rows))
    exponents = torch.frexp(largest)[1].clamp(-SCALED_BY, SCALED_BY).long()
    exponents = torch.where(exponents.abs() <= ORDINARY, 0, exponents)
    return torch.where(largest == 0, -SCALED_BY, exponents)


def _scaled(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """blocks [G, R, C] times 2^exponents [G]; the same tensor if there is nothing to do."""
    if not bool(exponents.any()) or blocks.numel() == 0:
        return blocks
    return torch.ldexp(blocks, exponents[:, None, None].to(blocks.dtype))


def _by_row(blocks: torch.Tensor) -> torch.Tensor:
    """[G, R, 128] -> [R, K], a view if it was made by `_by_block`."""
    return blocks.transpose(0, 1).flatten(1)


def _by_block(matrix: torch.Tensor) -> torch.Tensor:
    """[R, K] -> [K / 128, R, 128], the same memory."""
    blocks: torch.Tensor = matrix.unflatten(1, (-1, BLOCK))
    return blocks.transpose(0, 1)


def _add_products(sums: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Add r^T r of rows r [G, R, 128] to sums [G, 128, 128], which are returned."""
    return sums.baddbmm_(rows.transpose(1, 2), rows)


def learn_transform(
    inputs: torch.Tensor,
    weights: Iterable[torch.Tensor],
    steps: int = STEPS,
    shared: bool = False,
    gradients: torch.Tensor | None = None,
    activation_bits: int = BITS,
    damping: float | None = None,
    warn: Callable[[str], None] = lambda text: None,
    group: Group | None = None,
) -> torch.Tensor:
    """T float16 [K / 128, 128, 128] for the linears `weights`, float32 [N_i, K] each, that read `inputs` float32 [T, K].

    K is padded to a multiple of 128, and all values are finite. Blocks where nothing was gained, or whose inputs or weights
    are all zero, get the matrix that learning starts from. So do those whose learned matrix cannot be stored without losing
    its inverse, of which `warn` is told. Every matrix returned has a finite inverse. The blocks of a `shared` one are
    equal. The same arguments give the same result.
    `gradients` float32 [R, K], if known, say what errors of the input do (gradients.py): B is then theirs, g^T g, and not
    that of the weights, whose rows have to be scaled by how much their errors matter. `activation_bits`: of the inputs.
    `damping` of GPTQ, if it rounds the weights; None if they are rounded to nearest.
    Each process of the `group`, which have the same arguments, learns the matrices of a share of the blocks; a shared one
    is learned by all alike.
    """
    group, count = group or Group(), inputs.shape[1] // BLOCK
    share = Share.whole(count) if shared else group.share(count)
    columns = slice(share.first * BLOCK, share.stop * BLOCK)
    if share.size:
        own, lost = _learn(
            inputs[:, columns],
            (weight[:, columns] for weight in weights),
            steps,
            shared,
            None if gradients is None else gradients[:, columns],
            activation_bits,
            damping,
        )
    else:
        own, lost = torch.empty(0, BLOCK, BLOCK, dtype=torch.float16, device=inputs.device), 0
    stored = group.broadcast(own) if shared else group.gather_share(own, count)
    lost = lost if shared else int(group.sum_of_numbers([lost])[0])
    if lost:
        warn(f"{lost} of {len(stored)} learned transforms cannot be stored in 16 bits, their start is used")
    if activation_bits == 8 and not shared:
        stored = with_equal_peaks(stored, inputs)
    return stored.expand(count, -1, -1)


def _learn(
    inputs: torch.Tensor,
    weights: Iterable[torch.Tensor],
    steps: int,
    shared: bool,
    gradients: torch.Tensor | None,
    activation_bits: int,
    damping: float | None,
) -> tuple[torch.Tensor, int]:
    """What `learn_transform` returns for these columns, [G, 128, 128] or [1, 128, 128], and how many cannot be stored."""
    blocks = BlockStatistics.of(inputs, weights, gradients, shared)
    blocks.input_weight, blocks.damping = INPUT_WEIGHT[activation_bits], damping
    with few_threads(2 * INPUT_ROWS_PER_STEP * BLOCK * inputs.shape[1]):
        hadamard = apply_block_hadamard(torch.eye(BLOCK, device=inputs.device))[None]
        start = hadamard if shared else balanced_hadamard(blocks)
        learned = descend(blocks, start, steps)
        before, after = block_errors(blocks, start), block_errors(blocks, learned)
    better = torch.isfinite(after) & (after < before)  # False for NaN
    stored, beginning = storable(learned), storable(start)
    sound, begins_sound = is_sound(torch.cat([stored, beginning])).chunk(2)
    lost = int((better & ~sound).sum())
    stored = torch.where((better & sound)[:, None, None], stored, beginning)
    usable = (better & sound) | begins_sound
    return torch.where(usable[:, None, None], stored, storable(hadamard)), lost


def with_equal_peaks(stored: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """T float16 [G, 128, 128] -> for every block a power of two times T, so that its largest values in inputs [T, K] are of the
    size of the other blocks'.

    8-bit activations have one scale a token, with which a block of smaller values than another's has fewer codes to itself.
    The weights have scales by group, and take the other side of the factor for nothing.
    """
    peaks = _mean_peak(rows_of_step(_by_block(inputs), COMPARED_ROWS, 0) @ stored.float()).sqrt()
    exponents = torch.log2(peaks.amax() / peaks).round().clamp(0, MOST_RAISED)
    exponents = torch.where((peaks > 0) & torch.isfinite(exponents), exponents, 0.0)
    return torch.ldexp(stored.float(), exponents[:, None, None]).half()


def is_sound(transform: torch.Tensor) -> torch.Tensor:
    """T [G, 128, 128] -> per block, whether weights can be multiplied by its inverse: bool [G].

    The condition number, by Frobenius norms, is at most CONDITION.
    """
    exact = transform.double()
    inverse, failed = torch.linalg.inv_ex(exact)
    condition = exact.flatten(1).norm(dim=1) * inverse.flatten(1).norm(dim=1)
    sound: torch.Tensor = (failed == 0) & (condition <= CONDITION)  # False for NaN
    return sound


def balanced_hadamard(blocks: BlockStatistics) -> torch.Tensor:
    """diag(d) H, float32 [G, 128, 128], d_k = (B_kk / A_kk)^(1/4): both sides get the same energy in every channel.

    H is the Hadamard matrix over sqrt(128). The d_k of a block are within a factor of WIDEST of each other.
    """
    a, b = (matrix.diagonal(dim1=1, dim2=2) for matrix in (blocks.a, blocks.b))
    alive = (a.amax(1, keepdim=True) > 0) & (b.amax(1, keepdim=True) > 0)
    # A dead channel is taken for a quiet one: its factor is bounded.
    a, b = (side.clamp_min(1e-6 * side.mean(1, keepdim=True).clamp_min(1e-30)) for side in (a, b))
    log_d = torch.where(alive, (b.log() - a.log()) / 4, 0.0)
    log_d = log_d.clamp_min(log_d.amax(1, keepdim=True) - math.log(WIDEST))
    d = (log_d - log_d.mean(1, keepdim=True)).exp()
    return d[..., None] * apply_block_hadamard(torch.eye(BLOCK, device=a.device))


def descend(blocks: BlockStatistics, start: torch.Tensor, steps: int) -> torch.Tensor:
    """T after `steps` steps from `start`, float32 [G, 128, 128], or [1, 128, 128] for one that all blocks share."""
    walk = (_ReplayedWalk if replays_on(start.device) else _Walk)(blocks, start)
    for step in range(steps):
        if step % SAME_MOMENTS == 0:
            moments = moments_in_basis(blocks, walk.transform, walk.inverse)
        x, w = rows_of_step(blocks.x, INPUT_ROWS_PER_STEP, step), rows_of_step(blocks.w, WEIGHT_ROWS_PER_STEP, step)
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / WARM_UP)
        walk.step(x, w, moments, -rate / (1 - BETAS[0] ** (step + 1)), 1 - BETAS[1] ** (step + 1))
        if step % EXACT_INVERSE == EXACT_INVERSE - 1:
            walk.invert()
        else:
            walk.follow()
    walk.end()
    return walk.transform


class _Walk:
    """Where `descend` is: T, its inverse, and Adam's moments."""

    def __init__(self, blocks: BlockStatistics, start: torch.Tensor) -> None:
        self._blocks = blocks
        self.transform, self.inverse = start, _inverse(start)
        self._first, self._second = torch.zeros_like(start), torch.zeros_like(start)
        self._change = self._first  # S of the last step

    def step(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        moments: tuple[torch.Tensor, torch.Tensor],
        factor: float | torch.Tensor,
        level: float | torch.Tensor,
    ) -> None:
        """A step of T by rows x and w: `factor` times Adam's first moment over the root of its second, over `level`."""
        blocks, first, second = self._blocks, self._first, self._second
        slope = slope_of_log_error(
            blocks.weight_rows,
            x @ self.transform,
            w @ self.inverse.transpose(1, 2),
            *moments,
            len(self.transform) == 1,
            blocks.input_weight,
        )
        first.lerp_(slope, 1 - BETAS[0])
        second.lerp_(slope.square_(), 1 - BETAS[1])
        size = (second / level).sqrt_().add_(EPSILON)
        self._change = first / size * factor
        self.transform = torch.baddbmm(self.transform, self.transform, self._change)

    def follow(self) -> None:
        """With the inverse, to second order."""
        linear = torch.baddbmm(self.inverse, self._change, self.inverse, alpha=-1)
        self.inverse = torch.baddbmm(self.inverse, self._change, linear, alpha=-1)

    def invert(self) -> None:
        """Take the exact inverse."""
        self.inverse = _inverse(self.transform)

    def end(self) -> None:
        """No step comes any more."""


class _ReplayedWalk(_Walk):
    """The same on a GPU, for which a step is a hundred launches: a graph of them reads all that differs from places of its own."""

    def __init__(self, blocks: BlockStatistics, start: torch.Tensor) -> None:
        super().__init__(blocks, start)
        self.transform, self.inverse = start.clone(), self.inverse.clone()
        self._chain = Replayed(start.device)
        self._moments = torch.zeros_like(blocks.a), torch.zeros_like(blocks.a)
        self._numbers = torch.zeros(2, device=start.device)
        self._identity = torch.eye(BLOCK, device=start.device).expand_as(start)
        self._off = torch.zeros((), device=start.device)
        self._rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # by how many there are of x and w
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        moments: tuple[torch.Tensor, torch.Tensor],
        factor: float | torch.Tensor,
        level: float | torch.Tensor,
    ) -> None:
        key = x.shape[1], w.shape[1]
        if key not in self._rows:
            self._rows[key] = torch.empty_like(x), torch.empty_like(w)
        for place, rows in zip(self._rows[key], (x, w), strict=True):
            place.copy_(rows)
        if moments is not self._made:
            self._made = moments
            for place, made in zip(self._moments, moments, strict=True):
                place.copy_(made)
        for place, number in zip(self._numbers, (factor, level), strict=True):
            place.fill_(number)
        self._chain.run(key, partial(self._step_and_follow, *self._rows[key]))

    def _step_and_follow(self, x: torch.Tensor, w: torch.Tensor) -> None:
        places = self.transform, self.inverse
        super().step(x, w, self._moments, *self._numbers)
        super().follow()
        for place, made in zip(places, (self.transform, self.inverse), strict=True):
            place.copy_(made)
        self.transform, self.inverse = places
        self._change = self._first  # what was made in a capture is the graph's

    def follow(self) -> None:
        """Done already."""

    def invert(self) -> None:
        """By Newton's iteration from the inverse that followed. To decompose a matrix is dozens of launches, which take longer."""
        self._chain.run("invert", self._refine)
        if not bool(self._off < CONVERGED):
            self.inverse.copy_(_inverse(self.transform))

    def _refine(self) -> None:
        """X <- X + X (I - T X), of which the second factor is squared by every step."""
        inverse, off = self.inverse, self._identity
        for _ in range(NEWTON_STEPS):
            off = torch.baddbmm(self._identity, self.transform, inverse, alpha=-1)
            inverse = torch.baddbmm(inverse, inverse, off)
        self._off.copy_(off.square().sum((1, 2)).amax())
        self.inverse.copy_(inverse)

    def end(self) -> None:
        self._chain.forget()


def replays_on(device: torch.device) -> bool:
    return device.type == "cuda"


def _inverse(transform: torch.Tensor) -> torch.Tensor:
    """Block by block. Of a block that has none it holds no number that is of use, and the others do not suffer."""
    inverse: torch.Tensor = torch.linalg.inv_ex(transform)[0]
    return inverse


def rows_of_step(rows: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """About `count` of the rows [G, R, 128], evenly spaced, in every step others until all have come; all, if there are no
    more."""
    stride = -(-rows.shape[1] // count)
    return rows[:, step % stride :: stride]


def peaks_and_slopes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values y float32 [G, R, 128] -> per block the mean over rows of the largest square, and d^T y, [G, 128, 128], with d
    its gradient by y."""
    blocks, rows, _ = values.shape
    if values.is_cuda:
        # As few passes over the values as there are operations for. A product adds rows up in one order, as index_add_ would not there:
        # a resumed run has to write the same bytes.
        place = values.abs().argmax(-1, keepdim=True)
        largest = values.gather(-1, place)
        back = torch.zeros_like(values).scatter_(-1, place, largest * (2 / rows)).transpose(1, 2) @ values
        return largest.square().mean((1, 2)), back
    # The place of the largest size, by a maximum of integers: floats compare like their bits, whose lowest seven are
    # exchanged for the place. Several times faster than a maximum that returns places; almost equal sizes are as good.
    places = torch.arange(BLOCK, dtype=torch.int32)
    keys = values.view(torch.int32).bitwise_and(0x7FFFFF80).bitwise_or_(places)
    place = keys.amax(-1).bitwise_and_(BLOCK - 1).long()
    largest = values.gather(-1, place[..., None])
    scaled = values * (largest * (2 / rows))
    place += BLOCK * torch.arange(blocks)[:, None]
    back = values.new_zeros(blocks * BLOCK, BLOCK).index_add_(0, place.flatten(), scaled.flatten(0, 1))
    return largest.square().mean((1, 2)), back.view(blocks, BLOCK, BLOCK)


def moments_in_basis(
    blocks: BlockStatistics, transform: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' or, with GPTQ, what takes its place, and B', [G, 128, 128]."""
    a = transform.transpose(1, 2) @ (blocks.a @ transform)
    if blocks.damping is not None:
        a = after_feedback(a, blocks.damping)
    return a, inverse @ blocks.b @ inverse.transpose(1, 2)


def after_feedback(a: torch.Tensor, damping: float) -> torch.Tensor:
    """A' [G, 128, 128] -> M of trace C = 128 det(A' + delta I)^(1/128), delta = damping tr(A') / 128, that has C's slope: in
    T (I + S), C changes by 2 tr(S M) to first order.

    With D = A' + delta I the slope of log det D is 2 tr(S A' D^-1) + tr(D^-1) 2 damping tr(S A') / 128.
    """
    delta = a.diagonal(dim1=1, dim2=2).mean(1) * damping
    damped = a.clone()
    damped.diagonal(dim1=1, dim2=2).add_(delta[:, None])
    lower, failed = torch.linalg.cholesky_ex(damped)
    level = lower.diagonal(dim1=1, dim2=2).log().mean(1).mul_(2).exp_()  # C / 128
    inverse = torch.cholesky_inverse(lower)
    kept = inverse @ a + a * (_trace(inverse) * (damping / BLOCK))[:, None, None]
    # A block that is all zeros, or as good as that, has no slope.
    return torch.where(((failed == 0) & (delta > 0))[:, None, None], kept * level[:, None, None], a)


def slope_of_log_error(
    weight_rows: int,
    y: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    shared: bool,
    input_weight: float = 1.0,
) -> torch.Tensor:
    """Of the logarithm of every block's error by S in T (I + S), at S = 0, [G, 128, 128]; of their sum, if one T is for
    all. y [G, R, 128] and v [G, R', 128] are rows of the input and of the weights in the basis of T."""
    x_peak, x_back = peaks_and_slopes(y)
    w_peak, w_back = peaks_and_slopes(v)
    w_peak, w_back = w_peak * weight_rows, w_back * weight_rows
    a_trace, b_trace = _trace(a), _trace(b)
    x_peak, x_back = x_peak * input_weight, x_back * input_weight
    slope = x_back.transpose(1, 2) * b_trace[:, None, None] - w_back * a_trace[:, None, None]
    slope += a * (2 * w_peak)[:, None, None] - b * (2 * x_peak)[:, None, None]
    error = x_peak * b_trace + w_peak * a_trace
    if shared:
        slope, error = slope.sum(0, keepdim=True), error.sum(0, keepdim=True)
    # Not by torch.where and a number: that is sent to a GPU, which is waited for.
    return (slope / error.clamp_min(1e-30)[:, None, None]).masked_fill_(~(error[:, None, None] > 0), 0.0)


def _trace(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def block_errors(blocks: BlockStatistics, transform: torch.Tensor) -> torch.Tensor:
    """The objective per block over the rows kept, [G]; their sum [1], if one T is for all."""
    inverse = _inverse(transform)
    x_peak = _mean_peak(rows_of_step(blocks.x, COMPARED_ROWS, 0) @ transform)
    w_peak = _mean_peak(blocks.w @ inverse.transpose(1, 2))
    a_trace, b_trace = (_trace(moments) for moments in moments_in_basis(blocks, transform, inverse))
    error = blocks.input_weight * x_peak * b_trace + w_peak * blocks.weight_rows * a_trace
    return error.sum(0, keepdim=True) if len(transform) == 1 else error


def _mean_peak(values: torch.Tensor) -> torch.Tensor:
    return values.abs().amax(-1).square().mean(1)


def storable(transform: torch.Tensor) -> torch.Tensor:
    """T float32 [G, 128, 128] -> float16, scaled by block by a power of two to a largest entry in [1/2, 1] and rounded to
    what both 16-bit formats hold: entries below 2^-14 become zero."""
    _, exponent = torch.frexp(transform.abs().amax((1, 2), keepdim=True))
    return round_to_halves(torch.ldexp(transform, -exponent))


def round_to_halves(transform: torch.Tensor) -> torch.Tensor:
    """float32 -> float16, rounded to what both 16-bit formats hold: entries below 2^-14 become zero."""
    mantissa, exponents = torch.frexp(transform)
    rounded = torch.ldexp(torch.round(mantissa * 2**MANTISSA_BITS) / 2**MANTISSA_BITS, exponents)
    return torch.where(rounded.abs() < SMALLEST, 0.0, rounded).half()
