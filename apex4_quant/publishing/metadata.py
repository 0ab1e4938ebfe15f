"""The YAML block at the head of a model card, read and written."""

from __future__ import annotations

import re
from typing import Any

_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_metadata(card: str) -> tuple[dict[str, Any], str]:
    """(metadata, the text after it). A card without metadata, or with some that is no YAML mapping, has none."""
    try:
        return metadata_of(card)
    except ValueError:
        return {}, _split(card)[1]


def metadata_of(card: str) -> tuple[dict[str, Any], str]:
    """The same of a card that is to be written anew: ValueError for metadata that cannot be read, which would be lost."""
    from ..format.yaml_text import parse_yaml

    head, text = _split(card)
    if head is None:
        return {}, text
    found = parse_yaml(head)
    if found is not None and not isinstance(found, dict):
        raise ValueError("no mapping of keys to values")
    return found or {}, text


def _split(card: str) -> tuple[str | None, str]:
    match = _BLOCK.match(card)
    return (None, card) if match is None else (match[1], card[match.end() :])


def write_metadata(metadata: dict[str, Any], text: str) -> str:
    import yaml

    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{block}---\n{text}"
