"""Coordinate descent on codes: every step against float64 and a search over the whole grid, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apex4_quant.format.layouts import ROWMAJOR
from apex4_quant.format.number_format import CODE_MAX
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.storage import REPORT_NAME
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings
from apex4_quant.rounding.coordinate_descent import refine_codes
from apex4_quant.rounding.gptq import DAMPING, inverse_factor, quantize_weight_gptq

Call = Callable[..., Any]  # the fixtures of conftest.py


def problem(n: int, k: int, dead: bool = False) -> tuple[LinearFormat, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    x = torch.randn(4 * k, k, generator=generator) @ (torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k))
    if dead:
        x[:, [5, k - 1]] = 0
    weight = torch.randn(n, k, generator=generator) * 0.02
    return LinearFormat(n, k, 128, ROWMAJOR, "none", 1.0), weight, x.t() @ x / len(x)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian.double() + DAMPING * hessian.diagonal().mean().double() * torch.eye(len(hessian)).double()


def losses(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Of every row, in float64."""
    error = weight.double() - codes.double() * scales.double().repeat_interleave(128, dim=1)
    return ((error @ damped(hessian)) * error).sum(1)


@pytest.mark.parametrize(("n", "k"), [(48, 128), (64, 384)])
def test_every_row_gets_better_and_scales_and_range_stay(n: int, k: int) -> None:
    format, weight, hessian = problem(n, k)
    codes, scales = quantize_weight_gptq("w", weight, format, inverse_factor("w", hessian))
    before, kept, whole = losses(codes, scales, weight, hessian), codes.clone(), hessian.clone()
    for sweeps in (1, 4):
        refined = refine_codes(codes, scales, weight, hessian, DAMPING, sweeps)
        after = losses(refined, scales, weight, hessian)
        assert refined.dtype == torch.int8 and int(refined.abs().max()) <= CODE_MAX and torch.equal(codes, kept)
        assert bool((after <= before * (1 + 1e-5)).all()), "a row got worse"
        assert float(after.sum()) < 0.97 * float(before.sum())
        before = after
    assert torch.equal(refine_codes(codes, scales, weight, hessian, DAMPING, 0), codes) and torch.equal(hessian, whole)


def test_one_sweep_is_that_of_a_search_over_the_grid_in_float64() -> None:
    format, weight, hessian = problem(12, 256)
    codes, scales = quantize_weight_gptq("w", weight, format, inverse_factor("w", hessian))
    expected, grid = codes.clone(), torch.arange(-CODE_MAX, CODE_MAX + 1)
    for column in range(256):
        trials = []
        for code in grid:
            trial = expected.clone()
            trial[:, column] = code
            trials.append(losses(trial, scales, weight, hessian))
        expected[:, column] = grid[torch.stack(trials).argmin(0)].to(torch.int8)
    refined = refine_codes(codes, scales, weight, hessian, DAMPING, 1)
    assert not torch.equal(expected, codes)
    assert float((refined != expected).float().mean()) < 1e-3  # ties of float32 sums


def test_a_fixed_point_stays_and_so_do_dead_columns() -> None:
    format, weight, hessian = problem(32, 256, dead=True)
    codes, scales = quantize_weight_gptq("w", weight, format, inverse_factor("w", hessian))
    settled = refine_codes(codes, scales, weight, hessian, DAMPING, 60)
    assert torch.equal(settled, refine_codes(settled, scales, weight, hessian, DAMPING, 1))
    assert torch.equal(settled[:, [5, 255]], codes[:, [5, 255]]) and not torch.equal(settled, codes)


def test_gptq_ends_with_it_where_the_hessian_is_given() -> None:
    format, weight, hessian = problem(32, 256)
    factor, correction = inverse_factor("w", hessian), 0.01 * torch.randn(256, 256)
    codes, scales = quantize_weight_gptq("w", weight, format, factor, None, correction)
    refined, same = quantize_weight_gptq("w", weight, format, factor, None, correction, hessian, 3)
    assert torch.equal(same, scales)
    target = weight + weight @ correction
    assert torch.equal(refined, refine_codes(codes, scales, target, hessian, DAMPING, 3))


def test_a_recipe_asks_for_it(tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    shards = {}
    for sweeps in (0, 2):
        recipe = {"name": "mine", "rounding": "gptq", "refinement": sweeps}
        settings = QuantizeSettings(str(tiny_model()), recipe, calib=str(calib), samples=3, seq_len=32, target="none")
        quantize(settings, tmp_path / str(sweeps))
        shards[sweeps] = load_file(tmp_path / str(sweeps) / "model-00002-of-00004.safetensors")
        report = json.loads((tmp_path / str(sweeps) / REPORT_NAME).read_text())
        assert report["settings"]["recipe"]["refinement"] == sweeps
    first = "model.layers.0.self_attn.q_proj"  # what it reads is the same in both
    assert not torch.equal(shards[0][f"{first}.weight_packed"], shards[2][f"{first}.weight_packed"])
    assert torch.equal(shards[0][f"{first}.weight_scale"], shards[2][f"{first}.weight_scale"])
