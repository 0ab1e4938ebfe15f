"""The search for the clip ratio of activations."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.distributed.group import Group
from apex4_quant.format.feedback import clip_row, pack_feedback
from apex4_quant.kernels import reference
from apex4_quant.rounding.activation_clip import (
    ACTIVATION_CLIP_RATIOS,
    BLOCK_CLIP_RATIOS,
    search_activation_clip,
    search_block_clips,
)
from apex4_quant.transforms.learned_transform import round_to_halves


@pytest.mark.parametrize("rows", [(32, 8), (32, 500), (250, 6), (250, 6, 1), (300,)])
def test_clip_search_finds_the_least_output_error(rows: tuple[int, ...]) -> None:
    """Of more rows than columns too, which are added up."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(300, 256, generator=generator)
    weights = [torch.randn(count, 256, generator=generator) for count in rows]
    found = search_activation_clip(inputs, weights, 128)

    def error(clip: float) -> float:
        codes, scale = reference.quantize_activation(inputs, 128, clip, hadamard=False)
        rounded = (codes.double().unflatten(1, (-1, 128)) * scale[..., None]).flatten(1)
        return sum(float(((rounded - inputs.double()) @ w.double().t()).square().sum()) for w in weights)

    errors = {round(ratio, 2): error(ratio) for ratio in ACTIVATION_CLIP_RATIOS}
    assert found == min(errors, key=errors.__getitem__)
    assert found < 1.0  # Gaussian groups of 128 always gain from a little clipping


def test_clip_search_keeps_the_range_when_every_value_is_at_its_end() -> None:
    inputs = torch.randint(0, 2, (64, 128), generator=torch.Generator().manual_seed(6)) * 2.0 - 1
    assert search_activation_clip(inputs, [torch.eye(128)], 128) == 1.0


@pytest.mark.parametrize("rows", [(300,), (32, 8)])
def test_every_block_gets_the_ratio_with_the_least_error_of_its_own(rows: tuple[int, ...]) -> None:
    """Sixteen levels, against the reference. Values of the second block are +-1: 7 and -7 stand for both best, with 8 / 7 of the range."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(200, 384, generator=generator)
    inputs[:, 128:256] = inputs[:, 128:256].sign()
    weights = [torch.randn(count, 384, generator=generator) for count in rows]
    feedback = round_to_halves(0.05 * torch.randn(3, 128, 128, generator=generator))
    feedback[1] = 0
    found = search_block_clips(inputs, weights, feedback.float())
    errors = torch.empty(len(BLOCK_CLIP_RATIOS), 3, dtype=torch.float64)
    for number, ratio in enumerate(BLOCK_CLIP_RATIOS):
        eye = torch.eye(128).expand(3, -1, -1)
        matrix = torch.cat((eye, pack_feedback(feedback.float()), clip_row(torch.full((3,), ratio))), 1)
        codes, scale = reference.quantize_activation(inputs, 128, 1.0, False, matrix)
        difference = codes.double().unflatten(1, (-1, 128)) * scale[..., None] - inputs.double().unflatten(1, (-1, 128))
        for block in range(3):
            columns = slice(128 * block, 128 * block + 128)
            outputs = [difference[:, block] @ weight[:, columns].double().t() for weight in weights]
            errors[number, block] = sum(float(each.square().sum()) for each in outputs)
    # A code on the other side of a tie moves an error a little: ratios may be swapped that are as good.
    chosen = [BLOCK_CLIP_RATIOS.index(pytest.approx(float(ratio))) for ratio in found]
    assert all(errors[number, block] <= 1.001 * errors[:, block].min() for block, number in enumerate(chosen))
    assert float(found[1]) == pytest.approx(1.12) and float(found[0]) < 1


def test_processes_share_the_ratios_of_blocks() -> None:
    class Second(Group):
        """The second of two, whose sums are of both: the first's come from a process that tries its share alone."""

        def __init__(self, rank: int, others: torch.Tensor | None) -> None:
            self.rank, self.size, self.others, self.own = rank, 2, others, None

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            self.own = values.clone()
            return values if self.others is None else values + self.others

    generator = torch.Generator().manual_seed(5)
    inputs, weight = torch.randn(50, 256, generator=generator), torch.randn(9, 256, generator=generator)
    feedback = torch.zeros(2, 128, 128)
    first = Second(0, None)
    search_block_clips(inputs, [weight], feedback, first)
    assert first.own is not None and bool((first.own == 0).any()) and bool((first.own > 0).any())
    both = search_block_clips(inputs, [weight], feedback, Second(1, first.own))
    assert torch.equal(both, search_block_clips(inputs, [weight], feedback))
