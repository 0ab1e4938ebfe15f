"""Named ways to quantize, as data. A recipe decides what is done to a linear; the pipeline decides when."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """`transform` is the group transform used unless --transform says otherwise."""

    name: str
    summary: str
    transform: str = "hadamard128"
    activation_clip: float = 1.0


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("rtn", "round to nearest in a block-Hadamard basis, scales from a squared-error clipping search"),
    )
}
DEFAULT_RECIPE = "rtn"


def get_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} is not known: give one of {', '.join(RECIPES)}")
    return RECIPES[name]
