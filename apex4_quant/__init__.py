"""apex4: LLMs whose linear layers compute in INT4 on both sides (W4A4, groups of 128).

`import apex4_quant` makes transformers able to load apex4 checkpoints. It costs a few milliseconds: transformers is
not imported here, the registration happens when (or if already) it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"
__all__ = ["QuantizeSettings", "__version__", "quantize"]

# `calib/` and `cli.py` stand at the root of the repository and are linked into this package, so that neither is a
# top-level module of site-packages: they are imported as apex4_quant.calib and apex4_quant.cli (docs/log.md).
from .integrations.transformers.registration import arm as _arm

_arm()

if _TYPE_CHECKING:
    from .quantization.run import quantize
    from .quantization.settings import QuantizeSettings


def __getattr__(name: str) -> _Any:
    if name == "quantize":
        from .quantization.run import quantize

        return quantize
    if name == "QuantizeSettings":
        from .quantization.settings import QuantizeSettings

        return QuantizeSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
