"""The dtypes that layers run in, by the names that --dtype takes, and what to do where one is too narrow.

Without torch, for the command line's help.
"""

from __future__ import annotations

DTYPE_NAMES = ("bfloat16", "float16", "float32")


def wider_than(dtype: object) -> str:
    """What to do where numbers leave the range of `dtype`, a name or a torch.dtype: the end of a sentence.

    A run keeps the dtype that it was begun with, so that it cannot be resumed in another. bfloat16 has float32's range.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "float32":
        return "the model's own numbers are too large, get it again"
    wider = "bfloat16" if name == "float16" else "float32"
    return f"give --dtype {wider}, and with 'apex4 quantize' another output folder"
