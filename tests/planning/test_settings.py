"""Which transforms a plan chooses from, by recipe, mode and option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.planning.settings import PlanSettings, transforms_of

DENSE, FEEDBACK, SIXTEEN = TransformKind.DENSE, TransformKind.FEEDBACK, TransformKind.FEEDBACK_16
HADAMARD, NONE = TransformKind.HADAMARD, TransformKind.NONE


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "mixed"}, (HADAMARD,)),
        ({"recipe": "gptq"}, (HADAMARD,)),
        ({"recipe": "gptq", "budget": 2.0}, (HADAMARD,)),
        ({"transform": "dense128"}, (DENSE,)),
        ({"transform": "dense128", "budget": 2.0}, (DENSE,)),  # of the bits of activations
        ({"transform": "feedback128"}, (FEEDBACK,)),
        ({"transform": "feedback128", "budget": 2.0}, (FEEDBACK,)),
        ({"transform": "none", "mode": "mixed"}, (NONE,)),
    ],
    ids=str,
)
def test_transforms(settings: dict[str, Any], expected: tuple[TransformKind, ...]) -> None:
    assert transforms_of(PlanSettings("demo", **settings)) == expected


@pytest.mark.parametrize("learned", [DENSE, FEEDBACK, SIXTEEN])
def test_a_recipe_with_a_learned_transform_leaves_a_choice(learned: TransformKind, tmp_path: Path) -> None:
    recipe = tmp_path / "learned.yaml"
    recipe.write_text(f"transform: {learned}\n")
    for mode in ("auto", "w4a4", "g128"):
        assert transforms_of(PlanSettings("demo", str(recipe), mode=mode, budget=2.0)) == (HADAMARD, learned)
    assert transforms_of(PlanSettings("demo", str(recipe), mode="mixed")) == (HADAMARD,)
    for other in (DENSE, FEEDBACK, NONE):
        assert transforms_of(PlanSettings("demo", str(recipe), transform=other)) == (other,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"transform": "shared128"},
            "transform 'shared128' has no predicted errors: give --transform hadamard128, dense128, feedback128, feedback128x16 or none$",
        ),
        ({"recipe": "apex4-shared"}, "transform 'shared128' has no predicted errors"),
        ({"mode": "mixed", "transform": "dense128"}, "--mode mixed has groups per channel"),
        ({"mode": "mixed", "transform": "feedback128"}, "--mode mixed has groups per channel and feedback128 needs"),
        ({"mode": "w4a4", "transform": "dense128", "budget": 2.0}, "nothing to choose: leave --budget"),
        ({"mode": "w4a4", "transform": "feedback128", "max_loss": 2.0}, "feedback128 everywhere .*: leave --max-loss"),
        ({"mode": "g128", "transform": "feedback128", "budget": 2.0}, "feedback128 everywhere .*: leave --budget"),
        ({"mode": "g128", "recipe": "rtn", "max_loss": 2.0}, "nothing to choose: leave --max-loss"),
    ],
    ids=str,
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transforms_of(PlanSettings("demo", **settings))
