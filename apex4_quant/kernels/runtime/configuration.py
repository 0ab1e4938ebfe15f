"""One kernel as it is compiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """One cubin: a source of kernels/cuda under some macros, and its entry. `name` is unique within an architecture."""

    name: str
    source: str
    entry: str
    defines: dict[str, int | str]
