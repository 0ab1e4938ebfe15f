"""What a run is said to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.models.source import ModelSource
from apex4_quant.quantization import estimates
from apex4_quant.quantization.estimates import (
    MOST_BUSY,
    Clock,
    Rates,
    Timing,
    estimate_disk,
    measured_rates,
    preview,
    seconds_by_part,
    timing_of,
)
from apex4_quant.quantization.plan import plan_of
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings
from apex4_quant.recipes import named_recipes

from .test_ranks import write_moe

Call = Callable[..., Any]  # the fixtures of conftest.py


def test_estimates_count_the_second_stream(tiny_model: Call, calib: Path) -> None:
    model = str(tiny_model())
    plain, both = (
        preview(QuantizeSettings(model, recipe=recipe, calib=str(calib), samples=64, seq_len=256, target="none"))
        for recipe in ("apex4", "apex4-gptaq")
    )
    assert both.peak_memory >= plain.peak_memory + 3 * 64 * 256 * 128 * 2  # three states of [64, 256, 128] in bfloat16


def test_the_disk_holds_what_is_said(tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    """With its checkpoint, hidden states and gradients a run is never above the estimate, and not far below."""
    model = str(tiny_model())
    for recipe in ("apex4-gptaq", "apex4-fast"):
        out, most = tmp_path / recipe, 0
        settings = QuantizeSettings(model, recipe, calib=str(calib), samples=3, seq_len=128, target="none")

        def look(out: Path = out) -> bool:
            nonlocal most
            most = max(most, sum(path.stat().st_size for path in out.rglob("*.safetensors")))
            return False

        quantize(settings, out, should_stop=look)
        source = ModelSource(model)
        said = estimate_disk(source, plan_of(source, settings.resolve(source)), (3, 128), torch.bfloat16)
        overhead = 20_000  # headers
        assert most <= said + overhead and said < 2.5 * most, recipe


def test_what_learns_nothing_takes_memory_for_few_windows(tiny_model: Call) -> None:
    model, common = str(tiny_model()), {"samples": 512, "seq_len": 256, "target": "none"}
    rtn, gptq = (preview(QuantizeSettings(model, recipe, **common)) for recipe in ("rtn", "gptq"))
    few = preview(QuantizeSettings(model, "rtn", **common | {"samples": 16}))
    assert rtn.peak_memory == few.peak_memory < gptq.peak_memory


def test_a_busy_machine_is_no_slow_one() -> None:
    """A call of 10 ms that waits seconds for a core: what is said stays within a range that can be."""
    free = [0.010, 0.011, 0.010, 0.012, 0.010]
    assert timing_of(free, free) == Timing(0.010, 0.010)
    waiting = [2.0, 0.5, 3.0, 0.02, 1.0]
    assert timing_of(waiting, [0.011, 0.012, 0.010, 0.011, 0.012]) == Timing(0.010, MOST_BUSY * 0.010)
    assert timing_of(waiting) == Timing(0.02, MOST_BUSY * 0.02)  # a GPU: the best of several
    assert timing_of([0.010, 0.020, 0.015], [0.012, 0.022, 0.016]) == Timing(0.010, 0.015)


class Ticking:
    """A clock for calls that compute 10 ms each and wait for a core 90 ms more."""

    def __init__(self, seconds: float) -> None:
        self._now, self._seconds = 0.0, seconds

    def __call__(self) -> float:
        self._now += self._seconds
        return self._now


def test_rates_are_those_of_a_free_machine_and_of_this_one() -> None:
    threads = torch.get_num_threads()
    free, busy = measured_rates("cpu", Clock(Ticking(0.1), Ticking(0.010 * threads)))
    assert free.linear == free.product == pytest.approx(0.010 / 1024**3)
    assert (free.scale, free.column) == pytest.approx((0.010 / 1024**2, 0.010 / 128))
    # As long for 8 steps of 2 blocks as for 2 says nothing of a step: then half of it is taken.
    assert free.step == pytest.approx(0.010 / 2 / 12)
    for one, other in zip(astuple(free), astuple(busy), strict=True):
        assert other == (None if one is None else pytest.approx(MOST_BUSY * one))


def test_rates_of_a_gpu_are_of_large_work_and_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with small sizes: a call takes 10 ms whatever it does, so that nothing is left for a block, a row or a column."""
    for name, value in {
        "SIZE": 256,
        "STEPS": (2, 6),
        "CHANNELS": (128, 256),
        "ROWS": (64, 256),
        "COLUMNS": 256,
    }.items():
        monkeypatch.setattr(estimates, f"GPU_{name}", value)
    found, _ = estimates._rates_of_gpu("cpu", Clock(Ticking(0.1), Ticking(0.010 * torch.get_num_threads())))
    assert found.half == found.product == found.linear == pytest.approx(0.010 / 256**3)
    assert (found.step, found.step_once, found.column_row) == (0, 0, 0)
    assert found.moment is not None and found.call == pytest.approx(0.010 / estimates.GPU_CALLS)
    assert found.column == pytest.approx(0.010 / 256) and found.input_once == pytest.approx(0.010)


