"""Runs that keep to a budget of memory: states on the disk change no byte, and what cannot be is refused before it begins."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.errors import Apex4Error, Stopped, UsageError
from apex4_quant.hardware.memory import MemoryBudget, resident_now
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization import run
from apex4_quant.quantization.memory import MemoryAccount, MemoryEstimate, MemoryPlan, Windows, fit
from apex4_quant.quantization.plan import plan_of

from ..conftest import stop_after
from .test_ranks import settings_of, write_moe

Call = Callable[..., Any]


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """streaming(yes): what the next runs do with their states, whatever the budget."""

    def set_to(yes: bool) -> None:
        monkeypatch.setattr(run, "fit", lambda *_: MemoryPlan(MemoryBudget(), yes, 0, MemoryEstimate(0, 0, 0, 0)))

    return set_to


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# Gradients, both streams of GPTAQ, and a pass that measures a layer first.
@pytest.mark.parametrize("recipe", ["apex4-gptaq", "apex4-hadamard"])
def test_states_on_the_disk_change_no_byte(
    recipe: str, tiny_model: Call, calib: Path, tmp_path: Path, streaming: Callable[[bool], None]
) -> None:
    settings = QuantizeSettings(str(tiny_model()), recipe, calib=str(calib), samples=3, seq_len=64, target="none")
    streaming(False)
    assert not quantize(settings, tmp_path / "whole").states_on_disk
    streaming(True)
    assert quantize(settings, tmp_path / "streamed").states_on_disk
    assert same_files(tmp_path / "whole", tmp_path / "streamed")
    # A run that is stopped goes on either way: more memory may be there the next time, or less.
    for first in (True, False):
        out = tmp_path / f"stopped-{first}"
        streaming(first)
        with pytest.raises(Stopped):
            quantize(settings, out, should_stop=stop_after(1, out))
        streaming(not first)
        quantize(settings, out, resume=True)
        assert same_files(tmp_path / "whole", out)


def test_weights_of_the_next_layer_are_read_ahead(tiny_model: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(str(tiny_model()))
    expected = [source.read(source.layer_tensors(layer)) for layer in range(source.num_layers)]
    read, asked = ModelSource.read, threading.Semaphore(0)

    def noted(self: ModelSource, names: Iterable[str]) -> dict[str, torch.Tensor]:
        found = read(self, names)
        asked.release()
        return found

    monkeypatch.setattr(ModelSource, "read", noted)
    ahead = source.layer_reader(torch.device("cpu"))
    for layer, tensors in enumerate(expected):
        found = ahead.take(layer, layer + 1)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
        assert asked.acquire(timeout=30), "it is read before it is asked for"
    assert not asked.acquire(timeout=0.1), "a layer is read twice"


def test_a_file_that_cannot_be_read_ahead_is_said_when_its_layer_comes(
    tiny_model: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource(str(tiny_model()))
    read = ModelSource.read

    def damaged(self: ModelSource, names: Iterable[str]) -> dict[str, torch.Tensor]:
        if any("layers.1." in name for name in names):
            raise Apex4Error("damaged")
        return read(self, names)

    monkeypatch.setattr(ModelSource, "read", damaged)
    ahead, at_once = source.layer_reader(torch.device("cpu")), source.layer_reader(None)
    for reader in (ahead, at_once):
        reader.take(0, 1)
        with pytest.raises(Apex4Error, match="damaged"):
            reader.take(1, 2)


class Shapes(MemoryAccount):
    """An account of invented numbers: so many bytes, and 5 on the GPU and 10 on the host for every expert at once."""

    def __init__(self, experts: int = 0) -> None:
        self.experts = experts

    def estimate(self, experts_at_once: int | None = None) -> MemoryEstimate:
        count = self.experts if experts_at_once is None else experts_at_once
        return MemoryEstimate(gpu=20 + 5 * count, host=50 + 10 * count, states=100, streamed=10)


def test_a_budget_is_kept_by_states_on_the_disk_or_refused() -> None:
    estimate = Shapes()
    assert not fit(estimate, MemoryBudget(), 30, "cpu").streamed
    assert not fit(estimate, MemoryBudget(host=180), 30, "cpu").streamed
    assert fit(estimate, MemoryBudget(host=179), 30, "cpu").streamed
    assert fit(estimate, MemoryBudget(host=90, gpu=20), 30, "cuda").streamed
    with pytest.raises(UsageError, match=r"allows 89 B of the host.* about 90 B .30 B of them the program itself"):
        fit(estimate, MemoryBudget(host=89), 30, "cpu")
    with pytest.raises(UsageError, match=r"allows 19 B of the GPU.* about 20 B"):
        fit(estimate, MemoryBudget(gpu=19), 30, "cuda:0")
    fit(estimate, MemoryBudget(gpu=19), 30, "cpu")


@pytest.mark.parametrize(
    ("budget", "device", "at_once", "streamed"),
    [
        (MemoryBudget(), "cpu", 10, False),
        (MemoryBudget(host=280), "cpu", 10, False),
        (MemoryBudget(host=279), "cpu", 10, True),  # before a pass more for half of the experts
        (MemoryBudget(host=189), "cpu", 5, True),
        (MemoryBudget(host=139), "cpu", 4, True),
        (MemoryBudget(host=100), "cpu", 1, True),
        (MemoryBudget(gpu=70), "cuda", 10, False),
        (MemoryBudget(gpu=44), "cuda", 4, False),
        (MemoryBudget(gpu=25, host=100), "cuda", 1, True),
    ],
)
def test_experts_are_collected_in_as_few_portions_as_a_budget_lets(
    budget: MemoryBudget, device: str, at_once: int, streamed: bool
) -> None:
    found = fit(Shapes(10), budget, 30, device)
    assert (found.experts_at_once, found.streamed) == (at_once, streamed)
    assert found.expected == Shapes(10).estimate(at_once)


def test_one_expert_at_a_time_is_the_least() -> None:
    with pytest.raises(UsageError, match=r"allows 24 B of the GPU.* one expert at a time needs about 25 B"):
        fit(Shapes(10), MemoryBudget(gpu=24), 30, "cuda")
    with pytest.raises(
        UsageError, match=r"needs about 100 B .* with one expert at a time and hidden states on the disk"
    ):
        fit(Shapes(10), MemoryBudget(host=99), 30, "cpu")


# Both streams of GPTAQ; learned transforms and gradients.
@pytest.mark.parametrize(
    ("recipe", "at_once"),
    [("apex4-gptaq", 2), pytest.param("apex4", 1, marks=pytest.mark.slow("the same with another recipe"))],
)
def test_portions_of_experts_change_no_byte(
    recipe: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six experts, of which one is sent no token; hidden states are on the disk too."""
    monkeypatch.setattr(run, "resident_now", lambda: 0)
    monkeypatch.setattr(MemoryAccount, "estimate", Shapes.estimate)
    settings = settings_of(tmp_path, write_moe(tmp_path / "moe"), recipe)
    assert quantize(settings, tmp_path / "whole").experts_at_once is None
    budget = MemoryBudget(host=Shapes(6).estimate(at_once).on_host(True))
    portions = quantize(settings, tmp_path / "portions", memory=budget)
    assert portions.as_dict()["experts_at_once"] == at_once
    assert same_files(tmp_path / "whole", tmp_path / "portions")


