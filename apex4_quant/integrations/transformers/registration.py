"""Registers the quantizer with transformers without importing transformers.

If `transformers.quantizers.auto` is loaded, registration happens at once; otherwise right after it is loaded, through
a finder that lets the regular import do its work and steps out of the way. `apex4 --help` stays fast that way, and
the order of `import apex4_quant` and `import transformers` does not matter.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from . import quantizer as hf_quantizer  # noqa: F401  (registers as it is imported)


def arm() -> None:
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
