"""W4A4 linears with gradients: what a packed linear computes, as a function of numbers that can be learned.

    y = Q_a(x T; c) (s q)^T + b          s = exp(log_scale), q = round(v) in -7 ... 7, c = exp(log_clip)

v are the codes before rounding, free numbers from here on: of the float weights only their start is left. So T needs no
inverse, and learns by itself. Rounding passes gradients straight through (Bengio et al., arXiv 1308.3432): with r = x / s_a,
the quotient that is rounded,

    d Q_a / d x = 1 where |r| <= 7.5, else 0         d Q_a / d s_a = q - r there (as in LSQ, arXiv 1902.08153), else q
    d (s q) / d v = s                                d (s q) / d s = q

and s_a = c absmax / 7 hands its gradient on to c and to the largest value of the group. With error feedback q is round(r + what
earlier errors add), and the gradients are those above all the same: what is added is rounding noise, as q - r is. With sixteen levels
s_a is -c / 8 of the value of largest magnitude, every block has a c, q is in -8 ... 7, and r from -8.5 on is inside.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..format.feedback import block_clips_of, clip_row, feedback_of, pack_feedback, transform_of
from ..format.number_format import (
    ACTIVATION_SCALE_MIN,
    BITS,
    BLOCK,
    CODE_MAX,
    SIXTEENTH_CODE,
    TOKEN_CODE_MAX,
    WEIGHT_SCALE_MAX,
    WEIGHT_SCALE_MIN,
)
from ..format.quant_config import LinearFormat
from ..format.transform_kind import TransformKind
from ..kernels.folding import fold
from ..kernels.hadamard import apply_block_hadamard
from ..kernels.quantize.configs import prepack_feedback
from ..kernels.torch_backend import largest_of, round_with_feedback, signed_scale
from ..kernels.training import ops as training
from ..transforms.block_transforms import transform_weight
from ..transforms.learned_transform import round_to_halves

WITHIN_CELL = 0.45  # of a code: how far the start of v may be from it, so that rounding gives the code again


class _RoundActivation(torch.autograd.Function):
    """y [..., K], in groups, and log c -> what the quantizer makes of y, in its dtype. `feedback` is what TrainedInput keeps. A log c
    [K / 128] is one of sixteen levels, which have feedback."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        log_clip: torch.Tensor,
        group: int,
        code_max: int,
        feedback: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.group, ctx.code_max = group, code_max
        if training.run_on(y.device):
            if feedback is None:
                quantized = training.round_activation(y, log_clip, group, code_max)
            else:
                quantized = training.round_activation_with_feedback(y, log_clip, feedback)
        else:
            grouped = y.unflatten(-1, (-1, group)).float()
            scale = _scale(_largest(grouped, log_clip), log_clip, code_max)
            if feedback is None:
                codes = (grouped / scale).round_().clamp_(-code_max, code_max)
            else:
                codes = round_with_feedback((grouped / scale).flatten(0, -3), feedback, _lowest(log_clip, code_max))
                codes = codes.view_as(grouped)
            quantized = codes.mul_(scale).to(y.dtype).flatten(-2)
        ctx.save_for_backward(y, log_clip, None if feedback is None else quantized)
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, log_clip, quantized = ctx.saved_tensors
        group, code_max = ctx.group, ctx.code_max
        if training.run_on(y.device):
            gradient = gradients[0].contiguous()
            found = training.round_activation_back(y, log_clip, gradient, quantized, group, code_max)
            return *found, None, None, None
        grouped = y.unflatten(-1, (-1, group)).float()
        gradient = gradients[0].unflatten(-1, (-1, group)).float()
        largest, lowest = _largest(grouped, log_clip), _lowest(log_clip, code_max)
        scale = _scale(largest, log_clip, code_max)
        ratio = grouped / scale
        inside = (ratio >= lowest - 0.5) & (ratio <= code_max + 0.5)
        rounded = ratio if quantized is None else quantized.unflatten(-1, (-1, group)).float() / scale
        codes = rounded.round().clamp_(lowest, code_max)
        by_scale = (gradient * torch.where(inside, codes - ratio, codes)).sum(-1, keepdim=True)
        by_y = gradient * inside
        place = (grouped == largest).to(torch.uint8).argmax(-1, keepdim=True)  # the first
        sixteen = log_clip.dim() == 1
        slope = (  # d s_a by the largest value
            log_clip.exp()[:, None] / SIXTEENTH_CODE if sixteen else largest.sign() * log_clip.exp() / code_max
        )
        by_y.scatter_add_(-1, place, by_scale * slope)
        by_clip = by_scale * scale
        by_clip = by_clip.flatten(0, -3).sum((0, 2)) if sixteen else by_clip.sum()
        return by_y.to(y.dtype).flatten(-2), by_clip, None, None, None


