"""The model a checkpoint was made from: its Hub id and commit, and what its own card says of licence and languages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .folder import CARD_NAME, CheckpointFolder
from .metadata import read_metadata

DEMO = "demo"
_DEMO_PATH = Path(__file__).resolve().parents[1] / "demo"
_HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
# What a quantized model takes over from its base model's card.
INHERITED = ("license", "license_name", "license_link", "language")
LICENCE = INHERITED[:3]


@dataclass(frozen=True)
class BaseModel:
    """`hub_id` and `revision` are None for a model that is not known to come from the Hub. `name` is for people.

    `inherited` has those of INHERITED that the card of the base model gives; `card_found` says whether there was one.
    """

    name: str
    hub_id: str | None
    revision: str | None
    inherited: dict[str, Any]
    card_found: bool


def base_model_of(checkpoint: CheckpointFolder, given: str | None = None, offline: bool = False) -> BaseModel:
    """What the report tells, or `given`: ORG/NAME or ORG/NAME@REVISION of a model that was quantized from a folder.

    The card is looked for in the folder, in the Hub's cache and, unless `offline`, on the Hub. Raises UsageError for a
    `given` that is no Hub id.
    """
    recorded = str(checkpoint.report["model"])
    revision = checkpoint.report.get("model_revision")
    hub_id, local = None, None
    if given is not None:
        if not re.fullmatch(rf"{_HUB_ID}(@[\w./-]+)?", given):
            raise UsageError(f"--base-model {given!r} is no Hub id: give ORG/NAME or ORG/NAME@REVISION")
        hub_id, _, asked = given.partition("@")
        revision = asked or revision
    elif recorded == DEMO:
        local = _DEMO_PATH
    elif Path(recorded).expanduser().is_dir() or Path(recorded).is_absolute():
        local = Path(recorded).expanduser()
        hub_id = _id_of_snapshot(local)
    elif re.fullmatch(rf"{_HUB_ID}(@[\w./-]+)?", recorded):
        hub_id = recorded.partition("@")[0]
    name = hub_id or ("The demo model of apex4" if recorded == DEMO else Path(recorded).name)
    card = _card(local, hub_id, revision, offline)
    metadata = read_metadata(card)[0] if card is not None else {}
    inherited = {key: metadata[key] for key in INHERITED if key in metadata}
    return BaseModel(name, hub_id, revision, inherited, card is not None)


def _id_of_snapshot(folder: Path) -> str | None:
    """ORG/NAME of a folder in the Hub's cache, .../models--ORG--NAME/snapshots/COMMIT."""
    if folder.parent.name != "snapshots":
        return None
    match = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    return f"{match[1]}/{match[2]}" if match else None


def _card(local: Path | None, hub_id: str | None, revision: str | None, offline: bool) -> str | None:
    """The text of the base model's card, or None where it cannot be had: a card is made without it then."""
    if local is not None and (local / CARD_NAME).is_file():
        return (local / CARD_NAME).read_text("utf-8", errors="replace")
    if hub_id is None:
        return None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, CARD_NAME, revision=revision)
    if not isinstance(cached, str):
        if offline:
            return None
        try:
            cached = hf_hub_download(hub_id, CARD_NAME, revision=revision)
        except Exception:  # no network, no such model, no card, no right to see it: all mean that it cannot be had
            return None
    return Path(cached).read_text("utf-8", errors="replace")
