"""Quantized activations as the kernels exchange them: three formats, `sm80`, `sm90` and `s8`, all written out in PyTorch.

    codes   uint8    [K / 128, m_stride, 64 (sm80) or 128 (sm90, s8)]     m_stride = M rounded up to 16
    scales  float32  [G, m_stride]

`sm80` holds two two's-complement nibbles a byte, k even in the low one; `sm90` one byte a code, sign (bit 7) and
magnitude. `s8` holds 8-bit activations, one two's-complement byte each, with one scale a token: G is 1. A row's 16-byte chunks
are permuted as index.cuh says, those of `s8` as those of `sm90`. Rows from M on are padding and may hold anything.

Codes of `s8` are multiplied by folded weights (folding.py): their operands are `weight_packed` in the layout `sm90`, in the place
of `weight_scale` the ratio, int16 of the same shape and order, and `weight_unit`, float32 [tiles * 64], n in plain order.

The `require_` functions are what the operators of ops.py ask of their operands, on every device and when they are traced: a
kernel reads memory by the shapes that it is told.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch

from ..errors import Apex4Error
from ..format.layout_name import KERNEL_TILE_N
from ..format.layouts import S8, Layout, get_layout
from ..format.number_format import BLOCK, CLIP_ROWS, FEEDBACK_ROWS, LARGEST_K_OF_TOKENS, round_up
from .folding import fold
from .index import index_function

Operands: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # codes and scales

GROUPED_FORMATS = ("sm80", "sm90")  # of 4-bit activations: a scale for each token and group
TOKEN_FORMAT = "s8"  # of 8-bit activations: a scale for each token
FORMATS = (*GROUPED_FORMATS, TOKEN_FORMAT)
HALVES = (torch.bfloat16, torch.float16)  # the dtypes of inputs that kernels read
CHUNK = 16  # bytes
ROW_BYTES = {"sm80": BLOCK // 2, "sm90": BLOCK, "s8": BLOCK}


def format_of_codes(codes: torch.Tensor, unit: torch.Tensor | None) -> str:
    """The format of a codes tensor, from the bytes of its rows, and from whether the weights have units."""
    if unit is not None:
        return TOKEN_FORMAT
    return "sm80" if codes.shape[2] == ROW_BYTES["sm80"] else "sm90"


def layout_of_format(format: str) -> Layout:
    """In which the weights lie that codes of this format are multiplied by."""
    return S8 if format == TOKEN_FORMAT else get_layout(format)


def fold_scales(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 scales [N, G] -> the operands `weight_scale`, a ratio int16, and `weight_unit` float32 of the format `s8`."""
    ratio, unit = fold(scale)
    layout = layout_of_format(TOKEN_FORMAT)
    padding = layout.padded_out_features(len(unit)) - len(unit)
    return layout.pack_scales(ratio), torch.nn.functional.pad(unit, (0, padding))


def row_stride(rows: int) -> int:
    """m_stride. Plain arithmetic, so that it can be traced with a symbolic number of rows."""
    return (rows + 15) // 16 * 16


