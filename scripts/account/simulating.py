"""`scripts/account/issue_slots simulate`: does the overlap that the account assumes happen?

The simulation (simulation.py) runs with thread blocks that start nearly together and half a turn apart. It is NOT
validated on these GPUs; `issue_slots stand-in` holds it against a Hopper GPU that runs the same main loop with another mma.
"""

from __future__ import annotations

import json

from simulation import spread, steps_of

from apex4_quant.hardware.gpus import GPUS, Gpu
from apex4_quant.kernels.analysis import mainloops, sass
from apex4_quant.kernels.gemm.configs import SHARED_LIMITS
from apex4_quant.kernels.runtime.compiler import compile_kernel
from apex4_quant.planning.issue_model import loops


def resident(kernel: mainloops.Kernel, gpu: Gpu) -> tuple[int, int]:
    """Thread blocks of a multiprocessor, and warps of one on a scheduler."""
    row = next(r for r in mainloops.committed()["kernels"] if (r["arch"], r["name"]) == (kernel.arch, kernel.name))
    threads = kernel.tile[0] * kernel.tile[1] // kernel.accumulators
    registers = -(-row["registers"] // 8) * 8 * threads
    return min(65536 // registers, SHARED_LIMITS[gpu.sm][1] // (row["shared_memory"] + 1024)), threads // 128


def simulate_all() -> None:
    """Every large-tile kernel and the control on A100 and GA102: the least and the most of all runs, in clocks per product."""
    results = []
    print(f"{'GPU':9} {'kernel':24} {'blocks':>6} {'warps':>5} {'account':>8}  simulated clocks per product")
    for name in ("A100", "RTX 3090"):
        gpu = GPUS[name]
        for kernel in mainloops.kernels():
            if kernel.arch != f"sm_{gpu.sm}" or kernel.wide_groups or kernel.tile[0] < 128:
                continue
            loop = next(each for each in loops(kernel.arch) if each.name == kernel.name)
            blocks, warps = resident(kernel, gpu)
            steps = steps_of(compile_kernel(kernel.source, kernel.defines, kernel.arch).cubin, kernel.entry)
            mma = next(step.instruction.opcode for step in steps if step.instruction.klass == "tensor")
            mma_clocks = sass.products(mma) * loop.clocks(gpu)["tensor"]
            low, high = (turn / kernel.accumulators for turn in spread(steps, gpu.sm, mma_clocks, blocks, warps))
            account, low, high = round(loop.product_clocks(gpu), 2), round(low, 1), round(high, 1)
            print(f"{name:9} {kernel.name:24} {blocks:6} {warps:5} {account:8.2f}  {low} to {high}", flush=True)
            results.append({"gpu": name, "kernel": kernel.name, "account": account, "simulated": [low, high]})
    print(json.dumps(results))
