"""Hidden states in files."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.format.storage import write_tensors
from apex4_quant.models.states import TENSOR_NAME, StoredStates, in_memory


def test_stored_states_are_a_file_that_safetensors_would_write(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        states = torch.randn(5, 3, 8).to(dtype)
        write_tensors(tmp_path / "expected.safetensors", {TENSOR_NAME: states})
        stored = StoredStates.new(tmp_path, states.shape, dtype)
        for first in (3, 0):  # in any order
            stored.put(first, states[first : first + 3])
        assert torch.equal(in_memory(stored), states) and (len(stored), stored.nbytes) == (5, states.nbytes)
        assert all(torch.equal(a, b) for a, b in zip(stored.split(2), states.split(2), strict=True))
        assert torch.equal(stored[torch.tensor([4, 0])], states[[4, 0]])
        stored.move_to(tmp_path / "found.safetensors")
        assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
        assert torch.equal(stored.load(1, 9), states[1:])
        parts = [(tmp_path / "expected.safetensors", 1, 3), (tmp_path / "found.safetensors", 3, 5)]
        assert torch.equal(StoredStates.of(parts).load(), states[1:])
        assert torch.equal(StoredStates.of(parts).load(1, 3), states[2:4])


def test_states_without_a_name_leave_no_file(tmp_path: Path) -> None:
    stored = StoredStates.new(tmp_path, (2, 2, 2), torch.float32)
    assert len(list(tmp_path.iterdir())) == 1
    del stored
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_said(tmp_path: Path) -> None:
    write_tensors(tmp_path / "states.safetensors", {TENSOR_NAME: torch.ones(4, 2, 8)})
    stored = StoredStates.of([(tmp_path / "states.safetensors", 0, 4)])
    with (tmp_path / "states.safetensors").open("r+b") as file:
        file.truncate(120)
    with pytest.raises(Apex4Error, match=r"states\.safetensors is truncated"):
        stored.load()