def empty_operands(
    x: torch.Tensor, matrix: torch.Tensor | None, k_padded: int, group: int, clip: float, hadamard: bool, format: str
) -> Operands:
    """Room for the codes and scales of x [M, K]. The arguments behind x are the operators'."""
    m_stride = row_stride(x.shape[0])
    codes = x.new_empty((k_padded // BLOCK, m_stride, ROW_BYTES[format]), dtype=torch.uint8)
    return codes, x.new_empty((k_padded // group, m_stride), dtype=torch.float32)


def _places(m_stride: int, format: str) -> torch.Tensor:
    """int64 [m_stride * chunks]: where in a block, in chunks, chunk c of row m stands."""
    rows, chunks = torch.arange(m_stride)[:, None], torch.arange(ROW_BYTES[format] // CHUNK)
    name = "sm80" if format == "sm80" else "sm90"
    places: torch.Tensor = index_function(f"{name}_activation_byte")(rows, chunks) // CHUNK
    return places.flatten()


def pack_activations(codes: torch.Tensor, scales: torch.Tensor, format: str) -> Operands:
    """Integer codes [M, K] and float32 scales [M, G] -> the two operands in `format`. Padding is zero."""
    rows, k = codes.shape
    m_stride = round_up(rows, 16)
    blocks = torch.nn.functional.pad(codes.to(torch.int8), (0, 0, 0, m_stride - rows))
    blocks = blocks.reshape(m_stride, k // BLOCK, BLOCK).transpose(0, 1)
    if format == "sm80":
        nibbles = (blocks & 0xF).to(torch.uint8)
        stored = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    elif format == TOKEN_FORMAT:
        stored = blocks.contiguous().view(torch.uint8)
    else:
        stored = torch.where(blocks < 0, 0x80, 0).to(torch.uint8) | blocks.abs().to(torch.uint8)
    chunks = stored.reshape(k // BLOCK, m_stride * ROW_BYTES[format] // CHUNK, CHUNK)
    placed = torch.empty_like(chunks)
    placed[:, _places(m_stride, format).to(codes.device)] = chunks
    padded = torch.nn.functional.pad(scales, (0, 0, 0, m_stride - rows))
    return placed.reshape(k // BLOCK, m_stride, ROW_BYTES[format]), padded.t().contiguous()


def unpack_activations(
    codes: torch.Tensor, scales: torch.Tensor, rows: int, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `pack_activations`: int8 [rows, K] and float32 [rows, G]."""
    blocks, m_stride, _ = codes.shape
    chunks = codes.reshape(blocks, m_stride * ROW_BYTES[format] // CHUNK, CHUNK)
    chunks = chunks[:, _places(m_stride, format).to(codes.device)]
    stored = chunks.reshape(blocks, m_stride, ROW_BYTES[format])[:, :rows]
    if format == "sm80":
        signed = stored.view(torch.int8)
        values = torch.stack((signed << 4 >> 4, signed >> 4), -1).flatten(-2)
    elif format == TOKEN_FORMAT:
        values = stored.view(torch.int8)
    else:
        magnitude = (stored & 0x7F).to(torch.int8)
        values = torch.where(stored >= 0x80, -magnitude, magnitude)
    return values.transpose(0, 1).reshape(rows, blocks * BLOCK), scales[:, :rows].t()


# ---- what operators ask of their operands ----------------------------------------------------------------------------

WEIGHT_TILE_BYTES = KERNEL_TILE_N * BLOCK // 2  # of 64 output features of one block of 128 input features
# Rows of a block's matrix as it is stored, by what lies behind it: FEEDBACKS of quantize/configs.py.
_ROWS = {"": BLOCK, "feedback": BLOCK + FEEDBACK_ROWS, "feedback16": BLOCK + FEEDBACK_ROWS + CLIP_ROWS}
MATRIX_ROWS = tuple(_ROWS.values())


def feedback_of_matrix(matrix: torch.Tensor | None) -> str:
    """ "feedback" where error feedback lies behind the matrix of every block, "feedback16" where a clip ratio does too, else "".

    Prepacked matrices are [..., 128 rows], stored ones [..., rows, 128].
    """
    if matrix is None or matrix.dim() < 2:
        return ""
    width = matrix.shape[-1]
    rows = matrix.shape[-2] if width == BLOCK else width // BLOCK
    if rows == MATRIX_ROWS[1]:
        return "feedback"
    return "feedback16" if rows == MATRIX_ROWS[2] else ""


def _refuse(operator: str, argument: str, got: object, needed: str) -> NoReturn:
    raise Apex4Error(f"apex4.{operator}: {argument} is {got}, and {needed} is needed")


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def require_quantizer(
    operator: str, kernels: bool, x: torch.Tensor, matrix: torch.Tensor | None, k_padded: int, group: int, clip: float,
    hadamard: bool, format: str, *, gain: torch.Tensor | None = None, up: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Raise Apex4Error, naming operator and argument, if x cannot be quantized so.

    `kernels`: by kernels, on a GPU, which read less than PyTorch operations do. `gain` and `up`: what is fused with it.
    """
    shape = x.shape
    if len(shape) != 2:
        _refuse(operator, "the input's shape", list(shape), "[M, K]")
    k = shape[1]
    if format not in FORMATS:
        _refuse(operator, "format", repr(format), f"one of {', '.join(FORMATS)}")
    if group < BLOCK or group % BLOCK:
        _refuse(operator, "group", group, f"a multiple of {BLOCK}")
    if k_padded < k or k_padded < group or k_padded % group:
        _refuse(
            operator, "k_padded", k_padded, f"a multiple of the group's {group} that holds the input's {k} features"
        )
    if not clip > 0:
        _refuse(operator, "clip", clip, "more than 0")
    if format == TOKEN_FORMAT:
        if group != k_padded:
            _refuse(operator, "group", group, f"k_padded, {k_padded}, with the format {TOKEN_FORMAT}")
        if clip != 1:
            _refuse(operator, "clip", clip, f"1 with the format {TOKEN_FORMAT}")
        if k_padded > LARGEST_K_OF_TOKENS:
            _refuse(operator, "k_padded", k_padded, f"at most {LARGEST_K_OF_TOKENS} with the format {TOKEN_FORMAT}")
    if kernels and x.dtype not in HALVES:
        _refuse(operator, "the input's dtype", x.dtype, "bfloat16 or float16")
    if gain is not None:
        _require(operator, "gain", gain, x, x.dtype, (k,))
    if up is not None and (up.shape != shape or up.dtype != x.dtype or up.get_device() != x.get_device()):
        _refuse(operator, "up", _described(up), f"{_described(x)} beside the gate, as that is,")
    if matrix is not None:
        feedback = feedback_of_matrix(matrix)
        if feedback and (group != BLOCK or format == TOKEN_FORMAT):
            _refuse(
                operator, "group", group, f"{BLOCK}, and a format of 4-bit activations, with a matrix that has feedback"
            )
        if clip != 1 and feedback == "feedback16":
            _refuse(operator, "clip", clip, "1 with a matrix that has the clip ratio of every block")
        prepacked = kernels and (group == BLOCK or format == TOKEN_FORMAT)
        _require_matrix(operator, matrix, x, k_padded // BLOCK, prepacked)


def require_add_rms_norm_linear(
    kernels: bool,
    x: torch.Tensor,
    residual: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    gain_offset: float,
    *rest: Any,
) -> None:
    """Raise Apex4Error for what `add_rms_norm_linear` cannot read; its arguments."""
    operator = "add_rms_norm_linear"
    require_quantizer(operator, kernels, x, *rest[-6:], gain=gain)
    require_weights(operator, x, *rest)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.get_device() != x.get_device():
        _refuse(operator, "residual", _described(residual), f"{_described(x)} beside x, as that is,")


def _require(
    operator: str, argument: str, tensor: torch.Tensor, beside: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:  # fmt: skip
    if (
        tensor.shape != shape or tensor.dtype != dtype or tensor.get_device() != beside.get_device()
        or not tensor.is_contiguous()
    ):  # fmt: skip
        _refuse(operator, argument, _described(tensor), f"{dtype} {list(shape)} without gaps, beside the input,")


def _require_matrix(operator: str, matrix: torch.Tensor, x: torch.Tensor, blocks: int, prepacked: bool) -> None:
    feedback = feedback_of_matrix(matrix)
    rows = _ROWS[feedback]
    if not prepacked:
        _require(operator, "matrix", matrix, x, matrix.dtype, (blocks, rows, BLOCK))
    else:  # one for all blocks, or one for each
        count = 1 if len(matrix) == 1 and not feedback else blocks
        _require(operator, "matrix", matrix, x, x.dtype, (count, rows * BLOCK))


class _Weights(NamedTuple):
    """Weights that were found to belong together, and with what."""

    packed: weakref.ref[torch.Tensor]
    scale: weakref.ref[torch.Tensor]
    unit: weakref.ref[torch.Tensor] | None
    bias: weakref.ref[torch.Tensor] | None
    n: int
    k_padded: int
    group: int
    format: str
    device: int


_found_right: dict[int, _Weights] = {}  # by the id of weight_packed, as long as that lives


def require_weights(
    operator: str, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, n: int, matrix: torch.Tensor | None, k_padded: int, group: int, clip: float, hadamard: bool,
    format: str,
) -> None:  # fmt: skip
    """Raise Apex4Error if the weights do not belong to such an input, or have fewer than `n` outputs.

    A model calls with the same tensors again and again: what was found right of them is not looked at again.
    """
    found = _found_right.get(id(packed))
    if (
        found is not None
        and found.packed() is packed
        and found.scale() is scale
        and _is(found.unit, unit)
        and _is(found.bias, bias)
        and found[4:] == (n, k_padded, group, format, packed.get_device())
        and found.device == x.get_device()
    ):
        return
    if (format == TOKEN_FORMAT) != (unit is not None):
        given = "None" if unit is None else "given"
        _refuse(operator, "weight_unit", given, f"{'a unit' if unit is None else 'None'} with the format {format}")
    _require_weights(operator, x, packed, scale, unit, bias, n, k_padded // BLOCK, k_padded // group)
    if type(x) is torch.Tensor:  # and no stand-in of a trace
        key = id(packed)
        gone = weakref.ref(packed, lambda _: _found_right.pop(key, None))
        of_unit, of_bias = (None if tensor is None else weakref.ref(tensor) for tensor in (unit, bias))
        _found_right[key] = _Weights(
            gone, weakref.ref(scale), of_unit, of_bias, n, k_padded, group, format, packed.get_device()
        )


def _is(kept: weakref.ref[torch.Tensor] | None, tensor: torch.Tensor | None) -> bool:
    return tensor is None if kept is None else kept() is tensor


def _require_weights(
    operator: str, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor | None,
    bias: torch.Tensor | None, n: int, blocks: int, groups: int,
) -> None:  # fmt: skip
    tiles = packed.shape[0] if packed.dim() else 0
    _require(operator, "weight_packed", packed, x, torch.uint8, (tiles, blocks, WEIGHT_TILE_BYTES))
    if unit is None:
        _require(operator, "weight_scale", scale, x, torch.float16, (tiles, groups, KERNEL_TILE_N))
    else:  # the ratio, of groups that the activations do not have
        groups = scale.shape[1] if scale.dim() == 3 else 0
        if groups < 1 or blocks % groups:
            needed = f"torch.int16 [{tiles}, groups of {blocks} blocks, {KERNEL_TILE_N}] with a weight_unit"
            _refuse(operator, "weight_scale", _described(scale), needed)
        _require(operator, "weight_scale", scale, x, torch.int16, (tiles, groups, KERNEL_TILE_N))
        _require(operator, "weight_unit", unit, x, torch.float32, (tiles * KERNEL_TILE_N,))
    if not 0 < n <= tiles * KERNEL_TILE_N:
        _refuse(operator, "n", n, f"1 to the {tiles * KERNEL_TILE_N} outputs of weight_packed")
    if bias is not None:
        _require(operator, "bias", bias, x, torch.float32, (n,))


def require_gemm(
    operator: str, codes: torch.Tensor, scales: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor,
    unit: torch.Tensor | None, bias: torch.Tensor | None, m: int, n: int,
) -> None:  # fmt: skip
    """Raise Apex4Error if these are no operands of m tokens and weights of n outputs that belong together."""
    shape, groups = codes.shape, scales.shape[0] if scales.dim() else 0
    row_bytes = tuple(ROW_BYTES.values()) if unit is None else (ROW_BYTES[TOKEN_FORMAT],)
    if len(shape) != 3 or shape[2] not in row_bytes or codes.dtype != torch.uint8 or not codes.is_contiguous():
        needed = f"torch.uint8 [K / {BLOCK}, rows, {' or '.join(map(str, dict.fromkeys(row_bytes)))}] without gaps"
        _refuse(operator, "codes", _described(codes), needed)
    blocks, rows, _ = shape
    if unit is not None and blocks * BLOCK > LARGEST_K_OF_TOKENS:
        _refuse(operator, "codes", _described(codes), f"K of at most {LARGEST_K_OF_TOKENS} with a weight_unit")
    if groups < 1 or blocks % groups or (unit is not None and groups != 1):
        needed = "1" if unit is not None else f"groups of {blocks} blocks"
        _refuse(operator, "scales", _described(scales), f"torch.float32 [{needed}, {rows}]")
    _require(operator, "scales", scales, codes, torch.float32, (groups, rows))
    if type(codes) is torch.Tensor and not 0 <= m <= rows:  # in a trace both may be symbols
        _refuse(operator, "m", m, f"0 to the {rows} rows of codes")
    group = blocks // groups * BLOCK
    require_weights(
        operator,
        codes,
        packed,
        scale,
        unit,
        bias,
        n,
        None,
        blocks * BLOCK,
        group,
        1.0,
        False,
        format_of_codes(codes, unit),
    )
