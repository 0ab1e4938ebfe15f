"""The index functions of cuda/index.cuh, callable from Python: the same text, evaluated on ints or NumPy arrays."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "cuda" / "common" / "index.cuh"
_LINE = re.compile(r"^APEX4_INDEX\((\w+), \(([^)]*)\), (.*)\)$", re.MULTILINE)
_ALLOWED = re.compile(r"[\w\s+\-*&^|()<>]*")  # what C++ and Python read alike


@cache
def index_functions() -> dict[str, Callable[..., Any]]:
    """{name: function of ints or integer arrays}. Raises ValueError for an expression the two languages may differ on."""
    functions: dict[str, Callable[..., Any]] = {}
    for name, arguments, expression in _LINE.findall(SOURCE.read_text()):
        names = [argument.strip().removeprefix("int ") for argument in arguments.split(",")]
        if not _ALLOWED.fullmatch(expression) or re.search(r"(?<!<)<(?!<)|(?<!>)>(?!>)", expression):
            raise ValueError(f"{SOURCE.name}: {name} uses an operator that Python and C++ read differently")
        functions[name] = eval(f"lambda {', '.join(names)}: {expression}", {"__builtins__": {}})
    if len(functions) != SOURCE.read_text().count("\nAPEX4_INDEX("):
        raise ValueError(f"{SOURCE.name}: an APEX4_INDEX is not on one line")
    return functions


def index_function(name: str) -> Callable[..., Any]:
    return index_functions()[name]
