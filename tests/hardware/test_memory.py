"""Budgets of memory, as they are written."""

from __future__ import annotations

import pytest

from apex4_quant.hardware.memory import MemoryBudget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("20GiB", MemoryBudget(20 * 2**30, 20 * 2**30)),
        ("1.5GB", MemoryBudget(1_500_000_000, 1_500_000_000)),
        ("host=16GiB,gpu=800MB", MemoryBudget(16 * 2**30, 800_000_000)),
        ("gpu=24 GB", MemoryBudget(None, 24_000_000_000)),
    ],
)
def test_budgets(text: str, budget: MemoryBudget) -> None:
    assert MemoryBudget.parse(text) == budget
