"""What the operators launch on a GPU, seen without one; and on a GPU, the same results as on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.format.layouts import get_layout
from apex4_quant.kernels import cuda_ops, dispatch, ops
from apex4_quant.kernels.gemm import eight_bit, fused_linear, tuned
from apex4_quant.kernels.gemm.configs import SHARED_LIMITS, PlanSource, choose_gemm
from apex4_quant.kernels.gemm.fused_linear import MOST_TOKENS_S8
from apex4_quant.kernels.gemm.sm90_s8_configs import choose_sm90_s8
from apex4_quant.kernels.hadamard import hadamard_128
from apex4_quant.kernels.operands import unpack_activations
from apex4_quant.kernels.quantize import hadamard_product
from apex4_quant.kernels.quantize.configs import fragment_order, prepack_matrix
from apex4_quant.kernels.runtime import launcher, workspace
from apex4_quant.kernels.runtime.architectures import EIGHT_BIT_FAMILIES


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator(seed))


class Launches:
    """Stands for `launcher.kernel`: keeps what was launched, with pointers and numbers as plain values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str, dict[str, Any]]] = []
        self.launched: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        monkeypatch.setattr(launcher, "kernel", self.kernel)
        monkeypatch.setattr(cuda_ops, "gpu", lambda index: (90, 132))
        monkeypatch.setattr(cuda_ops, "current_cuda_stream", lambda index: 77)
        monkeypatch.setattr(workspace, "counters", lambda index, stream, size: torch.zeros(size, dtype=torch.uint8))
        self.board = torch.zeros(1 << 17, dtype=torch.uint8)
        monkeypatch.setattr(workspace, "board", lambda index, stream, size: self.board[:size])
        cuda_ops._gemm_launch.cache_clear()

    def kernel(self, source: str, entry: str, defines: dict[str, Any], device: int) -> Any:
        self.made.append((source, entry, defines))
        return SimpleNamespace(bind=partial(self.bind, tile=defines.get("TILE_M")))

    def bind(self, grid: Any, block: Any, pointers: int, numbers: Any, **rest: Any) -> Any:
        def launch(stream: int, *given: int) -> None:
            assert len(given) == pointers
            self.launched.append(((*given, *(each.value for each in numbers)), rest | {"stream": stream}))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    yield Launches(monkeypatch)
    cuda_ops._gemm_launch.cache_clear()


