"""The dtypes that layers run in, by the names that --dtype takes. Without torch, for the command line's help."""

from __future__ import annotations

DTYPE_NAMES = ("bfloat16", "float16", "float32")
