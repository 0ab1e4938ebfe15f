"""The operators as torch sees them: opcheck, autocast, and operands that do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels import cuda_ops, ops
from apex4_quant.kernels.operands import FORMATS, TOKEN_FORMAT, fold_scales, layout_of_format


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator(seed))


def right_numbers(format: str) -> tuple[Any, ...]:
    """The last arguments, of inputs of 300 features."""
    return (None, 384, 384, 1.0, True, format) if format == TOKEN_FORMAT else (None, 384, 128, 0.9, True, format)


def right_weights(format: str, scale: torch.Tensor) -> tuple[Any, ...]:
    """weight_packed, weight_scale and weight_unit."""
    layout = layout_of_format(format)
    packed = layout.pack(random_codes(len(scale), 128 * scale.shape[1]))
    return packed, *(fold_scales(scale) if format == TOKEN_FORMAT else (layout.pack_scales(scale), None))


def samples() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for format in FORMATS:
        x, gain = torch.randn(5, 300).bfloat16(), torch.rand(300).bfloat16()
        matrix = torch.randn(3, 128, 128).half()
        how = right_numbers(format)
        yield ops.quantize, (x, *how)
        yield ops.quantize, (x, matrix, 384, 384, how[3], False, format)
        yield ops.rms_norm_quantize, (x, gain, 1e-5, 1.0, *how)
        yield ops.silu_mul_quantize, (x, x + 1, *how)
        weights = right_weights(format, torch.ones(70, 3).half())
        operands = ops.quantize(x, *how)
        yield ops.gemm, (*operands, *weights, torch.zeros(70), 5, 70, torch.bfloat16)
        yield ops.gemm, (*operands, *weights, None, 5, 70, torch.float16)
        yield ops.linear, (x, *weights, torch.zeros(70), 70, *how)
        yield ops.rms_norm_linear, (x, gain, 1e-5, 1.0, *weights, None, 70, *how)
        yield ops.silu_mul_linear, (x, x + 1, *weights, None, 70, *how)
        yield ops.add_rms_norm_linear, (x, x + 1, gain, 1e-5, 1.0, *weights, None, 70, *how)


@pytest.mark.parametrize("index", range(30))
def test_opcheck(index: int) -> None:
    operator, arguments = list(samples())[index]
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_does_not_touch_them(format: str) -> None:
    x = torch.randn(4, 256, generator=generator(1)).bfloat16()
    how = (None, 256, 256 if format == TOKEN_FORMAT else 128, 1.0, True, format)
    weights = right_weights(format, torch.ones(64, 2).half())

    def run() -> torch.Tensor:
        return ops.gemm(*ops.quantize(x, *how), *weights, None, 4, 64, torch.float16)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), expected)


# ---- operands that do not fit ----------------------------------------------------------------------------------------

M, N, K = 5, 70, 300


def operands(operator: str, format: str = "sm90") -> dict[str, Any]:
    """Right arguments, by name."""
    x = torch.randn(M, K, generator=generator(1)).bfloat16()
    how = dict(zip(("matrix", "k_padded", "group", "clip", "hadamard", "format"), right_numbers(format), strict=True))
    names = ("weight_packed", "weight_scale", "weight_unit")
    weights = dict(zip(names, right_weights(format, torch.ones(N, 3).half()), strict=True))
    weights["bias"] = torch.zeros(N)
    if operator == "gemm":
        codes, scales = ops.quantize(x, *how.values())
        return {"codes": codes, "scales": scales, **weights, "m": M, "n": N, "out": torch.bfloat16}
    first: dict[str, Any] = {"x": x} | ({"residual": x + 1} if operator == "add_rms_norm_linear" else {})
    if "rms_norm" in operator:
        first |= {"gain": torch.ones(K).bfloat16(), "eps": 1e-5, "gain_offset": 0.0}
    elif operator.startswith("silu_mul"):
        first = {"gate": x, "up": x + 1}
    return first | ({**weights, "n": N} if operator.endswith("linear") else {}) | how


def without_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[1:]


def gaps(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


QUANTIZE, LINEAR = (
    ("quantize", "rms_norm_quantize", "silu_mul_quantize"),
    ("linear", "rms_norm_linear", "silu_mul_linear", "add_rms_norm_linear"),
)
WRONG: list[tuple[tuple[str, ...], str, Any, str]] = [
    ((*QUANTIZE, *LINEAR), "k_padded", 256, "k_padded is 256, and a multiple of the group's 128 that holds the input's 300"),
    ((*QUANTIZE, *LINEAR), "k_padded", 400, "k_padded is 400"),
    ((*QUANTIZE, *LINEAR), "k_padded", -384, "k_padded is -384"),
    ((*QUANTIZE, *LINEAR), "group", 0, "group is 0, and a multiple of 128 is needed"),
    ((*QUANTIZE, *LINEAR), "group", 192, "group is 192"),
    ((*QUANTIZE, *LINEAR), "format", "sm70", "format is 'sm70', and one of sm80, sm90, s8 is needed"),
    ((*QUANTIZE, *LINEAR), "clip", 0.0, "clip is 0.0, and more than 0"),
    ((*QUANTIZE, *LINEAR), "matrix", torch.zeros(2, 128, 128), r"matrix is torch.float32 \[2, 128, 128\], and torch.float32 \[3"),
    ((*QUANTIZE, *LINEAR), "matrix", torch.zeros(3, 128, 256)[..., ::2], "without gaps"),
    ((*QUANTIZE, *LINEAR), "matrix", torch.zeros(2, 184, 128), r"matrix is torch.float32 \[2, 184, 128\], and torch.float32 \[3, 184, 128\]"),
    (("quantize", "linear"), "x", torch.zeros(2, 3, K).bfloat16(), r"the input's shape is \[2, 3, 300\], and \[M, K\]"),
    (("rms_norm_quantize", "rms_norm_linear"), "gain", without_row, r"gain is torch.bfloat16 \[299\], and torch.bfloat16 \[300\]"),
    (("rms_norm_quantize", "rms_norm_linear"), "gain", torch.Tensor.float, "gain is torch.float32"),
    (("add_rms_norm_linear",), "residual", without_row, r"residual is torch.bfloat16 \[4, 300\]"),
    (("add_rms_norm_linear",), "residual", torch.Tensor.float, "residual is torch.float32"),
    (("add_rms_norm_linear",), "gain", torch.Tensor.float, "gain is torch.float32"),
    (("silu_mul_quantize", "silu_mul_linear"), "up", without_row, r"up is torch.bfloat16 \[4, 300\]"),
    (("gemm", *LINEAR), "n", 129, "n is 129"),
    (("gemm", *LINEAR), "n", 0, "n is 0"),
    (("gemm", *LINEAR), "bias", without_row, r"bias is torch.float32 \[69\], and torch.float32 \[70\]"),
    (("gemm", *LINEAR), "bias", torch.Tensor.half, "bias is torch.float16"),
    (("gemm", *LINEAR), "weight_packed", lambda w: w[:, 1:], r"weight_packed is torch.uint8 \[2, 2, 4096\], and .*\[2, 3, 4096\]"),
    (("gemm", *LINEAR), "weight_packed", lambda w: w.view(torch.int8), "weight_packed is torch.int8"),
    (("gemm", *LINEAR), "weight_packed", gaps, "without gaps"),
    (("gemm", *LINEAR), "weight_scale", without_row, r"weight_scale is torch.float16 \[1, 3, 64\]"),
    (("gemm", *LINEAR), "weight_scale", torch.Tensor.float, "weight_scale is torch.float32"),
    (("gemm",), "m", 17, "m is 17, and 0 to the 16 rows of codes is needed"),
    (("gemm",), "m", -1, "m is -1"),
    (("gemm",), "codes", lambda codes: codes[..., :100], r"codes is torch.uint8 \[3, 16, 100\]"),
    (("gemm",), "scales", lambda scales: scales[:, 1:], r"scales is torch.float32 \[3, 15\]"),
    (("gemm",), "scales", lambda scales: scales[:2], "scales is"),
    (LINEAR, "weight_unit", torch.zeros(128), "weight_unit is given, and None with the format sm90 is needed"),
    (LINEAR, "format", "s8", "group is 128, and k_padded, 384, with the format s8"),
    (("gemm",), "weight_unit", torch.zeros(128), r"scales is torch.float32 \[3, 16\], and torch.float32 \[1, 16\]"),
]  # fmt: skip
WRONG_EIGHT: list[tuple[tuple[str, ...], str, Any, str]] = [
    ((*QUANTIZE, *LINEAR), "group", 128, "group is 128, and k_padded, 384, with the format s8 is needed"),
    ((*QUANTIZE, *LINEAR), "clip", 0.9, "clip is 0.9, and 1 with the format s8"),
    (LINEAR, "weight_unit", None, "weight_unit is None, and a unit with the format s8"),
    (("gemm",), "weight_unit", None, "weight_scale is torch.int16"),
    (("gemm", *LINEAR), "weight_unit", lambda unit: unit[:70], r"weight_unit is torch.float32 \[70\], and torch.float32 \[128\]"),
    (("gemm", *LINEAR), "weight_unit", torch.Tensor.double, "weight_unit is torch.float64"),
    (("gemm", *LINEAR), "weight_scale", torch.Tensor.half, "weight_scale is torch.float16 .*, and torch.int16"),
    (("gemm", *LINEAR), "weight_scale", lambda ratio: ratio[:, :2], r"weight_scale is .*, and torch.int16 \[2, groups of 3 blocks, 64\]"),
    (("gemm",), "codes", lambda codes: codes[..., :64], r"codes is torch.uint8 \[3, 16, 64\], and torch.uint8 \[K / 128, rows, 128\]"),
    (("gemm",), "scales", lambda scales: scales.repeat(3, 1), r"scales is torch.float32 \[3, 16\], and torch.float32 \[1, 16\]"),
]  # fmt: skip
CASES = [
    (implementation, format, operator, argument, wrong, says)
    for format, wrongs in (("sm90", WRONG), ("s8", WRONG_EIGHT))
    for operators, argument, wrong, says in wrongs
    for operator in operators
    for implementation in ("cpu", "cuda", "fake")
    # A matrix as it is stored goes to the implementation for a CPU, and a number of rows may be a symbol while traced.
    if (implementation, argument) not in (("cuda", "matrix"), ("fake", "m"))
]


@pytest.mark.parametrize(("implementation", "format", "operator", "argument", "wrong", "says"), CASES)
def test_operands_that_do_not_fit_are_refused_in_one_sentence(
    implementation: str, format: str, operator: str, argument: str, wrong: Any, says: str
) -> None:
    """By the implementation for a CPU, by that for a GPU before it launches anything, and while torch.compile traces."""
    arguments = operands(operator, format)
    arguments[argument] = wrong(arguments[argument]) if callable(wrong) else wrong
    call = getattr(cuda_ops if implementation == "cuda" else ops, operator)
    tracing: Any = contextlib.nullcontext()
    if implementation == "fake":
        tracing = FakeTensorMode()
        for name, each in arguments.items():
            if isinstance(each, torch.Tensor):
                arguments[name] = tracing.from_tensor(each)
    with pytest.raises(Apex4Error, match=rf"^apex4\.{operator}: .*{says}") as raised, tracing:
        call(*arguments.values())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(M, K)}, "the input's dtype is torch.float32, and bfloat16 or float16 is needed"),
        ({"matrix": torch.zeros(2, 16384).bfloat16()}, r"matrix is torch.bfloat16 \[2, 16384\], and torch.bfloat16 \[3, 16384\]"),
        ({"matrix": torch.zeros(3, 16384).half()}, "matrix is torch.float16"),
        ({"matrix": torch.zeros(3, 23680).bfloat16(), "clip": 0.9}, "clip is 0.9, and 1 with a matrix that has the clip ratio of every block"),
        ({"matrix": torch.zeros(2, 23680).bfloat16(), "clip": 1.0}, r"matrix is torch.bfloat16 \[2, 23680\], and torch.bfloat16 \[3, 23680\]"),
        ({"matrix": torch.zeros(1, 23552).bfloat16()}, r"matrix is torch.bfloat16 \[1, 23552\], and torch.bfloat16 \[3, 23552\]"),
        ({"matrix": torch.zeros(3, 184, 128), "group": 384}, "group is 384, and 128, and a format of 4-bit activations, with a matrix that has feedback"),
        ({"matrix": torch.zeros(3, 23552).bfloat16(), "group": 384, "format": "s8", "clip": 1.0}, "group is 384, and 128, and a format of 4-bit"),
        ({"matrix": torch.zeros(1, 16384).bfloat16(), "group": 384}, r"matrix is .*, and torch.bfloat16 \[3, 128, 128\] without gaps"),
    ],
)  # fmt: skip
def test_what_only_kernels_refuse(change: dict[str, Any], says: str) -> None:
    with pytest.raises(Apex4Error, match=rf"^apex4\.quantize: {says}"):
        cuda_ops.quantize(*(operands("quantize") | change).values())


def test_more_inputs_than_an_integer_sums_are_refused() -> None:
    k = 2**17 + 128
    with pytest.raises(Apex4Error, match=r"k_padded is 131200, and at most 131072 with the format s8"):
        ops.quantize(torch.zeros(1, k), None, k, k, 1.0, True, TOKEN_FORMAT)
    codes, scales = torch.zeros(k // 128, 16, 128, dtype=torch.uint8), torch.zeros(1, 16)
    packed, ratio = torch.zeros(1, k // 128, 4096, dtype=torch.uint8), torch.zeros(1, 1, 64, dtype=torch.int16)
    with pytest.raises(Apex4Error, match=r"codes is .*, and K of at most 131072 with a weight_unit"):
        ops.gemm(codes, scales, packed, ratio, torch.zeros(64), None, 1, 64, torch.bfloat16)
