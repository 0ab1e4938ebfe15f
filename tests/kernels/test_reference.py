"""The float64 reference of 8-bit activations and of error feedback, against the format's text written out number by number."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from apex4_quant.format.feedback import clip_row, pack_feedback
from apex4_quant.kernels import reference
from apex4_quant.kernels.hadamard import hadamard_128
from apex4_quant.transforms.learned_transform import round_to_halves


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_to_even(value: Fraction) -> int:
    return round(value)  # Python's rounding of fractions is


def test_tokens_number_by_number() -> None:
    x = torch.randn(3, 256, generator=generator(1)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    x[1, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # with a scale of 1: ties
    codes, scales = reference.quantize_token(x, hadamard=False)
    for row in range(3):
        largest = max(abs(Fraction(float(value))) for value in x[row])
        scale = Fraction(float(torch.tensor(float(largest / 127), dtype=torch.float32)))
        assert Fraction(float(scales[row])) == scale
        expected = [min(127, max(-127, half_to_even(Fraction(float(value)) / scale))) for value in x[row]]
        assert codes[row].tolist() == expected
    assert codes[1, :4].tolist() == [127, 0, 2, -2]


def test_tokens_are_transformed_first() -> None:
    x, matrix = torch.randn(4, 256, generator=generator(1)), torch.randn(2, 128, 128, generator=generator(2))
    h = hadamard_128(torch.float64, x.device)
    for how, matrices in (({"hadamard": True}, [h, h]), ({"matrix": matrix}, list(matrix.double()))):
        plain = torch.cat([part.double() @ each for part, each in zip(x.split(128, 1), matrices, strict=True)], 1)
        for found, expected in zip(
            reference.quantize_token(x, **how), reference.quantize_token(plain, hadamard=False), strict=True
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_folded_weights_and_their_product_number_by_number(groups: int) -> None:
    n, k = 5, 128 * groups
    codes_w = torch.randint(-7, 8, (n, k), dtype=torch.int8, generator=generator(1))
    scale_w = (torch.rand(n, groups, generator=generator(2)) + 0.01).half()
    codes_a = torch.randint(-127, 128, (2, k), generator=generator(3))
    scale_a, bias = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.randn(n, generator=generator(4))
    folded, unit = reference.fold(codes_w, scale_w)
    y = reference.folded_linear(codes_a, scale_a, folded, unit, bias)
    for row in range(n):
        scales = [Fraction(float(value)) for value in scale_w[row]]
        ratios = [half_to_even(4608 * scale / max(scales)) for scale in scales]
        worth = [
            (1 if code > 0 else -1) * ((abs(code) * ratios[column // 128] + 128) // 256)
            for column, code in enumerate(codes_w[row].tolist())
        ]
        assert folded[row].tolist() == worth
        assert float(unit[row]) == float(torch.tensor(float(max(scales) / 18), dtype=torch.float32))
        for token in range(2):
            total = sum(a * w for a, w in zip(codes_a[token].tolist(), worth, strict=True))
            expected = total * float(scale_a[token]) * float(unit[row]) + float(bias[row])
            assert abs(float(y[token, row]) - expected) <= 1e-12 * (abs(expected) + 1)


@pytest.mark.parametrize("groups", [1, 3])
def test_weights_that_are_not_folded_number_by_number(groups: int) -> None:
    n, k = 4, 128 * groups
    codes_w = torch.randint(-7, 8, (n, k), dtype=torch.int8, generator=generator(1))
    scale_w = (torch.rand(n, groups, generator=generator(2)) + 0.01).half()
    codes_a = torch.randint(-127, 128, (2, k), generator=generator(3))
    scale_a, bias = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.randn(n, generator=generator(4))
    y = reference.unfolded_linear(codes_a, scale_a, codes_w, *reference.ratios(scale_w), bias)
    for row in range(n):
        scales = [Fraction(float(value)) for value in scale_w[row]]
        ratios = [half_to_even(4608 * scale / max(scales)) for scale in scales]
        unit = Fraction(float(torch.tensor(float(max(scales) / 18), dtype=torch.float32)))
        for token in range(2):
            products = zip(codes_a[token].tolist(), codes_w[row].tolist(), strict=True)
            total = sum(a * w * ratios[column // 128] for column, (a, w) in enumerate(products))
            expected = Fraction(float(scale_a[token])) * unit / 256 * total + Fraction(float(bias[row]))
            assert abs(float(y[token, row]) - float(expected)) <= 1e-12 * (abs(float(expected)) + 1)


def test_a_reader_that_folds_and_one_that_does_not_stay_within_the_bound() -> None:
    """docs/format.md: 0.52 units a weight from q s_w, for both; and so their outputs."""
    codes_w = torch.randint(-7, 8, (64, 2048), dtype=torch.int8, generator=generator(1))
    scale_w = (0.02 * torch.exp(-6 * torch.rand(64, 16, generator=generator(2)))).half()
    codes_a = torch.randint(-127, 128, (3, 2048), generator=generator(3))
    scale_a = torch.tensor([1.0, 2.0, 0.25], dtype=torch.float64)
    ratio, unit = reference.ratios(scale_w)
    folded, unit_of_folded = reference.fold(codes_w, scale_w)
    assert torch.equal(unit, unit_of_folded)
    exact = (codes_w.double().unflatten(1, (16, -1)) * scale_w.double()[..., None]).flatten(1)
    unfolded = (codes_w.double().unflatten(1, (16, -1)) * ratio.double()[..., None]).flatten(1) * unit[:, None] / 256
    off = ((folded * unit[:, None] - exact).abs() / unit[:, None]).max()
    assert 0.45 < off <= 0.52 and ((unfolded - exact).abs() / unit[:, None]).max() <= 7 / 512 + 1e-5
    one = reference.folded_linear(codes_a, scale_a, folded, unit)
    other = reference.unfolded_linear(codes_a, scale_a, codes_w, ratio, unit)
    bound = 0.52 * scale_a[:, None] * unit * codes_a.abs().sum(1, keepdim=True)
    assert ((one - other).abs() <= bound).all() and ((one - other).abs() > 1e-4 * bound).any()


# --- error feedback ---------------------------------------------------------------------------------------------------


def by_the_words_of_the_format(
    units: list[float], feedback: list[list[float]], lowest: int = -7
) -> tuple[list[int], list[float]]:
    """One block of one token: docs/format.md, section 2, column by column, G in step order. Codes, and what was rounded to them."""
    step = [column // 4 % 8 for column in range(128)]
    place = [16 * step[column] + 4 * (column // 32) + column % 4 for column in range(128)]
    codes, values = [0] * 128, list(units)
    for now in range(7, -1, -1):
        for column in range(128):
            if step[column] != now:
                continue
            for later in range(128):
                if step[later] > now:
                    error = codes[later] - values[later]
                    values[column] += error * feedback[place[later]][place[column]]
            codes[column] = min(7, max(lowest, round(values[column])))
    return codes, values


def random_feedback(blocks: int, seed: int) -> torch.Tensor:
    """G as it may be stored, in step order; large enough that some values are clamped."""
    steps = torch.arange(128) // 16
    return round_to_halves(0.2 * torch.randn(blocks, 128, 128, generator=generator(seed))) * (steps[:, None] > steps)


@pytest.mark.parametrize("clip", [1.0, 0.75])
def test_feedback_column_by_column(clip: float) -> None:
    x, feedback = torch.randn(3, 256, generator=generator(1)), random_feedback(2, 2)
    transform = round_to_halves(torch.randn(2, 128, 128, generator=generator(3)))
    matrix = torch.cat((transform, pack_feedback(feedback)), 1)
    codes, scale = reference.quantize_activation(x, 128, clip, False, matrix)
    plain, plain_scale = reference.quantize_activation(x, 128, clip, False, transform)
    assert torch.equal(scale, plain_scale) and (codes != plain).double().mean() > 0.1
    assert (codes == plain)[:, torch.arange(256) // 4 % 8 == 7].all(), "step 7 is rounded as without"
    for row in range(3):
        for block in range(2):
            own = slice(128 * block, 128 * block + 128)
            units = x[row, own].double() @ transform[block].double() / scale[row, block]
            expected, _ = by_the_words_of_the_format(units.tolist(), feedback[block].tolist())
            assert codes[row, own].tolist() == expected
    assert int(codes.abs().max()) == 7


def test_sixteen_levels_column_by_column() -> None:
    x, feedback = torch.randn(6, 256, generator=generator(1)), random_feedback(2, 2)
    transform = round_to_halves(torch.randn(2, 128, 128, generator=generator(3)))
    clips = [1.0625, 0.75]
    matrix = torch.cat((transform, pack_feedback(feedback), clip_row(torch.tensor(clips).half())), 1)
    codes, scale = reference.quantize_activation(x, 128, 1.0, False, matrix)
    assert bool((scale > 0).any()) and bool((scale < 0).any()) and int(codes.min()) == -8 and int(codes.max()) == 7
    for row in range(6):
        for block in range(2):
            own = slice(128 * block, 128 * block + 128)
            values = (x[row, own].double() @ transform[block].double()).tolist()
            largest = max(values, key=abs)
            expected_scale = -clips[block] * largest / 8
            assert float(scale[row, block]) == pytest.approx(expected_scale, rel=1e-7)
            expected, _ = by_the_words_of_the_format(
                [value / float(scale[row, block]) for value in values], feedback[block].tolist(), -8
            )
            assert codes[row, own].tolist() == expected


def test_scales_of_sixteen_levels_by_hand() -> None:
    """T is 1, G is 0. Of two values of one magnitude the negative one counts; where all are zero the scale is the floor's."""
    matrix = torch.cat((torch.eye(128)[None], torch.zeros(1, 56, 128), clip_row(torch.ones(1))), 1)
    x = torch.zeros(4, 128)
    x[0, :3] = torch.tensor([4.0, -4.0, 3.75])
    x[1, :3] = torch.tensor([4.0, -3.0, 0.26])
    x[2, :2] = torch.tensor([-4.0, 3.9])
    codes, scale = reference.quantize_activation(x, 128, 1.0, False, matrix)
    assert scale[:, 0].abs().tolist() == [0.5, 0.5, 0.5, 2.0**-100] and (scale[:3, 0] > 0).tolist() == [
        True,
        False,
        True,
    ]
    assert (
        codes[0, :3].tolist() == [7, -8, 7]
        and codes[1, :3].tolist() == [-8, 6, -1]
        and codes[2, :2].tolist() == [-8, 7]
    )
    assert not codes[3].any()


