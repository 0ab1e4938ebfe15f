"""What is learned computes what is stored, and its gradients are those of rounding that is passed straight through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apex4_quant.distillation.trained_linear import TrainedInput, TrainedLinear, _RoundActivation, _RoundWeight
from apex4_quant.format.feedback import clip_row, feedback_of, pack_feedback
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels.torch_backend import round_with_feedback
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.rounding.nearest import quantize_weight_rtn
from apex4_quant.transforms.learned_transform import round_to_halves

KINDS = list(TransformKind)


def random_feedback(blocks: int, random: torch.Generator) -> torch.Tensor:
    """As stored, float16 [blocks, 56, 128]."""
    return pack_feedback(round_to_halves(0.1 * torch.randn(blocks, 128, 128, generator=random)))


def clip_of(kind: TransformKind, bits: int) -> float:
    return 0.9 if bits == 4 and not kind.has_block_clips else 1.0


def made(kind: TransformKind, in_features: int, group: int = 128, bits: int = 4) -> tuple[Apex4Linear, TrainedLinear]:
    """A linear of 24 rows as it is stored, and as it is learned."""
    format = LinearFormat(
        24, in_features, group, get_layout("rowmajor"), kind, clip_of(kind, bits), activation_bits=bits
    )
    random = torch.Generator().manual_seed(in_features)
    weight = torch.randn(24, in_features, generator=random)
    bias = torch.randn(24, generator=random)
    matrix = None
    if kind.is_learned:
        blocks = format.padded_k // 128
        matrix = torch.eye(128) + 0.02 * torch.randn(blocks, 128, 128, generator=random)
        matrix = matrix[:1].expand(blocks, -1, -1) if kind is TransformKind.SHARED else matrix
        matrix = round_to_halves(matrix)
    codes, scales = quantize_weight_rtn("x", weight, format, matrix)
    if kind.has_feedback:
        assert matrix is not None
        matrix = torch.cat((matrix, random_feedback(len(matrix), random)), 1)
    if kind.has_block_clips:
        assert matrix is not None
        matrix = torch.cat((matrix, clip_row(round_to_halves(1.05 - 0.1 * torch.arange(len(matrix))))), 1)
    stored = Apex4Linear.from_codes(format, codes, scales, bias, matrix)
    input = TrainedInput(format, stored.input_transform, torch.device("cpu"))
    return stored, TrainedLinear(format, input, codes, scales, weight, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("in_features", "group"), [(128, 128), (576, 128), (300, 256)])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_computes_what_is_stored(kind: TransformKind, in_features: int, group: int, bits: int) -> None:
    if kind.is_learned and group != 128:
        pytest.skip("learned transforms have groups of 128")
    if kind.has_feedback and bits == 8:
        pytest.skip("errors of 8 bits are not made up for")
    stored, trained = made(kind, in_features, group, bits)
    assert {name for name, _ in trained.named_parameters() if "input." not in name} == {"v", "log_scale"}  # no bias
    codes, scales = trained.stored()
    matrix, clip = trained.input.stored()
    assert torch.equal(codes, stored.codes()) and torch.equal(scales, stored.scales())
    assert clip == pytest.approx(clip_of(kind, bits)) and trained.input.log_clip.requires_grad == (bits == 4)
    assert stored.input_transform is None or torch.equal(
        matrix if matrix is not None else torch.empty(0), stored.input_transform
    )
    x = torch.randn(5, in_features, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(trained(x), stored.reference(x), rtol=2e-5, atol=2e-4)


def straight_through(values: torch.Tensor) -> torch.Tensor:
    inside = values.detach().abs() <= 7.5
    return torch.where(inside, values + (values.round().clamp(-7, 7) - values).detach(), 7 * values.detach().sign())


def test_gradients_of_activations() -> None:
    random = torch.Generator().manual_seed(2)
    y, weights = torch.randn(6, 256, generator=random), torch.randn(6, 256, generator=random)
    log_clip = torch.tensor(-0.4)  # clips

    def gradients(function: object) -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (y, log_clip)]
        (function(*leaves) * weights).sum().backward()  # type: ignore[operator]
        return tuple(leaf.grad for leaf in leaves if leaf.grad is not None)

    def plain(y: torch.Tensor, log_clip: torch.Tensor) -> torch.Tensor:
        grouped = y.unflatten(-1, (-1, 128))
        scale = grouped.abs().amax(-1, keepdim=True) * log_clip.exp() / 7
        return (straight_through(grouped / scale) * scale).flatten(-2)

    ours = gradients(lambda y, log_clip: _RoundActivation.apply(y, log_clip, 128, 7))
    for found, wanted in zip(ours, gradients(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_activations_with_feedback() -> None:
    """What earlier errors add moves codes, and gradients as rounding noise does: q - r is of the codes that there are."""
    random = torch.Generator().manual_seed(2)
    y, weights = torch.randn(6, 256, generator=random), torch.randn(6, 256, generator=random)
    feedback = feedback_of(torch.cat((torch.zeros(2, 128, 128).half(), random_feedback(2, random)), 1))
    assert feedback is not None
    log_clip = torch.tensor(-0.4)
    scale = y.unflatten(-1, (-1, 128)).abs().amax(-1, keepdim=True) * log_clip.exp() / 7
    codes = round_with_feedback(y.unflatten(-1, (-1, 128)) / scale, feedback.float())

    def gradients(with_feedback: bool) -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (y, log_clip)]
        if with_feedback:
            rounded = _RoundActivation.apply(*leaves, 128, 7, feedback.float())  # type: ignore[no-untyped-call]
        else:
            own = leaves[0].unflatten(-1, (-1, 128))
            s = own.abs().amax(-1, keepdim=True) * leaves[1].exp() / 7
            inside = (own / s).detach().abs() <= 7.5
            rounded = (torch.where(inside, own / s + (codes - own / s).detach(), codes) * s).flatten(-2)
        torch.testing.assert_close(rounded, (codes * scale).flatten(-2))
        (rounded * weights).sum().backward()
        return tuple(leaf.grad for leaf in leaves if leaf.grad is not None)

    assert not torch.equal(codes, (y.unflatten(-1, (-1, 128)) / scale).round().clamp(-7, 7))
    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_sixteen_levels() -> None:
    """A scale is -c / 8 of its block's largest value, which autograd differentiates; codes are passed straight through."""
    random = torch.Generator().manual_seed(2)
    y, weights = torch.randn(6, 256, generator=random), torch.randn(6, 256, generator=random)
    y[0, 5], y[0, 7], y[1, 130] = 6.0, -6.0, 5.0
    log_clip = torch.tensor([-0.4, 0.1])  # the first clips
    feedback = feedback_of(torch.cat((torch.zeros(2, 128, 128).half(), random_feedback(2, random)), 1))
    assert feedback is not None

    def gradients(ours: bool) -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (y, log_clip)]
        grouped = leaves[0].unflatten(-1, (-1, 128))
        place = (grouped.detach().abs() - 1e-6 * grouped.detach().sign()).argmax(-1, keepdim=True)  # the negative one
        scale = -grouped.gather(-1, place) * leaves[1].exp()[:, None] / 8
        codes = round_with_feedback((grouped / scale).detach(), feedback.float(), -8)
        if ours:
            rounded = _RoundActivation.apply(*leaves, 128, 7, feedback.float())  # type: ignore[no-untyped-call]
            torch.testing.assert_close(rounded, (codes * scale).flatten(-2))
            assert {-8, 7} <= set(codes.flatten().int().tolist())
        else:
            ratio = grouped / scale
            inside = (ratio.detach() <= 7.5) & (ratio.detach() >= -8.5)
            rounded = (torch.where(inside, ratio + (codes - ratio).detach(), codes) * scale).flatten(-2)
        (rounded * weights).sum().backward()
        return tuple(leaf.grad for leaf in leaves if leaf.grad is not None)

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_weights() -> None:
    random = torch.Generator().manual_seed(3)
    v = 3 * torch.randn(4, 256, generator=random)
    log_scale, weights = torch.randn(4, 2, generator=random), torch.randn(4, 256, generator=random)

    def plain(v: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        codes = v + (v.round().clamp(-7, 7) - v).detach()
        return (codes.unflatten(1, (2, -1)) * log_scale.exp()[..., None]).flatten(1)

    found = []
    for function in (lambda v, s: _RoundWeight.apply(v, s, torch.float32, False), plain):
        leaves = [each.clone().requires_grad_() for each in (v, log_scale)]
        (function(*leaves) * weights).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_linears_of_one_input_quantize_it_once() -> None:
    stored, first = made(TransformKind.DENSE, 576)
    second = TrainedLinear(
        replace(first.format, transform_from="x"),
        first.input,
        stored.codes(),
        stored.scales(),
        torch.ones(24, 576),
        None,
    )
    x = torch.randn(3, 576)
    first(x)
    kept = first.input(x)
    second(x)
    assert second.input(x) is kept
    first.input.forget()
    assert first.input(x) is not kept
