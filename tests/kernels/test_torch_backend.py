"""The PyTorch backend against the float64 reference; exactness of the integer part and of the two-FFMA dequantization."""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.format.feedback import clip_row, feedback_of, transform_of
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.kernels import ops, reference, torch_backend
from apex4_quant.kernels.hadamard import apply_block_hadamard, apply_block_matrix, hadamard_128
from apex4_quant.kernels.operands import unpack_activations
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.transforms.learned_transform import round_to_halves

EPS = 2.0**-24  # half a unit in the last place of float32
MAX_SUM = 128 * 7 * 7  # 6272, the largest integer sum of a group of 128


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def random_scales(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 1e-3).half()


def code_inputs(m: int, k: int, group: int, seed: int = 0) -> torch.Tensor:
    """Integers in [-7, 7] with a +-7 in every group, so that s_a is 1 and quantization is the identity."""
    x = random_codes(m, k, seed=seed).float()
    x[:, ::group] = torch.where(x[:, ::group] < 0, -7.0, 7.0)
    return x


# --- the reference itself, against plain Python -----------------------------------------------------------------------


def test_reference_is_the_formula() -> None:
    m, n, k, group = 3, 4, 256, 128
    qa, qw = random_codes(m, k, seed=1), random_codes(n, k, seed=2)
    sa, sw, bias = normal(m, 2, seed=3).abs().double(), random_scales(n, 2, seed=4), normal(n, seed=5)
    sums, y = reference.group_sums(qa, qw, group), reference.linear(qa, sa, qw, sw, bias)
    a, w = qa.tolist(), qw.tolist()
    for i in range(m):
        for j in range(n):
            total = float(bias[j])
            for g in range(2):
                exact = sum(a[i][c] * w[j][c] for c in range(group * g, group * (g + 1)))
                assert int(sums[i, j, g]) == exact
                total += float(sa[i, g]) * float(sw[j, g]) * exact
            assert float(y[i, j]) == pytest.approx(total, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("module", [reference, torch_backend])
def test_activation_quantizer_on_a_known_group(module: ModuleType) -> None:
    x = torch.zeros(1, 128)
    x[0, :8] = torch.tensor([7.0, -7.0, 0.5, 1.5, 2.5, -0.5, 6.49, -3.51])  # ties go to even
    codes, scale = module.quantize_activation(x, 128, hadamard=False)
    assert scale.tolist() == [[1.0]]
    assert codes.flatten()[:8].tolist() == [7, -7, 0, 2, 2, 0, 6, -4]
    codes, scale = module.quantize_activation(x, 128, clip=0.5, hadamard=False)
    assert scale.tolist() == [[0.5]]
    assert codes.flatten()[:8].tolist() == [7, -7, 1, 3, 5, -1, 7, -7]


def test_reference_scale_is_the_float32_that_is_stored() -> None:
    _, scale = reference.quantize_activation(torch.full((1, 128), 1.0), 128, hadamard=False)
    assert scale.dtype == torch.float64 and float(scale) == float(np.float32(1 / 7)) != 1 / 7


# --- the Hadamard transform -------------------------------------------------------------------------------------------


def test_hadamard_is_sylvesters_and_orthonormal() -> None:
    matrix = hadamard_128(torch.float64, torch.device("cpu"))
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)], dtype=torch.float64)
    torch.testing.assert_close(matrix, signs / 128**0.5, rtol=1e-15, atol=0)
    assert torch.equal(matrix, matrix.t())
    torch.testing.assert_close(matrix @ matrix, torch.eye(128, dtype=torch.float64), rtol=0, atol=1e-14)


def test_hadamard_preserves_the_linear_map() -> None:
    x, w = normal(5, 384, seed=1).double(), normal(7, 384, seed=2).double()
    torch.testing.assert_close(apply_block_hadamard(x) @ apply_block_hadamard(w).t(), x @ w.t(), rtol=0, atol=1e-11)
    torch.testing.assert_close(apply_block_hadamard(apply_block_hadamard(x)), x, rtol=0, atol=1e-13)
    one_hot = torch.zeros(1, 384, dtype=torch.float64)
    one_hot[0, 200] = 1
    spread = apply_block_hadamard(one_hot)
    assert not spread[0, :128].any() and not spread[0, 256:].any()
    torch.testing.assert_close(spread[0, 128:256].abs(), torch.full((128,), 128**-0.5, dtype=torch.float64))


