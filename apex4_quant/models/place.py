"""How a model or a checkpoint is named on a command line. Importing this imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

DEMO = "demo"
DEMO_PATH = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True)
class Kind:
    """What a folder is asked for as: by what a sentence calls it, and what may be given."""

    name: str
    given: str
    folder: str


MODEL = Kind("model", "'demo', a local folder, or a Hub id (org/name)", "the folder of a Hugging Face model")
CHECKPOINT = Kind(
    "checkpoint", "a folder that 'apex4 quantize' wrote, or a Hub id (org/name)", "a folder that 'apex4 quantize' wrote"
)


def require_there(*models: str | None, kind: Kind = MODEL) -> None:
    """Before other arguments are looked at, and before anything is fetched: raise UsageError for a path that is not there."""
    for model in models:
        if model is not None:
            local_or_hub_id(model, kind)


def local_or_hub_id(model: str, kind: Kind) -> Path | tuple[str, str | None]:
    """The folder, or the id and its revision. Raises UsageError."""
    if model == DEMO:
        return DEMO_PATH
    if not model.strip():  # a variable that is not set: Path("") would be the folder one stands in
        raise UsageError(f"the {kind.name}'s name is empty: give {kind.given}")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UsageError(f"{kind.name} {model!r} is a file: give the folder that holds config.json and the safetensors")
    named = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w.-][\w./-]*))?", model)
    if not named:
        raise UsageError(f"{kind.name} folder {model!r} does not exist: give {kind.given}")
    return named[1], named[2]