def test_values_that_given_codes_were_rounded_from() -> None:
    """Also of codes that nobody would have rounded to: what is left of every error goes on."""
    units, feedback = 3 * torch.randn(2, 1, 128, generator=generator(1)).double(), random_feedback(1, 2).double()
    codes, values = reference.round_with_feedback(units, feedback)
    again, same = reference.round_with_feedback(units, feedback, codes)
    assert torch.equal(again, codes) and torch.equal(same, values)
    codes[0, 0, 28] += 1  # of step 7
    _, moved = reference.round_with_feedback(units, feedback, codes)
    assert torch.equal(moved[1], values[1]) and float(moved[0, 0, 28]) == float(values[0, 0, 28])
    # Step 6 has one later error more; columns 24 + 32 i + e of it are places 96 + 4 i + e.
    assert torch.allclose(moved[0, 0, 24:28] - values[0, 0, 24:28], feedback[0, 112, 96:100], atol=1e-12)
    rounded, values16 = reference.round_with_feedback(units, feedback, error_dtype=torch.bfloat16)
    errors = (rounded[..., 28] - values16[..., 28]).bfloat16().double()
    assert not torch.equal(errors, rounded[..., 28] - values16[..., 28])


def test_eight_bits_have_no_feedback() -> None:
    x, transform = torch.randn(4, 256, generator=generator(1)), torch.randn(2, 128, 128, generator=generator(2))
    matrix = torch.cat((transform, torch.full((2, 56, 128), 3.0)), 1)
    for found, expected in zip(
        reference.quantize_token(x, False, matrix), reference.quantize_token(x, False, transform), strict=True
    ):
        assert torch.equal(found, expected)
