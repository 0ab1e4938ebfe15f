"""Budgets of memory, as they are written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.cuda._utils import _get_device_index

from apex4_quant.hardware.memory import MemoryBudget, held_to


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


@pytest.mark.parametrize(("device", "index"), [("cuda", 2), ("cuda:1", 1)])
def test_a_budget_of_the_gpu_is_set_on_one_with_a_number(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses to limit "cuda", as which the usual device is given."""
    limits: list[tuple[float, int]] = []

    def limit(fraction: float, on: str | int) -> None:
        limits.append((fraction, _get_device_index(on)))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda on: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    with held_to(20 * 2**30, device):
        assert limits == [(0.25, index)]
    assert limits[1:] == [(1.0, index)]
    with held_to(None, device):
        assert len(limits) == 2