def test_the_account_of_portions_is_that_of_their_statistics(tmp_path: Path) -> None:
    source = ModelSource(str(write_moe(tmp_path / "moe", hidden_size=1024, num_hidden_layers=1)))
    settings = QuantizeSettings(source.name, "gptq", samples=64, seq_len=64, target="none", device="cpu")
    plan = plan_of(source, settings.resolve(source))
    account = MemoryAccount(source, plan, Windows(64, 64, 64), torch.bfloat16, "cuda")
    of_one = 4 * 1024**2 + 2048 * 1024 * 2  # a Hessian, and the rows kept
    assert account.experts == 6
    assert account.estimate().gpu - account.estimate(1).gpu == 5 * of_one
    assert account.estimate(6) == account.estimate()


@pytest.mark.parametrize(
    "text", ["20", "", "lots", "-1GB", "0GB", "host=1GB,host=2GB", "disk=1GB", "host=1GB,", "1e9GB"]
)
def test_what_is_no_budget_is_refused(text: str, quantize_badly: Call, one_sentence: Call, tiny_model: Call) -> None:
    one_sentence(quantize_badly(tiny_model(), "--memory", text), 2, "--memory", "host=16GiB,gpu=20GiB")


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_written(
    quantize_badly: Call, one_sentence: Call, tiny_model: Call, tmp_path: Path
) -> None:
    sentence = one_sentence(
        quantize_badly(tiny_model(), "--memory", "host=10MB"), 2, "10.0 MB of the host", "needs about"
    )
    assert "allow more" in sentence and not (tmp_path / "out").exists()


