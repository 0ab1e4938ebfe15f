"""The environment variables of apex4, all of them: names and meaning. `apex4 --help` prints this table.

Others are read where a standard says so: XDG_CACHE_HOME for the folder of the cache, CUDA_HOME and CUDA_PATH for CUDA's
headers, and whatever Hugging Face's libraries read.
"""

from __future__ import annotations

import os
from collections.abc import Callable

ACTIVATIONS = "APEX4_ACTIVATIONS"
CACHE_DIR = "APEX4_CACHE_DIR"
FUSE = "APEX4_FUSE"
GEMM = "APEX4_GEMM"
KEEP_EVERY = "APEX4_KEEP_EVERY"
KERNEL = "APEX4_KERNEL"
TIMEOUT = "APEX4_TIMEOUT"

SECONDS_TO_KEEP = (
    60  # of KEEP_EVERY: the states of a large model are gigabytes a layer, and a GPU takes seconds for one
)
SECONDS_TO_WAIT = 600  # of TIMEOUT: more than the longest work of one process between two meetings

MEANING = {
    ACTIVATIONS: "8: all linears have 8-bit activations; 4: those of the checkpoint that do.  [default: auto, by GPU]",
    CACHE_DIR: "Folder for compiled kernels and tuned plans.  [default: apex4 in the user's cache folder]",
    FUSE: "0: every linear quantizes its input by itself, apart from norms and activation functions.",
    GEMM: "One plan of the GEMM for all shapes, to measure it.  [default: the tuned one or the heuristic's]",
    KEEP_EVERY: f"Seconds of quantizing that a kill may cost; 0 keeps every layer for itself.  [default: {SECONDS_TO_KEEP}]",
    KERNEL: "reference: compute with PyTorch operations, also on a GPU that has kernels.",
    TIMEOUT: f"Seconds that the processes of one run wait for each other.  [default: {SECONDS_TO_WAIT}]",
}


def reader(name: str) -> Callable[[], str | None]:
    """A function that says what the variable `name` is now, for who asks in every call of an operator.

    `os.environ._data`, Python 3.11: the public `os.environ.get` raises and catches an exception for a variable that is not set,
    which takes a microsecond. Where the name is not there, or of another form, the public one is asked.
    """
    data, key = getattr(os.environ, "_data", None), os.fsencode(name)
    if os.name != "posix" or not isinstance(data, dict) or not all(isinstance(each, bytes) for each in data):
        return lambda: os.environ.get(name)

    def read() -> str | None:
        value = data.get(key)
        return None if value is None else os.fsdecode(value)

    return read
