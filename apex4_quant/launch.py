"""`python -m apex4_quant.launch PROGRAM ARGUMENTS...`: another program that finds apex4 checkpoints, unchanged.

transformers has no entry points for quantizers: it knows ours as soon as `apex4_quant` is imported, and a program that does
not import it refuses the checkpoint. This imports it and runs the program in the same process:

    python -m apex4_quant.launch lm_eval --model hf --model_args pretrained=OUT --tasks hellaswag
    python -m apex4_quant.launch transformers serve OUT
    python -m apex4_quant.launch my_script.py --model OUT
    accelerate launch -m apex4_quant.launch lm_eval --model hf --model_args pretrained=OUT --tasks hellaswag

PROGRAM is a command of an installed package, a Python file, or a module as for `python -m`.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

# To find this module Python has imported apex4_quant, which registers the format with transformers.
_USAGE = "apex4: give a program to run: python -m apex4_quant.launch PROGRAM ARGUMENTS..."


def launch(words: Sequence[str]) -> None:
    """Run `words`, a program and its arguments, as if they stood on the command line. Ends as the program does."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__ if words else _USAGE, file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    program, *arguments = words
    sys.argv = [program, *arguments]
    if Path(program).is_file():
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")
        return
    for command in entry_points(group="console_scripts", name=program):
        sys.exit(command.load()())
    if not _is_module(program):
        print(f"apex4: {program!r} is no installed command, no file and no module: install it first", file=sys.stderr)
        sys.exit(2)
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    launch(sys.argv[1:])