def test_what_was_allowed_stands_beside_what_is_needed_and_used(
    invoke: Callable[..., Result], tiny_model: Call, calib: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    small = (
        "--calib",
        calib,
        "--samples",
        2,
        "--seq-len",
        32,
        "--target",
        "none",
        "--recipe",
        "gptq",
        "--device",
        "cpu",
    )
    common = ("quantize", model, "-o", tmp_path / "out", *small, "--memory", "host=64GiB")
    shown = invoke(*common, "--dry-run").stdout
    assert "of the host (allowed: host 68.7 GB)" in shown and "of the disk" in shown and "of the GPU" not in shown
    expected = json.loads(invoke(*common, "--dry-run", "--json").stdout)
    assert expected["memory_budget"] == {"host": 64 * 2**30, "gpu": None} and not expected["states_on_disk"]
    assert expected["peak_gpu_memory_estimate"] == 0 and expected["disk_estimate"] > 0
    used = json.loads(invoke(*common, "--json").stdout)
    # Most of it is the program itself here, so this says that the account is not far off, and no more.
    assert 0.75 < used["peak_memory"]["host"] / expected["peak_host_memory_estimate"] < 1.25
    assert used["memory_budget"] == expected["memory_budget"] and used["seconds"] > 0


def test_an_account_of_shapes(tiny_model: Call) -> None:
    """What dominates: K x K for wide inputs, attention's graph for long windows, states for many of them."""
    source = ModelSource(str(tiny_model(intermediate_size=4096)))  # a layer is more than the embedding

    def of(count: int, length: int, recipe: str = "gptq", device: str = "cuda") -> MemoryEstimate:
        settings = QuantizeSettings(source.name, recipe, samples=count, seq_len=length, target="none", device="cpu")
        plan = plan_of(source, settings.resolve(source))
        return MemoryAccount(source, plan, Windows(count, length, count), torch.bfloat16, device).estimate()

    one, many = of(8, 64), of(800, 64)
    sizes = [source.infos[name].elements * 2 for name in source.layer_tensors(0)]
    layer = sum(1 << (size - 1).bit_length() for size in sizes)  # the next, which is read ahead
    assert one.states - layer == 2 * 2**17 and many.states - layer == 2 * 2**24  # pinned: 131,072 and 13,107,200 bytes
    assert many.host == one.host and many.streamed == one.streamed == 2 * 8192 * 128 * 2
    assert many.gpu > one.gpu  # rows are kept of inputs, which 8 x 64 tokens do not fill
    assert one.host >= sum(sizes) + sum(
        1 << (size // 4 - 1).bit_length() for size in sizes if size > 2**14
    )  # its shard, pinned
    cpu = of(8, 64, device="cpu")
    assert cpu.gpu == 0 and cpu.host > one.host and resident_now() > 2**26
