"""apex4: LLMs whose linear layers compute in INT4 on both sides (W4A4, groups of 128).

`import apex4_quant` makes transformers able to load apex4 checkpoints. It costs a few milliseconds: transformers is
not imported here, the registration happens when (or if already) it is.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"
__all__ = ["QuantizeSettings", "__version__", "quantize"]

# In a checkout `calib/` and `cli.py` stand beside this package, in a wheel inside it (pyproject.toml maps them), so
# that neither is a top-level module of site-packages. Both are imported as apex4_quant.calib and apex4_quant.cli.
if not (_Path(__file__).parent / "calib").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from ._register import arm as _arm

_arm()

if _TYPE_CHECKING:
    from .pipeline import QuantizeSettings, quantize


def __getattr__(name: str) -> _Any:
    if name in ("QuantizeSettings", "quantize"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
