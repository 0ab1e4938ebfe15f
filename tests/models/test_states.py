"""Hidden states in files."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.format.storage import write_tensors
from apex4_quant.models.states import TENSOR_NAME, StoredStates, _brought_ahead, brought, in_memory, picked


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


class Stream:
    """Of a GPU: says in `log` what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.events += 1
        return f"copy {self.events - 1}"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    copy = torch.Tensor.copy_

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        def logged(self: torch.Tensor, part: torch.Tensor, **options: Any) -> torch.Tensor:
            log.append(f"{stream.name} copies {int(part[0])}")
            return copy(self, part, **options)

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "copy_", logged)
            yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing", log))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying", log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    return log


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_the_next_part_is_copied_while_one_is_computed_with(count: int, streams: list[str]) -> None:
    states = torch.arange(count)
    found = [part.tolist() for part in _brought_ahead(states.split(2), torch.device("cpu"))]
    assert found == [part.tolist() for part in brought(states.split(2), torch.device("cpu"))]
    assert [number for part in found for number in part] == states.tolist()


def test_a_room_is_filled_when_what_it_held_was_computed_with(streams: list[str]) -> None:
    for part in _brought_ahead(torch.arange(3).split(1), torch.device("cpu")):
        streams.append(f"computing with {int(part)}")
    assert streams == [
        "copying waits for computing", "copying copies 0",
        "copying waits for computing", "copying copies 1",
        "computing waits for copy 0", "computing with 0",
        "copying waits for computing", "copying copies 2",  # where 0 was
        "computing waits for copy 1", "computing with 1",
        "computing waits for copy 2", "computing with 2",
        "computing waits for copying",
    ]  # fmt: skip


def test_rooms_are_given_back_when_no_copy_is_on_its_way(streams: list[str]) -> None:
    parts = _brought_ahead(torch.arange(3).split(1), torch.device("cpu"))
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert streams[-1] == "computing waits for copying"


@pytest.mark.parametrize(("windows", "is_view"), [([1, 4, 7], True), ([0, 1, 3], False), ([5], False), ([], False)])
def test_evenly_spaced_windows_are_picked_where_they_are(windows: list[int], is_view: bool) -> None:
    states = torch.arange(8 * 3.0).view(8, 3, 1)
    found = picked(states, torch.tensor(windows, dtype=torch.int64))
    assert torch.equal(found, states[torch.tensor(windows, dtype=torch.int64)])
    storage = states.untyped_storage().data_ptr()
    assert (found.untyped_storage().data_ptr() == storage) is is_view
