"""Measured winners: kept in a file, used before the heuristic, never after the kernels have changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.kernels.gemm import configs, tuned
from apex4_quant.kernels.gemm.configs import GemmPlan, candidates, choose_gemm
from apex4_quant.tools import tuning

SHAPE = (90, 132, 100, 4096, 32, 1, "bf16")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("APEX4_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("APEX4_GEMM", raising=False)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As another process, which has chosen nothing yet."""
    tuned.winners.cache_clear(), configs._choose_gemm.cache_clear()


def another_plan() -> GemmPlan:
    return next(plan for plan in candidates(*SHAPE) if plan != choose_gemm(*SHAPE))


def keep(plan: GemmPlan) -> Path:
    return tuned.add(90, 132, "Some GPU", {tuned.key(*SHAPE[2:]): {"plan": plan.label}})


@pytest.mark.parametrize(
    ("m", "tokens"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192), (100000, 8192)]
)
def test_the_tokens_a_winner_is_for(m: int, tokens: int) -> None:
    assert tuned.tokens_up_to(m) == tokens


def test_a_winner_comes_before_the_heuristic() -> None:
    heuristic, other = choose_gemm(*SHAPE), another_plan()
    keep(other)
    assert choose_gemm(*SHAPE) == other
    assert choose_gemm(*SHAPE, measured=False) == heuristic
    # Up to 128 tokens, and for this shape alone.
    assert choose_gemm(90, 132, 128, *SHAPE[3:]) == replace(other, m=128)
    assert choose_gemm(90, 132, 100, 4160, 32, 1) == choose_gemm(90, 132, 100, 4160, 32, 1, measured=False)
    assert choose_gemm(90, 114, *SHAPE[2:]).sm_count == 114


def test_the_variable_comes_before_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    heuristic = choose_gemm(*SHAPE)
    keep(another_plan())
    monkeypatch.setenv("APEX4_GEMM", heuristic.label)
    assert choose_gemm(*SHAPE) == heuristic


def test_winners_are_added_to_those_that_are_there() -> None:
    keep(another_plan())
    tuned.add(90, 132, "Some GPU", {"16 64 1 1 bf16": {"plan": "x"}})
    assert len(tuned.winners(90, 132)) == 2


def test_winners_of_other_kernels_are_not_used() -> None:
    heuristic = choose_gemm(*SHAPE)
    file = keep(another_plan())
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "0" * 64}))
    forget()
    assert choose_gemm(*SHAPE) == heuristic


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"fingerprint": 1}', '{"fingerprint": "x", "shapes": 3}'])
def test_a_damaged_file_is_as_none(damage: str) -> None:
    heuristic = choose_gemm(*SHAPE)
    keep(another_plan()).write_text(damage)
    forget()
    assert choose_gemm(*SHAPE) == heuristic


def test_the_heuristic_keeps_its_plan_where_it_is_as_fast() -> None:
    heuristic, other = choose_gemm(*SHAPE), another_plan()
    assert tuning.winner([(other, 1.00), (heuristic, 1.01)], heuristic) == (heuristic, 1.01)
    assert tuning.winner([(other, 1.00), (heuristic, 1.03)], heuristic) == (other, 1.00)
    assert tuning.winner([(other, 1.00)], heuristic) == (other, 1.00)


def test_every_plan_is_timed_and_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a shape's tuning, on a CPU, with a clock that likes one plan."""
    import torch

    wanted = another_plan()
    seen = []

    class Clock:
        def seconds(self, call: object) -> float:
            plan = choose_gemm(*SHAPE)  # what the operators would use now
            seen.append(plan)
            call()
            return 1.0 if plan == wanted else 2.0

    settings = tuning.TuneSettings(("4096x4096",))
    entry = tuning._tune_shape(90, 132, 100, 512, 4096, settings, Clock(), torch.device("cpu"))
    assert {plan.label for plan in seen} == {plan.label for plan in candidates(90, 132, 100, 512, 32, 1, "bf16")}
    assert entry["heuristic"] == choose_gemm(90, 132, 100, 512, 32, 1, "bf16").label
    assert entry["microseconds"] in (1e6, 2e6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", "16", "bf16", 3), "no shapes to tune for"),
        (("4096x4096", "17", "bf16", 3), "not for 17"),
        (("4096x4096", "many", "bf16", 3), "'many' is no list"),
        (("nothing", "16", "bf16", 3), "'nothing' is not known"),
    ],
)
def test_mistakes(arguments: tuple[str, str, str, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tuning.tune(tuning.settings_of(*arguments))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Apex4Error, match="needs an NVIDIA GPU"):
        tuning.tune(tuning.TuneSettings(("4096x4096",)))
