"""What a run is asked for, and what was decided: two types, of which only the second is recorded.

    QuantizeSettings    as a user gives them: `auto`, None, paths of files, text for numbers
    ResolvedSettings    every field decided and checked, files replaced by what they say
    as_dict, from_dict  the second as JSON: settings.json of an unfinished run, "settings" of a checkpoint's report

A run is resumed with the settings that were recorded. What is asked for beside them is compared in its resolved form, so
`0256` and 256, or two spellings of one GPU or one folder, are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import Apex4Error, UsageError
from ..format.layouts import get_layout
from ..format.number_format import BITS, GroupSize, parse_activation_bits, parse_group_size
from ..format.transform_kind import TransformKind
from ..hardware.devices import resolve_device, resolve_dtype
from ..hardware.gpus import resolve_target
from ..models.place import DEMO, DEMO_PATH
from ..models.source import ModelSource
from ..models.tokenizers import Bos
from ..recipes import DEFAULT_RECIPE, get_recipe, named_recipes
from ..transforms.rewriter import require_rotatable
from .plan_file import PlanEntry, PlanFile, plan_given, read_plan_file

LARGEST_COUNT = 2**31 - 1  # of windows, and of tokens a window
SEEDS = (-(2**63), 2**64 - 1)  # what torch.Generator.manual_seed takes


@dataclass(frozen=True)
class QuantizeSettings:
    """What the user asks for. `resolve` decides what is `auto` or None.

    `recipe` is a name, the path of a YAML file, or a file's content. `plan` is the path of a plan file; from Python it may
    also be its content, {"group_size": ..., "transform": ...} by full module name, or group sizes alone. `samples` are
    windows of `seq_len` tokens of the text `calib`, which begin with BOS or not (`bos`). `ignore` are patterns of linears to keep as they are.
    """

    model: str
    recipe: str | dict[str, Any] = DEFAULT_RECIPE
    group_size: GroupSize = 128
    plan: str | dict[str, Any] | None = None
    target: str = "auto"
    layout: str | None = None
    transform: str | None = None
    activation_bits: int | None = None  # None: 4
    calib: str = "bundled"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    bos: str = Bos.AUTO
    device: str = "auto"
    dtype: str = "auto"
    ignore: tuple[str, ...] = ()

    def asked(self) -> dict[str, Any]:
        """Every field by name, as if each had been given: for `require_same`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def resolve(self, source: ModelSource) -> ResolvedSettings:
        """Check every value and decide the open ones. Raises UsageError."""
        recipe = get_recipe(self.recipe)
        require_rotatable(source, recipe)
        target = resolve_target(self.target)
        transform = self.transform or recipe.transform
        if transform not in list(TransformKind):
            raise UsageError(f"transform {transform!r} is not known: give one of {', '.join(TransformKind)}")
        for name, value in (("samples", self.samples), ("seq-len", self.seq_len)):
            if value < 1:
                raise UsageError(f"--{name} is {value}: give a positive number")
            if value > LARGEST_COUNT:
                raise UsageError(f"--{name} is {value}: give a number up to {LARGEST_COUNT}")
        if not SEEDS[0] <= self.seed <= SEEDS[1]:
            raise UsageError(f"--seed is {self.seed}: give a whole number from {SEEDS[0]} to {SEEDS[1]}")
        if self.bos not in list(Bos):
            raise UsageError(f"--bos is {self.bos!r}: give one of {', '.join(Bos)}")
        group_size = parse_group_size(self.group_size)
        if self.plan is not None and group_size != 128:
            raise UsageError("--plan decides every group size: leave --group-size away")
        bits = BITS if self.activation_bits is None else parse_activation_bits(self.activation_bits)
        kind = TransformKind(transform).fitting(group_size, bits)  # the recipe's gives way, what was asked for does not
        if self.transform is not None and kind != transform:
            raise UsageError(
                f"--transform {transform} is for groups of 128 and {BITS}-bit activations: leave --transform away, or give "
                f"{TransformKind.DENSE}"
            )
        context = source.config.get("max_position_embeddings") or self.seq_len
        plan = self._plan()
        return ResolvedSettings(
            model=self.model,
            # A file may change before a resume: its content is what is recorded.
            recipe=self.recipe if self.recipe in list(named_recipes()) else recipe.as_dict(),
            group_size=group_size,
            plan=None if plan is None else plan.for_model(source, kind, bits),
            plan_origin=None if plan is None else plan.origin,
            target=target.gpu or target.arch or "none",
            layout=get_layout(self.layout or target.layout).name,
            transform=kind,
            activation_bits=bits,
            calib=self.calib,
            samples=self.samples,
            seq_len=min(self.seq_len, context),
            seed=self.seed,
            bos=str(Bos(self.bos)),
            device=resolve_device(self.device),
            dtype=resolve_dtype(self.dtype, source.config),
            ignore=tuple(self.ignore),
        )

    def _plan(self) -> PlanFile | None:
        if self.plan is None:
            return None
        plan = read_plan_file(Path(self.plan).expanduser()) if isinstance(self.plan, str) else plan_given(self.plan)
        if plan.names_transforms and self.transform is not None:
            raise UsageError(
                f"plan {plan.path} decides transforms: leave --transform away, or remove them from the plan"
            )
        if plan.names_activation_bits and self.activation_bits is not None:
            raise UsageError(
                f"plan {plan.path} decides activation bits: leave --activation-bits away, or remove them from the plan"
            )
        return plan


