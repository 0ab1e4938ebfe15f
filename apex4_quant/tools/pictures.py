"""Pictures of measurements, drawn by matplotlib (the extra `plot`): SVG or PNG, the same bytes for the same figures.

matplotlib is imported when a picture is asked for, so that no command needs it otherwise. No display is needed: a PNG
is drawn by matplotlib's Agg renderer, and no window library is loaded.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Apex4Error, UsageError
from ..format.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

SUFFIXES = (".svg", ".png")
# Wong's palette (Nature Methods 8, 441, 2011), which stays apart for most kinds of colour blindness.
COLOURS = ("#0072b2", "#56b4e9", "#777777", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#000000")
# A fixed salt makes the ids of an SVG the same in every run; its text stays text, so that it can be searched.
_STYLE: dict[RcKeyType, Any] = {
    "svg.hashsalt": "apex4",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def check_picture(path: Path) -> None:
    """Refuse, before anything is measured, a picture that could not be written afterwards.

    UsageError where the suffix names no format that is drawn, Apex4Error where matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"a picture is written as .svg or .png, not {path.name!r}: give it one of these endings")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"picture {path} cannot be written, its folder does not exist: make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise Apex4Error("pictures are drawn by matplotlib, which is not installed: pip install 'apex4-quant[plot]'")


def save_picture(path: Path, draw: Callable[[], Figure]) -> None:
    """Write what `draw` draws to `path`, in the format of its suffix. Raises UsageError or Apex4Error."""
    check_picture(path)
    import matplotlib

    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    drawn = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        draw().savefig(drawn, format=path.suffix[1:], metadata=metadata, dpi=150)
    write_bytes(path, drawn.getvalue())
