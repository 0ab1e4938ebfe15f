"""What a call of a layer keeps is its own: other threads, and what comes after it, see nothing of it."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from apex4_quant.kernels import dispatch
from apex4_quant.models.families import FAMILIES
from apex4_quant.nn.call_scope import CallScope
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.nn.prepare import prepare_model

THREADS, CALLS = 4, 60
LLAMA = FAMILIES["LlamaForCausalLM"]


@pytest.fixture
def threads_that_switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.fails = False

    def forward(self, meet: Callable[[], Any] | None = None) -> None:
        if meet is not None:
            meet()
        self.seen.append(CallScope.of(self).current())
        if self.fails:
            raise ValueError("as asked")


def test_every_call_has_its_own() -> None:
    module = Looking()
    scope = CallScope.of(module)
    assert CallScope.of(module) is scope and scope.current() is None
    module()
    module()
    first, second = module.seen
    assert first is not second and None not in (first, second) and scope.current() is None
    module.fails = True
    with pytest.raises(ValueError, match="as asked"):
        module()
    assert scope.current() is None


def test_calls_at_the_same_time_do_not_see_each_other() -> None:
    module, barrier = Looking(), threading.Barrier(2)
    CallScope.of(module)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(module, barrier.wait) for _ in range(2)]:
            done.result()
    assert len(set(map(id, module.seen))) == 2 and None not in module.seen


def test_a_copy_has_a_scope_of_its_own() -> None:
    module = Looking()
    scope = CallScope.of(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied()
        assert copied.seen[0] is not None and CallScope.of(copied) is not scope and not module.seen
    CallScope.remove_from(module)
    module()
    assert CallScope.of(module) is not scope and module.seen == [None]


@pytest.mark.usefixtures("threads_that_switch_often")
@pytest.mark.parametrize("kernel", ["sm80", "sm90", None])
def test_a_model_called_from_four_threads(kernel: str | None, small_llama: Callable[[], Any]) -> None:
    model = small_llama()
    prepare_model(model, LLAMA, kernel)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randint(0, 64, (1, 3 + thread), generator=generator) for thread in range(THREADS)]

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits

    expected = [run(ids) for ids in inputs]
    barrier = threading.Barrier(THREADS)

    def serve(thread: int) -> int:
        barrier.wait()
        return sum(not torch.equal(run(inputs[thread]), expected[thread]) for _ in range(CALLS))

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(serve, range(THREADS))) == [0] * THREADS


@pytest.mark.usefixtures("threads_that_switch_often")
def test_the_first_calls_come_from_several_threads(
    small_llama: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are put in order by the call itself: once, and nobody computes with half of it."""
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    monkeypatch.setattr(dispatch, "kernel_format", lambda device, bits=4: "sm90")
    packed = []
    prepare = Apex4Linear.prepare

    def counted(self: Apex4Linear, kernel: str | None, activation_bits: int | None = None) -> None:
        packed.append(self)
        prepare(self, kernel, activation_bits)

    monkeypatch.setattr(Apex4Linear, "prepare", counted)
    for _ in range(5):
        linear = small_llama().model.layers[0].mlp.gate_proj
        expected = linear.reference(x)
        packed.clear()
        barrier = threading.Barrier(THREADS)

        def run(_: int, linear: Any = linear, barrier: Any = barrier) -> torch.Tensor:
            barrier.wait()
            result: torch.Tensor = linear(x)
            return result

        with ThreadPoolExecutor(THREADS) as pool:
            assert all(torch.equal(y, expected) for y in pool.map(run, range(THREADS)))
        assert packed == [linear]
