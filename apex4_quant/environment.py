"""The environment variables of apex4, all of them: names and meaning. `apex4 --help` prints this table.

Others are read where a standard says so: XDG_CACHE_HOME for the folder of the cache, CUDA_HOME and CUDA_PATH for CUDA's
headers, and whatever Hugging Face's libraries read.
"""

from __future__ import annotations

CACHE_DIR = "APEX4_CACHE_DIR"
FUSE = "APEX4_FUSE"
GEMM = "APEX4_GEMM"
KERNEL = "APEX4_KERNEL"

MEANING = {
    CACHE_DIR: "Folder for compiled kernels and tuned plans.  [default: apex4 in the user's cache folder]",
    FUSE: "0: every linear quantizes its input by itself, apart from norms and activation functions.",
    GEMM: "One plan of the GEMM for all shapes, to measure it.  [default: the tuned one or the heuristic's]",
    KERNEL: "reference: compute with PyTorch operations, also on a GPU that has kernels.",
}
