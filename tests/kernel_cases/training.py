"""What distillation computes with kernels, held against what the same functions compute by operations of PyTorch.

tests/gpu/test_training.py runs the checks on a GPU, tests/kernels/training/test_training_kernels.py the small ones on a CPU.
"""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import torch

from apex4_quant.distillation.step import divergence
from apex4_quant.distillation.student import PackedLinear
from apex4_quant.distillation.trained_linear import _RoundActivation, _RoundWeight
from apex4_quant.format.feedback import feedback_of, pack_feedback
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels.quantize.configs import prepack_feedback
from apex4_quant.kernels.torch_backend import largest_of
from apex4_quant.kernels.training import ops
from apex4_quant.rounding.nearest import quantize_weight_rtn

DTYPES = (torch.float32, torch.bfloat16)
# Rows, padded K, group, largest code, log of the clip ratio.
ACTIVATIONS: tuple[tuple[int, int, int, int, float], ...] = (
    (5, 256, 128, 7, 0.0), (11, 640, 128, 7, -0.4), (3, 512, 256, 7, 0.1), (4, 384, 384, 127, 0.0), (513, 1536, 128, 7, -0.1),
)  # fmt: skip
# Rows, padded K, log of the clip ratio.
WITH_FEEDBACK: tuple[tuple[int, int, float], ...] = ((5, 256, 0.0), (67, 384, -0.4), (513, 1536, -0.1))
# N, padded K, groups of a row, folded.
WEIGHTS = ((7, 256, 2, False), (5, 640, 5, True), (3, 512, 1, False), (3, 512, 1, True), (576, 1536, 12, False))
VOCABULARIES = ((3, 1000), (2, 1001), (40, 49152))  # tokens, entries
DIFFERENT = (
    0.01  # of the elements: scales may differ by a rounding, and a value beside a tie then falls to the other side
)
DIFFERENT_FEEDBACK = 0.02
VALUES_A_TIE = 2**18  # so many have one or two beside a tie, in bfloat16