def test_the_account_of_a_gpu_counts_calls(tiny_model: Call) -> None:
    """By rates of nothing but one second a call: of 8 inputs in two layers."""
    source = ModelSource(str(tiny_model()))
    settings = QuantizeSettings(source.name, "apex4-fast", target="none", device="cpu").resolve(source)
    rates = Rates(0, 0, 0, 0, 0, input_once=1, step_once=1, half=0.0, moment=0.0, byte=1, call=1)
    parts = seconds_by_part(source, plan_of(source, settings), 8192 + 10, "cuda", rates)
    steps = named_recipes()["apex4-fast"].transform_steps
    assert parts["transforms"] == 8 * (1 + steps) and parts["states"] == 8202 * 128 * 2 * 2
    # Two batches: half a layer for each of 8 inputs, and both layers once.
    assert parts["passes"] == 2 * (8 / 2 + 2) * estimates.CALLS_OF_A_LAYER
    assert parts["Hessians"] == 0 and parts["linears"] == 14 * estimates.CALLS_OF_A_LINEAR


def test_states_are_kept_while_a_layer_is_worked_on(tiny_model: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the disk later than the next layer is done is waited for."""
    monkeypatch.setattr(estimates, "KEEPING", 1.0)
    source = ModelSource(str(tiny_model()))
    settings = QuantizeSettings(source.name, "rtn", target="none", device="cpu").resolve(source)
    plan = plan_of(source, settings)
    states = 10 * 128 * 2

    def keeping(rate: float, every: float) -> float:
        monkeypatch.setenv("APEX4_KEEP_EVERY", str(every))
        parts = seconds_by_part(source, plan, 10, "cpu", Rates(*[rate] * 5))
        return parts["keeping"]

    # Before the first layer, and behind the first of two: of those behind the last there are none.
    assert keeping(0, 0) == 2 * states
    assert keeping(0, states) == 2 * states and keeping(0, states + 1) == states
    assert keeping(1, 0) == states  # while the next layer is worked on
    work = keeping(1e-6, 0)
    assert states < work < 2 * states
    assert states < keeping(1e-6, 1e6) < work  # the less often, the less there is to wait for


def test_the_account_of_time(tiny_model: Call, tmp_path: Path) -> None:
    """By rates of one second for everything: what is done how often."""
    ones = Rates(1, 1, 1, 1, 1, 1)

    def parts(model: Path, recipe: str, tokens: int, at_once: int | None = None) -> dict[str, float]:
        source = ModelSource(str(model))
        settings = QuantizeSettings(str(model), recipe, target="none", device="cpu").resolve(source)
        return seconds_by_part(source, plan_of(source, settings), tokens, "cpu", ones, at_once)

    model = tiny_model()  # 2 layers: q 128 x 128, k, v 64 x 128, o 128 x 128, gate, up 256 x 128, down 128 x 256
    elements = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256)
    gptq = parts(model, "gptq", 100)
    assert gptq["passes"] == 125 * elements and gptq["scales"] == elements and gptq["errors"] == 2 * 1024 * elements
    assert gptq["Hessians"] == pytest.approx(0.6 * 100 * 2 * (3 * 128**2 + 256**2))
    assert gptq["factors"] == 2 * (3 * 128**3 + 256**3)
    learned = parts(model, "apex4-fast", 100)
    steps = named_recipes()["apex4-fast"].transform_steps
    assert learned["transforms"] == steps * 2 * (1 + 1 + 1 + 2)
    # Products in float64 of rows of weights with themselves: 256, 128, 512 and 128 rows of 128, 128, 128 and 256.
    rounded = 2 * (125 * 640 + 13 * 1024 * 640 + 1024 * (3 * 128 + 128 + 2 * 128 + 256))
    made = 2 * (256 * 128 + 128 * 128 + 512 * 128 + 128 * 256) * 128
    assert learned["feedback"] == 2 * made + rounded and gptq["feedback"] == 0
    assert parts(model, "apex4", 100)["feedback"] == 2 * 2 * 640 * 4096 * 128 + rounded
    looked_at = 13 * 1024
    # Blocks of 128 of W^T W alone, of 256, 128, 512 and 128 rows, and of 128, 128, 128 and 256 columns.
    clips = 128 * (128 * (256 + 128 + 512 + 3 * looked_at) + 256 * (128 + looked_at))
    assert learned["clips"] == 2 * clips and "gradients" not in learned
    # With one ratio for all blocks W^T W as a whole; o and down have no more rows than columns.
    clips = 128**2 * (256 + looked_at) + 128**2 * looked_at + 128**2 * (512 + looked_at) + 256 * 128 * looked_at
    assert parts(model, "apex4-hadamard", 100)["clips"] == 2 * clips
    assert {"transforms", "gradients", "rounding"} <= set(parts(model, "apex4", 100))
    rtn = parts(model, "rtn", 200)
    assert rtn["passes"] == 2 * gptq["passes"] and not {"Hessians", "rounding", "gradients"} & set(rtn)
    moe = write_moe(tmp_path / "moe")
    dense = 2 * (2 * 128 * 128 + 2 * 64 * 128)
    assert "portions" not in parts(moe, "gptq", 100)
    assert parts(moe, "gptq", 100, 2)["portions"] == 2 * 2 * 100 * dense


def test_an_estimate_is_a_range_around_rates_that_do_not_depend_on_luck(tiny_model: Call, monkeypatch: Any) -> None:
    model = str(tiny_model())
    least, most = preview(QuantizeSettings(model, "gptq", samples=4, seq_len=64, target="none")).seconds
    assert 0 < least <= most <= MOST_BUSY * least * 1.001
