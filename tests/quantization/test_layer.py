"""The steps of a layer, each by itself: what it needs, what it returns, what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from apex4_quant.calib.probes import InputProbe
from apex4_quant.format.layout_name import LayoutName
from apex4_quant.format.layouts import ROWMAJOR, get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels.operands import TOKEN_FORMAT
from apex4_quant.quantization.collector import CollectedInput, Part, Statistics
from apex4_quant.quantization.gradients import InputGradients
from apex4_quant.quantization.layer import (
    LayerTensors,
    decide_input,
    gptq_moments,
    measure_error,
    pack,
    record_of,
    round_weight,
    rounded_together,
    stored,
)
from apex4_quant.quantization.plan import PlannedLinear
from apex4_quant.recipes import Recipe, Rounding
from apex4_quant.rounding.gptq import DAMPING
from apex4_quant.transforms.block_transforms import transform_weight
from apex4_quant.transforms.learned_transform import learn_transform

N, K = 32, 256


def weight_of(name: str) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(len(name))) * 0.1


def planned(name: str, transform: TransformKind, owner: str | None = None) -> PlannedLinear:
    return PlannedLinear(name, 0, 0, LinearFormat(N, K, 128, ROWMAJOR, transform, 1.0, owner))


def collected(transform: TransformKind, hessians: bool = True) -> CollectedInput:
    """An input that two linears read, of which the second takes its transform from the first."""
    linears = [planned("long_name", transform, "a" if transform.is_learned else None), planned("a", transform)]
    rows = torch.randn(2048, K, generator=torch.Generator().manual_seed(0))
    rows[:, 7] *= 30
    parts = []
    for linear in linears:
        format = linear.format if hessians else None
        statistics = Statistics(linear.name, InputProbe(2048), torch.float32, format)
        statistics.add(rows)
        parts.append(Part(linear.name, [linear], statistics))
    return CollectedInput(parts[0].statistics, parts)


def weighed() -> Iterator[torch.Tensor]:
    yield from (weight_of("a"), weight_of("long_name"))


def test_a_weight_is_taken_once() -> None:
    tensors = LayerTensors({"a.weight": weight_of("a"), "norm.weight": torch.ones(3)})
    assert torch.equal(tensors.weight("a"), tensors.take_weight("a"))
    with pytest.raises(KeyError):
        tensors.take_weight("a")
    assert set(tensors.untaken()) == {"norm.weight"}


def test_the_owner_of_a_transform_comes_first_and_parts_are_given_away() -> None:
    found = collected(TransformKind.DENSE)
    assert [linear.name for linear in found.linears] == ["a", "long_name"] and found.format.transform_from is None
    assert [part.reader for part in found.take_parts()] == ["a", "long_name"] and not found.parts


def test_decisions_are_the_recipes() -> None:
    lines: list[str] = []
    nothing = decide_input(collected(TransformKind.HADAMARD), Recipe("x"), {}, weighed, lines.append)
    assert nothing.matrix is None and nothing.clip is None
    recipe = Recipe("x", search_clip=True, transform_steps=5)
    both = decide_input(collected(TransformKind.DENSE), recipe, {}, weighed, lines.append)
    assert both.matrix is not None and both.matrix.shape == (2, 128, 128) and both.clip is not None
    shared = decide_input(collected(TransformKind.SHARED), recipe, {}, weighed, lines.append)
    assert shared.matrix is not None and torch.equal(shared.matrix[0], shared.matrix[1])
    gradients = {"a": InputGradients(torch.randn(64, K, generator=torch.Generator().manual_seed(3)), {})}
    told = decide_input(collected(TransformKind.DENSE), recipe, gradients, weighed, lines.append)
    assert told.matrix is not None and not torch.equal(told.matrix, both.matrix)
    assert not lines


@pytest.mark.parametrize(
    "bits, rounding, damping",
    [(8, Rounding.GPTQ, DAMPING), (8, Rounding.NEAREST, None), (4, Rounding.GPTQ, None)],
)
def test_with_eight_bits_a_transform_is_learned_for_gptq(bits: int, rounding: Rounding, damping: float | None) -> None:
    found = collected(TransformKind.DENSE)
    for part in found.parts:
        part.planned = [replace(each, format=replace(each.format, activation_bits=bits)) for each in part.planned]
    decided = decide_input(found, Recipe("x", rounding=rounding, transform_steps=3), {}, weighed, print).matrix
    rows = found.statistics.inputs()
    assert decided is not None
    assert torch.equal(decided, learn_transform(rows, weighed(), 3, activation_bits=bits, damping=damping))


@pytest.mark.parametrize("refinement", [0, 2])
def test_from_a_weight_to_what_is_stored(refinement: int) -> None:
    recipe = Recipe("x", rounding=Rounding.GPTQ, refinement=refinement, transform_steps=5)
    found = collected(TransformKind.DENSE)
    matrix = decide_input(found, recipe, {}, weighed, print).matrix
    owner, errors = None, []
    for part in found.take_parts():
        (linear,) = part.planned
        moments = gptq_moments(part, matrix, recipe, print)
        assert moments is not None and (moments.hessian is not None) == (refinement > 0)
        weight = weight_of(linear.name)
        before = weight.clone()
        codes, scales = round_weight(linear.name, weight, linear.format, matrix, moments, refinement)
        assert torch.equal(weight, before) and codes.dtype == torch.int8 and int(codes.abs().max()) <= 7
        packed = pack(linear.format, codes, scales, None, matrix, owner)
        owner = owner or packed
        names = {name for name, _ in stored(linear.name, packed)}
        kept = {"weight_packed", "weight_scale"} | ({"input_transform"} if packed is owner else set())
        assert names == {f"{linear.name}.{part}" for part in kept}
        rounded = codes.float() * scales.float().repeat_interleave(128, 1)
        assert float((rounded - transform_weight(weight, linear.format, matrix)).norm() / rounded.norm()) < 0.2
        errors.append(measure_error(packed, weight, part.statistics.inputs()))
        assert record_of(linear, linear.format, errors[-1])["error"] == errors[-1]
    assert all(0.01 < error < 0.2 for error in errors)


def test_without_moments_weights_are_rounded_to_nearest_and_the_bias_is_no_error() -> None:
    linear = planned("a", TransformKind.HADAMARD)
    part = collected(TransformKind.HADAMARD, hessians=False).parts[0]
    assert gptq_moments(part, None, Recipe("x"), print) is None
    codes, scales = round_weight("a", weight_of("a"), linear.format, None, None, 0)
    plain = pack(linear.format, codes, scales, None, None, None)
    biased = pack(linear.format, codes, scales, torch.full((N,), 1e3), None, None)
    x = part.statistics.inputs()
    assert measure_error(biased, weight_of("a"), x) < 0.1 * measure_error(plain, weight_of("a"), x)


@pytest.mark.parametrize("layout", list(LayoutName))
@pytest.mark.parametrize("kernel", ["sm80", "sm90", TOKEN_FORMAT])
def test_a_linear_that_computed_is_stored_in_the_checkpoints_layout(layout: LayoutName, kernel: str) -> None:
    """On a GPU a linear puts its tensors into the order of that GPU's kernels before the layer's shard is written: a
    checkpoint for another target would hold those."""
    format = LinearFormat(128, K, 128, get_layout(layout), TransformKind.NONE, 1.0)
    codes = torch.randint(-7, 8, (128, K), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales = torch.rand(128, 2).half() + 0.1
    linear = pack(format, codes, scales, None, None, None)
    before = {name: tensor.clone() for name, tensor in stored("a", linear)}
    linear.prepare(kernel)
    after = dict(stored("a", linear))
    assert list(after) == list(before) == ["a.weight_packed", "a.weight_scale"]
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and torch.equal(after[name], tensor), name


@pytest.mark.parametrize(
    ("rows", "processes", "expected"),
    [
        ((512, 128, 128), 1, [[512], [128], [128]]),
        ((512, 128, 128), 2, [[512, 128, 128]]),  # 384 each
        ((256, 256, 256), 2, [[256, 256], [256]]),
        ((384, 384), 2, [[384, 384]]),
        ((128,) * 5, 2, [[128, 128], [128, 128], [128]]),
    ],
)
def test_no_process_rounds_more_rows_at_once_than_the_largest_has(
    rows: tuple[int, ...], processes: int, expected: list[list[int]]
) -> None:
    form = planned("a", TransformKind.NONE).format
    linears = [PlannedLinear(f"{number}", 0, 0, replace(form, out_features=n)) for number, n in enumerate(rows)]
    found = [[each.format.out_features for each in together] for together in rounded_together(linears, processes)]
    assert found == expected
