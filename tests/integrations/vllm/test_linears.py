"""Every linear of vLLM computes what that of transformers does on the same input: the default recipe's, with 4 and with 8 bits.

Roundings of attention and norms, which part the two programs everywhere else (test_ties.py), have no part in it. On a CPU they are
equal to the bit. On a GPU linears that vLLM runs in one may get another kernel than alone, with another order of its sums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.nn.linear import Apex4Linear

from .generating import generate_apart

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
DEVICE, DTYPE = ("cuda", "float16") if torch.cuda.is_available() else ("cpu", "float32")


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_every_linear_computes_what_that_of_transformers_does(
    bits: int, quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("APEX4_ACTIVATIONS", str(bits))
    folder, file = quantized("demo", "apex4", layout="sm90"), tmp_path / "linears.pt"
    small = {"kv_cache_memory_bytes": 2**28, "gpu_memory_utilization": 0.05, "max_num_seqs": 32, "count": 32}
    generate_apart(tmp_path / "generated.json", folder, dtype=DTYPE, linears=str(file), **small)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE)).to(DEVICE).eval()
    compared = unequal = 0
    for name, (x, y) in torch.load(file).items():
        parent, _, last = name.rpartition(".")
        linears = [model.get_submodule(f"{parent}.{each}") for each in MEMBERS.get(last, (last,))]
        assert all(isinstance(each, Apex4Linear) and each.activation_bits == bits for each in linears)
        expected = torch.cat([each(x.to(DEVICE)) for each in linears], -1).cpu()
        near = 0.0 if DEVICE == "cpu" else 2**-8
        torch.testing.assert_close(y, expected, rtol=near, atol=near * float(expected.abs().mean()), msg=name)
        compared, unequal = compared + y.numel(), unequal + int((y != expected).sum())
    assert compared
    record_property("outputs", compared)
    record_property("unequal", unequal)
    print(f"{compared} outputs, {unequal} not equal to the bit")