@dataclass(frozen=True)
class ResolvedSettings:
    """What a run does, every field decided. `recipe` is a named recipe's name or the content of a file.

    `transform` and `activation_bits` are those of linears for which `plan`, by full module name, has none. `seq_len` is within the model's context.
    `target` is a GPU of the table, sm_XX or none. `plan_origin` says how the plan came about (PlanFile.origin) and decides
    nothing: it is recorded for cards and reports.
    """

    model: str
    recipe: str | dict[str, Any]
    group_size: GroupSize
    plan: dict[str, PlanEntry] | None
    plan_origin: dict[str, Any] | None
    target: str
    layout: str
    transform: TransformKind
    activation_bits: int
    calib: str
    samples: int
    seq_len: int
    seed: int
    bos: str
    device: str
    dtype: str
    ignore: tuple[str, ...]

    def asked(self) -> dict[str, Any]:
        """Every field by name, as a user would give it: for `require_same`."""
        return self.changed({}).asked()

    def resolve(self, source: ModelSource) -> ResolvedSettings:
        """These settings: nothing is open any more."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """The JSON object that is recorded. Nothing is said of activations of 4 bits, nor of a plan that the planner did not
        make."""
        values = self._values()
        if self.activation_bits == BITS:
            del values["activation_bits"]
        if self.plan_origin is None:
            del values["plan_origin"]
        return values

    def _values(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "plan": None if self.plan is None else {name: entry.as_dict() for name, entry in self.plan.items()},
            "transform": str(self.transform),
            "ignore": list(self.ignore),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Path) -> ResolvedSettings:
        """What `as_dict` wrote into the file `where`, which may hold more beside it. Raises Apex4Error if it is damaged."""
        try:
            values = {"activation_bits": BITS, "plan_origin": None, **values}
            known = {field.name: values[field.name] for field in fields(cls)}
            parse_activation_bits(known["activation_bits"])
            plan = known["plan"]
            return cls(
                **known
                | {
                    "plan": None if plan is None else dict(plan_given(plan).linears),
                    "transform": TransformKind(known["transform"]),
                    "ignore": tuple(known["ignore"]),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise Apex4Error(f"{where} is damaged: the run cannot be resumed, begin again in another folder") from error

    def changed(self, asked: Mapping[str, Any]) -> QuantizeSettings:
        """The same settings, as a user would give them, but for what is `asked`, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(QuantizeSettings)}
        if self.plan is not None:
            values["plan"] = {name: entry.as_dict() for name, entry in self.plan.items()}
        # Beside a plan that decides transforms, or another plan, the transform is an option only if it is asked for.
        if "plan" in asked or any(entry.transform for entry in (self.plan or {}).values()):
            values["transform"] = None
        if "plan" in asked or any(entry.activation_bits for entry in (self.plan or {}).values()):
            values["activation_bits"] = None
        if self.transform.has_feedback and ("group_size" in asked or "activation_bits" in asked):
            values["transform"] = None  # another may be all that fits
        return QuantizeSettings(**values | dict(asked))


def require_same(out: Path, first: ResolvedSettings, asked: Mapping[str, Any]) -> None:
    """Raise UsageError if what is `asked`, by field of QuantizeSettings, is not what `out` was begun with.

    `auto` is what the first run decided. Files that are asked for are read, and the model's headers.
    """
    asked = {name: value for name, value in asked.items() if value != "auto"}
    model = asked.pop("model", first.model)
    if not same_model(model, first.model):
        raise other_setting(out, "model", first.model, model)
    if not asked:
        return
    again = first.changed(asked).resolve(ModelSource(first.model))
    recorded, now = first._values(), again._values()
    for name, given in asked.items():
        if recorded[name] != now[name]:
            shown = now[name] if name == "recipe" or str(given) == str(now[name]) else given
            raise other_setting(out, name, getattr(first, name) if name == "ignore" else recorded[name], shown)


def same_model(one: str, other: str) -> bool:
    """Whether two values of MODEL name one model: the same text, or one local folder in two spellings."""
    folders = [_local_folder(model) for model in (one, other)]
    return one == other or (folders[0] is not None and folders[0] == folders[1])


def _local_folder(model: str) -> Path | None:
    folder = DEMO_PATH if model == DEMO else Path(model).expanduser()
    return folder.resolve() if folder.is_dir() else None


def other_setting(out: Path, name: str, first: Any, now: Any) -> UsageError:
    """The refusal to resume with another setting."""
    describe = _recipe_as_text if name == "recipe" else _setting_as_text
    return UsageError(
        f"{out} was begun with {name} = {describe(first, now)} and now {describe(now, first)} is asked for: "
        "resume with the first run's settings or choose another output folder"
    )


def _setting_as_text(value: Any, other: Any) -> str:
    # A plan has hundreds of entries: which of them differ is for a diff of the two files.
    return "a plan of its own" if isinstance(value, dict) else repr(value)


def _recipe_as_text(recipe: Any, other: Any) -> str:
    """A recipe's name, and of a file's content what is not the same in the `other`."""
    if not isinstance(recipe, dict):
        return repr(recipe)
    differ = [key for key in recipe if isinstance(other, dict) and key != "name" and recipe[key] != other.get(key)]
    content = ", ".join(f"{key}: {recipe[key]!r}" for key in differ)
    return f"{recipe.get('name')!r} of a file" + (f" with {content}" if content else "")
