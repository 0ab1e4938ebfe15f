"""Quantized activations as the kernels exchange them: two formats, `sm80` and `sm90`, and both written out in PyTorch.

    codes   uint8    [K / 128, m_stride, 64 (sm80) or 128 (sm90)]     m_stride = M rounded up to 16
    scales  float32  [G, m_stride]

`sm80` holds two two's-complement nibbles a byte, k even in the low one; `sm90` one byte a code, sign (bit 7) and
magnitude. A row's 16-byte chunks are permuted as index.cuh says. Rows from M on are padding and may hold anything.

The `require_` functions are what the operators of ops.py ask of their operands, on every device and when they are traced: a
kernel reads memory by the shapes that it is told. What does not depend on the number of rows is checked once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, NoReturn, TypeAlias

import torch

from ..errors import Apex4Error
from ..format.layouts import KERNEL_TILE_N
from ..format.number_format import BLOCK, round_up
from .index import index_function

Operands: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # codes and scales

FORMATS = ("sm80", "sm90")
CHUNK = 16  # bytes
ROW_BYTES = {"sm80": BLOCK // 2, "sm90": BLOCK}


def format_of_codes(codes: torch.Tensor) -> str:
    """The format of a codes tensor, from the bytes of its rows."""
    return "sm80" if codes.shape[2] == ROW_BYTES["sm80"] else "sm90"


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
    return (index_function(f"{format}_activation_byte")(rows, chunks) // CHUNK).flatten()


def pack_activations(codes: torch.Tensor, scales: torch.Tensor, format: str) -> Operands:
    """Integer codes [M, K] and float32 scales [M, G] -> the two operands in `format`. Padding is zero."""
    rows, k = codes.shape
    m_stride = round_up(rows, 16)
    blocks = torch.nn.functional.pad(codes.to(torch.int8), (0, 0, 0, m_stride - rows))
    blocks = blocks.reshape(m_stride, k // BLOCK, BLOCK).transpose(0, 1)
    if format == "sm80":
        nibbles = (blocks & 0xF).to(torch.uint8)
        stored = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    else:
        stored = torch.where(blocks < 0, 0x80, 0).to(torch.uint8) | blocks.abs().to(torch.uint8)
    chunks = stored.reshape(k // BLOCK, m_stride * ROW_BYTES[format] // CHUNK, CHUNK)
    placed = torch.empty_like(chunks)
    placed[:, _places(m_stride, format).to(codes.device)] = chunks
    padded = torch.nn.functional.pad(scales, (0, 0, 0, m_stride - rows))
    return placed.reshape(k // BLOCK, m_stride, ROW_BYTES[format]), padded.t().contiguous()


def unpack_activations(codes: torch.Tensor, scales: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `pack_activations`: int8 [rows, K] and float32 [rows, G]."""
    format = format_of_codes(codes)
    blocks, m_stride, _ = codes.shape
    chunks = codes.reshape(blocks, m_stride * ROW_BYTES[format] // CHUNK, CHUNK)
    chunks = chunks[:, _places(m_stride, format).to(codes.device)]
    stored = chunks.reshape(blocks, m_stride, ROW_BYTES[format])[:, :rows]
    if format == "sm80":
        signed = stored.view(torch.int8)
        values = torch.stack((signed << 4 >> 4, signed >> 4), -1).flatten(-2)
    else:
        magnitude = (stored & 0x7F).to(torch.int8)
        values = torch.where(stored >= 0x80, -magnitude, magnitude)
    return values.transpose(0, 1).reshape(rows, blocks * BLOCK), scales[:, :rows].t()


# ---- what operators ask of their operands ----------------------------------------------------------------------------

WEIGHT_TILE_BYTES = KERNEL_TILE_N * BLOCK // 2  # of 64 output features of one block of 128 input features
MATRIX_ELEMENTS = BLOCK * BLOCK


class _Kind(NamedTuple):
    """What is checked of a tensor once, however often it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: int  # -1: CPU
    dense: bool


def _kind(tensor: torch.Tensor) -> _Kind:
    return _Kind(tensor.shape, tensor.dtype, tensor.get_device(), tensor.is_contiguous())


def _refuse(operator: str, argument: str, got: object, needed: str) -> NoReturn:
    if isinstance(got, torch.Size):
        got = list(got)
    raise Apex4Error(f"apex4.{operator}: {argument} is {got}, and {needed} is needed")


def require_quantizer(
    operator: str, kernels: bool, x: torch.Tensor, matrix: torch.Tensor | None, k_padded: int, group: int, clip: float,
    hadamard: bool, format: str, gain: torch.Tensor | None = None, up: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Raise Apex4Error, naming operator and argument, if x cannot be quantized so. `kernels`: by kernels, on a GPU, which
    read less than PyTorch operations do. `gain` and `up`: what is fused with it."""
    if x.dim() != 2:
        _refuse(operator, "the input's shape", x.shape, "[M, K]")
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype or up.device != x.device):
        _refuse(
            operator,
            "up",
            f"{up.dtype} {list(up.shape)} on {up.device}",
            f"the gate's {x.dtype} {list(x.shape)} on {x.device}",
        )
    check = _check_quantizer if type(x) is torch.Tensor else _check_quantizer.__wrapped__  # shapes may be symbols
    check(
        operator, kernels, x.shape[1], x.dtype, x.get_device(), k_padded, group, clip, format,
        None if matrix is None else _kind(matrix), None if gain is None else _kind(gain),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _check_quantizer(
    operator: str, kernels: bool, k: int, dtype: torch.dtype, device: int, k_padded: int, group: int, clip: float, format: str,
    matrix: _Kind | None, gain: _Kind | None,
) -> None:  # fmt: skip
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
    if kernels and dtype not in (torch.bfloat16, torch.float16):
        _refuse(operator, "the input's dtype", dtype, "bfloat16 or float16")
    if gain is not None and (gain.shape != (k,) or gain.dtype != dtype or gain.device != device or not gain.dense):
        _refuse(operator, "gain", f"{gain.dtype} {list(gain.shape)}", f"{dtype} {[k]} without gaps, beside the input,")
    if matrix is not None:
        if matrix.device != device or not matrix.dense:
            _refuse(operator, "matrix", f"{matrix.dtype} {list(matrix.shape)}", "one without gaps, beside the input,")
        _check_matrix(operator, matrix, k_padded // BLOCK, dtype if kernels and group == BLOCK else None)


def _check_matrix(operator: str, matrix: _Kind, blocks: int, prepacked: torch.dtype | None) -> None:
    """`prepacked`: the dtype in which kernels read it; None: as it is stored."""
    got = f"{matrix.dtype} {list(matrix.shape)}"
    if prepacked is None:
        if matrix.shape != (blocks, BLOCK, BLOCK):
            _refuse(operator, "matrix", got, f"float16 {[blocks, BLOCK, BLOCK]}")
    elif matrix.shape not in ((1, MATRIX_ELEMENTS), (blocks, MATRIX_ELEMENTS)) or matrix.dtype != prepacked:
        _refuse(operator, "matrix", got, f"{prepacked} [1 or {blocks}, {MATRIX_ELEMENTS}] of prepack_matrix")


def require_weights(
    operator: str, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int,
    matrix: torch.Tensor | None, k_padded: int, group: int, *_: object,
) -> None:  # fmt: skip
    """Raise Apex4Error if the weights do not belong to such an input, or have fewer than `n` outputs."""
    check = _check_weights if type(x) is torch.Tensor else _check_weights.__wrapped__
    of_bias = None if bias is None else _kind(bias)
    check(operator, x.get_device(), _kind(packed), _kind(scale), of_bias, n, k_padded // BLOCK, k_padded // group)


@lru_cache(maxsize=4096)
def _check_weights(
    operator: str, device: int, packed: _Kind, scale: _Kind, bias: _Kind | None, n: int, blocks: int, groups: int
) -> None:
    def require(argument: str, kind: _Kind, dtype: torch.dtype, *shape: int) -> None:
        if kind.shape != shape or kind.dtype != dtype or kind.device != device or not kind.dense:
            needed = f"{dtype} {list(shape)} without gaps, beside the input,"
            _refuse(operator, argument, f"{kind.dtype} {list(kind.shape)}", needed)

    tiles = packed.shape[0] if packed.shape else 0
    require("weight_packed", packed, torch.uint8, tiles, blocks, WEIGHT_TILE_BYTES)
    require("weight_scale", scale, torch.float16, tiles, groups, KERNEL_TILE_N)
    if not 0 < n <= tiles * KERNEL_TILE_N:
        _refuse(operator, "n", n, f"1 to the {tiles * KERNEL_TILE_N} outputs of weight_packed")
    if bias is not None:
        require("bias", bias, torch.float32, n)


def require_gemm(
    operator: str, codes: torch.Tensor, scales: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, m: int, n: int,
) -> None:  # fmt: skip
    """Raise Apex4Error if these are no operands of m tokens and weights of n outputs that belong together."""
    codes_kind, scales_kind = _kind(codes), _kind(scales)
    whole = type(codes) is torch.Tensor
    check = _check_codes if whole else _check_codes.__wrapped__
    check(operator, codes_kind, scales_kind)
    if whole and not 0 <= m <= codes_kind.shape[1]:
        _refuse(operator, "m", m, f"0 to the {codes_kind.shape[1]} rows of codes")
    check = _check_weights if whole else _check_weights.__wrapped__
    of_bias = None if bias is None else _kind(bias)
    blocks, groups = codes_kind.shape[0], scales_kind.shape[0]
    check(operator, codes_kind.device, _kind(packed), _kind(scale), of_bias, n, blocks, groups)


@lru_cache(maxsize=4096)
def _check_codes(operator: str, codes: _Kind, scales: _Kind) -> None:
    got = f"{codes.dtype} {list(codes.shape)}"
    needed = f"uint8 [K / {BLOCK}, rows, {' or '.join(map(str, ROW_BYTES.values()))}] without gaps"
    if (
        len(codes.shape) != 3
        or codes.shape[2] not in ROW_BYTES.values()
        or codes.dtype != torch.uint8
        or not codes.dense
    ):
        _refuse(operator, "codes", got, needed)
    got = f"{scales.dtype} {list(scales.shape)}"
    if (
        len(scales.shape) != 2 or scales.shape[1] != codes.shape[1] or scales.dtype != torch.float32 or not scales.dense
        or scales.device != codes.device or scales.shape[0] < 1 or codes.shape[0] % scales.shape[0]
    ):  # fmt: skip
        _refuse(operator, "scales", got, f"float32 [groups of {codes.shape[0]} blocks, {codes.shape[1]}] beside codes")
