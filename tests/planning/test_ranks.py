"""`apex4 plan` by several processes: the plan of one, up to the order of sums; refused where the processes differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.distributed.group import Group
from apex4_quant.planning.planner import make_plan
from apex4_quant.planning.settings import PlanSettings
from apex4_quant.quantization.plan_file import read_plan_file

from ..distributed.several import Several
from ..quantization.test_ranks import write_moe

Call = Callable[..., Any]  # the fixtures of conftest.py


@pytest.mark.parametrize("kind", ["llama", "moe"])
def test_plan_of_two_is_that_of_one(kind: str, tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    # 600 inside: more than one group size, and rows that two do not share evenly.
    model = tiny_model(intermediate_size=600) if kind == "llama" else write_moe(tmp_path / "moe")
    # 31 windows: one has more than the other, and an expert's tokens are not known beforehand.
    settings = PlanSettings(
        str(model), target="A100", calib=str(calib), samples=31, seq_len=16, device="cpu", mode="auto"
    )
    one = make_plan(settings).as_dict()

    def work(group: Group) -> None:
        plan = make_plan(settings, tmp_path / "two.json" if group.is_first else tmp_path / "not-here.json", group=group)
        print(json.dumps(plan.as_dict()))

    ended = Several(2, tmp_path / "said", work).wait()
    assert [each.code for each in ended] == [0, 0], ended
    first, second = (json.loads(each.stdout) for each in ended)
    assert first == second and not (tmp_path / "not-here.json").exists()
    assert set(read_plan_file(tmp_path / "two.json").linears) == {entry["name"] for entry in one["linears"]}
    assert first["predicted"]["loss"] == pytest.approx(one["predicted"]["loss"], rel=0.02)
    for ours, theirs in zip(one["linears"], first["linears"], strict=True):
        assert (ours["name"], ours["shape"]) == (theirs["name"], theirs["shape"])
        # Sums in another order send a learned transform another way, and a token to another expert.
        for label, error in ours["predicted_error"].items():
            assert theirs["predicted_error"][label] == pytest.approx(error, rel=0.05), (ours["name"], label)


def test_ranks_that_cannot_plan_together_are_refused(tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    settings = PlanSettings(str(tiny_model()), target="A100", calib=str(calib), samples=2, seq_len=16, device="cpu")

    def work(group: Group) -> None:
        make_plan(replace(settings, seed=group.rank), group=group)

    ended = Several(2, tmp_path / "said", work).wait()
    said = "".join(each.stderr for each in ended).splitlines()
    assert [each.code for each in ended] == [2, 2] and len(said) == 1, ended
    assert "rank 1 has another calibration text" in said[0]
