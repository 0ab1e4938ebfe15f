"""torch.ops.apex4.experts against the float64 reference of every expert: by PyTorch operations, and by its kernels' own source."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels import cuda_ops
from apex4_quant.kernels.experts import ops
from apex4_quant.kernels.hadamard import hadamard_128
from apex4_quant.kernels.quantize.configs import prepack_matrix
from apex4_quant.kernels.runtime import launcher, workspace

from ... import cuda_on_cpu
from ...kernel_cases import experts as cases

# y is rounded to 8 bits, between the products too; codes at a tie may fall to either side.
MOST_ERROR = 0.004
HIDDEN, INNER = 200, 136  # no multiples of a block or a tile


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(
    tokens: int, top_k: int, experts: int, hidden: int = HIDDEN, case: str = "spread"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = generator(5)
    x = torch.randn(tokens, hidden, generator=made).bfloat16()
    return x, cases.ids_of(case, tokens, top_k, experts, made), torch.rand(tokens, top_k, generator=made)


@pytest.mark.parametrize(
    ("format", "transform"),
    [*product(("s8", "sm80"), ("hadamard", "dense", "shared")), ("sm80", "feedback"), ("sm80", "feedback16")],
)
def test_on_a_cpu_it_is_the_reference_of_every_expert(format: str, transform: str) -> None:
    layer = cases.layer(
        4,
        HIDDEN,
        INNER,
        format,
        generator(),
        transform=transform,
        clips=format == "sm80" and transform != "feedback16",
        kernels=False,
    )
    for case in cases.ID_CASES:
        x, ids, weights = inputs(9, 2, 4, case=case)
        y = ops.experts(x, ids, weights, None, *layer.arguments)
        assert y.dtype == x.dtype and cases.error(y, cases.expected(layer, x, ids, weights)) < MOST_ERROR, case


def test_many_experts_top_k_and_a_map_on_a_cpu() -> None:
    layer = cases.layer(128, 128, 64, "s8", generator(), kernels=False)
    for tokens, top_k in ((1, 8), (3, 1)):
        x, ids, weights = inputs(tokens, top_k, 128, 128)
        y = ops.experts(x, ids.int(), weights, None, *layer.arguments)
        assert cases.error(y, cases.expected(layer, x, ids, weights)) < MOST_ERROR
    x, ids, weights = inputs(6, 8, 300, 128)
    expert_map = torch.full((300,), -1, dtype=torch.int32)
    expert_map[100:228] = torch.arange(128, dtype=torch.int32)
    y = ops.experts(x, ids, weights, expert_map, *layer.arguments)
    assert cases.error(y, cases.expected(layer, x, ids, weights, expert_map)) < MOST_ERROR
    assert ops.experts(x[:0], ids[:0], weights[:0], None, *layer.arguments).shape == (0, 128)


def test_what_torch_asks_of_an_operator_and_compiles() -> None:
    layer = cases.layer(4, 128, 64, "s8", generator(), kernels=False)
    arguments = (*inputs(5, 2, 4, 128), None, *layer.arguments)
    torch.library.opcheck(torch.ops.apex4.experts.default, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *given: ops.experts(*given) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), ops.experts(*arguments) * 2)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, torch.zeros(5, 2), "topk_ids is torch.float32 \\[5, 2\\]"),
        (2, torch.zeros(5, 3), "topk_weights is torch.float32 \\[5, 3\\]"),
        (3, torch.zeros(4), "expert_map is torch.float32"),
        (4, torch.zeros(4, 2, 1, 8, dtype=torch.uint8), "in_packed is torch.uint8 \\[4, 2, 1, 8\\]"),
        (6, None, "in_unit is None"),
        (8, 127, "in_n is 127, and an even number"),
        (12, torch.zeros(3, 2, 1, 4096, dtype=torch.uint8), "out_packed is torch.uint8 \\[3, 2, 1, 4096\\]"),
        (13, torch.zeros(4, 2, 1, 64), "out_scale is torch.float32"),
        (15, torch.zeros(1, 1, 128, 128), "out_matrix is torch.float32 \\[1, 1, 128, 128\\]"),
        (15, torch.zeros(4, 1, 184, 128), "out_matrix is torch.float32 \\[4, 1, 184, 128\\]"),
        (20, torch.ones(4), "out_clip_factors is torch.float32 \\[4\\]"),
        (21, "sm90", "format is 'sm90', and s8 or sm80"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(place: int, value: Any, message: str) -> None:
    arguments: list[Any] = [
        *inputs(5, 2, 4, 128),
        None,
        *cases.layer(4, 128, 64, "s8", generator(), kernels=False).arguments,
    ]
    arguments[place] = value
    with pytest.raises(Apex4Error, match=f"^apex4.experts: {message}.*needed$"):
        ops.experts(*arguments)


# ---- what it does on a GPU, by the kernels' source on a CPU ----------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_launcher() -> Any:
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernels' source with")
    return cuda_on_cpu.CpuLauncher((), "-O0")


@pytest.fixture
def as_on_a_gpu(cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launcher, "kernel", cpu_launcher.kernel)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda_ops, "gpu", lambda index: (80, 8))
    for module in (cuda_ops, ops):
        monkeypatch.setattr(module, "current_cuda_stream", lambda index: 0)
    monkeypatch.setattr(workspace, "counters", lambda index, stream, size: torch.zeros(size, dtype=torch.uint8))
    signs = hadamard_128(torch.float64, torch.device("cpu")).sign()[None]
    monkeypatch.setattr(ops, "signs", lambda index, dtype: prepack_matrix(signs, dtype))
    cuda_ops._gemm_launch.cache_clear()
    yield
    cuda_ops._gemm_launch.cache_clear()


@pytest.mark.parametrize(
    ("format", "transform", "clips"),
    [
        ("s8", "hadamard", False), ("s8", "dense", False), ("s8", "shared", False),
        ("sm80", "hadamard", False), ("sm80", "hadamard", True), ("sm80", "dense", True), ("sm80", "shared", False),
        ("sm80", "feedback", True), ("sm80", "feedback16", False),
    ],
)  # fmt: skip
def test_its_kernels_give_the_reference_of_every_expert(
    format: str, transform: str, clips: bool, as_on_a_gpu: None
) -> None:
    layer = cases.layer(4, HIDDEN, INNER, format, generator(), transform=transform, clips=clips)
    for case in ("spread", "some far away"):
        x, ids, weights = inputs(19, 2, 4, case=case)
        y = ops._on_gpu(x, ids, weights, None, *layer.arguments)
        assert cases.error(y, cases.expected(layer, x, ids, weights)) < MOST_ERROR, case
        assert torch.equal(ops._on_gpu(x, ids, weights, None, *layer.arguments), y)


def test_many_tokens_are_computed_in_parts(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = cases.layer(4, HIDDEN, INNER, "s8", generator())
    x, ids, weights = inputs(11, 2, 4)
    y = ops._on_gpu(x, ids, weights, None, *layer.arguments)
    monkeypatch.setattr(ops, "MOST_CHOICES", 8)  # of four tokens
    assert torch.equal(ops._on_gpu(x, ids, weights, None, *layer.arguments), y)


def test_a_gpu_without_such_kernels_is_refused(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "gpu", lambda index: (87, 8))
    layer = cases.layer(4, 128, 64, "s8", generator())
    with pytest.raises(Apex4Error, match=r"^apex4\.experts: there is none for 8-bit activations on sm_87$"):
        ops._on_gpu(*inputs(3, 2, 4, 128), None, *layer.arguments)
