"""The format's arithmetic in vectorised PyTorch: what runs on a CPU, and on any GPU that has no kernel of ours.

Exact where the format says exact. Codes are integers of magnitude <= 7, or 8 of activations with sixteen levels, so a product sum
over a group of g inputs is at most 56 g: below 2^24, a float32 matrix product of codes holds it exactly, in any order of
summation. (K beyond 299,000 in one group would not; no model has it.) The dequantization costs one multiply by s_w, exact for g = 128 (13
bits times the 11 of a float16; on a CPU it is done to the weights beforehand), and one multiply-add by s_a.

With 8-bit activations weights are folded first (folding.py). A sum over 1024 inputs is at most 127 * 126 * 1024 < 2^24, so that a
float32 product holds that of eight blocks; beyond them the parts are added as int32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..format.feedback import block_clips_of, feedback_of, step_order, transform_of
from ..format.number_format import (
    ACTIVATION_SCALE_MIN,
    BLOCK,
    CODE_MAX,
    SIXTEENTH_CODE,
    STEP_COLUMNS,
    TOKEN_CODE_MAX,
)
from .folding import fold, fold_codes
from .hadamard import apply_block_hadamard, apply_block_matrix

ROWS_AT_ONCE = 2048  # tokens per pass: bounds the float32 partial sums, [rows, N]

# On a CPU fewer, so that a pass over the rows finds them in a core's cache, and malloc has room for them without asking the
# system: with 2048 rows of 768 the quantizer took four times as long. A product wants so many rows at least.
CPU_ELEMENTS, CPU_ROWS = 2**18, 256

EXACT_INPUTS = 1024  # input features whose sums of 8-bit products are exact in float32

# int8 codes [N, K], float16 scales [N, G] and a bias [N] or None.
Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def row_ranges(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Which of `rows` rows of `width` elements are computed at once, one range after the other."""
    step = ROWS_AT_ONCE
    if device.type == "cpu":
        step = min(step, max(CPU_ROWS, CPU_ELEMENTS // width))
    return (slice(start, start + step) for start in range(0, rows, step))


def quantize_activation(
    x: torch.Tensor, group: int, clip: float = 1.0, hadamard: bool = True, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] of any float dtype, K a multiple of `group` -> codes float32 [M, G, g] (integers), scales float32 [M, G].

    `matrix` [K / 128, 128, 128] is multiplied to the blocks of x in float32, in the place of the Hadamard matrix. With error
    feedback it is [K / 128, 184, 128] or, with sixteen levels, [K / 128, 185, 128], and `group` is 128.

    NaN in an input group gives NaN scales, hence NaN outputs of that token: damage upstream stays visible.
    """
    return _quantize_in_ranges(x, group, clip, hadamard, matrix, CODE_MAX)


def quantize_token(
    x: torch.Tensor, hadamard: bool = True, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_activation`, to 8 bits with one scale a token: codes float32 [M, 1, K] (integers), scales float32 [M, 1]."""
    return _quantize_in_ranges(x, x.shape[1], 1.0, hadamard, matrix, TOKEN_CODE_MAX)


def _quantize_in_ranges(
    x: torch.Tensor, group: int, clip: float, hadamard: bool, matrix: torch.Tensor | None, code_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = None if matrix is None else matrix.float()
    ranges = list(row_ranges(len(x), x.shape[1], x.device))
    if len(ranges) < 2:
        return _quantize(x, group, clip, hadamard, matrix, code_max)
    codes, scales = zip(*(_quantize(x[rows], group, clip, hadamard, matrix, code_max) for rows in ranges), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _quantize(
    x: torch.Tensor, group: int, clip: float, hadamard: bool, matrix: torch.Tensor | None, code_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    feedback = clips = None
    if matrix is not None:
        x = apply_block_matrix(x, transform_of(matrix))
        if code_max == CODE_MAX:  # errors of 8 bits are not made up for
            feedback, clips = feedback_of(matrix), block_clips_of(matrix)
    elif hadamard:
        x = apply_block_hadamard(x)
    return quantize_transformed(x, group, clip, feedback, code_max, clips)


def quantize_transformed(
    x: torch.Tensor,
    group: int,
    clip: float = 1.0,
    feedback: torch.Tensor | None = None,
    code_max: int = CODE_MAX,
    clips: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_activation`, of x float32 [M, K] that was transformed already. `feedback`: G [K / 128, 128, 128] in step order;
    `clips` [K / 128], of every block, with feedback alone: then there are sixteen levels, and `clip` is 1."""
    grouped = x.unflatten(-1, (-1, group))
    if clips is None:
        lowest, scale = -CODE_MAX, (grouped.abs().amax(-1) * (clip / code_max)).clamp_min(ACTIVATION_SCALE_MIN)
    else:
        lowest, scale = SIXTEENTH_CODE, signed_scale(largest_of(grouped), clips)
    units = grouped / scale[..., None]
    if feedback is not None:
        return round_with_feedback(units, feedback, lowest), scale
    return units.round_().clamp_(-code_max, code_max), scale


def largest_of(grouped: torch.Tensor) -> torch.Tensor:
    """[..., g] -> the value of largest magnitude [...] with its sign; of two that differ in the sign alone, the negative one."""
    least, most = grouped.amin(-1), grouped.amax(-1)
    return torch.where(-least >= most, least, most)


def signed_scale(largest: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """The scales of sixteen levels [M, KB], of blocks of these largest values [M, KB] and of clip ratios [KB]."""
    return (largest.abs() * (clips / -SIXTEENTH_CODE)).clamp_min(ACTIVATION_SCALE_MIN).copysign(-largest)


def round_with_feedback(units: torch.Tensor, feedback: torch.Tensor, lowest: int = -CODE_MAX) -> torch.Tensor:
    """Values in units of their scale, float32 [M, KB, 128], and G [KB, 128, 128] in step order -> codes float32 [M, KB, 128], from
    `lowest` to 7."""
    order = step_order(units.device)
    values = units.detach().transpose(0, 1)[..., order]  # [KB, M, 128]; rounding has no gradient
    codes = torch.empty_like(values)
    errors = torch.empty_like(values)
    for start in range(BLOCK - STEP_COLUMNS, -1, -STEP_COLUMNS):
        step, later = slice(start, start + STEP_COLUMNS), slice(start + STEP_COLUMNS, BLOCK)
        wanted = values[..., step]
        if start + STEP_COLUMNS < BLOCK:
            wanted = torch.baddbmm(wanted, errors[..., later], feedback[:, later, step])
        code = wanted.round().clamp_(lowest, CODE_MAX)
        codes[..., step] = code
        errors[..., step] = code.sub_(wanted)
    rounded = torch.empty_like(codes)
    rounded[..., order] = codes
    return rounded.transpose(0, 1)


def linear(
    x: torch.Tensor,
    codes_w: torch.Tensor,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None = None,
    clip: float = 1.0,
    hadamard: bool = True,
    matrix: torch.Tensor | None = None,
    activation_bits: int = 4,
) -> torch.Tensor:
    """y [..., N] in x's dtype: quantize x [..., K], multiply by int8 codes_w [N, K_padded], dequantize.

    scale_w is float16 [N, G], matrix None or [K_padded / 128, 128, 128]; K is padded with zeros to K_padded; bias [N] is added in
    float32. `clip` is of 4-bit activations.
    """
    return linears(x, [(codes_w, scale_w, bias)], clip, hadamard, matrix, activation_bits)[0]


@torch.no_grad()  # rounding has no gradient worth having
def linears(
    x: torch.Tensor,
    weights: Sequence[Weight],
    clip: float = 1.0,
    hadamard: bool = True,
    matrix: torch.Tensor | None = None,
    activation_bits: int = 4,
) -> list[torch.Tensor]:
    """What `linear` returns for each of `weights`, which have K_padded and G in common: x is quantized once."""
    # Under autocast the products of codes would be rounded to 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        padded_k, groups = weights[0][0].shape[1], weights[0][1].shape[1]
        matrix = None if matrix is None else matrix.float()
        rows = x.reshape(-1, x.shape[-1])
        in_tokens = activation_bits == 8
        group, code_max = (padded_k, TOKEN_CODE_MAX) if in_tokens else (padded_k // groups, CODE_MAX)
        prepare, product = (folded_weight, multiply_folded) if in_tokens else (grouped_weight, multiply)
        prepared = [prepare(codes, scale) for codes, scale, _ in weights]
        results = [torch.empty(len(rows), len(codes), dtype=x.dtype, device=x.device) for codes, _, _ in weights]
        for some in row_ranges(len(rows), padded_k, x.device):
            part = rows[some]
            if part.shape[1] < padded_k:
                part = torch.nn.functional.pad(part, (0, padded_k - part.shape[1]))
            codes, scale_a = _quantize(part, group, 1.0 if in_tokens else clip, hadamard, matrix, code_max)
            for y, (weight, factor), (_, _, bias) in zip(results, prepared, weights, strict=True):
                y[some] = product(codes, scale_a, weight, factor, bias)
        return [y.reshape(*x.shape[:-1], y.shape[1]) for y in results]


def grouped_weight(codes_w: torch.Tensor, scale_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """int8 codes [N, K] and float16 scales [N, G] as `multiply` wants them: [G, N, g] and float32 [G, N].

    On a CPU, where a few rows are multiplied at once, groups of 128 are float32 and have their scale in them, which then is
    None: sums of such products are exact too, being at most 56 * 128 times an 11-bit number.
    """
    weight = codes_w.unflatten(1, (scale_w.shape[1], -1)).transpose(0, 1)
    scale_w = scale_w.float().t().contiguous()
    if codes_w.device.type != "cpu":
        return weight, scale_w
    if weight.shape[2] > BLOCK:
        return weight.float(), scale_w
    return weight * scale_w[..., None], None


def multiply(
    codes: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    scale_w: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """float32 [M, N] from codes float32 [M, G, g] and scale_a float32 [M, G], and what `grouped_weight` returns."""
    total = torch.zeros(len(codes), weight.shape[1], dtype=torch.float32, device=codes.device)
    for g in range(len(weight)):
        partial = codes[:, g] @ weight[g].float().t()  # exact integers, or s_w times those
        if scale_w is not None:
            partial *= scale_w[g]
        total.addcmul_(partial, scale_a[:, g, None])
    if bias is not None:
        total += bias.float()
    return total


def folded_weight(codes_w: torch.Tensor, scale_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [N, K] and float16 scales [N, G] as `multiply_folded` wants them: float32 [N, K] (integers) and unit [N]."""
    ratio, unit = fold(scale_w)
    return fold_codes(codes_w, ratio).float(), unit


def multiply_folded(
    codes: torch.Tensor,
    scale_a: torch.Tensor,
    weight: torch.Tensor,
    unit: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """float32 [M, N] from codes float32 [M, 1, K] and scale_a float32 [M, 1], and what `folded_weight` returns."""
    assert unit is not None
    total = exact_product(codes[:, 0], weight) * scale_a * unit
    if bias is not None:
        total += bias.float()
    return total


def exact_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 [M, N], the exact integer product of 8-bit codes [M, K] and folded weights [N, K], both float32, rounded once."""
    if codes.shape[1] <= EXACT_INPUTS:
        return codes @ weight.t()
    pairs = zip(codes.split(EXACT_INPUTS, 1), weight.split(EXACT_INPUTS, 1), strict=True)
    sums = torch.zeros(len(codes), len(weight), dtype=torch.int32, device=codes.device)
    for part_a, part_w in pairs:
        sums += (part_a @ part_w.t()).int()
    return sums.float()
