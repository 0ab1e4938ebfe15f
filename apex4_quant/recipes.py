"""Named ways to quantize, as data (recipes.yaml). A recipe says what is done; quantization/run.py says in which order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UsageError, shown
from .format.transform_kind import TransformKind

MOST_STEPS, MOST_SWEEPS, MOST_OWN_TOKENS = 100_000, 100, 10**9
_LARGEST = 10**15
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
DEFAULT_RECIPE = "apex4"
_NAMED = Path(__file__).with_name("recipes.yaml")


class Rounding(StrEnum):
    """How a weight becomes codes. The value is what recipes say."""

    NEAREST = "nearest"  # every weight on its own (rounding/nearest.py)
    GPTQ = "gptq"  # errors of a column are made up for by those behind it (rounding/gptq.py)


class Importance(StrEnum):
    """By what outputs and inputs are weighed where a transform and a clip ratio are chosen. The value is what recipes say."""

    READERS = "readers"  # the norms of the weights that read them (transforms/importance.py)
    GRADIENTS = "gradients"  # gradients of the model's predictions (quantization/gradients.py); experts keep the first


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear.

    transform        the group transform, unless --transform or a plan says otherwise
    rounding         how weights become codes
    search_clip      look for an activation clip ratio of every linear input, or with feedback128x16 of every block of it; without it
                     all are `activation_clip`
    activation_clip  the largest value of a group that is represented, over its absmax: in (0, 1]
    rotation         merge random Hadamard rotations of the residual stream and of the values into the weights
    diagonal         exponent of the balancing factors (0: none), in [0, 1]
    gptaq            how far GPTQ's targets are moved from what a linear makes of its inputs, which come through quantized
                     layers, to what it makes of the original model's (0: not at all, 1: all the way; rounding/gptq.py)
    importance       by what errors are weighed where a transform and a clip ratio are chosen
    transform_steps  steps in which a transform is learned
    refinement       how often the codes of GPTQ are gone over again (rounding/coordinate_descent.py)
    distill_steps    steps in which the whole quantized model learns the original's predictions, 0: none (distillation/)
    distill_own_tokens  tokens of text that the original writes itself for it, 0: it learns on the calibration text alone

    `rotation` and `diagonal` leave the model's function as it is (transforms/function_preserving.py).
    """

    name: str
    summary: str = ""
    transform: TransformKind = TransformKind.HADAMARD
    rounding: Rounding = Rounding.NEAREST
    search_clip: bool = False
    activation_clip: float = 1.0
    rotation: bool = False
    diagonal: float = 0.0
    gptaq: float = 0.0
    importance: Importance = Importance.READERS
    transform_steps: int = 100
    refinement: int = 0
    distill_steps: int = 0
    distill_own_tokens: int = 0

    def __post_init__(self) -> None:
        # A plain string compares equal to a member and is none: `is` would take the wrong branch without a word.
        for name, kind in _ENUMS.items():
            object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def learns_from_text(self) -> bool:
        """Whether calibration text decides anything but the group transform, which is not the recipe's alone."""
        return (
            self.rounding is Rounding.GPTQ
            or self.importance is Importance.GRADIENTS
            or self.search_clip
            or self.diagonal > 0
            or self.distill_steps > 0
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """Checked. `where` names the source in the UsageError that a wrong key or value raises."""
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise UsageError(
                f"{where} has the unknown key {shown(unknown[0])}: the keys are {', '.join(list(known)[1:])}"
            )
        for key, value in values.items():
            types, wanted = _VALUES["str" if key in _ENUMS else str(known[key].type)]
            if not isinstance(value, types) or (isinstance(value, bool) and types != (bool,)):
                raise UsageError(f"{where} has {key} = {shown(value)}: give {wanted}")
            if isinstance(value, int) and abs(value) > _LARGEST:  # float() of it would fail
                raise UsageError(f"{where} has {key} = {shown(value)}: give {wanted} that is not so large")
            if key in _ENUMS and value not in list(_ENUMS[key]):
                raise UsageError(f"{where} has {key} = {shown(value)}: give one of {', '.join(_ENUMS[key])}")
        given: dict[str, Any] = {k: float(v) if known[k].type == "float" else v for k, v in values.items()}
        recipe = cls(**given)
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
        if not 0 <= recipe.distill_steps <= MOST_STEPS:
            raise UsageError(
                f"{where} has distill_steps = {recipe.distill_steps}: give a whole number from 0 to {MOST_STEPS}"
            )
        if not 0 <= recipe.distill_own_tokens <= MOST_OWN_TOKENS:
            raise UsageError(
                f"{where} has distill_own_tokens = {recipe.distill_own_tokens}: give a whole number from 0 to {MOST_OWN_TOKENS}"
            )
        if recipe.distill_own_tokens and not recipe.distill_steps:
            raise UsageError(
                f"{where} has distill_own_tokens = {recipe.distill_own_tokens} and no steps of distillation: add distill_steps"
            )
        if recipe.distill_steps and (recipe.rotation or recipe.diagonal):
            key = "rotation: true" if recipe.rotation else f"diagonal: {recipe.diagonal}"
            raise UsageError(f"{where} has distill_steps and '{key}', which exclude each other: leave one away")
        for key in ("refinement", "gptaq"):
            if getattr(recipe, key) and recipe.rounding is not Rounding.GPTQ:
                raise UsageError(
                    f"{where} has {key} = {getattr(recipe, key)} and rounding = '{recipe.rounding}': add 'rounding: gptq'"
                )
        return recipe

    def as_dict(self) -> dict[str, Any]:
        """What recipes.yaml would say, in plain values."""
        return asdict(self) | {name: str(getattr(self, name)) for name in _ENUMS}


_ENUMS: dict[str, type[StrEnum]] = {"transform": TransformKind, "rounding": Rounding, "importance": Importance}
# By the annotation of a field: the types that a value may have, and what to give instead of another.
_VALUES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}


def _load(path: Path, what: str) -> dict[str, Any]:
    from .format.yaml_text import parse_yaml  # not for --help

    try:
        values = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} cannot be read ({error}): give a YAML file") from error
    if not isinstance(values, dict):
        raise UsageError(f"{what} is not a mapping of keys to values: give keys such as 'rounding: gptq'")
    return values


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, simplest first. YAML is not loaded: --help says them."""
    return re.findall(r"^([\w-]+):", _NAMED.read_text("utf-8"), re.MULTILINE)


@cache
def named_recipes() -> dict[str, Recipe]:
    """Those that come with the package, by name."""
    entries = _load(_NAMED, "recipes.yaml")
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
    if path.suffix not in RECIPE_SUFFIXES:
        raise UsageError(f"recipe {recipe!r} is not known: give one of {', '.join(named_recipes())}, or a .yaml file")
    if not path.is_file():
        raise UsageError(f"recipe {recipe!r} does not exist: give a YAML file or one of {', '.join(named_recipes())}")
    return Recipe.from_dict({"name": path.stem} | _load(path, f"recipe {recipe}"), f"recipe {recipe}")
