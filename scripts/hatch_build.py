"""Build hook: where `cli.py` and `calib/` go in a wheel. An editable install finds them in the checkout instead."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INSIDE_PACKAGE = {"cli.py": "apex4_quant/cli.py", "calib": "apex4_quant/calib"}


class Hook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"].update(INSIDE_PACKAGE)
