"""The torch operators on a CPU: operand formats, agreement with the PyTorch backend, opcheck; and who gets which kernel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.format.layouts import get_layout
from apex4_quant.kernels import dispatch, hadamard, ops, torch_backend
from apex4_quant.kernels.gemm import fused_linear
from apex4_quant.kernels.gemm.configs import SHARED_LIMITS, choose_gemm
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.operands import FORMATS, pack_activations, row_stride, unpack_activations
from apex4_quant.kernels.quantize.configs import fragment_order, prepack_matrix
from apex4_quant.kernels.runtime import launcher, workspace

NO_TRANSFORM = {"hadamard": False, "matrix": None}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator(seed))


# ---- operand formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "m", "k", "block", "byte", "value"), [
    ("sm80", 0, 0, 0, 0, 0x09), ("sm80", 0, 1, 0, 0, 0x90), ("sm80", 0, 33, 0, 16, 0x90), ("sm80", 1, 128, 1, 64, 0x09),
    ("sm80", 2, 0, 0, 128 + 16, 0x09), ("sm80", 6, 127, 0, 384 + 15, 0x90), ("sm80", 17, 32, 0, 17 * 64 + 16, 0x09),
    ("sm90", 0, 0, 0, 0, 0x87), ("sm90", 0, 17, 0, 17, 0x87), ("sm90", 1, 0, 0, 128 + 16, 0x87),
    ("sm90", 7, 127, 0, 7 * 128 + 15, 0x87), ("sm90", 9, 130, 1, 9 * 128 + 16 + 2, 0x87),
])  # fmt: skip
def test_golden_place_of_a_code(format: str, m: int, k: int, block: int, byte: int, value: int) -> None:
    codes = torch.zeros(18, 256, dtype=torch.int8)
    codes[m, k] = -7
    stored, _ = pack_activations(codes, torch.ones(18, 2), format)
    assert stored.shape == (2, 32, {"sm80": 64, "sm90": 128}[format]) and stored.dtype == torch.uint8
    flat = stored.flatten(1)
    assert {(b, int(i)): int(flat[b, i]) for b in range(2) for i in flat[b].nonzero()} == {(block, byte): value}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "k", "groups"), [(1, 128, 1), (16, 384, 3), (33, 512, 2), (0, 128, 1)])
def test_operands_pack_and_unpack(format: str, m: int, k: int, groups: int) -> None:
    codes, scales = random_codes(m, k), torch.rand(m, groups, generator=generator(1))
    stored, stored_scales = pack_activations(codes, scales, format)
    assert stored_scales.shape == (groups, row_stride(m)) and stored_scales.is_contiguous() and stored.is_contiguous()
    again, scales_again = unpack_activations(stored, stored_scales, m)
    assert torch.equal(again, codes) and torch.equal(scales_again, scales)


def test_the_swizzle_of_sm90_is_the_128_byte_one() -> None:
    rows, chunks = np.arange(16)[:, None], np.arange(8)
    address = index_function("sm90_activation_byte")(rows, chunks)
    # wgmma's 128-byte swizzle: address bits 4..6 are those of the plain address, exclusive or bits 7..9.
    plain = 128 * rows + 16 * chunks
    assert (address == (plain ^ (plain >> 3 & 0x70))).all()


# ---- agreement with the backend --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k", "group"), [(5, 70, 300, 128), (1, 64, 512, 256), (17, 130, 384, 384)])
@pytest.mark.parametrize("transform", ["hadamard", "matrix", "none"])
def test_quantize_then_gemm_is_the_backend_bit_for_bit(
    format: str, dtype: torch.dtype, m: int, n: int, k: int, group: int, transform: str
) -> None:
    padded = -(-k // group) * group
    x = torch.randn(m, k, generator=generator(1)).to(dtype)
    codes_w, bias = random_codes(n, padded), torch.randn(n, generator=generator(2))
    scale_w = (torch.rand(n, padded // group, generator=generator(3)) * 0.01 + 1e-4).half()
    matrix = torch.randn(padded // 128, 128, 128, generator=generator(4)).half() if transform == "matrix" else None
    how = {"hadamard": transform == "hadamard", "matrix": matrix}
    layout = get_layout(format)
    operands = ops.quantize(x, matrix, padded, group, 0.9, how["hadamard"], format)
    packed, scale = layout.pack(codes_w), layout.pack_scales(scale_w)
    for some in (bias, None):
        y = ops.gemm(*operands, packed, scale, some, m, n, dtype)
        assert torch.equal(y, torch_backend.linear(x, codes_w, scale_w, some, clip=0.9, **how))


@pytest.mark.parametrize("format", FORMATS)
def test_fused_quantizers_are_the_operations_before_them(format: str) -> None:
    x, up = torch.randn(5, 256, generator=generator(1)), torch.randn(5, 256, generator=generator(2))
    gain = torch.rand(256, generator=generator(3))
    how = (None, 256, 128, 1.0, True, format)
    expected = ops.quantize(torch.nn.functional.silu(x) * up, *how)
    assert all(map(torch.equal, ops.silu_mul_quantize(x, up, *how), expected))
    normed = torch.nn.functional.rms_norm(x, (256,), gain + 1, 1e-5)
    codes, scales = ops.rms_norm_quantize(x, gain, 1e-5, 1.0, *how)
    expected = ops.quantize(normed, *how)
    torch.testing.assert_close(scales, expected[1])
    assert float((codes != expected[0]).float().mean()) < 0.01


def test_rows_of_a_wider_tensor_can_be_quantized() -> None:
    wide = torch.randn(6, 512, generator=generator(1)).bfloat16()
    how = (None, 256, 128, 1.0, True, "sm90")
    strided, plain = ops.quantize(wide[:, 128:384], *how), ops.quantize(wide[:, 128:384].contiguous(), *how)
    assert all(map(torch.equal, strided, plain))


def test_nothing_to_compute() -> None:
    operands = ops.quantize(torch.zeros(0, 128).bfloat16(), None, 128, 128, 1.0, True, "sm80")
    layout = get_layout("sm80")
    packed, scale = layout.pack(random_codes(64, 128)), layout.pack_scales(torch.ones(64, 1).half())
    assert ops.gemm(*operands, packed, scale, None, 0, 64, torch.bfloat16).shape == (0, 64)


@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_is_its_quantizer_and_the_gemm(format: str) -> None:
    x, up, gain = (torch.randn(*shape, generator=generator(1)).bfloat16() for shape in ((7, 300), (7, 300), (300,)))
    how = (None, 384, 128, 0.9, True, format)
    layout = get_layout(format)
    weights = layout.pack(random_codes(70, 384)), layout.pack_scales((torch.rand(70, 3) * 0.01).half())
    bias = torch.randn(70, generator=generator(2))
    for quantize, linear, inputs in (
        (ops.quantize, ops.linear, (x,)),
        (ops.rms_norm_quantize, ops.rms_norm_linear, (x, gain, 1e-5, 1.0)),
        (ops.silu_mul_quantize, ops.silu_mul_linear, (x, up)),
    ):
        expected = ops.gemm(*quantize(*inputs, *how), *weights, bias, 7, 70, torch.bfloat16)
        assert torch.equal(linear(*inputs, *weights, bias, 70, *how), expected)


# ---- as torch sees them ----------------------------------------------------------------------------------------------


def samples() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for format in FORMATS:
        x, gain = torch.randn(5, 300).bfloat16(), torch.rand(300).bfloat16()
        matrix = torch.randn(3, 128, 128).half()
        how = (None, 384, 128, 0.9, True, format)
        yield ops.quantize, (x, *how)
        yield ops.quantize, (x, matrix, 384, 384, 0.9, False, format)
        yield ops.rms_norm_quantize, (x, gain, 1e-5, 1.0, *how)
        yield ops.silu_mul_quantize, (x, x + 1, *how)
        layout = get_layout(format)
        weights = layout.pack(random_codes(70, 384)), layout.pack_scales(torch.ones(70, 3).half())
        operands = ops.quantize(x, *how)
        yield ops.gemm, (*operands, *weights, torch.zeros(70), 5, 70, torch.bfloat16)
        yield ops.gemm, (*operands, *weights, None, 5, 70, torch.float16)
        yield ops.linear, (x, *weights, torch.zeros(70), 70, *how)
        yield ops.rms_norm_linear, (x, gain, 1e-5, 1.0, *weights, None, 70, *how)
        yield ops.silu_mul_linear, (x, x + 1, *weights, None, 70, *how)


@pytest.mark.parametrize("index", range(18))
def test_opcheck(index: int) -> None:
    operator, arguments = list(samples())[index]
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_does_not_touch_them(format: str) -> None:
    x = torch.randn(4, 256, generator=generator(1)).bfloat16()
    how = (None, 256, 128, 1.0, True, format)
    layout = get_layout(format)
    weights = layout.pack(random_codes(64, 256)), layout.pack_scales(torch.ones(64, 2).half())

    def run() -> torch.Tensor:
        return ops.gemm(*ops.quantize(x, *how), *weights, None, 4, 64, torch.float16)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), expected)


# ---- dispatch --------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fake_gpu((8, 6)) makes torch report one GPU of that capability, with everything installed."""

    def fake(capability: tuple[int, int]) -> None:
        dispatch._format_of_gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(dispatch, "_require_tools", lambda index: None)

    yield fake
    dispatch._format_of_gpu.cache_clear()


