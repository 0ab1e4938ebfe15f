"""What a run is said to take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.estimates import MOST_BUSY, Timing, estimate_disk, preview, timing_of
from apex4_quant.quantization.plan import plan_of
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings

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


def test_an_estimate_is_a_range_around_rates_that_do_not_depend_on_luck(tiny_model: Call, monkeypatch: Any) -> None:
    model = str(tiny_model())
    least, most = preview(QuantizeSettings(model, "gptq", samples=4, seq_len=64, target="none")).seconds
    assert 0 < least <= most <= MOST_BUSY * least * 1.001
