"""Every configuration of gemm_s8.cu that this GPU can run; on Hopper those of other architectures too, natively."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apex4_quant.kernels import ops  # noqa: F401  registers the operators
from apex4_quant.kernels.gemm import s8_configs
from apex4_quant.kernels.gemm.s8_configs import S8Config, S8Plan

from ..kernel_cases import s8


def configurations(sm: int, _: pytest.Config) -> dict[str, S8Config]:
    """By name: architectures share tiles, and differ in stages."""
    of = (90, 80, 86, 75) if sm == 90 else (sm,)
    return {config.name: config for each in of for config in s8_configs.all_configs(each)}


def of_one_type(sm: int, config: pytest.Config) -> dict[str, S8Config]:
    """What these tests look at does not depend on the type of the outputs, except in 16 bits' range."""
    return {name: each for name, each in configurations(sm, config).items() if each.out == "bf16"}


CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_shapes": configurations,
    "test_integer_sums": of_one_type,
    "test_extremes": of_one_type,
    "test_deterministic_in_graphs_and_streams": of_one_type,
}


def test_shapes(case: S8Config, gpu: Any) -> None:
    s8.check_shapes(case, gpu.generator)


def test_integer_sums(case: S8Config, gpu: Any) -> None:
    s8.check_integers(case, gpu.generator)


def test_extremes(case: S8Config, gpu: Any) -> None:
    s8.check_extremes(case, gpu.generator)


def test_deterministic_in_graphs_and_streams(case: S8Config, gpu: Any) -> None:
    s8.check_replay(case, gpu.generator)


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator(bias: bool, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """apex4::gemm with the format `s8`, of every tile, shared and not."""
    for config in s8_configs.all_configs(gpu.sm):
        if config.out != "bf16":
            continue
        for splits in (1, 3):
            monkeypatch.setenv("APEX4_GEMM", f"{config.tile_name}/{splits}")
            operands = s8.random_operands(config.tile_m + 3, 328, 6, 2, gpu.generator, bias)
            launch = s8.Launch(S8Plan(config, *operands.shape[:2], 6, splits), operands)
            m, n, _ = operands.shape
            y = torch.ops.apex4.gemm(
                launch.a_codes, launch.a_scale, launch.w_packed, launch.w_ratio, launch.w_unit, operands.bias, m, n,
                torch.bfloat16,
            )  # fmt: skip
            assert s8.same(y, s8.expected(operands, torch.bfloat16)), config.name
