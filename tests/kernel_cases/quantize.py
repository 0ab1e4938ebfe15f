"""Cases of the activation quantizers, and what must hold of them, against the float64 reference.

Every case poisons the outputs, runs one quantizer and decodes what it wrote. What must hold, and why:

* Without a transform nothing is rounded before the quotient: with the stored scale s, a code is rint(t / s) of a float32
  division, bit for bit.
* With a transform, t' = t + e. Butterflies: seven additions deep and one constant factor, |e| <= 8 u |x|_1 / sqrt(128), u =
  2^-24. Tensor cores: eight mma steps that add seventeen numbers each, cut off at no less than 24 bits, |e| <= 136 u sum
  |x_i T_ij|. The quotient adds 4 u |t / s| and, from its shift to [0, 1], 14 u. A code may differ from rint(t / s), by
  one, only if t / s is nearer to a tie than that.
* RMSNorm and SiLU round to 16 bits on the way. Where float32's own error (relative 2^-19 of a normalised value, 2^-20 of a
  SiLU) leaves two possible results, their distance d_i counts as an error of x_i, and e grows by sum d_i |T_ij|.
* Eight bits (format s8): one scale a row, of the whole of it, and codes up to 127. Its Hadamard transform is one mma step and
  three additions: |e| <= (17 + 4) u |x|_1 / sqrt(128); 14 u, for the shift that it does not have, is left in.
* A scale is off by at most clip / 7 times the largest e of its group, and 4 u of itself.
* RMSNorm with a dense transform, many rows, Hopper: all cases share one board (quantize_dense_sm90.cu).
* A Hadamard transform is checked both ways: as butterflies, and as the product with a shared matrix, which the operators choose
  for some shapes (quantize_configs.product_is_faster).
* With sixteen levels (transform "feedback16") a scale has the other sign than the value of largest magnitude, or than one that is
  as large within e. Its largest code is -8, and what is said of clip / 7 is said of the block's clip / 8.
* With error feedback (transforms "feedback" and "feedback16") a code that rounds the other way moves all that follow. So the values that a step has
  to round are worked out from the kernel's own codes of the steps before, and what those may be off by goes on, times |G|.
* A residual is added first: the sum, rounded to 16 bits, is stored bit for bit as torch rounds it, and is what is normalised.
* NaN in a group makes its scale NaN, infinity makes it not finite. Nothing but codes and scales of the m rows is written.

tests/gpu/test_quantize.py runs all cases on a GPU, tests/kernels/quantize/test_quantize_kernels.py some on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch

from apex4_quant.format.feedback import block_clips_of, clip_row, feedback_of, pack_feedback, step_order, transform_of
from apex4_quant.format.number_format import (
    ACTIVATION_SCALE_MIN,
    BLOCK,
    CODE_MAX,
    SIXTEENTH_CODE,
    STEP_COLUMNS,
    TOKEN_CODE_MAX,
    GroupSize,
    group_length,
    padded_in_features,
    round_up,
)
from apex4_quant.kernels.hadamard import hadamard_128
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.quantize.configs import FEEDBACKS, INPUTS, NORMS, board_bytes, dense_adds, prepack_matrix
from apex4_quant.kernels.quantize.launch import most_between_bytes, run_quantize
from apex4_quant.transforms.error_feedback import feedback_by_moments
from apex4_quant.transforms.learned_transform import storable

U = 2.0**-24
BUTTERFLY_ERROR, TENSOR_CORE_ERROR, MMA_STEP_ERROR = 8 * U, 136 * U, 17 * U
QUOTIENT_ERROR, SHIFT_ERROR = 4 * U, 14 * U
SCALE_ERROR = 4 * U
RMS_NORM_ERROR, SILU_ERROR, SILU_UNDERFLOW = 2.0**-19, 2.0**-20, 1e-36
EPS = 1e-5
POISON, GUARD = 0xA5, 64
BLOCK_CLIPS = (1.0, 1.0546875, 0.875)  # of eight bits: both 16-bit types hold them
LARGE_GPU = 132  # multiprocessors
MOST_UNDECIDED = 0.03  # of the codes: with more near ties than that a check would say little
MOST_UNDECIDED_WITH_FEEDBACK = 0.25  # bounds add up from step to step, which errors hardly do
# An input that may be rounded either way moves all codes of its block, a large part of a short row: of rows of 200 drawn
# on a CPU, 22 of 2500 (RMSNorm, bfloat16) and 32 of 1500 (SiLU) had more than 3 % undecided, up to 18 %; of rows of 128 one
# of 800 had 36 %. Such codes are compared all the same, within those bounds.
FEW_CODES, MOST_UNDECIDED_OF_FEW = 1024, 0.5
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    m: int
    k: int
    group: GroupSize = 128
    input: str = "plain"
    transform: str = "hadamard"
    dtype: str = "bfloat16"
    format: str = "sm80"
    clip: float = 1.0
    gain_offset: bool = False
    padding: int = 0  # ldx - k
    offset: int = 0  # of the first element of x, in elements: 1 is unaligned
    data: str = "normal"  # extreme, zero, nan, infinity, ties
    shared_matrix: bool = False  # dense: the Hadamard matrix through the tensor cores
    sm_90: bool = False  # s8, on a CPU: the kernels of Hopper
    seed: int = 0

    @property
    def code_max(self) -> int:
        return TOKEN_CODE_MAX if self.format == "s8" else CODE_MAX

    @property
    def has_feedback(self) -> bool:
        return self.transform in FEEDBACKS[1:]

    @property
    def label(self) -> str:
        """The test's id: sizes, kinds, and what is not as usual; without the seed."""
        head = f"{self.input} {self.transform} {self.dtype} {self.format} {self.m} x {self.k} group {self.group}"
        unusual = {field.name: getattr(self, field.name) for field in fields(self)[7:-1]}
        usual = {field.name: field.default for field in fields(self)}
        return " ".join([head, *(f"{name} {value}" for name, value in unusual.items() if value != usual[name])])


