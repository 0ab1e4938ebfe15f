"""Every configuration of the 8-bit GEMMs of sm_90a."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apex4_quant.kernels.gemm import sm90_s8_configs
from apex4_quant.kernels.gemm.sm90_s8_configs import Sm90S8Config

from ..kernel_cases import s8


def configurations(sm: int, _: pytest.Config) -> dict[str, Sm90S8Config]:
    return {config.name: config for config in sm90_s8_configs.all_configs(sm)}


def of_one_type(sm: int, config: pytest.Config) -> dict[str, Sm90S8Config]:
    """What these tests look at does not depend on the type of the outputs, except in 16 bits' range."""
    return {name: each for name, each in configurations(sm, config).items() if each.out == "bf16"}


CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_shapes": configurations,
    "test_integer_sums": of_one_type,
    "test_extremes": of_one_type,
    "test_long_rows": of_one_type,
    "test_deterministic_in_graphs_and_streams": of_one_type,
}


def test_shapes(case: Sm90S8Config, gpu: Any) -> None:
    s8.check_shapes(case, gpu.generator)


def test_integer_sums(case: Sm90S8Config, gpu: Any) -> None:
    s8.check_integers(case, gpu.generator)


def test_extremes(case: Sm90S8Config, gpu: Any) -> None:
    s8.check_extremes(case, gpu.generator)


def test_long_rows(case: Sm90S8Config, gpu: Any) -> None:
    """All 127 and 7 over 28,672 inputs, the largest sums of Llama-2-70B."""
    s8.check_long_rows(case, gpu.generator)


def test_deterministic_in_graphs_and_streams(case: Sm90S8Config, gpu: Any) -> None:
    s8.check_replay(case, gpu.generator)
