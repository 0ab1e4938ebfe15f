"""Measured winners among the GEMM's plans, in a file beside the compiled kernels. Torch-free.

`apex4 kernels tune` (tools/tuning.py) writes it, `choose_gemm` (configs.py) reads it. A file belongs to one kind of GPU and to one
state of the kernels: after any change of them it is not used any more, since its winners may not be.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from ..runtime import compiler

# A plan is measured for these numbers of tokens and used up to each: between them the tiles that win change.
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def tokens_up_to(m: int) -> int:
    """The number of tokens whose winner m tokens get."""
    return next((tokens for tokens in TOKENS if m <= tokens), TOKENS[-1])


def key(m: int, n: int, k_blocks: int, blocks_per_group: int, out: str, activation_bits: int = 4) -> str:
    bits = "" if activation_bits == 4 else f" {activation_bits} bits"
    return f"{tokens_up_to(m)} {n} {k_blocks} {blocks_per_group} {out}{bits}"


def path(sm: int, sm_count: int) -> Path:
    return compiler.cache_folder() / f"tuned_sm{sm}_{sm_count}.json"


@cache
def fingerprint() -> str:
    """Of everything a GEMM is compiled from, and of the lists of configurations."""
    digest = hashlib.sha256()
    for source in (*sorted(compiler.SOURCES.rglob("*.cuh")), *sorted(compiler.SOURCES.glob("gemm/*.cu"))):
        digest.update(source.read_bytes())
    for listed in sorted(Path(__file__).parent.glob("*configs.py")):
        digest.update(listed.read_bytes())
    return digest.hexdigest()


_generation = 0


def generation() -> int:
    """Another number whenever this process has added winners: who keeps a plan by it chooses anew then.

    What another process adds is seen by those that start after it.
    """
    return _generation


@cache
def winners(sm: int, sm_count: int) -> dict[str, dict[str, Any]]:
    """{key: {"plan": label, ...}}; {} where nothing was measured, for other kernels, or the file is damaged."""
    try:
        stored = json.loads(path(sm, sm_count).read_text("utf-8"))
        shapes = stored["shapes"] if stored["fingerprint"] == fingerprint() else {}
        return {name: entry for name, entry in shapes.items() if isinstance(entry["plan"], str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def add(sm: int, sm_count: int, gpu: str, measured: dict[str, dict[str, Any]]) -> Path:
    """Keep winners with those that are there. Raises OSError where the cache cannot be written."""
    winners.cache_clear()
    shapes = winners(sm, sm_count) | measured
    file = path(sm, sm_count)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": fingerprint(), "gpu": gpu, "shapes": shapes}
    compiler.write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
    winners.cache_clear()
    global _generation
    _generation += 1
    return file
