"""What `apex4 plan` is asked for, and which transforms follow from that."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..format.number_format import BLOCK
from ..format.transform_kind import TransformKind
from ..models.tokenizers import Bos
from ..recipes import DEFAULT_RECIPE, get_recipe
from .cost_model import DEFAULT_TOKENS, OURS
from .options import Mode

# Those whose errors are predicted.
PLANNED_TRANSFORMS = (
    TransformKind.HADAMARD,
    TransformKind.DENSE,
    TransformKind.FEEDBACK,
    TransformKind.FEEDBACK_16,
    TransformKind.NONE,
)
TOKENS = 8192  # of calibration text, unless told otherwise: the hidden states entering every layer are kept


@dataclass(frozen=True)
class PlanSettings:
    """What `apex4 plan` is asked for; `budget` and `max_loss` are multiples, see choosing.py."""

    model: str
    recipe: str = DEFAULT_RECIPE
    target: str = "auto"
    mode: str = Mode.AUTO
    budget: float | None = None
    max_loss: float | None = None
    tokens: int = DEFAULT_TOKENS
    mainloop: str = OURS.name
    transform: str | None = None
    calib: str = "bundled"
    samples: int | None = None  # None: as many as TOKENS tokens are
    seq_len: int = 2048
    seed: int = 0
    bos: str = Bos.AUTO
    device: str = "auto"
    dtype: str = "auto"


def transforms_of(settings: PlanSettings) -> tuple[TransformKind, ...]:
    """The transforms that a plan chooses from, for activations of 4 bits: `choices_of` says what others have in their place.

    Raises UsageError for one that no errors are predicted for, one that the mode cannot have, and bounds on nothing.
    """
    recipe, mode = get_recipe(settings.recipe), settings.mode
    transform = settings.transform or recipe.transform
    if transform not in list(PLANNED_TRANSFORMS):
        raise UsageError(
            f"transform '{transform}' has no predicted errors: give --transform {', '.join(PLANNED_TRANSFORMS[:-1])} "
            f"or {PLANNED_TRANSFORMS[-1]}"
        )
    transform = TransformKind(transform)
    if mode == Mode.MIXED:
        if settings.transform is not None and transform.is_learned:
            raise UsageError(
                f"--mode mixed has groups per channel and {transform} needs groups of {BLOCK}: leave --transform away, "
                "or give another mode"
            )
        return (TransformKind.HADAMARD if transform.is_learned else transform,)
    if settings.transform is None and transform.is_learned:
        return (TransformKind.HADAMARD, transform)
    if mode == Mode.G128 or (transform.is_learned and mode != Mode.AUTO):
        for name, value in (("budget", settings.budget), ("max-loss", settings.max_loss)):
            if value is not None:
                raise UsageError(
                    f"groups of {BLOCK} and the transform {transform} everywhere leave nothing to choose: leave --{name} "
                    "away, or change --mode, --transform or --recipe"
                )
    return (transform,)