# ---- operands -------------------------------------------------------------------------------------------------------


def _draw(case: Case, generator: torch.Generator) -> torch.Tensor:
    shape, on = (case.m, case.k), {"generator": generator, "device": generator.device}
    if case.data == "zero":
        return torch.zeros(shape, device=generator.device)
    if case.data == "extreme":
        return torch.randint(0, 2, shape, **on).float() * 2 - 1
    if case.data == "ties":  # half-integers times a step that is no power of two
        x = torch.randint(-2 * case.code_max, 2 * case.code_max + 1, shape, **on) / 2
        x[:, ::BLOCK] = case.code_max
        bits = (4 if case.dtype == "bfloat16" else 7) - (4 if case.format == "s8" else 0)  # the products are exact
        return x * (torch.randint(min(3, (1 << bits) // 2 + 1), (1 << bits) + 1, (case.m, 1), **on) / 32)
    x = torch.randn(shape, **on)
    x[:, ::37] *= 20  # outlier channels
    x *= 10.0 ** (torch.rand(case.m, 1, **on) * 3 - 2)
    if case.data in ("nan", "infinity"):
        x[case.m // 2, case.k // 2] = float("nan") if case.data == "nan" else float("inf")
    return x


def _strided(values: torch.Tensor, case: Case, device: torch.device) -> torch.Tensor:
    """`values` in memory as `case` wants it: row stride and alignment; poison between the rows."""
    m, k = values.shape
    ld = k + case.padding
    storage = torch.full((case.offset + m * ld,), float("nan"), dtype=DTYPES[case.dtype], device=device)
    view = storage.as_strided((m, k), (ld, 1), case.offset)
    view.copy_(values)
    return view


@dataclass
class Operands:
    x: torch.Tensor
    second: torch.Tensor | None
    matrix: (
        torch.Tensor | None
    )  # [KB or 1, 128, 128], with feedback [KB, 184, 128] or [KB, 185, 128], exact in both 16-bit types
    factor: float
    residual: torch.Tensor | None = None


def make_operands(case: Case, device: torch.device) -> Operands:
    generator = torch.Generator(device).manual_seed(case.seed)
    x, second, matrix, factor = _draw(case, generator), None, None, 1.0

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if case.input == "silu_mul":
        second = _strided(normal(case.m, case.k), case, device)
    elif case.input in NORMS:
        gain = normal(1, case.k) * 0.3 + (0 if case.gain_offset else 1)
        second = _strided(gain, replace(case, padding=0), device)[0]
    if case.transform == "dense":
        if case.shared_matrix:
            matrix = torch.where(hadamard_128(torch.float32, device) > 0, 1.0, -1.0)[None]
            factor = BLOCK**-0.5
        else:
            matrix = storable(normal(padded_in_features(case.k, case.group) // BLOCK, BLOCK, BLOCK))
    if case.has_feedback:
        blocks = padded_in_features(case.k, case.group) // BLOCK
        amplifying = normal(blocks, 200, BLOCK) @ (
            torch.eye(BLOCK, device=device) + 0.04 * normal(blocks, BLOCK, BLOCK)
        )
        feedback = pack_feedback(feedback_by_moments((amplifying.transpose(1, 2) @ amplifying).double()))
        matrix = torch.cat((storable(normal(blocks, BLOCK, BLOCK)), feedback), 1)
    if case.transform == "feedback16":
        clips = torch.tensor(BLOCK_CLIPS, device=device).repeat(-(-len(matrix) // len(BLOCK_CLIPS)))[: len(matrix)]
        matrix = torch.cat((matrix, clip_row(clips)), 1)
    residual = _strided(normal(case.m, case.k), case, device) if case.input == "add_rms_norm" else None
    return Operands(_strided(x, case, device), second, matrix, factor, residual)


_boards: dict[torch.device, torch.Tensor] = {}


def board(m: int, device: torch.device) -> torch.Tensor:
    """For kernels that need one: the same for all cases, as a stream's is for all its launches."""
    if device not in _boards or _boards[device].numel() < board_bytes(m):
        _boards[device] = torch.zeros(board_bytes(max(m, 2048)), dtype=torch.uint8, device=device)
    return _boards[device]


def run(case: Case, operands: Operands) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Codes as stored [KB, m_stride, bytes] and scales [G, m_stride], and what was written that should not have been."""
    x, device = operands.x, operands.x.device
    k_padded, group = padded_in_features(case.k, case.group), group_length(case.k, case.group)
    k_blocks, groups, m_stride = k_padded // BLOCK, k_padded // group, round_up(case.m, 16)
    row_bytes = {"sm80": 64, "sm90": 128, "s8": 128}[case.format]
    poisoned = torch.full((GUARD + k_blocks * m_stride * row_bytes + GUARD,), POISON, dtype=torch.uint8, device=device)
    poisoned_scales = torch.full((GUARD + 4 * groups * m_stride + GUARD,), POISON, dtype=torch.uint8, device=device)
    codes, scales = poisoned[GUARD:-GUARD], poisoned_scales[GUARD:-GUARD]
    matrix = None if operands.matrix is None else prepack_matrix(operands.matrix, x.dtype)
    between = torch.full((most_between_bytes(case.m, k_blocks) // 4,), float("nan"), dtype=torch.float32, device=device)
    adds = operands.residual is not None
    poisoned_total = torch.full((GUARD + case.m * case.k + GUARD,), float("nan"), dtype=x.dtype, device=device)
    total = poisoned_total[GUARD:-GUARD]
    ld_second = operands.second.stride(0) if case.input == "silu_mul" else operands.residual.stride(0) if adds else 0
    on_gpu = device.type == "cuda"
    run_quantize(
        device.index or 0,
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        x=x.data_ptr(),
        m=case.m,
        k=case.k,
        k_blocks=k_blocks,
        m_stride=m_stride,
        ldx=x.stride(0),
        dtype=case.dtype,
        format=case.format,
        stream=torch.cuda.current_stream(device).cuda_stream if on_gpu else 0,
        sm_count=torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4,
        blocks_per_group=group // BLOCK,
        transform=case.transform,
        clip=case.clip,
        input=case.input,
        second=0 if operands.second is None else operands.second.data_ptr(),
        ld_second=ld_second,
        residual=operands.residual.data_ptr() if adds else 0,
        total=total.data_ptr() if adds else 0,
        eps=EPS,
        gain_offset=case.gain_offset,
        matrix=0 if matrix is None else matrix.data_ptr(),
        between=between.data_ptr(),
        board=board(case.m, device).data_ptr(),
        matrix_is_shared=case.shared_matrix,
        matrix_factor=operands.factor,
        sm_90=case.sm_90 if not on_gpu else torch.cuda.get_device_capability(device) == (9, 0),
    )
    if on_gpu:
        torch.cuda.synchronize(device)
    codes = codes.view(k_blocks, m_stride, row_bytes)
    bytes_of_scales = scales.view(groups, m_stride, 4)
    outside = {
        "around the codes": (poisoned[:GUARD], poisoned[-GUARD:]),
        "around the scales": (poisoned_scales[:GUARD], poisoned_scales[-GUARD:]),
        "in rows past m": (codes[:, case.m :], bytes_of_scales[:, case.m :]),
    }
    wrong = [
        f"wrote {where}" for where, parts in outside.items() if any(bool((part != POISON).any()) for part in parts)
    ]
    if adds:
        expected = (x + operands.residual).flatten()
        if not bool(((total == expected) | (total.isnan() & expected.isnan())).all()):
            wrong.append("another sum")
        if not bool(torch.cat((poisoned_total[:GUARD], poisoned_total[-GUARD:])).isnan().all()):
            wrong.append("wrote around the sum")
    return codes, scales.view(torch.float32).view(groups, m_stride), wrong


def decode(codes: torch.Tensor, m: int, format: str) -> torch.Tensor:
    """Stored codes [KB, m_stride, bytes] -> int64 [m, KB * 128], by the words of the activation formats alone."""
    k_blocks, _, row_bytes = codes.shape
    byte = index_function(f"{'sm90' if format == 's8' else format}_activation_byte")
    row, chunk, within = torch.arange(m)[:, None, None], torch.arange(row_bytes // 16)[:, None], torch.arange(16)
    where = (byte(row, chunk) + within).flatten(1).to(codes.device)  # [m, bytes], in the order of k
    stored = codes.reshape(k_blocks, -1)[:, where].long()  # [KB, m, bytes]
    if format == "sm80":
        nibbles = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)
        values = torch.where(nibbles > 7, nibbles - 16, nibbles)
    elif format == "s8":
        values = torch.where(stored > 127, stored - 256, stored)
    else:
        magnitude = stored & 0x7F
        values = torch.where(stored > 0x7F, -magnitude, magnitude)
        values[stored == 0x80] = -100  # a negative zero must not occur
    return values.permute(1, 0, 2).reshape(m, -1)


# ---- what is expected -----------------------------------------------------------------------------------------------


def staged(case: Case, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the transform float64 [m, k], as the unfused modules round it, and how far the kernel's may be off."""
    x, dtype = operands.x.double(), operands.x.dtype
    if operands.residual is not None:
        x = (operands.x + operands.residual).double()
    if case.input == "plain":
        return x, torch.zeros_like(x)
    second = operands.second.double()
    if case.input == "silu_mul":
        exact = x * torch.sigmoid(x)
        error = SILU_ERROR * exact.abs() + SILU_UNDERFLOW
    else:
        exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        error = RMS_NORM_ERROR * exact.abs()

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype).double()  # once: float64 to 16 bits

    def finished(value: torch.Tensor) -> torch.Tensor:
        if case.input in NORMS and case.gain_offset:
            return rounded(value * (1 + second))
        return rounded(rounded(value) * second)

    if case.input in NORMS and case.gain_offset:
        error = error * 2  # 1 + gain and the product are rounded to float32, too
    low, high = finished(exact - error), finished(exact + error)
    return finished(exact), (high - low).abs()


def transformed(
    case: Case, operands: Operands, x: torch.Tensor, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """t float64 [m, K padded] and a bound of the kernel's |t' - t|."""
    padded_k = padded_in_features(case.k, case.group)
    x, error = (torch.nn.functional.pad(each, (0, padded_k - case.k)) for each in (x, error))
    if case.transform == "none":
        return x, error
    x, error = (each.unflatten(-1, (-1, BLOCK)).transpose(0, 1) for each in (x, error))  # [KB, m, 128]
    if case.transform == "hadamard":
        matrix = hadamard_128(torch.float64, x.device)[None]
        own = BUTTERFLY_ERROR if case.format != "s8" else MMA_STEP_ERROR + BUTTERFLY_ERROR / 2
    else:
        matrix, own = transform_of(operands.matrix.double()) * operands.factor, TENSOR_CORE_ERROR
    matrix = matrix.expand(len(x), BLOCK, BLOCK)
    bound = own * (x.abs() @ matrix.abs()) + error @ matrix.abs()
    return tuple(each.transpose(0, 1).flatten(1) for each in (x @ matrix, bound))


def compare(case: Case, operands: Operands, codes: torch.Tensor, scales: torch.Tensor) -> list[str]:
    """What is wrong with the codes int64 [m, K padded] and scales float32 [m, G] of a case."""
    wrong, code_max = [], case.code_max
    group = group_length(case.k, case.group)
    t, bound = (each.unflatten(-1, (-1, group)) for each in transformed(case, operands, *staged(case, operands)))
    absmax = t.abs().amax(-1)
    bad = ~torch.isfinite(absmax)
    if bool(torch.isfinite(scales[bad]).any()):
        wrong.append("a scale is finite where the input is not")
    if case.data == "nan" and not bool(torch.isnan(scales[torch.isnan(absmax)]).all()):
        wrong.append("a scale is not NaN where the input is")
    clips = None if operands.matrix is None else block_clips_of(operands.matrix.double())
    share, lowest, size = case.clip / code_max, -code_max, scales
    if clips is not None:
        share, lowest, size = clips / -SIXTEENTH_CODE, SIXTEENTH_CODE, scales.abs()
        # What a scale's sign says to be the largest: that of the values of the other sign.
        named = torch.where(scales > 0, (-t).amax(-1), t.amax(-1))
        if bool(((named < absmax - 2 * bound.amax(-1)) & ~bad).any()):
            wrong.append("a scale has the wrong sign")
    expected = (share * absmax).clamp_min(ACTIVATION_SCALE_MIN)
    tolerance = share * bound.amax(-1) + SCALE_ERROR * expected
    off = ~((size.double() - expected).abs() <= tolerance) & ~bad
    if bool(off.any()):
        worst = float(((size.double() - expected).abs() / expected)[off].max())
        wrong.append(f"{int(off.sum())} scales of {off.numel()} are off, by up to {worst:.3g} of themselves")
    codes = codes.unflatten(-1, (-1, group))
    fine = ~bad[..., None].expand_as(codes)
    found = codes[fine]
    if found.numel() and not lowest <= int(found.min()) <= int(found.max()) <= code_max:
        wrong.append("a code is too large or a negative zero")
    scale = scales.double()[..., None]
    exact = t / scale
    if case.transform == "none":  # what the kernel computes, but of values that may be off by `bound`
        exact = (t.float() / scales[..., None]).double()
        near = torch.where(bound > 0, bound / scale, -1.0)
    else:
        near = bound / scale.abs() + QUOTIENT_ERROR * exact.abs() + SHIFT_ERROR
    if case.has_feedback:
        exact, near = _with_feedback(case, operands, exact, near, codes)
    ideal = torch.round(exact).clamp(lowest, code_max)
    inside = (exact > lowest - 0.5) & (exact < code_max + 0.5)
    undecided = ((exact - torch.floor(exact) - 0.5).abs() <= near) & inside
    difference = (codes.double() - ideal).abs()
    unequal = fine & (difference > 0) & ~undecided
    if case.input != "plain":  # an input of another rounding may be a whole code away
        unequal &= difference > near + 0.5
        undecided = undecided & (near < 0.5)
    if bool(unequal.any()):
        where = tuple(int(i) for i in unequal.nonzero()[0])
        wrong.append(
            f"{int(unequal.sum())} codes of {codes.numel()} are wrong, first at row, group, element {where}: "
            f"{int(codes[where])}, exactly {float(exact[where]):.6f}"
        )
    if bool((fine & (difference > 1) & (near < 1)).any()):
        wrong.append("a code is off by more than one")
    most = MOST_UNDECIDED_WITH_FEEDBACK if case.has_feedback else MOST_UNDECIDED
    if case.input != "plain" and case.transform != "none" and codes.numel() < FEW_CODES:
        most = MOST_UNDECIDED_OF_FEW
    if case.data == "normal" and float(undecided.double().mean()) > most:
        wrong.append(f"{float(undecided.double().mean()):.1%} of the codes are too near to a tie to say")
    return wrong


def _with_feedback(
    case: Case, operands: Operands, units: torch.Tensor, near: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values in units of the scale [m, KB, 128], which may be off by `near`, those that a kernel with these codes had to round,
    and how far they may be off. Errors of a step are rounded to 16 bits; where that may go either way, both are possible."""
    feedback, order = feedback_of(operands.matrix.double()), step_order(units.device)
    values, bound, codes = (each[..., order].double().clone() for each in (units, near, codes))

    def rounded(errors: torch.Tensor) -> torch.Tensor:
        return errors.to(DTYPES[case.dtype]).double()

    for start in range(BLOCK - STEP_COLUMNS, 0, -STEP_COLUMNS):
        step = slice(start, start + STEP_COLUMNS)
        errors, off = codes[..., step] - values[..., step], bound[..., step] + SHIFT_ERROR
        to_left = feedback[:, step, :start]
        values[..., :start] += torch.einsum("mbi,bij->mbj", rounded(errors), to_left)
        apart = rounded(errors + off) - rounded(errors - off)
        sums = torch.einsum("mbi,bij->mbj", errors.abs(), to_left.abs())
        bound[..., :start] += torch.einsum("mbi,bij->mbj", apart, to_left.abs()) + MMA_STEP_ERROR * sums
    back = torch.argsort(order)
    return values[..., back], bound[..., back] + SHIFT_ERROR


def check(case: Case, device: torch.device) -> list[str]:
    """What is wrong, in words; nothing if the case passes."""
    operands = make_operands(case, device)
    stored, scales, wrong = run(case, operands)
    return wrong + compare(case, operands, decode(stored, case.m, case.format), scales[:, : case.m].t())


# ---- the list -------------------------------------------------------------------------------------------------------


def cases(quick: bool, seed: int) -> Iterator[Case]:
    return filter(_is_one_quantizer, _listed(quick, seed))


def _is_one_quantizer(case: Case) -> bool:
    """Of many rows of a norm on Hopper the kernel with a dense transform adds nothing."""
    if case.input != "add_rms_norm" or case.transform != "dense":
        return True
    sizes = case.m, padded_in_features(case.k, case.group) // BLOCK
    aligned = (case.k + case.padding) % 8 == case.k % 8 == case.offset % 8 == 0
    return dense_adds(*sizes, aligned=aligned, format=case.format, sm_count=LARGE_GPU)


def _listed(quick: bool, seed: int) -> Iterator[Case]:
    rows = (1, 3, 100) if quick else (1, 3, 16, 100, 2048)
    widths = (200, 4096) if quick else (128, 200, 4096, 11008, 14336)
    number = seed
    for format in ("sm80", "sm90", "s8"):
        for dtype in DTYPES:
            for input in INPUTS:
                for transform in ("none", "hadamard", "dense", *FEEDBACKS[1:]):
                    if transform in FEEDBACKS[1:] and format == "s8":
                        continue
                    base = Case(1, 1, format=format, dtype=dtype, input=input, transform=transform)
                    dense = transform in ("dense", *FEEDBACKS[1:])
                    groups: tuple[GroupSize, ...] = (128,) if dense else (128, 256, "channel")
                    if format == "s8":  # a group is a row
                        base, groups = replace(base, group="channel"), ("channel",)
                    for k in widths:
                        for m in rows:
                            for group in groups:
                                number += 1
                                clip = 1.0 if format == "s8" or transform == "feedback16" else (1.0, 0.9)[number % 2]
                                yield replace(base, m=m, k=k, group=group, clip=clip, seed=number)
                    number += 1
                    small = replace(base, m=37, k=1000, seed=number)
                    yield from (replace(small, data=data) for data in ("extreme", "zero", "nan", "infinity", "ties"))
                    yield replace(small, padding=24)
                    yield replace(small, padding=1)
                    yield replace(small, padding=8, offset=1)
                    yield replace(small, k=333)
                    if input in NORMS:
                        yield replace(small, gain_offset=True)
                        yield replace(small, gain_offset=True, k=4096, m=700)
                        yield replace(small, k=1000, m=2100)
                    if not dense:  # rows longer than a CTA holds
                        yield replace(small, m=5, k=20000, group="channel")
                        yield replace(small, m=5, k=53248, group="channel")
                        if format != "s8":
                            yield replace(small, m=9, k=2944, group=384)
                    elif transform == "dense":
                        yield replace(small, shared_matrix=True)
                        yield replace(small, shared_matrix=True, m=1000, k=8192)
                        if input == "rms_norm":
                            yield replace(small, shared_matrix=True, m=5000, k=4096, gain_offset=True)
                    if format == "s8":  # few rows that CTAs share, and more of them than there are CTAs
                        yield from (
                            replace(small, m=m, k=k) for m, k in ((1, 28672), (13, 12288), (600, 28672), (9000, 256))
                        )
                        yield from (
                            replace(small, m=m, k=4096, data=data) for m in (2, 300) for data in ("nan", "ties")
                        )
