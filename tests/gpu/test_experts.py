"""The kernels of experts on this GPU; on Hopper those of other architectures too: of 8 bits natively, of 4 emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apex4_quant.kernels.experts import ops
from apex4_quant.kernels.experts.configs import ExpertConfig, gemm_configs_of

from ..kernel_cases import experts as cases

MOST_ERROR = 0.01  # beside the rounding of 16 bits, codes that fall to the other side of a tie


def configurations(sm: int, _: pytest.Config) -> dict[str, ExpertConfig]:
    found = {config.name: config for each in ((90, 80, 86, 75) if sm == 90 else (sm,)) for config in gemm_configs_of(each, "s8")}  # fmt: skip
    for each in (80, 86) if sm == 90 else (sm,) if sm in (80, 86, 89) else ():
        for config in gemm_configs_of(each, "sm80"):
            found[f"{config.name}{' emulated' if sm == 90 else ''}"] = config
    return found


CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {"test_products": configurations}


def test_products(case: ExpertConfig, gpu: Any) -> None:
    rows = case.tile_m
    for counts, n, blocks, splits, pad in (
        ([0, 1, rows + 3, 0, 5], 136, 5, 2, 3), ([3 * rows + 1], 512, 8, 1, 0), ([0] * 60 + [1] * 40 + [rows], 200, 3, 3, 8),
        ([2, 0, 0, 200], 1000, 16, 1, 0), ([rows] * 4, 64, 1, 1, 0),
    ):  # fmt: skip
        launch = cases.Launch(case, counts, n, blocks, 1, splits, gpu.generator, divisor=2, pad_columns=pad)
        assert launch.problems() == [], (counts, n, blocks, splits)


@pytest.mark.parametrize("choice", cases.ID_CASES)
def test_the_router(choice: str, gpu: Any) -> None:
    for tokens, top_k, experts in ((1, 8, 128), (1, 1, 4), (37, 3, 5), (700, 8, 128)):
        cases.check_route(cases.ids_of(choice, tokens, top_k, experts, gpu.generator), experts, 32)


@pytest.mark.parametrize("transform", ["hadamard", "dense", "shared"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_operator_in_graphs_too(transform: str, tokens: int, gpu: Any) -> None:
    for experts, hidden, inner, top_k, dtype in ((4, 200, 136, 2, torch.bfloat16), (128, 384, 200, 8, torch.float16)):
        layer = cases.layer(experts, hidden, inner, "s8", gpu.generator, transform=transform, dtype=dtype)
        x = torch.randn(tokens, hidden, generator=gpu.generator, device=gpu.device).to(dtype)
        ids = cases.ids_of("spread", tokens, top_k, experts, gpu.generator)
        weights = torch.rand(tokens, top_k, generator=gpu.generator, device=gpu.device)

        def run() -> torch.Tensor:
            y: torch.Tensor = ops.experts(x, ids, weights, None, *layer.arguments)  # noqa: B023  called at once
            return y

        y = run()
        assert cases.error(y, cases.expected(layer, x, ids, weights)) < MOST_ERROR
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(run(), y) and torch.equal(captured, y)