@pytest.mark.parametrize(
    ("capability", "format"), [((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90")]
)
def test_architectures_with_kernels(capability: tuple[int, int], format: str, fake_gpu: Any) -> None:
    fake_gpu(capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernel_format(GPU) == dispatch.kernel_format(torch.device("cuda")) == format
        assert dispatch.kernel_format(torch.device("cpu")) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (10, 0), (12, 0)])
def test_an_architecture_without_kernels_says_so_once(capability: tuple[int, int], fake_gpu: Any) -> None:
    fake_gpu(capability)
    with pytest.warns(RuntimeWarning) as caught:
        assert [dispatch.kernel_format(GPU) for _ in range(3)] == [None] * 3
    (warning,) = caught
    text = str(warning.message)
    assert f"sm_{capability[0]}{capability[1]}" in text and "sm_90" in text and "PyTorch operations" in text


def test_missing_tools_are_named_once(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu((9, 0))

    def missing(index: int) -> None:
        raise Apex4Error("cuda-core is needed and is not installed: pip install 'apex4-quant[cuda13]'")

    monkeypatch.setattr(dispatch, "_require_tools", missing)
    with pytest.warns(RuntimeWarning) as caught:
        assert [dispatch.kernel_format(GPU) for _ in range(3)] == [None] * 3
    (warning,) = caught
    assert "pip install" in str(warning.message) and "PyTorch operations" in str(warning.message)


def test_the_variable(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu((9, 0))
    monkeypatch.setenv("APEX4_KERNEL", "reference")
    assert dispatch.kernel_format(GPU) is None
    monkeypatch.setenv("APEX4_KERNEL", "")
    assert dispatch.kernel_format(GPU) == "sm90"
    monkeypatch.setenv("APEX4_KERNEL", "marlin")
    for device in (GPU, torch.device("cpu")):
        with pytest.raises(UsageError, match=r"APEX4_KERNEL=marlin.*'reference'"):
            dispatch.kernel_format(device)


# ---- memory that kernels find as they have left it -------------------------------------------------------------------


def test_counters_per_stream_and_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(workspace, "_of_stream", {})
    monkeypatch.setattr(workspace, "_spare", {})
    monkeypatch.setattr(workspace, "_zeros", lambda index, size: torch.zeros(max(size, 64), dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    workspace.prepare(torch.device("cuda"))
    first = workspace.counters(0, 11, 16)
    assert workspace.counters(0, 11, 64) is first
    assert workspace.counters(0, 22, 16) is not first
    larger = workspace.counters(0, 11, 100)
    assert larger.numel() >= 100 and workspace.counters(0, 11, 16) is larger
    capturing = True
    assert workspace.counters(0, 11, 100) is larger
    captured = workspace.counters(0, 33, 100)  # the spare one has grown with what was needed
    assert captured is not larger and workspace.counters(0, 33, 4) is captured
    with pytest.raises(Apex4Error, match="capture"):
        workspace.counters(0, 44, 16)
    board = workspace.board(0, 44, 16)  # another piece, with a spare one of its own
    assert workspace.board(0, 44, 64) is board and workspace.counters(0, 33, 4) is captured
    capturing = False
    workspace.counters(0, 44, 16)
    capturing = True
    assert workspace.counters(0, 55, 16) is not None
    assert any(first is each for each in workspace._replaced), "a graph may still have it"


# ---- launches, without a GPU -----------------------------------------------------------------------------------------


class Launches:
    """Stands for `launcher.kernel`: keeps what was launched, with pointers and numbers as plain values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str, dict[str, Any]]] = []
        self.launched: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        monkeypatch.setattr(launcher, "kernel", self.kernel)
        monkeypatch.setattr(ops, "_gpu", lambda index: (90, 132))
        monkeypatch.setattr(ops, "_stream", lambda index: 77)
        monkeypatch.setattr(workspace, "counters", lambda index, stream, size: torch.zeros(size, dtype=torch.uint8))
        self.board = torch.zeros(1 << 17, dtype=torch.uint8)
        monkeypatch.setattr(workspace, "board", lambda index, stream, size: self.board[:size])
        ops._gemm_launch.cache_clear()

    def kernel(self, source: str, entry: str, defines: dict[str, Any], device: int) -> Launches:
        self.made.append((source, entry, defines))
        return self

    def bind(self, grid: Any, block: Any, pointers: int, numbers: Any, **rest: Any) -> Any:
        def launch(stream: int, *given: int) -> None:
            assert len(given) == pointers
            self.launched.append(((*given, *(each.value for each in numbers)), rest | {"stream": stream}))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    yield Launches(monkeypatch)
    ops._gemm_launch.cache_clear()


@pytest.mark.parametrize("m", [1, 5, 300])
def test_what_a_gemm_launches(m: int, launches: Launches) -> None:
    n, blocks, groups, stride = 130, 64, 32, -(-m // 16) * 16
    codes, scales = torch.zeros(blocks, stride, 128, dtype=torch.uint8), torch.zeros(groups, stride)
    packed, scale = torch.zeros(3, blocks, 4096, dtype=torch.uint8), torch.zeros(3, groups, 64).half()
    bias = torch.zeros(n)
    y = ops._gemm_cuda(codes, scales, packed, scale, bias, m, n, torch.float16)
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
    assert ops._gemm_cuda(codes, scales, packed, scale, None, 0, n, torch.float16).shape == (0, n)
    assert len(launches.launched) == 1


def test_what_the_quantizers_launch(launches: Launches) -> None:
    wide = torch.zeros(6, 1024, dtype=torch.bfloat16)
    x, up, gain = wide[:, :512], wide[:, 512:], torch.zeros(512, dtype=torch.bfloat16)
    matrix = torch.zeros(4, 128 * 128, dtype=torch.bfloat16)
    how = (512, 128, 0.7, True, "sm90")
    ops._quantize_cuda(x, None, 512, 256, 0.7, True, "sm80")
    ops._silu_mul_quantize_cuda(x, up, None, *how)
    ops._rms_norm_quantize_cuda(x, gain, 1e-5, 1.0, None, *how)
    codes, scales = ops._rms_norm_quantize_cuda(x, gain, 1e-5, 0.0, matrix, *how)
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
        (ops._quantize_cuda, ops._linear_cuda, (x,)),
        (ops._rms_norm_quantize_cuda, ops._rms_norm_linear_cuda, (x, gain, 1e-5, 1.0)),
        (ops._silu_mul_quantize_cuda, ops._silu_mul_linear_cuda, (x, up)),
    ):
        launches.launched.clear()
        codes, scales = quantize(*inputs, *how)
        ops._gemm_cuda(codes, scales, packed, scale, None, m, n, x.dtype)
        apart, launches.launched = launches.launched, []
        y = linear(*inputs, packed, scale, None, n, *how)
        assert y.shape == (m, n) and len(launches.launched) == len(apart) == 2 + (
            dense and quantize is ops._rms_norm_quantize_cuda
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
    assert linear(*(each[:0] if each is not gain else each for each in inputs), packed, scale, None, n, *how).shape == (
        0,
        n,
    )


def test_many_rows_of_a_norm_in_front_of_a_dense_transform_are_one_launch(launches: Launches) -> None:
    m, n, k = 9000, 130, 512
    x, gain = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(k, dtype=torch.bfloat16)
    matrix = torch.zeros(4, 128 * 128, dtype=torch.bfloat16)
    packed, scale = torch.zeros(3, 4, 4096, dtype=torch.uint8), torch.zeros(3, 4, 64).half()
    how = (matrix, k, 128, 0.7, False, "sm90")
    ops._rms_norm_quantize_cuda(x, gain, 1e-5, 0.0, *how)
    ops._rms_norm_linear_cuda(x, gain, 1e-5, 0.0, packed, scale, None, n, *how)
    assert [source for source, _, _ in launches.made[:1]] == ["quantize/quantize_dense_sm90.cu"]
    assert len(launches.launched) == 3  # the quantizer; the quantizer and the GEMM
    for args, rest in launches.launched[:2]:
        assert args[2:6] == (x.data_ptr(), gain.data_ptr(), launches.board.data_ptr(), matrix.data_ptr())
        assert args[6:8] == (m, k) and rest["shared_bytes"] > 0


def test_a_hadamard_transform_of_many_normalised_rows_is_a_product(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.zeros(1, 128 * 128, dtype=torch.bfloat16)
    monkeypatch.setattr(ops, "signs", lambda index, dtype: matrix if dtype == torch.bfloat16 else None)
    m, k = 4200, 8192
    x, gain = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(k, dtype=torch.bfloat16)
    packed, scale = torch.zeros(1, 64, 4096, dtype=torch.uint8), torch.zeros(1, 64, 64).half()

    def source_of(
        x: torch.Tensor, matrix: Any = None, group: int = 128, hadamard: bool = True, format: str = "sm90"
    ) -> str:
        launches.made.clear(), launches.launched.clear()
        ops._rms_norm_quantize_cuda(x, gain.to(x.dtype), 1e-5, 0.0, matrix, k, group, 0.7, hadamard, format)
        return launches.made[0][0]

    assert source_of(x) == "quantize/quantize_dense_sm90.cu"
    ops._rms_norm_linear_cuda(x, gain, 1e-5, 0.0, packed, scale, None, 64, None, k, 128, 0.7, True, "sm90")
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
    ops._quantize_cuda(x, None, k, 128, 0.7, True, "sm90")
    ops._silu_mul_quantize_cuda(x, x, None, k, 128, 0.7, True, "sm90")
    assert [source for source, _, _ in launches.made] == ["quantize/quantize_rows.cu"] * 2


def test_the_signs_are_made_once_and_not_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, waited = True, []
    monkeypatch.setattr(hadamard, "_signs", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: SimpleNamespace(synchronize=lambda: waited.append(index))
    )
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    assert hadamard.signs(3, torch.bfloat16) is None
    capturing = False
    made = hadamard.signs(3, torch.bfloat16)
    assert made is not None and made.shape == (1, 128 * 128) and made.dtype == torch.bfloat16 and waited == [3]
    natural = made.flatten()[torch.from_numpy(fragment_order()).argsort()].view(128, 128).double()
    assert torch.equal(natural @ natural, 128 * torch.eye(128, dtype=torch.float64)) and bool(
        (natural.abs() == 1).all()
    )
    assert torch.equal((natural / 128**0.5), hadamard.hadamard_128(torch.float64, made.device))
    capturing = True
    assert hadamard.signs(3, torch.bfloat16) is made and hadamard.signs(4, torch.bfloat16) is None


def test_few_tokens_on_hopper_are_one_launch(launches: Launches) -> None:
    m, n, k = 3, 130, 1000
    wide = torch.zeros(m, 2048, dtype=torch.float16)
    x, up = wide[:, :k], wide[:, 1024 : 1024 + k]
    packed, scale, bias = torch.zeros(3, 8, 4096, dtype=torch.uint8), torch.zeros(3, 8, 64).half(), torch.zeros(n)
    how = (None, 1024, 128, 0.7, True, "sm90")
    for input, linear, inputs in (
        (0, ops._linear_cuda, (x,)),
        (2, ops._silu_mul_linear_cuda, (x, up)),
    ):
        launches.made.clear(), launches.launched.clear()
        y = linear(*inputs, packed, scale, bias, n, *how)
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
        monkeypatch.setattr(ops, "_gpu", lambda index: (80, 108))
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    packed, scale = torch.zeros(1, k // 128, 4096, dtype=torch.uint8), torch.zeros(1, k // group, 64).half()
    how = (None, k, group, 1.0, what.get("hadamard", True), what.get("format", "sm90"))
    if "gain" in what:
        ops._rms_norm_linear_cuda(x, x[0], 1e-5, 0.0, packed, scale, None, 64, *how)
    else:
        ops._linear_cuda(x, packed, scale, None, 64, *how)
    assert len(launches.launched) == launched


def test_shared_memory_of_the_fused_kernel_is_enough_or_it_is_not_taken() -> None:
    longest = {1: 224, 2: 112, 3: 112, 4: 0}  # blocks of a row, of those that are tried
    for m, most in longest.items():
        for k_blocks in (1, 8, 32, 64, 112, 224, 400, 1000):
            plan = fused_linear.choose_fused(90, 132, m, 4096, k_blocks, "plain", "bfloat16")
            assert (plan is not None) == (k_blocks <= most), (m, k_blocks)
            assert plan is None or plan.shared_bytes <= SHARED_LIMITS[90][0]
    assert fused_linear.choose_fused(80, 108, 1, 4096, 32, "plain", "bfloat16") is None


def test_one_matrix_for_all_blocks_is_launched_as_one(launches: Launches) -> None:
    x = torch.randn(5, 512).bfloat16()
    strides = []
    for blocks in (4, 1):
        ops._quantize_cuda(x, torch.zeros(blocks, 128 * 128, dtype=torch.bfloat16), 512, 128, 1.0, False, "sm90")
        strides.append(launches.launched[-1][0][12])  # matrix_stride, in 16-byte words
    assert strides == [128 * 128 * 2 // 16, 0]


def test_a_dense_transform_of_wide_groups_is_computed_by_torch(launches: Launches) -> None:
    x, matrix = torch.randn(5, 300).bfloat16(), torch.randn(4, 128, 128).half()
    arguments = (matrix, 512, 256, 0.9, False, "sm90")
    assert all(map(torch.equal, ops._quantize_cuda(x, *arguments), ops.quantize(x, *arguments)))
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
    expected = unpack_activations(*ops.quantize(x, matrix, *how), m)
    operands = ops.quantize(x.to(device), prepared, *how)
    found = unpack_activations(operands[0].cpu(), operands[1].cpu(), m)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=0)
    difference = (found[0] - expected[0]).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 2e-3  # ties within rounding
    codes_w, bias = random_codes(n, k), torch.randn(n, generator=generator(3))
    weights = layout.pack(codes_w), layout.pack_scales((torch.rand(n, k // 128, generator=generator(4)) * 0.01).half())
    y = ops.gemm(*operands, *(w.to(device) for w in weights), bias.to(device), m, n, torch.bfloat16)
    wanted = ops.gemm(*(each.cpu() for each in operands), *weights, bias, m, n, torch.bfloat16)
    torch.testing.assert_close(y.cpu(), wanted, rtol=2.0**-7, atol=1e-3)
