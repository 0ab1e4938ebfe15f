"""Chains of operations as graphs, with a GPU's part played by fakes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apex4_quant.hardware import replayed
from apex4_quant.hardware.replayed import Replayed

DEVICE = torch.device("cpu")


class Graph:
    """Of a GPU: what is launched between the two calls is not run, but replayed. `now` is the one being captured."""

    now: Graph | None = None
    fails = ""
    log: list[str]

    def __init__(self) -> None:
        self.launched: list[str] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        Graph.now = self

    def capture_end(self) -> None:
        Graph.now = None
        if Graph.fails:
            raise RuntimeError(f"{Graph.fails}\nand more of it")

    def replay(self) -> None:
        Graph.log += [f"replayed {name}" for name in self.launched]

    def reset(self) -> None:
        Graph.log.append("reset")


def launch(name: str) -> None:
    if Graph.now is None:
        Graph.log.append(name)
    else:
        Graph.now.launched.append(name)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Pool:
    id = "pool"


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    for name, fake in {
        "CUDAGraph": Graph, "MemPool": Pool, "current_stream": lambda device: Stream(), "stream": on
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(replayed, "_stream", lambda device: Stream())
    monkeypatch.setattr(Replayed, "refused", False)
    monkeypatch.setattr(Graph, "log", [], raising=False)
    monkeypatch.setattr(Graph, "fails", "")
    return Graph.log


def test_a_chain_is_captured_when_it_comes_again() -> None:
    chains = Replayed(DEVICE)
    for key in "aabab":
        chains.run(key, lambda key=key: launch(key))
    assert Graph.log == ["a", "replayed a", "b", "replayed a", "replayed b"]
    chains.forget()
    chains.run("a", lambda: launch("a"))
    assert Graph.log[5:] == ["reset", "reset", "a"]


def test_where_nothing_can_be_captured_operations_are_launched_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Graph, "fails", "operation not permitted")
    chains = Replayed(DEVICE)
    chains.run("a", lambda: launch("a"))
    with pytest.warns(RuntimeWarning, match=r"^apex4: .*slower: no CUDA graph \(operation not permitted\)$"):
        chains.run("a", lambda: launch("a"))
    for each in (chains, Replayed(DEVICE)):
        for _ in range(2):
            each.run("a", lambda: launch("a"))
    assert Graph.log == ["a"] * 6


def test_no_memory_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chains = Replayed(DEVICE)
    chains.run("a", lambda: launch("a"))

    def operations() -> Any:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        chains.run("a", operations)
    assert not Replayed.refused
