"""Memory that kernels find as they have left it."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels.runtime import workspace


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