@pytest.mark.parametrize("m", [2, 300])
def test_a_plan_that_is_forced_or_won_is_used_at_once(
    m: int, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also for shapes that this process has chosen for already: by gemm, and by the kernel that quantizes, too."""
    monkeypatch.setenv("APEX4_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("APEX4_GEMM", raising=False)
    tuned.winners.cache_clear()
    x = torch.zeros(m, 512, dtype=torch.bfloat16)
    packed, scale = torch.zeros(3, 4, 4096, dtype=torch.uint8), torch.zeros(3, 4, 64).half()
    codes, scales = cuda_ops.quantize(x, None, 512, 128, 1.0, True, "sm90")

    def tiles() -> list[int]:
        launches.made.clear(), launches.launched.clear()
        cuda_ops.gemm(codes, scales, packed, scale, None, None, m, 130, x.dtype)
        cuda_ops.linear(x, packed, scale, None, None, 130, None, 512, 128, 1.0, True, "sm90")
        return [rest["tile"] for _, rest in launches.launched if rest["tile"] is not None]

    before = tiles()
    assert len(before) == 2 and set(before) <= {8, 64, 128}
    monkeypatch.setenv("APEX4_GEMM", "sm90_m32n64s5")
    assert tiles() == [32, 32]
    monkeypatch.delenv("APEX4_GEMM")
    assert tiles() == before
    tuned.add(90, 132, "Some GPU", {tuned.key(m, 130, 4, 1, "bf16"): {"plan": "sm90_m16n64s8"}})
    assert tiles() == [16, 16]
    tuned.winners.cache_clear()


@pytest.mark.parametrize("m", [1, 5, 300])
def test_what_a_gemm_launches(m: int, launches: Launches) -> None:
    n, blocks, groups, stride = 130, 64, 32, -(-m // 16) * 16
    codes, scales = torch.zeros(blocks, stride, 128, dtype=torch.uint8), torch.zeros(groups, stride)
    packed, scale = torch.zeros(3, blocks, 4096, dtype=torch.uint8), torch.zeros(3, groups, 64).half()
    bias = torch.zeros(n)
    y = cuda_ops.gemm(codes, scales, packed, scale, None, bias, m, n, torch.float16)
    assert y.shape == (m, n) and y.dtype == torch.float16
    ((source, entry, defines),), ((args, rest),) = launches.made, launches.launched
    pointers = tuple(tensor.data_ptr() for tensor in (y, codes, scales, packed, scale, bias))
    plan = choose_gemm(90, 132, m, n, blocks, 2, "fp16")
    assert (source, entry, defines["OUT_BF16"]) == (plan.config.source, "apex4_gemm", 0)
    assert (
        source == ("gemm/gemm_sm90.cu" if m == 300 else "gemm/gemm_sm90_decode.cu") and rest["cluster"] == plan.cluster
    )
    assert args[:6] == pointers and [pointer != 0 for pointer in args[6:8]] == [plan.parts > 1] * 2
    assert args[8:] == (m, n, blocks, 2, stride, n, *plan.arguments)
    assert rest["stream"] == 77 and rest["shared_bytes"] > 0
    assert cuda_ops.gemm(codes, scales, packed, scale, None, None, 0, n, torch.float16).shape == (0, n)
    assert len(launches.launched) == 1


def test_what_the_quantizers_launch(launches: Launches) -> None:
    wide = torch.zeros(6, 1024, dtype=torch.bfloat16)
    x, up, gain = wide[:, :512], wide[:, 512:], torch.zeros(512, dtype=torch.bfloat16)
    matrix = torch.zeros(4, 128 * 128, dtype=torch.bfloat16)
    how = (512, 128, 0.7, True, "sm90")
    cuda_ops.quantize(x, None, 512, 256, 0.7, True, "sm80")
    cuda_ops.silu_mul_quantize(x, up, None, *how)
    cuda_ops.rms_norm_quantize(x, gain, 1e-5, 1.0, None, *how)
    codes, scales = cuda_ops.rms_norm_quantize(x, gain, 1e-5, 0.0, matrix, *how)
    assert codes.shape == (4, 16, 128) and scales.shape == (4, 16)
    assert [source for source, _, _ in launches.made] == [
        *["quantize/quantize_rows.cu"] * 3,
        "quantize/row_rms.cu",
        "quantize/quantize_dense.cu",
    ]
    plain, gated, normed, _, dense = (args for args, _ in launches.launched)
    assert plain[2:4] == (x.data_ptr(), 0) and plain[4:10] == (6, 512, 4, 2, 16, 1024)
    assert gated[2:4] == (x.data_ptr(), up.data_ptr()) and gated[4:11] == (6, 512, 4, 1, 16, 1024, 1024)
    assert normed[3] == gain.data_ptr() and dense[2:4] == (x.data_ptr(), gain.data_ptr())
    assert dense[5] == matrix.data_ptr() and codes.data_ptr() == dense[0]
    assert all(rest["stream"] == 77 for _, rest in launches.launched)


@pytest.mark.parametrize("m", [5, 300])
@pytest.mark.parametrize("dense", [False, True])
def test_what_a_linear_launches(m: int, dense: bool, launches: Launches) -> None:
    """The same as its parts, on codes and scales in memory of its own."""
    n, k = 130, 512
    x, up, gain = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((m, k), (m, k), (k,)))
    packed, scale = torch.zeros(3, 4, 4096, dtype=torch.uint8), torch.zeros(3, 4, 64).half()
    how = (torch.zeros(4, 128 * 128, dtype=torch.bfloat16) if dense else None, k, 128, 0.7, not dense, "sm90")
    for quantize, linear, inputs in (
        (cuda_ops.quantize, cuda_ops.linear, (x,)),
        (cuda_ops.rms_norm_quantize, cuda_ops.rms_norm_linear, (x, gain, 1e-5, 1.0)),
        (cuda_ops.silu_mul_quantize, cuda_ops.silu_mul_linear, (x, up)),
    ):
        launches.launched.clear()
        codes, scales = quantize(*inputs, *how)
        cuda_ops.gemm(codes, scales, packed, scale, None, None, m, n, x.dtype)
        apart, launches.launched = launches.launched, []
        y = linear(*inputs, packed, scale, None, None, n, *how)
        assert y.shape == (m, n) and len(launches.launched) == len(apart) == 2 + (
            dense and quantize is cuda_ops.rms_norm_quantize
        )
        multiplied, _ = launches.launched[-1]
        first, second = launches.launched[-2][0][:2]
        assert (first, second) == multiplied[1:3], "the GEMM reads what the quantizer has written"
        assert second - first == codes.numel() and second % 16 == 0
        assert multiplied[0] == y.data_ptr() and multiplied[3:5] == (packed.data_ptr(), scale.data_ptr())
        assert multiplied[8:] == apart[-1][0][8:] and launches.launched[-2][0][6:] == apart[-2][0][6:]
        if len(apart) == 3:
            (between, *_), _ = launches.launched[0]
            assert between == second + 4 * scales.numel() == launches.launched[1][0][4], (
                "inverse_rms, behind the scales"
            )
    assert linear(
        *(each[:0] if each is not gain else each for each in inputs), packed, scale, None, None, n, *how
    ).shape == (
        0,
        n,
    )


def test_an_addition_in_front_of_a_norm_is_the_quantizer_s(launches: Launches) -> None:
    m, n, k = 5, 130, 512
    wide = torch.ones(m, 2 * k, dtype=torch.bfloat16)
    x, residual, gain = wide[:, :k], torch.ones(m, k, dtype=torch.bfloat16), torch.zeros(k, dtype=torch.bfloat16)
    packed, scale = torch.zeros(3, 4, 4096, dtype=torch.uint8), torch.zeros(3, 4, 64).half()
    weights, how = (packed, scale, None, None, n), (k, 128, 0.7, True, "sm90")
    y, total = cuda_ops.add_rms_norm_linear(x, residual, gain, 1e-5, 1.0, *weights, None, *how)
    assert y.shape == (m, n) and total.shape == (m, k) and total.is_contiguous()
    (args, _), (multiplied, _) = launches.launched
    assert args[2:6] == (x.data_ptr(), gain.data_ptr(), residual.data_ptr(), total.data_ptr())
    assert args[6:13] == (m, k, 4, 1, 16, 2 * k, k) and args[-2:] == (1, 1) and multiplied[0] == y.data_ptr()
    launches.made.clear()
    cuda_ops.add_rms_norm_linear(x, wide[:, 1 : k + 1], gain, 1e-5, 1.0, *weights, None, *how)
    args, _ = launches.launched[2]
    assert args[12] == 2 * k and args[-1] == 0, "rows of the residual that do not start on 16 bytes"
    # In front of a dense transform the kernel adds that works out the root of squares.
    launches.launched.clear(), launches.made.clear()
    matrix = torch.zeros(4, 128 * 128, dtype=torch.bfloat16)
    y, total = cuda_ops.add_rms_norm_linear(x, residual, gain, 1e-5, 1.0, *weights, matrix, *how[:3], False, how[4])
    (args, _), (quantized, _), _ = launches.launched
    assert args[1:8] == (x.data_ptr(), residual.data_ptr(), total.data_ptr(), m, k, 2 * k, k)
    assert quantized[2] == total.data_ptr() and quantized[4] == args[0] and quantized[9:11] == (k, 0)
    # Many rows have none on Hopper: the sum is a tensor first.
    launches.launched.clear(), launches.made.clear()
    many = [torch.ones(9000, k, dtype=torch.bfloat16) for _ in range(2)]
    y, total = cuda_ops.add_rms_norm_linear(*many, gain, 1e-5, 1.0, *weights, matrix, *how[:3], False, how[4])
    assert torch.equal(total, many[0] + many[1]) and launches.launched[-2][0][2] == total.data_ptr()
    empty = cuda_ops.add_rms_norm_linear(x[:0], residual[:0], gain, 1e-5, 1.0, *weights, None, *how)
    assert [each.shape for each in empty] == [(0, n), (0, k)]


def test_many_rows_of_a_norm_in_front_of_a_dense_transform_are_one_launch(launches: Launches) -> None:
    m, n, k = 9000, 130, 512
    x, gain = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(k, dtype=torch.bfloat16)
    matrix = torch.zeros(4, 128 * 128, dtype=torch.bfloat16)
    packed, scale = torch.zeros(3, 4, 4096, dtype=torch.uint8), torch.zeros(3, 4, 64).half()
    how = (matrix, k, 128, 0.7, False, "sm90")
    cuda_ops.rms_norm_quantize(x, gain, 1e-5, 0.0, *how)
    cuda_ops.rms_norm_linear(x, gain, 1e-5, 0.0, packed, scale, None, None, n, *how)
    assert [source for source, _, _ in launches.made[:1]] == ["quantize/quantize_dense_sm90.cu"]
    assert len(launches.launched) == 3  # the quantizer; the quantizer and the GEMM
    for args, rest in launches.launched[:2]:
        assert args[2:6] == (x.data_ptr(), gain.data_ptr(), launches.board.data_ptr(), matrix.data_ptr())
        assert args[6:8] == (m, k) and rest["shared_bytes"] > 0


def test_a_hadamard_transform_of_many_normalised_rows_is_a_product(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.zeros(1, 128 * 128, dtype=torch.bfloat16)
    monkeypatch.setattr(cuda_ops, "signs", lambda index, dtype: matrix if dtype == torch.bfloat16 else None)
    m, k = 4200, 8192
    x, gain = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(k, dtype=torch.bfloat16)
    packed, scale = torch.zeros(1, 64, 4096, dtype=torch.uint8), torch.zeros(1, 64, 64).half()

    def source_of(
        x: torch.Tensor, matrix: Any = None, group: int = 128, hadamard: bool = True, format: str = "sm90"
    ) -> str:
        launches.made.clear(), launches.launched.clear()
        cuda_ops.rms_norm_quantize(x, gain.to(x.dtype), 1e-5, 0.0, matrix, k, group, 0.7, hadamard, format)
        return launches.made[0][0]

    assert source_of(x) == "quantize/quantize_dense_sm90.cu"
    cuda_ops.rms_norm_linear(x, gain, 1e-5, 0.0, packed, scale, None, None, 64, None, k, 128, 0.7, True, "sm90")
    assert len(launches.launched) == 3  # the quantizer; the quantizer and the GEMM
    for args, rest in launches.launched[:2]:
        assert args[2:6] == (x.data_ptr(), gain.data_ptr(), launches.board.data_ptr(), matrix.data_ptr())
        assert args[12] == 0 and args[13] == pytest.approx(128**-0.5) and rest["shared_bytes"] > 0
    own = torch.zeros(64, 128 * 128, dtype=torch.bfloat16)
    assert source_of(x, own, hadamard=False) == "quantize/quantize_dense_sm90.cu"
    assert launches.launched[0][0][5] == own.data_ptr() and launches.launched[0][0][13] == 1
    wide = torch.zeros(m, k + 4, dtype=torch.bfloat16)[:, :k]
    for made in (
        source_of(x[:2000]), source_of(wide), source_of(x, group=256), source_of(x, hadamard=False),
        source_of(x, format="sm80"), source_of(x.half()),  # whose matrix is not there yet, while a graph is captured
    ):  # fmt: skip
        assert made == "quantize/quantize_rows.cu"
    launches.made.clear()
    cuda_ops.quantize(x, None, k, 128, 0.7, True, "sm90")
    cuda_ops.silu_mul_quantize(x, x, None, k, 128, 0.7, True, "sm90")
    assert [source for source, _, _ in launches.made] == ["quantize/quantize_rows.cu"] * 2


def test_the_signs_are_made_once_and_not_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, waited = True, []
    monkeypatch.setattr(hadamard_product, "_signs", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: SimpleNamespace(synchronize=lambda: waited.append(index))
    )
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    assert hadamard_product.signs(3, torch.bfloat16) is None
    capturing = False
    made = hadamard_product.signs(3, torch.bfloat16)
    assert made is not None and made.shape == (1, 128 * 128) and made.dtype == torch.bfloat16 and waited == [3]
    natural = made.flatten()[torch.from_numpy(fragment_order()).argsort()].view(128, 128).double()
    assert torch.equal(natural @ natural, 128 * torch.eye(128, dtype=torch.float64)) and bool(
        (natural.abs() == 1).all()
    )
    assert torch.equal((natural / 128**0.5), hadamard_128(torch.float64, made.device))
    capturing = True
    assert hadamard_product.signs(3, torch.bfloat16) is made and hadamard_product.signs(4, torch.bfloat16) is None


def test_few_tokens_on_hopper_are_one_launch(launches: Launches) -> None:
    m, n, k = 3, 130, 1000
    wide = torch.zeros(m, 2048, dtype=torch.float16)
    x, up = wide[:, :k], wide[:, 1024 : 1024 + k]
    packed, scale, bias = torch.zeros(3, 8, 4096, dtype=torch.uint8), torch.zeros(3, 8, 64).half(), torch.zeros(n)
    how = (None, 1024, 128, 0.7, True, "sm90")
    for input, linear, inputs in (
        (0, cuda_ops.linear, (x,)),
        (2, cuda_ops.silu_mul_linear, (x, up)),
    ):
        launches.made.clear(), launches.launched.clear()
        y = linear(*inputs, packed, scale, None, bias, n, *how)
        ((source, entry, defines),), ((args, rest),) = launches.made, launches.launched
        assert (source, entry, defines["QUANTIZES"]) == ("gemm/gemm_sm90_decode.cu", "apex4_linear", 1)
        assert (defines["APEX4_INPUT"], defines["OUT_BF16"], defines["APEX4_BF16"]) == (input, 0, 0)
        second = 0 if input == 0 else inputs[1].data_ptr()
        assert args[:6] == (
            y.data_ptr(), x.data_ptr(), second, packed.data_ptr(), scale.data_ptr(), bias.data_ptr()
        )  # fmt: skip
        assert args[6:14] == (m, n, k, 8, 2048, 2048 if input == 2 else 0, n, 3)
        assert args[14:] == pytest.approx((0.1, 1))
        plan = choose_gemm(90, 132, m, n, 8, 1, "fp16")
        assert rest["cluster"] == plan.cluster and rest["programmatic"] and rest["stream"] == 77
        of_stages = -(-8 // (4 * plan.cluster)) * 4
        assert rest["shared_bytes"] == defines["SHARED_BYTES"] + of_stages * (32 + m * 128) + 128


@pytest.mark.parametrize(
    ("what", "launched"),
    [
        ({}, 1), ({"m": 3}, 1), ({"m": 4}, 2), ({"format": "sm80"}, 2), ({"group": 256}, 2), ({"hadamard": False}, 2),
        ({"k": 8192}, 1), ({"m": 3, "k": 8192}, 1), ({"k": 57344}, 2), ({"gain": True}, 2),
    ],
)  # fmt: skip
def test_what_is_no_one_launch(
    what: dict[str, Any], launched: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens, another architecture, wide groups, no transform, too much to quantize, or RMSNorm in front."""
    m, k, group = what.get("m", 1), what.get("k", 1024), what.get("group", 128)
    if what.get("format") == "sm80":
        monkeypatch.setattr(cuda_ops, "gpu", lambda index: (80, 108))
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    packed, scale = torch.zeros(1, k // 128, 4096, dtype=torch.uint8), torch.zeros(1, k // group, 64).half()
    how = (None, k, group, 1.0, what.get("hadamard", True), what.get("format", "sm90"))
    if "gain" in what:
        cuda_ops.rms_norm_linear(x, x[0], 1e-5, 0.0, packed, scale, None, None, 64, *how)
    else:
        cuda_ops.linear(x, packed, scale, None, None, 64, *how)
    assert len(launches.launched) == launched


@pytest.mark.parametrize("m", [1, MOST_TOKENS_S8])
def test_few_tokens_of_eight_bits_are_one_launch(m: int, launches: Launches) -> None:
    n, k = 130, 1000
    x, up = torch.randn(m, 2048).half()[:, :k], torch.randn(m, 2048).half()[:, :k]
    packed, ratio = torch.zeros(3, 8, 4096, dtype=torch.uint8), torch.zeros(3, 8, 64, dtype=torch.int16)
    unit, bias = torch.zeros(192), torch.zeros(n)
    how = (None, 1024, 1024, 1.0, True, "s8")
    for input, linear, inputs in ((0, cuda_ops.linear, (x,)), (2, cuda_ops.silu_mul_linear, (x, up))):
        launches.made.clear(), launches.launched.clear()
        y = linear(*inputs, packed, ratio, unit, bias, n, *how)
        ((source, entry, defines),), ((args, rest),) = launches.made, launches.launched
        assert (source, entry, defines["QUANTIZES"]) == ("gemm/gemm_sm90_decode_s8.cu", "apex4_linear", 1)
        assert (defines["APEX4_INPUT"], defines["APEX4_FORMAT"], defines["OUT_BF16"]) == (input, 8, 0)
        assert defines["ROUNDS"] == 1, "no more passes than the tokens need"
        second = 0 if input == 0 else inputs[1].data_ptr()
        weights = packed.data_ptr(), ratio.data_ptr(), unit.data_ptr()
        assert args[:7] == (y.data_ptr(), x.data_ptr(), second, *weights, bias.data_ptr())
        assert args[7:] == (m, n, k, 8, 2048, 2048 if input == 2 else 0, n, 3, 1)
        plan = choose_sm90_s8(90, 132, m, n, 8, 1, "fp16", PlanSource(None, 0))
        assert rest["cluster"] == plan.cluster and rest["programmatic"] and rest["stream"] == 77
        of_stages = -(-8 // (4 * plan.cluster)) * 4
        assert rest["shared_bytes"] == defines["SHARED_BYTES"] + of_stages * m * 128


def test_few_normalised_tokens_of_eight_bits_are_one_launch(launches: Launches) -> None:
    m, n, k = 2, 64, 1000
    x, residual, gain = torch.randn(m, 1024).half()[:, :k], torch.randn(m, 2048).half()[:, :k], torch.ones(k).half()
    weights = torch.zeros(1, 8, 4096, dtype=torch.uint8), torch.zeros(1, 8, 64, dtype=torch.int16), torch.zeros(64)
    behind = *weights, None, n, None, 1024, 1024, 1.0, True, "s8"
    y = cuda_ops.rms_norm_linear(x, gain, 1e-5, 1.0, *behind)
    z, total = cuda_ops.add_rms_norm_linear(x, residual, gain, 1e-5, 1.0, *behind)
    assert [defines["APEX4_INPUT"] for _, _, defines in launches.made] == [1, 3]
    pointers = *(each.data_ptr() for each in weights), 0
    of_norm = pytest.approx((1e-5, 1 / k)), 1
    for (args, _), out, sums, ld_second in (
        (launches.launched[0], y, (), 0),
        (launches.launched[1], z, (residual.data_ptr(), total.data_ptr()), 2048),
    ):
        assert args[: 7 + len(sums)] == (out.data_ptr(), x.data_ptr(), gain.data_ptr(), *pointers, *sums)
        numbers = args[7 + len(sums) :]
        assert numbers[:9] == (m, n, k, 8, 1024, ld_second, n, 1, 1)
        assert (numbers[9:11], numbers[11]) == of_norm and len(numbers) == 12


@pytest.mark.parametrize(
    ("what", "launched"),
    [
        ({}, 1),
        ({"m": MOST_TOKENS_S8 + 1}, 2),
        ({"groups": 2}, 2),
        ({"hadamard": False}, 2),
        ({"k": 16384}, 1),
        ({"k": 16512}, 2),
    ],
)
def test_what_is_no_one_launch_of_eight_bits(what: dict[str, Any], launched: int, launches: Launches) -> None:
    m, k = what.get("m", 1), what.get("k", 1024)
    x, groups = torch.zeros(m, k, dtype=torch.bfloat16), what.get("groups", k // 128)
    packed, ratio = torch.zeros(1, k // 128, 4096, dtype=torch.uint8), torch.zeros(1, groups, 64, dtype=torch.int16)
    cuda_ops.linear(x, packed, ratio, torch.zeros(64), None, 64, None, k, k, 1.0, what.get("hadamard", True), "s8")
    assert len(launches.launched) == launched


def test_eight_bits_launch_the_kernel_of_their_family(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(
        name="some", source="gemm/some.cu", entry="apex4_gemm", defines={"TILE_M": 7}, shared_bytes=5
    )
    plan = SimpleNamespace(
        config=config, grid=(2, 1, 1), block=64, cluster=1, programmatic=True, arguments=(11, 12), parts=2, counters=3,
        workspace_words=40,
    )  # fmt: skip
    asked = []
    monkeypatch.setitem(EIGHT_BIT_FAMILIES, 90, "some")
    monkeypatch.setattr(eight_bit, "CHOOSERS", {"some": lambda *shape: asked.append(shape) or plan})
    codes, scales = torch.zeros(4, 16, 128, dtype=torch.uint8), torch.zeros(1, 16)
    packed, ratio = torch.zeros(3, 4, 4096, dtype=torch.uint8), torch.zeros(3, 2, 64, dtype=torch.int16)
    unit, bias = torch.zeros(192), torch.zeros(130)
    y = cuda_ops.gemm(codes, scales, packed, ratio, unit, bias, 5, 130, torch.float16)
    assert [shape[:-1] for shape in asked] == [(90, 132, 5, 130, 4, 2, "fp16")]
    ((args, rest),) = launches.launched
    assert args[:7] == tuple(tensor.data_ptr() for tensor in (y, codes, scales, packed, ratio, unit, bias))
    assert args[7] != 0 and args[8] != 0 and args[9:] == (5, 130, 4, 2, 16, 130, 11, 12)
    assert rest["programmatic"] and rest["shared_bytes"] == 5
    monkeypatch.setattr(eight_bit, "CHOOSERS", {})
    with pytest.raises(Apex4Error, match="there is no kernel for 8-bit activations for sm_90"):
        cuda_ops.gemm(codes, scales, packed, ratio, unit, bias, 6, 130, torch.float16)


def test_shared_memory_of_the_fused_kernel_is_enough_or_it_is_not_taken() -> None:
    longest = {1: 224, 2: 112, 3: 112, 4: 0}  # blocks of a row, of those that are tried
    for m, most in longest.items():
        for k_blocks in (1, 8, 32, 64, 112, 224, 400, 1000):
            plan = fused_linear.choose_fused(90, 132, m, 4096, k_blocks, "plain", "bfloat16")
            assert (plan is not None) == (k_blocks <= most), (m, k_blocks)
            assert plan is None or plan.shared_bytes <= SHARED_LIMITS[90][0]
    assert fused_linear.choose_fused(80, 108, 1, 4096, 32, "plain", "bfloat16") is None
    for m, most in {1: 128, 2: 64, 3: 0}.items():  # passes of all threads
        for k_blocks in (1, 8, 32, 64, 80, 112, 128, 224, 400):
            plan = fused_linear.choose_fused_s8(90, 132, m, 4096, k_blocks, "plain", "bfloat16", PlanSource(None, 0))
            assert (plan is not None) == (k_blocks <= most), (m, k_blocks)
            assert plan is None or plan.shared_bytes <= SHARED_LIMITS[90][0]
    assert fused_linear.choose_fused_s8(86, 84, 1, 4096, 32, "plain", "bfloat16", PlanSource(None, 0)) is None


def test_one_matrix_for_all_blocks_is_launched_as_one(launches: Launches) -> None:
    x = torch.randn(5, 512).bfloat16()
    strides = []
    for blocks in (4, 1):
        cuda_ops.quantize(x, torch.zeros(blocks, 128 * 128, dtype=torch.bfloat16), 512, 128, 1.0, False, "sm90")
        strides.append(launches.launched[-1][0][12])  # matrix_stride, in 16-byte words
    assert strides == [128 * 128 * 2 // 16, 0]


def test_a_dense_transform_of_wide_groups_is_computed_by_torch(launches: Launches) -> None:
    x, matrix = torch.randn(5, 300).bfloat16(), torch.randn(4, 128, 128).half()
    arguments = (matrix, 512, 256, 0.9, False, "sm90")
    assert all(map(torch.equal, cuda_ops.quantize(x, *arguments), ops.quantize(x, *arguments)))
    assert not launches.launched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 17, 300])
@pytest.mark.parametrize("transform", ["hadamard", "matrix", "none"])
def test_on_a_gpu_the_operators_are_those_of_the_cpu(m: int, transform: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    format = dispatch.kernel_format(device)
    if format is None:
        pytest.skip("this GPU has no kernels")
    k, n = 1024, 200
    x, layout = torch.randn(m, k, generator=generator(1)).bfloat16(), get_layout(format)
    stored = torch.randn(k // 128, 128, 128, generator=generator(2)).mul(0.1).bfloat16().half()
    matrix = stored if transform == "matrix" else None
    prepared = None if matrix is None else prepack_matrix(matrix.to(device), x.dtype)
    how = (k, 128, 0.9, transform == "hadamard", format)
    expected = unpack_activations(*ops.quantize(x, matrix, *how), m, format)
    operands = ops.quantize(x.to(device), prepared, *how)
    found = unpack_activations(operands[0].cpu(), operands[1].cpu(), m, format)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=0)
    difference = (found[0] - expected[0]).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 2e-3  # ties within rounding
    codes_w, bias = random_codes(n, k), torch.randn(n, generator=generator(3))
    weights = layout.pack(codes_w), layout.pack_scales((torch.rand(n, k // 128, generator=generator(4)) * 0.01).half())
    y = ops.gemm(*operands, *(w.to(device) for w in weights), None, bias.to(device), m, n, torch.bfloat16)
    wanted = ops.gemm(*(each.cpu() for each in operands), *weights, None, bias, m, n, torch.bfloat16)
    torch.testing.assert_close(y.cpu(), wanted, rtol=2.0**-7, atol=1e-3)
