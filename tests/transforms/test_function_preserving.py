"""Each change of a float layer by itself: in float32, for every architecture, it changes weights and no function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apex4_quant.models.families import InputGroup
from apex4_quant.models.source import ModelSource
from apex4_quant.transforms.function_preserving import (
    balance,
    balancing_factor,
    merged_by_norm,
    rotate_stream,
    rotate_values,
)
from apex4_quant.transforms.orthogonal import Orthogonal
from apex4_quant.transforms.rewriter import mean_squares

from .conftest import (
    ROTATABLE,
    SAME,
    ZOO,
    difference,
    groups_of,
    output_of,
    random_hidden,
    relative_tensors,
    runner_of,
)

# Single layers: each change by itself, for every architecture.

# Values that are gated, clamped, or made of a latent vector behind a norm.
VALUES_STAY = ("qwen3next", "deepseek2 lite", "deepseek3", "olmoe")
# Inputs that no norm's gain and no rows of another linear can scale: the same values, GPT-OSS's gate, OLMo 2's norms behind.
WITHOUT_SOURCE = ("deepseek2 lite", "deepseek3", "olmoe", "gptoss", "gptoss ragged", "olmo2")


@torch.no_grad()
@pytest.mark.parametrize("name", ROTATABLE)
def test_rotated_stream_goes_through_a_layer_as_the_stream_did(
    name: str, float_model: Callable[..., ModelSource]
) -> None:
    source = float_model(name)
    runner, hidden = runner_of(source), random_hidden(source)
    rotation = Orthogonal(hidden.shape[-1], 1)
    for index in range(source.num_layers):
        tensors = relative_tensors(source, index)
        expected = rotation.apply(output_of(runner, source, index, tensors, hidden))
        writers = source.family.residual_writers(source.config, index)
        rotate_stream(tensors, groups_of(source, index), writers, source.family.norm_offset, rotation)
        for group in groups_of(source, index):
            gain_one = 1 - source.family.norm_offset
            assert group.norm is None or bool((tensors[f"{group.norm}.weight"] == gain_one).all())
        assert difference(output_of(runner, source, index, tensors, rotation.apply(hidden)), expected) < SAME


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO.MODELS)
def test_rotated_values_leave_a_layer_as_it_was(name: str, float_model: Callable[..., ModelSource]) -> None:
    source = float_model(name)
    runner, hidden = runner_of(source), random_hidden(source)
    heads, queries = runner.config.num_key_value_heads, runner.config.num_attention_heads
    for index in range(source.num_layers):
        tensors = relative_tensors(source, index)
        before = {n: t.clone() for n, t in tensors.items()}
        expected = output_of(runner, source, index, tensors, hidden)
        per_head = [g for g in groups_of(source, index) if g.producer is not None and g.producer.per_head]
        if not per_head or per_head[0].producer.gated:
            assert name in VALUES_STAY
            continue
        (group,) = per_head
        width = tensors["self_attn.o_proj.weight"].shape[1] // queries
        rotate_values(tensors, group, heads, [Orthogonal(width, head) for head in range(heads)])
        assert difference(output_of(runner, source, index, tensors, hidden), expected) < SAME
        changed = [n for n in tensors if not torch.equal(tensors[n], before[n])]
        assert "self_attn.o_proj.weight" in changed and len(changed) == 2 + ("self_attn.v_proj.bias" in tensors)


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO.MODELS)
def test_balanced_layer_is_the_layer_with_inputs_as_uneven_as_weights(
    name: str, float_model: Callable[..., ModelSource]
) -> None:
    source = float_model(name)
    runner, hidden = runner_of(source), random_hidden(source)
    prefix, heads = source.family.layer_prefix(1), runner.config.num_key_value_heads
    tensors, groups = relative_tensors(source, 1), groups_of(source, 1)
    expected = output_of(runner, source, 1, tensors, hidden)

    def squares() -> dict[InputGroup, torch.Tensor]:
        return mean_squares(runner, 1, {prefix + n: t.clone() for n, t in tensors.items()}, groups, hidden)

    for group, mean_square in squares().items():
        offset = source.family.norm_offset
        has_source = group.norm is not None or group.producer is not None
        assert balance(tensors, group, mean_square, kv_heads=heads, norm_offset=offset, alpha=0.25) == has_source
        if not has_source:
            assert name in WITHOUT_SOURCE
            continue
        assert difference(output_of(runner, source, 1, tensors, hidden), expected) < SAME
        a = squares()[group]
        b = sum(tensors[f"{linear}.weight"].double().square().sum(0) for linear in group.linears)
        if group.producer is not None and group.producer.per_head:  # query heads of a key/value head share factors
            width = len(a) // runner.config.num_attention_heads
            a, b = (x.view(heads, -1, width).sum(1) for x in (a, b))
        ratio = a / b
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_factors_have_geometric_mean_one_and_leave_dead_channels_alone() -> None:
    a, b = torch.tensor([0.0, 4.0, 1.0, 1e-30, 1.0]).double(), torch.tensor([1.0, 4.0, 16.0, 1.0, 0.0]).double()
    factor = balancing_factor(a, b, 0.25)
    assert factor[0] == factor[4] == 1
    assert float(factor.log().sum()) == pytest.approx(0, abs=1e-12)
    assert float(factor[2] / factor[1]) == pytest.approx(2)
    assert float(factor[3] / factor[2]) < 100
    assert torch.equal(balancing_factor(torch.zeros(3), b[:3], 0.25), torch.ones(3))


def test_groups_of_one_norm_are_folded_once_and_an_input_without_source_is_refused() -> None:
    groups = [
        InputGroup(("a", "b"), norm="n", also_read_by=("r",)),
        InputGroup(("c",), norm="n", also_read_by=("r", "s")),
        InputGroup(("d",)),
        InputGroup(("e",)),
    ]
    first, *others = merged_by_norm(groups)
    assert (first.linears, first.also_read_by, first.norm) == (("a", "b", "c"), ("r", "s"), "n")
    assert others == groups[2:]
    tensors = {"d.weight": torch.ones(2, 3)}
    assert not balance(tensors, groups[2], torch.ones(3), kv_heads=1, norm_offset=0.0, alpha=0.25)
    assert torch.equal(tensors["d.weight"], torch.ones(2, 3))
