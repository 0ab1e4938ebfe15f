"""Learning transforms with steps in a CUDA graph, against one launch after the other; and states brought to the GPU ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apex4_quant.hardware.replayed import Replayed
from apex4_quant.models.states import brought
from apex4_quant.transforms.learned_transform import learn_transform

CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_a_graph_learns_the_same": lambda *_: {
        "four bits": {}, "eight bits": {"activation_bits": 8, "damping": 0.01}, "shared": {"shared": True},
        "gradients": {"gradients": 700},
    },
    "test_parts_are_brought_ahead": lambda *_: {"pinned": True, "pageable": False},
}  # fmt: skip


def test_a_graph_learns_the_same(case: dict[str, Any], gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def random(rows: int) -> torch.Tensor:
        values = torch.randn(rows, 384, generator=gpu.generator, device=gpu.device)
        return values * torch.logspace(0, 1, 384, device=gpu.device)

    x, weights = random(3001), [random(900), random(5000)]  # of some steps a row more than of others
    options = case | ({"gradients": random(case["gradients"])} if "gradients" in case else {})

    def learn() -> torch.Tensor:
        return learn_transform(x, weights, 45, **options)

    found = learn()
    assert not Replayed.refused
    held = torch.cuda.memory_reserved(gpu.device)
    for _ in range(3):
        assert torch.equal(learn(), found), "a second run differs"
    assert torch.cuda.memory_reserved(gpu.device) <= held + 2**26, "graphs keep memory"
    monkeypatch.setattr(Replayed, "refused", True)  # the same operations, one by one
    expected = learn()
    # Both matrices are rounded to 8 bits of mantissa at the end.
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error <= 1e-2, f"off by {float(error):.1e}"


def test_parts_are_brought_ahead(case: bool, gpu: Any) -> None:
    states = torch.randn(13, 64, 1024, generator=gpu.generator, device=gpu.device).cpu()
    states = states.pin_memory() if case else states
    found = []
    for part in brought(states.split(2), gpu.device):
        torch.cuda._sleep(2_000_000)  # so long that the next part is there before this one is read
        found.append(part + 1)
    assert torch.equal(torch.cat(found).cpu(), states + 1)
