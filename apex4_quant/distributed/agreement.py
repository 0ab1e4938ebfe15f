"""What must be the same for all processes of a run, whatever the run does: versions, the kind of GPU, threads."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .. import __version__


def versions_here(device: torch.device) -> dict[str, Any]:
    """By what a user calls it; for `Group.require_equal`."""
    import transformers

    return {
        "apex4_quant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "kind of GPU": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "number of threads": torch.get_num_threads(),
    }


def settings_here(settings: dict[str, Any]) -> dict[str, Any]:
    return {f"setting {name}": value for name, value in settings.items()}