def check_activation(
    rows: int, k: int, group: int, code_max: int, log_clip: float, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    y, gradient = (torch.randn(rows, k, generator=random) for _ in range(2))
    y[0, :group] = 0  # a group without a largest value
    y[1, 3], y[1, 9] = -20, 20  # the first of two counts
    leaves = y.to(device, dtype), torch.tensor(log_clip, device=device)
    _check(lambda y, c: _RoundActivation.apply(y, c, group, code_max), leaves, gradient.to(device, dtype))


def check_feedback(
    rows: int, k: int, log_clip: float, dtype: torch.dtype, device: torch.device, seed: int, sixteen: bool = False
) -> None:
    """G and its errors are float16 in the kernel: a value beside a tie falls to either side, and others of its group after it."""
    random = torch.Generator().manual_seed(seed)
    y, gradient = (torch.randn(rows, k, generator=random) for _ in range(2))
    y[0, :128] = 0
    y[1, 2], y[1, 3], y[1, 9] = 20, -20, -20  # the first one counts; with sixteen levels the first negative one
    later = (0.1 * torch.randn(k // 128, 128, 128, generator=random)).half()
    feedback = feedback_of(torch.cat((torch.zeros_like(later), pack_feedback(later)), 1))
    assert feedback is not None
    log_clips = log_clip + 0.05 * torch.arange(k // 128) if sixteen else torch.tensor(log_clip)
    leaves = y.to(device, dtype), log_clips.to(device)
    packed, plain = prepack_feedback(feedback).to(device), feedback.float().to(device)
    # Two calls, as each reads G in its own way; the way back of either is of its own codes.
    ours = _outcome(lambda y, c: _RoundActivation.apply(y, c, 128, 7, packed), leaves, gradient.to(device, dtype))
    with patch.object(ops, "run_on", lambda device: False):
        wanted = _outcome(lambda y, c: _RoundActivation.apply(y, c, 128, 7, plain), leaves, gradient.to(device, dtype))
        unmade = torch.zeros_like(plain) if sixteen else None
        without = _outcome(
            lambda y, c: _RoundActivation.apply(y, c, 128, 7, unmade), leaves, gradient.to(device, dtype)
        )[0]
    assert ours[0].dtype == ours[1].dtype == dtype and ours[0].shape == ours[1].shape == y.shape
    grouped, clips = y.to(dtype).float().unflatten(1, (-1, 128)), log_clips.exp()
    scale = -largest_of(grouped) * clips / 8 if sixteen else grouped.abs().amax(-1) * clips / 7
    units = torch.where(scale == 0, 1e-20, scale).to(device).repeat_interleave(128, 1)
    codes, exact = (each[0].float() / units for each in (ours, wanted))
    tolerance = 0.04 if dtype is torch.bfloat16 else 1e-4
    assert float((codes - codes.round()).abs().max()) < tolerance and float(codes.max()) < 7.1
    assert (-8.1 < float(codes.min()) < -7.9) if sixteen else (float(codes.min()) > -7.1)
    assert float((codes - exact).abs().max()) < 2.1
    assert float(((codes - exact).abs() > 0.5).float().mean()) <= DIFFERENT_FEEDBACK
    assert float(((codes - without.float() / units).abs() > 0.5).float().mean()) > 0.1
    same = ((codes - exact).abs() < 0.5).unflatten(1, (-1, 128)).all(-1).repeat_interleave(128, 1)
    differ = (ours[1].float() - wanted[1].float()).abs() > (0.02 if dtype is torch.bfloat16 else 1e-3)
    assert float(differ[same].float().mean()) <= DIFFERENT
    size = wanted[2].abs() + math.sqrt(rows * (128 if sixteen else k))
    assert ours[2].shape == wanted[2].shape and bool(((ours[2] - wanted[2]).abs() < 0.1 * size).all())


def check_weight(
    n: int, k: int, groups: int, folded: bool, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    v, gradient = 4 * torch.randn(n, k, generator=random), torch.randn(n, k, generator=random)
    v[0, :4] = torch.tensor([0.5, -0.5, 7.4, -9.0])
    log_scale = torch.randn(n, groups, generator=random) - 4
    leaves = v.to(device), log_scale.to(device)
    _check(lambda v, s: _RoundWeight.apply(v, s, dtype, folded), leaves, gradient.to(device, dtype))


def check_divergence(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ours, theirs = ((3 * torch.randn(tokens, vocabulary, generator=random)).to(device, dtype) for _ in range(2))
    leaf = ours.clone().requires_grad_()
    wanted = torch.stack([divergence(o[None], t[None]) for o, t in zip(leaf, theirs, strict=True)])
    (0.5 * wanted.sum()).backward()
    losses, gradient = ops.divergence(ours, theirs, 0.5)
    assert gradient is not None and leaf.grad is not None and gradient.dtype == dtype
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-7)
    alone, nothing = ops.divergence(ours, theirs, None)
    assert torch.equal(alone, losses) and nothing is None


def _check(function: Any, leaves: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> None:
    ours = _outcome(function, leaves, gradient)
    with patch.object(ops, "run_on", lambda device: False):
        plain = _outcome(function, leaves, gradient)
    for found, wanted in zip(ours, plain, strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        tolerance = 2e-2 if found.dtype is torch.bfloat16 else 1e-4
        found, wanted = found.float(), wanted.float()
        if (
            found.numel() < 100
        ):  # sums, of what may differ: a value beside a tie moves one by about its gradient, of size 1
            ties = gradient.numel() // VALUES_A_TIE
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()) + ties)
            continue
        differ = (found - wanted).abs() > tolerance * wanted.abs() + 1e-5
        assert float(differ.float().mean()) <= DIFFERENT


def _outcome(function: Any, leaves: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradients of the leaves."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    result = function(*leaves)
    result.backward(gradient)
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def packed_linears(model: Any) -> list[PackedLinear]:
    """All linears of the layers of a model, rounded to nearest behind the Hadamard transform; each has an input of its own."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            n, k = module.weight.shape
            format = LinearFormat(n, k, 128, get_layout("rowmajor"), TransformKind.HADAMARD, 0.95)
            codes, scales = quantize_weight_rtn(name, module.weight.float(), format, None)
            found.append(PackedLinear(name, (len(found), 0), format, codes, scales, None))
    return found
