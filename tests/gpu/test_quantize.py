"""The activation quantizers: every input, transform, type and format, over rows, widths and groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..kernel_cases import quantize


def cases(_: int, config: pytest.Config) -> dict[str, quantize.Case]:
    listed = list(quantize.cases(config.getoption("--gpu-quick"), config.getoption("--gpu-seed")))
    named = {case.label: case for case in listed}
    assert len(named) == len(listed), "two cases have one name"
    return named


CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {"test_codes_and_scales": cases}


def test_codes_and_scales(case: quantize.Case, gpu: Any) -> None:
    assert quantize.check(case, gpu.device) == []
