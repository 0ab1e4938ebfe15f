"""scripts/bench/serve: how the kernels of decoding steps become microseconds by kind."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "serve"


@pytest.fixture(scope="module")
def serve() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="serve")


def test_the_time_of_a_step_by_kind_of_kernel(serve: dict[str, Any]) -> None:
    # name, microseconds, and from its end to the next one's start; below zero: that one began before
    step = [
        ("triton_red_fused_rsqrt", 2, -1), ("apex4_linear", 10, 1), ("flash_fwd", 3, 0), ("void vllm::reshape_and_cache_flash", 2, 0),
        ("nvjet_sm90", 5, 0), ("nvjet_head", 50, 1), ("reduce_argmax", 2, 100),
    ]  # fmt: skip
    ran, now = [], 0.0
    for _ in range(serve["STEPS"]):
        for name, us, gap in step:
            ran.append((name, now, now + us))
            now += us + gap
    found = serve["microseconds"](ran)
    assert found.pop("between steps") == pytest.approx(100, abs=100 / serve["STEPS"] + 0.1)
    assert found == {
        "kernels": 7.0, "norms": 2.0, "linears": 9.0 + 5.0, "attention": 3.0, "cache": 2.0, "head": 50.0,
        "sampling and inputs": 2.0, "idle": pytest.approx(2.0, abs=0.1),
    }  # fmt: skip


def test_the_last_steps_are_taken_of_what_ran(serve: dict[str, Any]) -> None:
    """Two layers; in front of the steps a longer one, which is left out."""
    ran, now = [], 0.0
    for step in range(serve["STEPS"] + 2):
        for name, us in (
            ("reshape_and_cache_flash", 2),
            ("nvjet_sm90", 5),
            ("reshape_and_cache_flash", 2),
            ("nvjet_head", 50),
        ):
            ran.append((name, now, now + us * (10 if step == 0 else 1)))
            now = ran[-1][2]
    found = serve["of_steps"](ran, 2)
    assert found["us"] == {
        "kernels": 4.0,
        "cache": 4.0,
        "head": 50.0,
        "linears": 5.0,
        "between steps": 0.0,
        "idle": 0.0,
    }
    assert found["longest"][0] == ["nvjet_head", 1.0, 50.0]
    assert "error" in serve["of_steps"](ran[:8], 2)


def test_every_kernel_has_a_kind(serve: dict[str, Any]) -> None:
    kinds = {
        "apex4_quantize_whole_rows": "quantizers", "apex4_row_rms": "quantizers", "apex4_gemm": "linears",
        "apex4_route": "routing of experts", "fused_moe_kernel": "linears", "void flash::prepare_varlen_num_blocks": "attention",
        "triton_poi_fused_cat_cos": "rope and what else is compiled", "Memcpy DtoD": "sampling and inputs",
    }  # fmt: skip
    assert {name: serve["kind_of"](name) for name in kinds} == kinds
