"""Named ways to quantize, as data. A recipe decides what is done to a linear; the pipeline decides when."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """`transform` is the group transform used unless --transform says otherwise. `rounding` is "nearest" or "gptq".
    `search_clip` looks for an activation clip ratio per linear input; without it all are `activation_clip`.
    `rotation` merges random Hadamard rotations of the residual stream and of the values into the weights, `diagonal` is
    the exponent of the balancing factors (0: none). Both leave the model's function as it is (model_transform.py)."""

    name: str
    summary: str
    transform: str = "hadamard128"
    rounding: str = "nearest"
    search_clip: bool = False
    activation_clip: float = 1.0
    rotation: bool = False
    diagonal: float = 0.0


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("rtn", "round to nearest, weight scales from a squared-error search"),
        Recipe("gptq", "GPTQ on the inputs that come through the quantized layers before", rounding="gptq"),
        Recipe(
            "apex4", "GPTQ, and an activation clip ratio searched for every input", rounding="gptq", search_clip=True
        ),
        # QuaRot's rotations and fixed clip ratio; its two online transforms, of whole widths, are the group transform.
        Recipe(
            "quarot-128g",
            "merged random Hadamard rotations, GPTQ, activations clipped at 0.9: QuaRot with groups of 128",
            rounding="gptq",
            activation_clip=0.9,
            rotation=True,
        ),
    )
}
DEFAULT_RECIPE = "apex4"


def get_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} is not known: give one of {', '.join(RECIPES)}")
    return RECIPES[name]
