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


def test_plan_of_two_is_that_of_one(calib: Path, tmp_path: Path) -> None:
    """Of a model with experts, whose tokens are not known beforehand; one process has a window more than the other."""
    model = write_moe(tmp_path / "moe")
    recipe = tmp_path / "feedback.yaml"  # with 8 bits it is dense128
    recipe.write_text("transform: feedback128x16\n")
    settings = PlanSettings(
        str(model), str(recipe), target="A100", calib=str(calib), samples=15, seq_len=16, device="cpu"
    )
    one = make_plan(settings).as_dict()

    def work(group: Group) -> None:
        plan = make_plan(settings, tmp_path / f"{group.rank}.json", group=group)
        print(json.dumps(plan.as_dict()))

    ended = Several(2, tmp_path / "said", work).wait()
    assert [each.code for each in ended] == [0, 0], ended
    two, same = (json.loads(each.stdout) for each in ended)
    assert two == same and not (tmp_path / "1.json").exists()
    assert set(read_plan_file(tmp_path / "0.json").linears) == {entry["name"] for entry in one["linears"]}
    assert two["predicted"]["loss"] == pytest.approx(one["predicted"]["loss"], rel=0.02)
    for ours, theirs in zip(one["linears"], two["linears"], strict=True):
        assert (ours["name"], ours["shape"]) == (theirs["name"], theirs["shape"])
        for figures in ("predicted_loss", "predicted_error"):
            assert set(theirs[figures]) == set(ours[figures])
            for label, figure in ours[figures].items():
                # Sums in another order send learning another way, which on an expert's few tokens is any way at all.
                learned, expert = label.startswith(("dense", "feedback")), "experts" in ours["name"]
                if learned and expert:
                    assert theirs[figures][label] > 0
                    continue
                rel = 0.15 if learned or expert else 0.02
                assert theirs[figures][label] == pytest.approx(figure, rel=rel), (ours["name"], figures, label)


def test_ranks_that_cannot_plan_together_are_refused(tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    settings = PlanSettings(str(tiny_model()), target="A100", calib=str(calib), samples=2, seq_len=16, device="cpu")

    def work(group: Group) -> None:
        make_plan(replace(settings, seed=group.rank), group=group)

    ended = Several(2, tmp_path / "said", work).wait()
    said = "".join(each.stderr for each in ended).splitlines()
    assert [each.code for each in ended] == [2, 2] and len(said) == 1, ended
    assert "rank 1 has another calibration text" in said[0]