# --- activation quantization ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize(("k", "group", "clip"), [(384, 128, 1.0), (512, 256, 0.9), (1152, 1152, 0.75)])
def test_activation_codes_equal_the_reference_except_at_ties(
    dtype: torch.dtype, hadamard: bool, k: int, group: int, clip: float
) -> None:
    x = normal(64, k, seed=k)
    x[:, ::37] *= 20  # outlier channels
    x = (x * torch.logspace(-3, 2, 64)[:, None]).to(dtype)
    codes, scale = torch_backend.quantize_activation(x, group, clip, hadamard)
    expected, expected_scale = reference.quantize_activation(x, group, clip, hadamard)
    assert codes.shape == (64, k // group, group) and scale.dtype == torch.float32
    tolerance = 4e-6 if hadamard else 4 * EPS
    torch.testing.assert_close(scale.double(), expected_scale, rtol=tolerance, atol=0)
    transformed = apply_block_hadamard(x.double()) if hadamard else x.double()
    exact = transformed.unflatten(-1, (-1, group)) / expected_scale[..., None]
    at_tie = ((exact.abs() % 1) - 0.5).abs() < (1e-4 if hadamard else 1e-5)
    difference = (codes.double() - expected.unflatten(-1, (-1, group))).abs()
    assert int(difference.max()) <= 1
    assert not bool((difference[~at_tie] > 0).any())
    assert float(codes.abs().max()) == 7
    # bfloat16 and float16 land on ties by themselves; float32 does not.
    assert dtype != torch.float32 or float(at_tie.double().mean()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_depend_on_the_values_of_x_not_on_its_dtype(dtype: torch.dtype) -> None:
    x, codes_w, scale_w = normal(9, 256).to(dtype), random_codes(10, 256), random_scales(10, 2)
    for narrow, wide in zip(
        torch_backend.quantize_activation(x, 128), torch_backend.quantize_activation(x.float(), 128), strict=True
    ):
        assert torch.equal(narrow, wide)
    y = torch_backend.linear(x, codes_w, scale_w)
    assert y.dtype == dtype
    assert torch.equal(y, torch_backend.linear(x.float(), codes_w, scale_w).to(dtype))


def with_feedback(k: int, sixteen: bool = False) -> torch.Tensor:
    """Matrices of an input of K features as they are stored, float16 [K / 128 rounded up, 184 or 185, 128]."""
    matrix = torch.cat((normal(-(-k // 128), 128, 128, seed=7), 0.1 * normal(-(-k // 128), 56, 128, seed=8)), 1)
    if sixteen:
        matrix = torch.cat((matrix, clip_row(1.05 - 0.1 * torch.arange(len(matrix)))), 1)
    return round_to_halves(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "k", "clip"), [(1, 200, 1.0), (70, 200, 0.8), (3, 1000, 0.9), (37, 1000, 1.0), (600, 128, 1.0)]
)
@pytest.mark.parametrize("sixteen", [False, True])
def test_codes_with_feedback_are_what_the_reference_rounds(
    dtype: torch.dtype, m: int, k: int, clip: float, sixteen: bool
) -> None:
    """A code on the other side of a tie moves those that follow: the reference goes on from the codes that were made."""
    x, matrix, clip = normal(m, k, seed=k + m).to(dtype), with_feedback(k, sixteen), 1.0 if sixteen else clip
    padded = matrix.shape[0] * 128
    operands = ops.quantize(x, matrix, padded, 128, clip, False, "sm80")
    codes, scale = unpack_activations(*operands, m, "sm80")
    whole = torch.nn.functional.pad(x, (0, padded - k))
    direct, _ = torch_backend.quantize_activation(whole, 128, clip, False, matrix)
    assert torch.equal(direct.flatten(1).to(torch.int8), codes)
    expected, expected_scale = reference.quantize_activation(whole, 128, clip, False, matrix)
    torch.testing.assert_close(scale.double(), expected_scale, rtol=4e-6, atol=0)
    transformed = apply_block_matrix(whole.double(), transform_of(matrix).double()).unflatten(1, (-1, 128))
    feedback = feedback_of(matrix.double())
    assert feedback is not None
    units = transformed / expected_scale[..., None]
    _, values = reference.round_with_feedback(units, feedback, codes.unflatten(1, (-1, 128)))
    assert int(codes.min()) >= (-8 if sixteen else -7) and (int(codes.min()) == -8) == sixteen
    difference = (codes.double().unflatten(1, (-1, 128)) - values.round().clamp(-8 if sixteen else -7, 7)).abs()
    at_tie = ((values.abs() % 1) - 0.5).abs() < 1e-4
    assert not bool((difference[~at_tie] > 0).any()) and float(at_tie.double().mean()) < 2e-3
    assert float((codes == expected).double().mean()) > 0.97


@pytest.mark.parametrize("sixteen", [False, True])
def test_feedback_is_no_part_of_eight_bits(sixteen: bool) -> None:
    x, matrix, weights = normal(5, 200), with_feedback(200, sixteen), (random_codes(10, 256), random_scales(10, 2))
    how = {"hadamard": False, "clip": 1.0}
    for bits, same in ((8, True), (4, False)):
        found = torch_backend.linear(x, *weights, matrix=matrix, activation_bits=bits, **how)
        without = torch_backend.linear(x, *weights, matrix=transform_of(matrix), activation_bits=bits, **how)
        assert torch.equal(found, without) == same
    padded = torch.nn.functional.pad(x, (0, 56))
    for found, without in zip(
        torch_backend.quantize_token(padded, False, matrix),
        torch_backend.quantize_token(padded, False, transform_of(matrix)),
        strict=True,
    ):
        assert torch.equal(found, without)


@pytest.mark.parametrize("sixteen", [False, True])
def test_nan_is_seen_and_stays_in_its_token_with_feedback(sixteen: bool) -> None:
    x, matrix, weights = normal(3, 256), with_feedback(256, sixteen), (random_codes(10, 256), random_scales(10, 2))
    clean = torch_backend.linear(x, *weights, hadamard=False, matrix=matrix)
    x[1, 130] = float("nan")
    y = torch_backend.linear(x, *weights, hadamard=False, matrix=matrix)
    assert bool(y[1].isnan().all()) and torch.equal(y[::2], clean[::2])
    x[1, 130] = 0
    x[1] *= 0
    assert not torch_backend.linear(x, *weights, hadamard=False, matrix=matrix)[1].any()


def test_zero_group_gets_the_floor_scale_and_zero_codes() -> None:
    x = torch.zeros(2, 256)
    x[1, 128:] = 3.5
    for module in (torch_backend, reference):
        codes, scale = module.quantize_activation(x, 128, hadamard=False)
        assert scale.double().tolist() == [[2.0**-100, 2.0**-100], [2.0**-100, 0.5]]
        assert not codes.flatten(1)[:, :128].any() and (codes.flatten(1)[1, 128:] == 7).all()


# --- the GEMM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k", "group"),
    [(3, 5, 128, 128), (3, 17, 14336, 128), (2, 9, 14336, 256), (4, 6, 4096, 512), (2, 3, 14336, 14336), (1, 2, 384, 384)],
)  # fmt: skip
@pytest.mark.parametrize("adversarial", [False, True])
def test_integer_part_is_exact(m: int, n: int, k: int, group: int, adversarial: bool) -> None:
    x, codes_w = code_inputs(m, k, group), random_codes(n, k, seed=1)
    if adversarial:  # every product +49 in row 0 of the weight, -49 in row 1
        x, codes_w = torch.full((m, k), 7.0), torch.full((n, k), 7, dtype=torch.int8)
        codes_w[1::2] = -7
        x[1::2] = -7
    quantized, scale = torch_backend.quantize_activation(x, group, hadamard=False)
    assert torch.equal(scale, torch.ones(m, k // group)) and torch.equal(quantized.flatten(1), x)
    y = torch_backend.linear(x, codes_w, torch.ones(n, k // group, dtype=torch.float16), hadamard=False)
    exact = x.long() @ codes_w.long().t()
    assert torch.equal(y.double(), exact.double())
    assert torch.equal(reference.group_sums(x, codes_w, group).sum(-1), exact)
    if adversarial:
        assert int(exact[0, 0]) == 49 * k == -int(exact[0, 1])


def test_one_group_times_scale_is_exact_in_float32() -> None:
    x, codes_w = code_inputs(50, 128, 128), random_codes(300, 128, seed=1)
    x[0], codes_w[0] = 7, 7
    scale_w = torch.randint(1, 0x7C00, (300, 1), generator=torch.Generator().manual_seed(2)).short().view(torch.float16)
    y = torch_backend.linear(x, codes_w, scale_w, hadamard=False)
    assert torch.equal(y.double(), (x.double() @ codes_w.double().t()) * scale_w.double().t())


@pytest.mark.parametrize("m", [1, 3, 2049])
@pytest.mark.parametrize("k", [384, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_equals_the_reference_on_its_own_operands(m: int, k: int, dtype: torch.dtype) -> None:
    n, padded_k = 23, 384
    x = (normal(m, k, seed=m) * torch.logspace(-2, 1, m)[:, None]).to(dtype)
    codes_w, scale_w, bias = random_codes(n, padded_k), random_scales(n, 3), normal(n, seed=9).to(dtype)
    y = torch_backend.linear(x, codes_w, scale_w, bias, clip=0.95)
    assert y.dtype == dtype and y.shape == (m, n)
    padded = torch.nn.functional.pad(x, (0, padded_k - k))
    codes, scale = torch_backend.quantize_activation(padded, 128, 0.95)
    codes = codes.flatten(1)
    expected = reference.linear(codes, scale, codes_w, scale_w, bias)
    sums = reference.group_sums(codes, codes_w, 128).double()
    size = torch.einsum("mng,mg,ng->mn", sums.abs(), scale.double(), scale_w.double()) + bias.double().abs()
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    bound = 10 * EPS * size + unit * expected.abs() + (2.0**-24 if dtype == torch.float16 else 0.0)
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_linear_keeps_leading_dimensions_and_takes_no_rows() -> None:
    x, codes_w, scale_w = normal(2, 3, 256), random_codes(5, 256), random_scales(5, 2)
    y = torch_backend.linear(x, codes_w, scale_w)
    assert y.shape == (2, 3, 5)
    assert torch.equal(y.reshape(6, 5), torch_backend.linear(x.reshape(6, 256), codes_w, scale_w))
    assert torch_backend.linear(x[:0], codes_w, scale_w).shape == (0, 3, 5)
    assert torch_backend.linear(x[0, 0], codes_w, scale_w).shape == (5,)


def test_padding_of_k_is_zeros_of_the_untransformed_input() -> None:
    x, codes_w, scale_w = normal(4, 200), random_codes(5, 256), random_scales(5, 2)
    padded = torch.cat((x, torch.zeros(4, 56)), 1)
    assert torch.equal(torch_backend.linear(x, codes_w, scale_w), torch_backend.linear(padded, codes_w, scale_w))


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_row_gives_the_bias(hadamard: bool, dtype: torch.dtype) -> None:
    x, bias = normal(3, 256).to(dtype), normal(5).to(dtype)
    x[1] = 0
    y = torch_backend.linear(x, random_codes(5, 256), random_scales(5, 2), bias, hadamard=hadamard)
    assert torch.equal(y[1], bias) and not torch.equal(y[0], bias)
    assert not torch_backend.linear(x, random_codes(5, 256), random_scales(5, 2), hadamard=hadamard)[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("hadamard", [False, True])
def test_damage_in_a_token_stays_in_that_token_and_shows(bad: float, hadamard: bool) -> None:
    x, codes_w, scale_w = normal(5, 384), random_codes(9, 384), random_scales(9, 3)
    good = torch_backend.linear(x, codes_w, scale_w, hadamard=hadamard)
    x[2, 200] = bad
    y = torch_backend.linear(x, codes_w, scale_w, hadamard=hadamard)
    assert bool(torch.isnan(y[2]).all())
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], good[keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hadamard", [False, True])
def test_huge_and_tiny_inputs(dtype: torch.dtype, hadamard: bool) -> None:
    codes_w, scale_w = random_codes(9, 256), random_scales(9, 2)
    x = normal(4, 256).to(dtype)
    plain = torch_backend.linear(x, codes_w, scale_w, hadamard=hadamard).double()
    huge = torch_backend.linear(x * 1e30, codes_w, scale_w, hadamard=hadamard).double()
    rows = torch.linalg.vector_norm(plain, dim=1)
    assert bool(torch.isfinite(huge).all())
    torch.testing.assert_close(torch.linalg.vector_norm(huge, dim=1) / 1e30, rows, rtol=0.05, atol=0)
    tiny = torch_backend.linear(x * 1e-30, codes_w, scale_w, hadamard=hadamard).double()
    assert bool(torch.isfinite(tiny).all()) and float(tiny.abs().max()) < 1e-27
    assert not torch_backend.linear(x * 1e-36, codes_w, scale_w, hadamard=hadamard).any()


def test_autocast_does_not_touch_the_integer_part() -> None:
    x, codes_w, scale_w = code_inputs(3, 256, 128), random_codes(9, 256, seed=1), random_scales(9, 2)
    expected = torch_backend.linear(x, codes_w, scale_w, hadamard=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch_backend.linear(x, codes_w, scale_w, hadamard=False)
    assert torch.equal(y, expected)


# --- exactness of the dequantization by two FFMA (docs/kernels.md, section 6) -----------------------------------------


def _two_ffma(sums: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """t = fma(f, s, -12582912 s), f the float whose bits are 0x4B400000 + n. In float64 the fma's inside is exact."""
    f = (np.int32(0x4B400000) + sums.astype(np.int32)).view(np.float32)
    s = scale.astype(np.float32)
    offset = np.float32(-12582912) * s
    assert np.array_equal(offset.astype(np.float64), -12582912 * s.astype(np.float64))  # itself exact
    return (f.astype(np.float64) * s.astype(np.float64) + offset.astype(np.float64)).astype(np.float32)


def _some_float16(kind: str) -> np.ndarray:
    if kind == "all mantissas":
        return (1.0 + np.arange(1024) / 1024).astype(np.float16)
    if kind == "all subnormals":
        return np.arange(1, 1024, dtype=np.uint16).view(np.float16)
    return np.random.default_rng(0).integers(1, 0x7C00, 500, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("kind", ["all mantissas", "all subnormals", "random"])
def test_scale_times_integer_and_two_ffma_are_exact(kind: str) -> None:
    scale = _some_float16(kind)
    sums = np.arange(-MAX_SUM, MAX_SUM + 1)[:, None]
    for part in np.array_split(scale, 8):
        exact = sums * part.astype(np.float64)
        product = sums.astype(np.float32) * part.astype(np.float32)
        assert product.dtype == np.float32 and np.array_equal(product.astype(np.float64), exact)
        assert np.array_equal(_two_ffma(sums, part[None]).astype(np.float64), exact)


def test_float64_emulates_the_fma_with_one_rounding() -> None:
    random = np.random.default_rng(1)
    scale = random.integers(1, 0x7C00, 2000, dtype=np.uint16).view(np.float16)
    sums = random.integers(-MAX_SUM, MAX_SUM + 1, 2000)
    fused = _two_ffma(sums, scale)
    for n, s, t in zip(sums.tolist(), scale.tolist(), fused.tolist(), strict=True):
        exact = Fraction(12582912 + n) * Fraction(s) - 12582912 * Fraction(s)
        assert exact == n * Fraction(s) == Fraction(t)


def test_a_scale_of_12_bits_would_not_be_exact() -> None:
    scale, n = np.float32(1 + 2.0**-13), np.float32(MAX_SUM - 1)  # shows that the property test can fail
    assert float(n * scale) != float(n) * float(scale)


# --- the layer --------------------------------------------------------------------------------------------------------


def make_layer(
    layout: str, bias: bool = True, transform: str = "hadamard128"
) -> tuple[Apex4Linear, torch.Tensor, torch.Tensor]:
    format = LinearFormat(70, 200, 128, get_layout(layout), transform, 0.9)
    codes, scales = random_codes(70, 256), random_scales(70, 2)
    return Apex4Linear.from_codes(format, codes, scales, normal(70) if bias else None), codes, scales


@pytest.mark.parametrize("layout", ["rowmajor", "sm80"])
@pytest.mark.parametrize(("bias", "hadamard"), [(False, True), (True, False), (True, True)])
def test_layer_is_the_backend_on_its_stored_tensors(layout: str, bias: bool, hadamard: bool) -> None:
    layer, codes, scales = make_layer(layout, bias, "hadamard128" if hadamard else "none")
    x = normal(2, 3, 200)
    assert layer.weight_packed.shape == layer.format.packed_shape
    assert layer.weight_scale.shape == layer.format.scale_shape
    assert torch.equal(layer(x), torch_backend.linear(x, codes, scales, layer.bias, clip=0.9, hadamard=hadamard))
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", *(["bias"] if bias else [])}


def test_casting_the_layer_keeps_the_stored_tensors() -> None:
    layer, codes, scales = make_layer("sm80")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        layer.to(dtype)
        assert layer.weight_scale.dtype == torch.float16 and layer.weight_packed.dtype == torch.uint8
        assert torch.equal(layer.scales(), scales) and torch.equal(layer.codes(), codes)
        assert layer.bias.dtype == dtype


def test_require_legal_names_the_damaged_tensor() -> None:
    layer, _, _ = make_layer("sm80")
    layer.require_legal("block.0.up")
    layer.weight_packed.data.view(-1)[5] = 0x80
    with pytest.raises(Apex4Error, match=r"block\.0\.up\.weight_packed"):
        layer.require_legal("block.0.up")
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        layer, _, _ = make_layer("sm80")
        layer.weight_scale.data.view(-1)[-1] = bad
        with pytest.raises(Apex4Error, match=r"block\.0\.up\.weight_scale"):
            layer.require_legal("block.0.up")


@pytest.mark.parametrize("rows", [1, 255, 256, 700])
def test_linears_that_read_one_input_compute_what_each_computes_alone(rows: int) -> None:
    x = torch.randn(rows, 1000).bfloat16()
    matrix = torch.randn(8, 128, 128)
    weights = [(random_codes(n, 1024), random_scales(n, 8), bias) for n, bias in ((5, None), (40, torch.randn(40)))]
    together = torch_backend.linears(x, weights, 0.9, False, matrix)
    for (codes, scales, bias), y in zip(weights, together, strict=True):
        assert torch.equal(y, torch_backend.linear(x, codes, scales, bias, 0.9, False, matrix))


def test_a_cpu_passes_over_rows_in_pieces_that_fit_its_cache() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for width in (128, 768, 4096, 28672):
        ranges = list(torch_backend.row_ranges(5000, width, cpu))
        steps = {piece.stop - piece.start for piece in ranges}
        assert len(steps) == 1 and [piece.start for piece in ranges[1:]] == [piece.stop for piece in ranges[:-1]]
        (step,) = steps
        assert step <= 2048 and (step * width <= 2**18 or step == 256)
        assert next(torch_backend.row_ranges(5000, width, cuda)) == slice(0, 2048)


def test_sums_are_exact_with_the_weights_scale_in_them() -> None:
    """Every scale's mantissa is full: a sum of 128 products is an integer of 24 bits times a power of two."""
    codes_w, x = random_codes(300, 128), random_codes(70, 128).float()
    codes_w[0], x[0], x[:, 5] = 7, 7, 7
    _, scale_a = torch_backend.quantize_activation(x, 128, hadamard=False)
    assert bool((scale_a == 1).all())
    scale_w = torch.ldexp(torch.full((300, 1), 2047.0), -torch.randint(1, 24, (300, 1))).half()
    assert bool((torch.frexp(scale_w.float())[0] * 2048 == 2047).all())
    y = torch_backend.linear(x, codes_w, scale_w, hadamard=False)
    assert torch.equal(y.double(), (x.double() @ codes_w.double().t()) * scale_w.double().t())
    assert y[0, 0] == 49 * 128 * scale_w[0].double()
