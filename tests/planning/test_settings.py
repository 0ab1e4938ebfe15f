"""Which transforms a plan chooses from, by recipe, mode and option."""

from __future__ import annotations

from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.planning.settings import PlanSettings, transforms_of

DENSE, HADAMARD, NONE = TransformKind.DENSE, TransformKind.HADAMARD, TransformKind.NONE


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (HADAMARD, DENSE)),
        ({"mode": "g128"}, (HADAMARD, DENSE)),
        ({"mode": "mixed"}, (HADAMARD,)),
        ({"recipe": "gptq"}, (HADAMARD,)),
        ({"recipe": "gptq", "budget": 2.0}, (HADAMARD,)),
        ({"transform": "dense128"}, (DENSE,)),
        ({"transform": "dense128", "budget": 2.0}, (DENSE,)),  # of the bits of activations
        ({"transform": "none", "mode": "mixed"}, (NONE,)),
    ],
    ids=str,
)
def test_transforms(settings: dict[str, Any], expected: tuple[TransformKind, ...]) -> None:
    assert transforms_of(PlanSettings("demo", **settings)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transform": "shared128"}, "transform 'shared128' has no predicted errors"),
        ({"recipe": "apex4-shared"}, "transform 'shared128' has no predicted errors"),
        ({"mode": "mixed", "transform": "dense128"}, "--mode mixed has groups per channel"),
        ({"mode": "w4a4", "transform": "dense128", "budget": 2.0}, "nothing to choose: leave --budget"),
        ({"mode": "g128", "recipe": "rtn", "max_loss": 2.0}, "nothing to choose: leave --max-loss"),
    ],
    ids=str,
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transforms_of(PlanSettings("demo", **settings))