def _lowest(log_clip: torch.Tensor, code_max: int) -> int:
    return SIXTEENTH_CODE if log_clip.dim() == 1 else -code_max


def _largest(grouped: torch.Tensor, log_clip: torch.Tensor) -> torch.Tensor:
    """[..., g] -> the value that a group's scale is made of, [..., 1]: one of those of largest magnitude, with its sign."""
    if log_clip.dim() == 1:
        return largest_of(grouped)[..., None]
    return grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))


def _scale(largest: torch.Tensor, log_clip: torch.Tensor, code_max: int) -> torch.Tensor:
    """Of largest values [..., 1]."""
    if log_clip.dim() == 1:
        return signed_scale(largest[..., 0], log_clip.exp())[..., None]
    return (largest.abs() * (log_clip.exp() / code_max)).clamp_min(ACTIVATION_SCALE_MIN)


class _RoundWeight(torch.autograd.Function):
    """v [N, K] and log s [N, G] -> s round(v), [N, K] in `dtype`, or w8 u if it is folded."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, log_scale: torch.Tensor, dtype: torch.dtype, folded: bool) -> torch.Tensor:
        ctx.save_for_backward(v, log_scale)
        folding = None
        if folded:
            ratio, unit = fold(_stored_scale(log_scale))
            folding = ratio.float(), unit
        if training.run_on(v.device):
            return training.round_weight(v, log_scale, dtype, folding)
        codes = _codes(v, log_scale)
        if folding is None:
            return (codes * log_scale.exp()[..., None]).flatten(1).to(dtype)
        magnitude = torch.floor((codes.abs() * folding[0][..., None] + 128) / 256)
        return (magnitude * codes.sign() * folding[1][:, None, None]).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        v, log_scale = ctx.saved_tensors
        if training.run_on(v.device):
            return *training.round_weight_back(v, log_scale, gradients[0].contiguous()), None, None
        gradient = gradients[0].float().unflatten(1, (log_scale.shape[1], -1))
        scaled = gradient * log_scale.exp()[..., None]
        return scaled.flatten(1), (scaled * _codes(v, log_scale)).sum(-1), None, None


def _stored_scale(log_scale: torch.Tensor) -> torch.Tensor:
    """float16, as it is stored."""
    return log_scale.exp().clamp(WEIGHT_SCALE_MIN, WEIGHT_SCALE_MAX).half()


def _codes(v: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """[N, G, g]."""
    codes: torch.Tensor = v.round().clamp_(-CODE_MAX, CODE_MAX).unflatten(1, (log_scale.shape[1], -1))
    return codes


class TrainedInput(nn.Module):
    """The quantizer of an input: its transform and clip ratio. Linears that read one input share it, and what it computes.

    `matrix` float16 [padded K / 128, 128, 128] is the stored transform, or [1, 128, 128] if all blocks share one; with error
    feedback behind it, which is computed with and not learned but set anew, [padded K / 128, 184, 128]; and with a clip ratio for
    every block, which is learned, [padded K / 128, 185, 128].
    With 8 bits an input has one scale a token and no clip ratio to be learned, and the weights behind it are folded.
    """

    def __init__(self, format: LinearFormat, matrix: torch.Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.format = format
        self.matrix = (
            None if matrix is None else nn.Parameter(transform_of(matrix).to(device, torch.float32, copy=True))
        )
        clips = None if matrix is None else block_clips_of(matrix)
        one = torch.tensor(math.log(format.activation_clip))
        self.log_clip = nn.Parameter((one if clips is None else clips.float().log()).to(device, copy=True))
        self.of_tokens = format.activation_bits != BITS
        self.log_clip.requires_grad_(not self.of_tokens)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.keeps_unrounded = False
        self.unrounded: torch.Tensor | None = None  # the transformed input of the last call, if it is kept
        self.feedback: torch.Tensor | None = None  # G float16 [padded K / 128, 128, 128] in step order
        self._kept_feedback: torch.Tensor | None = None  # the same as _RoundActivation reads it
        feedback = None if matrix is None else feedback_of(matrix)
        if feedback is not None:
            self.set_feedback(feedback.to(device))

    def set_feedback(self, feedback: torch.Tensor) -> None:
        """Into the tensors that are there: a step that was captured into a graph reads them."""
        read = prepack_feedback(feedback) if training.run_on(feedback.device) else feedback.float()
        if self.feedback is None or self._kept_feedback is None:
            self.feedback, self._kept_feedback = feedback.clone(), read
        else:
            self.feedback.copy_(feedback)
            self._kept_feedback.copy_(read)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> quantized, [..., padded K]. The linears of one input are called with the same tensor."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        y = nn.functional.pad(x, (0, self.format.padded_k - x.shape[-1])) if x.shape[-1] < self.format.padded_k else x
        if self.matrix is not None:
            blocks = y.reshape(-1, self.format.padded_k // BLOCK, BLOCK).transpose(0, 1)
            matrix = self.matrix.to(y.dtype).expand(len(blocks), -1, -1)
            y = torch.bmm(blocks, matrix).transpose(0, 1).reshape(y.shape)
        elif self.format.transform is TransformKind.HADAMARD:
            y = apply_block_hadamard(y)
        group, code_max = self.format.group_length, CODE_MAX
        if self.of_tokens:
            group, code_max = self.format.padded_k, TOKEN_CODE_MAX
        y = y.contiguous()
        if self.keeps_unrounded:
            self.unrounded = y
        quantized: torch.Tensor = _RoundActivation.apply(y, self.log_clip, group, code_max, self._kept_feedback)  # type: ignore[no-untyped-call]
        self._last = (x, quantized)
        return quantized

    def forget(self) -> None:
        """Let go of the last input and of the graph behind it."""
        self._last = self.unrounded = None

    @torch.no_grad()
    def stored(self) -> tuple[torch.Tensor | None, float]:
        """The transform as it is stored, float16, and the clip ratio of all blocks."""
        matrix = None if self.matrix is None else round_to_halves(self.matrix)
        if matrix is not None and self.feedback is not None:
            matrix = torch.cat((matrix, pack_feedback(self.feedback)), 1)
        if not self.format.transform.has_block_clips:
            return matrix, float(self.log_clip.exp())
        assert matrix is not None
        return torch.cat((matrix, clip_row(round_to_halves(self.log_clip.exp()))), 1), 1.0


class TrainedLinear(nn.Module):
    """A linear of `codes` [N, padded K] and `scales` [N, G] behind `input`; `weight` float [N, K] is what was rounded."""

    def __init__(
        self,
        format: LinearFormat,
        input: TrainedInput,
        codes: torch.Tensor,
        scales: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.format, self.input = format, input
        codes, scales = codes.to(weight.device).float(), scales.to(weight.device).float()
        matrix = None if input.matrix is None else input.matrix.detach().expand(format.padded_k // BLOCK, -1, -1)
        exact = transform_weight(weight, format, matrix).unflatten(1, (scales.shape[1], -1)) / scales[..., None]
        self.v = nn.Parameter(torch.clamp(exact.flatten(1), codes - WITHIN_CELL, codes + WITHIN_CELL))
        self.log_scale = nn.Parameter(scales.log())
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        folded = self.input.of_tokens
        weight = _RoundWeight.apply(self.v, self.log_scale, x.dtype, folded)  # type: ignore[no-untyped-call]
        return nn.functional.linear(self.input(x), weight, self.bias)

    @torch.no_grad()
    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes [N, padded K], float16 scales [N, G]."""
        return _codes(self.v, self.log_scale).flatten(1).to(torch.int8), _stored_scale(self.log_scale)
