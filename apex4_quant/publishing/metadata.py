"""The YAML block at the head of a model card, read and written."""

from __future__ import annotations

import re
from typing import Any

_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_metadata(card: str) -> tuple[dict[str, Any], str]:
    """(metadata, the text after it). A card without metadata, or with some that is no YAML mapping, has none."""
    import yaml

    match = _BLOCK.match(card)
    if match is None:
        return {}, card
    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return {}, card[match.end() :]
    return (found if isinstance(found, dict) else {}), card[match.end() :]


def write_metadata(metadata: dict[str, Any], text: str) -> str:
    import yaml

    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{block}---\n{text}"
