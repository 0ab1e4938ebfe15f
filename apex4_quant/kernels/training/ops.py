"""What distillation computes with kernels: rounding with gradients, and the divergence of predictions with its gradient.

By operations of PyTorch each is a dozen passes over its tensor in float32. Tensors are contiguous, and a model's are bfloat16 or
float32. Operands, and what is computed: cuda/training/round_activation.cu, round_feedback.cu, round_weight.cu, divergence.cu.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ...format.number_format import ACTIVATION_SCALE_MIN, BLOCK, CODE_MAX, SIXTEENTH_CODE
from .. import dispatch
from ..runtime import launcher
from .configs import (
    DIVERGENCE_THREADS,
    FEEDBACK_TILE_ROWS,
    FEEDBACK_WARPS,
    WARPS,
    divergence_config,
    feedback_config,
    rounding_config,
)

Kinds = tuple[type[ctypes.c_int] | type[ctypes.c_int64] | type[ctypes.c_float], ...]
_COUNTS_OF_GROUPS: Kinds = (ctypes.c_int64, ctypes.c_int)


def run_on(device: torch.device) -> bool:
    """Whether this device computes with kernels (dispatch.py)."""
    return dispatch.kernel_format(device) is not None


def round_activation(y: torch.Tensor, log_clip: torch.Tensor, group: int, code_max: int) -> torch.Tensor:
    """y [..., K] and log_clip float32 [] -> codes times scales in groups of `group`, as y."""
    out = torch.empty_like(y)
    kinds = (*_COUNTS_OF_GROUPS, ctypes.c_float, ctypes.c_float)
    numbers = (_groups(y, group), group, float(code_max), ACTIVATION_SCALE_MIN)
    _round("round_activation", y.dtype, kinds, numbers, out, y, log_clip)
    return out


def round_activation_with_feedback(y: torch.Tensor, log_clip: torch.Tensor, feedback: torch.Tensor) -> torch.Tensor:
    """As `round_activation`, 4-bit codes in groups of 128; `feedback` float16 [K / 128, 7168] is prepacked G
    (quantize/configs.py, prepack_feedback). A log_clip [K / 128], of every block, is one of sixteen levels."""
    blocks = y.shape[-1] // BLOCK
    assert feedback.shape[0] == blocks and feedback.dtype is torch.float16
    out = torch.empty_like(y)
    rows, device = _groups(y, BLOCK) // blocks, y.device.index or 0
    launch = _feedback(_is_float32(y.dtype), log_clip.dim() == 1, device, rows, blocks)
    _launch(launch, out, y, feedback, log_clip)
    return out


def round_activation_back(
    y: torch.Tensor,
    log_clip: torch.Tensor,
    gradient: torch.Tensor,
    rounded: torch.Tensor | None,
    group: int,
    code_max: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of y, as y, and of log_clip, float32 as that. `rounded` is what was made of y with feedback, if it was; with a
    log_clip [K / 128] it was, to sixteen levels."""
    blocks = log_clip.numel() if log_clip.dim() else 0
    assert not blocks or (rounded is not None and group == BLOCK and y.shape[-1] == blocks * BLOCK)
    by_y = torch.empty_like(y)
    by_clip = torch.empty(_groups(y, group), dtype=torch.float32, device=y.device)
    kinds = (*_COUNTS_OF_GROUPS, ctypes.c_float, ctypes.c_float, ctypes.c_int)
    numbers = (_groups(y, group), group, float(code_max), ACTIVATION_SCALE_MIN, blocks)
    _round("round_activation_back", y.dtype, kinds, numbers, by_y, by_clip, y, log_clip, gradient, rounded)
    return by_y, by_clip.view(-1, blocks).sum(0) if blocks else by_clip.sum()


