"""Named ways to quantize, as data (recipes.yaml). A recipe decides what is done; the pipeline decides when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UsageError
from .format.transform_kind import TransformKind

ROUNDINGS = ("nearest", "gptq")
READERS, GRADIENTS = "readers", "gradients"
MOST_STEPS, MOST_SWEEPS = 100_000, 100
SUFFIXES = (".yaml", ".yml", ".json")
DEFAULT_RECIPE = "apex4"


@dataclass(frozen=True)
class Recipe:
    """`transform` is the group transform used unless --transform says otherwise: "hadamard128", "dense128" (learned for
    every block of every input), "shared128" (learned, one matrix for all blocks of an input) or "none". `rounding` is
    "nearest" or "gptq". `search_clip` looks for an activation clip ratio per linear input; without it all are
    `activation_clip`. `rotation` merges random Hadamard rotations of the residual stream and of the values into the
    weights, `diagonal` is the exponent of the balancing factors (0: none). Both leave the model's function as it is
    (function_preserving.py). `gptaq` is how far GPTQ's targets are moved from what a linear makes of its inputs, which come
    through quantized layers, to what it makes of the original model's (0: not at all, 1: all the way; gptq.py).
    `importance` is how outputs and inputs are weighed where a transform and a clip ratio are chosen: "readers", by the
    weights that read them (importance.py), or "gradients", by what their errors do to the model's predictions
    (gradients.py; experts keep the first). `transform_steps` is how long a transform is learned, `refinement` how often
    the codes of GPTQ are gone over again (coordinate_descent.py).
    """

    name: str
    summary: str = ""
    transform: TransformKind = TransformKind.HADAMARD
    rounding: str = "nearest"
    search_clip: bool = False
    activation_clip: float = 1.0
    rotation: bool = False
    diagonal: float = 0.0
    gptaq: float = 0.0
    importance: str = READERS
    transform_steps: int = 100
    refinement: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """Checked. `where` names the source in the UsageError that a wrong key or value raises."""
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise UsageError(f"{where} has the unknown key {unknown[0]!r}: the keys are {', '.join(list(known)[1:])}")
        for key, value in values.items():
            kind = {"str": str, "TransformKind": str, "bool": bool, "int": int, "float": (int, float)}[
                str(known[key].type)
            ]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UsageError(f"{where} has {key} = {value!r}: give {_KINDS[str(known[key].type)]}")
        # An enum only behind the check: what is not one of its values gets a sentence.
        recipe = cls(**{k: float(v) if known[k].type == "float" else v for k, v in values.items()})
        choices = (("transform", tuple(TransformKind)), ("rounding", ROUNDINGS), ("importance", (READERS, GRADIENTS)))
        for key, allowed in choices:
            if getattr(recipe, key) not in allowed:
                raise UsageError(f"{where} has {key} = {getattr(recipe, key)!r}: give one of {', '.join(allowed)}")
        recipe = replace(recipe, transform=TransformKind(recipe.transform))
        if not 0 < recipe.activation_clip <= 1:
            raise UsageError(f"{where} has activation_clip = {recipe.activation_clip}: give a number in (0, 1]")
        if not 0 <= recipe.diagonal <= 1:
            raise UsageError(f"{where} has diagonal = {recipe.diagonal}: give an exponent in [0, 1]")
        if not 0 <= recipe.gptaq <= 1:
            raise UsageError(f"{where} has gptaq = {recipe.gptaq}: give a number in [0, 1]")
        if not 0 < recipe.transform_steps <= MOST_STEPS:
            raise UsageError(
                f"{where} has transform_steps = {recipe.transform_steps}: give a whole number from 1 to {MOST_STEPS}"
            )
        if not 0 <= recipe.refinement <= MOST_SWEEPS:
            raise UsageError(
                f"{where} has refinement = {recipe.refinement}: give a whole number from 0 to {MOST_SWEEPS}"
            )
        if recipe.refinement and recipe.rounding != "gptq":
            raise UsageError(
                f"{where} has refinement = {recipe.refinement} and rounding = {recipe.rounding!r}: add 'rounding: gptq'"
            )
        if recipe.gptaq and recipe.rounding != "gptq":
            raise UsageError(
                f"{where} has gptaq = {recipe.gptaq} and rounding = {recipe.rounding!r}: add 'rounding: gptq'"
            )
        return recipe

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"transform": str(self.transform)}


_KINDS = {
    "str": "a text",
    "TransformKind": "a text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
}


def _load(path: Path, what: str) -> dict[str, Any]:
    import yaml  # not for --help

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{what} cannot be read ({' '.join(str(error).split())}): give a YAML file") from error
    if not isinstance(values, dict):
        raise UsageError(f"{what} is not a mapping of keys to values: give keys such as 'rounding: gptq'")
    return values


@cache
def named_recipes() -> dict[str, Recipe]:
    """Those that come with the package, by name."""
    entries = _load(Path(__file__).with_name("recipes.yaml"), "recipes.yaml")
    return {name: Recipe.from_dict({"name": name} | entry, f"recipe {name!r}") for name, entry in entries.items()}


def get_recipe(recipe: Recipe | str | Mapping[str, Any]) -> Recipe:
    """A named recipe, that of a YAML file, or one as `Recipe.as_dict` wrote it. Raises UsageError."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        return Recipe.from_dict(recipe, f"recipe {recipe.get('name')!r}")
    if recipe in named_recipes():
        return named_recipes()[recipe]
    path = Path(recipe)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"recipe {recipe!r} is not known: give one of {', '.join(named_recipes())}, or a .yaml file")
    if not path.is_file():
        raise UsageError(f"recipe {recipe!r} does not exist: give a YAML file or one of {', '.join(named_recipes())}")
    return Recipe.from_dict({"name": path.stem} | _load(path, f"recipe {recipe}"), f"recipe {recipe}")
