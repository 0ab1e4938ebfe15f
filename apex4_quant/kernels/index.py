"""The index functions of cuda/index.cuh, callable from Python: the same text, evaluated on ints, NumPy arrays or tensors."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, overload

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SOURCE = Path(__file__).parent / "cuda" / "common" / "index.cuh"
_LINE = re.compile(r"^APEX4_INDEX\((\w+), \(([^)]*)\), (.*)\)$", re.MULTILINE)
_ALLOWED = re.compile(r"[\w\s+\-*&^|()<>]*")  # what C++ and Python read alike


class IndexFunction(Protocol):
    """An APEX4_INDEX of index.cuh. Arrays are broadcast against each other, and an int among them is one for all."""

    @overload
    def __call__(self, *arguments: int) -> int: ...  # type: ignore[overload-overlap]  # of ints alone: an int

    @overload
    def __call__(self, *arguments: int | NDArray[np.integer]) -> NDArray[np.integer]: ...  # type: ignore[overload-overlap]  # as above

    @overload
    def __call__(self, *arguments: int | torch.Tensor) -> torch.Tensor: ...


@cache
def index_functions() -> dict[str, IndexFunction]:
    """{name: function of ints or integer arrays}. Raises ValueError for an expression the two languages may differ on."""
    functions: dict[str, IndexFunction] = {}
    for name, arguments, expression in _LINE.findall(SOURCE.read_text()):
        names = [argument.strip().removeprefix("int ") for argument in arguments.split(",")]
        if not _ALLOWED.fullmatch(expression) or re.search(r"(?<!<)<(?!<)|(?<!>)>(?!>)", expression):
            raise ValueError(f"{SOURCE.name}: {name} uses an operator that Python and C++ read differently")
        functions[name] = eval(f"lambda {', '.join(names)}: {expression}", {"__builtins__": {}})
    if len(functions) != SOURCE.read_text().count("\nAPEX4_INDEX("):
        raise ValueError(f"{SOURCE.name}: an APEX4_INDEX is not on one line")
    return functions


def index_function(name: str) -> IndexFunction:
    return index_functions()[name]