def round_weight(
    v: torch.Tensor, log_scale: torch.Tensor, dtype: torch.dtype, folding: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """v float32 [N, K] and log_scale float32 [N, G] -> the weight [N, K] in `dtype`; folded if there are ratios, float32
    [N, G], and units, float32 [N]."""
    weight = torch.empty(v.shape, dtype=dtype, device=v.device)
    of_row = log_scale.shape[1]
    kinds = (ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_float)
    numbers = (log_scale.numel(), of_row, v.shape[1] // of_row, float(CODE_MAX))
    _round("round_weight", dtype, kinds, numbers, weight, v, log_scale, *(folding or (None, None)))
    return weight


def round_weight_back(
    v: torch.Tensor, log_scale: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of v and log_scale, float32."""
    by_v, by_scale = torch.empty_like(v), torch.empty_like(log_scale)
    numbers = (log_scale.numel(), v.shape[1] // log_scale.shape[1], float(CODE_MAX))
    kinds = (*_COUNTS_OF_GROUPS, ctypes.c_float)
    _round("round_weight_back", gradient.dtype, kinds, numbers, by_v, by_scale, v, log_scale, gradient)
    return by_v, by_scale


def divergence(
    ours: torch.Tensor, theirs: torch.Tensor, weight: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [..., V] -> KL(theirs || ours) of each token, float32 [...], and unless `weight` is None the gradient of their sum
    times `weight`, as `ours`."""
    vocabulary = ours.shape[-1]
    losses = torch.empty(ours.shape[:-1], dtype=torch.float32, device=ours.device)
    gradient = None if weight is None else torch.empty_like(ours)
    whole = vocabulary % 4 == 0 and all(each.data_ptr() % (4 * each.itemsize) == 0 for each in (ours, theirs))
    kinds, numbers = (ctypes.c_int, ctypes.c_float), (vocabulary, weight or 0.0)
    launch = _divergence(whole, _is_float32(ours.dtype), ours.device.index or 0, losses.numel(), kinds, numbers)
    _launch(launch, losses, gradient, ours, theirs)
    return losses, gradient


def _groups(y: torch.Tensor, group: int) -> int:
    assert group % BLOCK == 0 and y.shape[-1] % group == 0
    return y.numel() // group


def _round(
    entry: str, dtype: torch.dtype, kinds: Kinds, numbers: tuple[float, ...], *tensors: torch.Tensor | None
) -> None:
    device = next(each.device for each in tensors if each is not None)
    _launch(_rounding(entry, _is_float32(dtype), device.index or 0, len(tensors), kinds, numbers), *tensors)


@cache
def _rounding(
    entry: str, float32: bool, device: int, pointers: int, kinds: Kinds, numbers: tuple[float, ...]
) -> launcher.Launch:
    config = rounding_config(entry, float32)
    kernel = launcher.kernel(config.source, config.entry, config.defines, device)
    grid = -(-int(numbers[0]) // WARPS)
    return kernel.bind((grid, 1, 1), 32 * WARPS, pointers, _typed(kinds, numbers))


@cache
def _feedback(float32: bool, sixteen: bool, device: int, rows: int, blocks: int) -> launcher.Launch:
    config = feedback_config(float32, sixteen)
    kernel = launcher.kernel(config.source, config.entry, config.defines, device)
    grid = blocks, -(-rows // (FEEDBACK_TILE_ROWS * FEEDBACK_WARPS)), 1
    kinds: Kinds = (ctypes.c_int64, ctypes.c_int, ctypes.c_float)
    most = float(-SIXTEENTH_CODE if sixteen else CODE_MAX)
    return kernel.bind(grid, 32 * FEEDBACK_WARPS, 4, _typed(kinds, (rows, blocks, most)))


@cache
def _divergence(
    whole: bool, float32: bool, device: int, tokens: int, kinds: Kinds, numbers: tuple[float, ...]
) -> launcher.Launch:
    config = divergence_config(float32, whole)
    kernel = launcher.kernel(config.source, config.entry, config.defines, device)
    return kernel.bind((tokens, 1, 1), DIVERGENCE_THREADS, 4, _typed(kinds, numbers))


def _typed(kinds: Kinds, numbers: tuple[float, ...]) -> list[launcher.Number]:
    return [kind(number) for kind, number in zip(kinds, numbers, strict=True)]  # type: ignore[arg-type]


def _is_float32(dtype: torch.dtype) -> bool:
    assert dtype in (torch.bfloat16, torch.float32), dtype
    return dtype is torch.float32


def _launch(launch: launcher.Launch, *tensors: torch.Tensor | None) -> None:
    there = [each for each in tensors if each is not None]
    assert all(each.is_contiguous() for each in there)
    launch(_stream(there[0].device), *(0 if each is None else each.data_ptr() for each in tensors))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
