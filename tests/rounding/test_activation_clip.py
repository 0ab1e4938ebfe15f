"""The search for the clip ratio of activations."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.kernels import reference
from apex4_quant.rounding.activation_clip import ACTIVATION_CLIP_RATIOS, search_activation_clip


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
