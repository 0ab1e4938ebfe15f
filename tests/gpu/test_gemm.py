"""Every configuration of the W4A4 GEMM that this GPU can run; on Hopper also those for sm_80, whose mma is emulated there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apex4_quant.kernels.gemm import configs as gemm_configs
from apex4_quant.kernels.gemm.configs import GemmConfig

from ..kernel_cases import gemm


def configurations(sm: int, _: pytest.Config) -> dict[str, GemmConfig]:
    families = [90, 80, 86] if sm == 90 else [sm]
    return {
        f"{config.name} of sm_{family}{' (emulated)' if family != sm else ''}": config
        for family in families
        for config in gemm_configs.all_configs(family)
    }


def of_one_type(sm: int, config: pytest.Config) -> dict[str, GemmConfig]:
    """Those for bfloat16 outputs: what these tests look at does not depend on the type of the outputs."""
    return {name: each for name, each in configurations(sm, config).items() if each.out == "bf16"}


CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_shapes": configurations,
    "test_integer_sums": of_one_type,
    "test_extremes": of_one_type,
    "test_deterministic_in_graphs_and_streams": of_one_type,
}


def test_shapes(case: GemmConfig, gpu: Any) -> None:
    gemm.check_shapes(case, gpu.sm_count, gpu.generator)


def test_integer_sums(case: GemmConfig, gpu: Any) -> None:
    gemm.check_integers(case, gpu.sm_count, gpu.generator)


def test_extremes(case: GemmConfig, gpu: Any) -> None:
    gemm.check_extremes(case, gpu.sm_count, gpu.generator)


def test_deterministic_in_graphs_and_streams(case: GemmConfig, gpu: Any) -> None:
    gemm.check_replay(case, gpu.sm_count, gpu.generator)
