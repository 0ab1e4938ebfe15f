"""Every linear of vLLM computes what that of transformers does on the same input, to the bit: the default recipe's, with 4 and 8 bits.

Roundings of attention and norms, which part the two programs everywhere else (test_ties.py), have no part in it. On a GPU linears that
vLLM runs in one may get another kernel than one of them alone, whose float32 sums have another order. So there the rows of
transformers' linears are put one behind the other: the same shape gets the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.nn.fused_inputs import KernelWeights
from apex4_quant.nn.linear import Apex4Linear, input_of

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
    compared = alone_unequal = 0
    unequal = {}
    for name, (x, y) in torch.load(file).items():
        parent, _, last = name.rpartition(".")
        linears = [model.get_submodule(f"{parent}.{each}") for each in MEMBERS.get(last, (last,))]
        x = x.to(DEVICE)
        alone = torch.cat([each(x) for each in linears], -1).cpu()  # which also prepares them
        assert all(isinstance(each, Apex4Linear) and each.activation_bits == bits for each in linears)
        expected = alone if DEVICE == "cpu" else in_one(linears, x).cpu()
        if not torch.equal(y, expected):
            unequal[name] = f"{int((y != expected).sum())} by up to {float((y.float() - expected.float()).abs().max())}"
        near = 0.0 if DEVICE == "cpu" else 2**-8
        torch.testing.assert_close(y, alone, rtol=near, atol=near * float(alone.abs().mean()), msg=name)
        compared, alone_unequal = compared + y.numel(), alone_unequal + int((y != alone).sum())
    print(f"{compared} outputs; linears by themselves: {alone_unequal} not equal to the bit; {unequal}")
    record_property("outputs", compared)
    record_property("not equal to linears by themselves", alone_unequal)
    assert compared and not unequal


def in_one(linears: Sequence[Apex4Linear], x: torch.Tensor) -> torch.Tensor:
    """What the linears, which read one input, make of it in one call. Their rows fill whole tiles."""
    packed, scale, unit, bias, rows = zip(*(each.kernel_weights() for each in linears), strict=True)
    assert bias[0] is None and all(each % linears[0].layout.tile_n == 0 for each in rows)
    units = None if unit[0] is None else torch.cat(unit)
    weights = KernelWeights(torch.cat(packed), torch.cat(scale), units, None, sum(rows))
    return input_of(x).linear(weights, linears[0].quantizer_arguments(x.dtype, x.device))
