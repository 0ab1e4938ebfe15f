"""Quantized activations as the kernels exchange them: two formats, `sm80` and `sm90`, and both written out in PyTorch.

    codes   uint8    [K / 128, m_stride, 64 (sm80) or 128 (sm90)]     m_stride = M rounded up to 16
    scales  float32  [G, m_stride]

`sm80` holds two two's-complement nibbles a byte, k even in the low one; `sm90` one byte a code, sign (bit 7) and
magnitude. A row's 16-byte chunks are permuted as index.cuh says. Rows from M on are padding and may hold anything.
"""

from __future__ import annotations

import torch

from ..format.number_format import BLOCK, round_up
from .index import index_function

FORMATS = ("sm80", "sm90")
CHUNK = 16  # bytes
ROW_BYTES = {"sm80": BLOCK // 2, "sm90": BLOCK}


def format_of_codes(codes: torch.Tensor) -> str:
    """The format of a codes tensor, from the bytes of its rows."""
    return "sm80" if codes.shape[2] == ROW_BYTES["sm80"] else "sm90"


def row_stride(rows: int) -> int:
    """m_stride. Plain arithmetic, so that it can be traced with a symbolic number of rows."""
    return (rows + 15) // 16 * 16


def _places(m_stride: int, format: str) -> torch.Tensor:
    """int64 [m_stride * chunks]: where in a block, in chunks, chunk c of row m stands."""
    rows, chunks = torch.arange(m_stride)[:, None], torch.arange(ROW_BYTES[format] // CHUNK)
    return (index_function(f"{format}_activation_byte")(rows, chunks) // CHUNK).flatten()


def pack_activations(codes: torch.Tensor, scales: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
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
