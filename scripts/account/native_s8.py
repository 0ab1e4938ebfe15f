"""`scripts/account/issue_slots native`: gemm_s8.cu, which runs on Hopper as it is, timed there beside its account.

One wave of thread blocks, K 65536, every thread block counts its own clocks in the main loop; the median of the launches' means
is given per product (issue_model.py), beside the busiest pipe of the account and what the simulation says. An mma takes what
was measured of warps that do nothing else. What is timed is this main loop on this scheduler, NOT an Ampere or Ada GPU.
The last line is JSON.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from simulation import spread, steps_of
from stand_in import K_BLOCKS, LAUNCHES, SM, STAMPS, START, STOP, mma_clocks, once, stamps

from apex4_quant.kernels.analysis import sass
from apex4_quant.kernels.gemm.s8_configs import SHARED_LIMITS, S8Config
from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.runtime.compiler import SOURCES, compile_kernel
from apex4_quant.planning.issue_model import RATES, pipe_clocks

CONFIGS = tuple(S8Config(*tile) for tile in ((128, 128, 4), (128, 128, 3), (128, 128, 2), (64, 128, 4), (32, 128, 5), (16, 128, 6)))  # fmt: skip


def stamped_source() -> str:
    text = (SOURCES / "gemm" / "gemm_s8.cu").read_text()
    text = once(text, "constexpr int THREADS", STAMPS + "constexpr int THREADS")
    text = once(text, "  ptx::wait_for_predecessor();\n", START)
    return once(text, "  ptx::let_successor_start();\n", STOP)


def measure(config: S8Config, source: str, sms: int, stream: int) -> tuple[float, int, int]:
    """Clocks per product, thread blocks on a multiprocessor, registers."""
    registers = compile_kernel(source, config.defines, launcher.device_arch(0)).resources.registers
    resident = min(
        65536 // (-(-registers // 8) * 8 * config.threads), SHARED_LIMITS[SM][1] // (config.shared_bytes + 1024 + 128)
    )
    wave = resident * sms
    tiles_m = next(d for d in range(int(wave**0.5), 0, -1) if wave % d == 0)
    m, n = tiles_m * config.tile_m, wave // tiles_m * config.tile_n
    a = torch.randint(0, 256, (K_BLOCKS, m, 128), dtype=torch.uint8, device="cuda")
    w = torch.randint(0, 256, (n // 64, K_BLOCKS, 4096), dtype=torch.uint8, device="cuda")
    ratio = torch.randint(0, 4609, (n // 64, K_BLOCKS, 64), dtype=torch.int16, device="cuda")
    floats = torch.rand(m + n, device="cuda")
    y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    pointers = [y, a, floats, w, ratio, floats[m:]]
    kernel = launcher.kernel(source, config.entry, config.defines, 0)
    numbers = [ctypes.c_int(each) for each in (m, n, K_BLOCKS, 1, m, n, 1)]
    launch = kernel.bind((wave, 1, 1), config.threads, 9, numbers, shared_bytes=config.shared_bytes)
    means = []
    for _ in range(LAUNCHES + 3):
        launch(stream, *(tensor.data_ptr() for tensor in pointers), 0, 0, 0)
        torch.cuda.synchronize()
        means.append(statistics.mean(stamps(kernel, wave)))
    products = resident * config.tile_m * config.tile_n / 32 / 4 * K_BLOCKS  # of one scheduler
    return statistics.median(means[3:]) / products, resident, registers


def time_native(with_simulation: bool) -> None:
    """Print measured clocks per product of every tile beside its account and, if asked, what the simulation says."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("issue_slots native needs a GPU of sm_90")
    sms, stream = torch.cuda.get_device_properties(0).multi_processor_count, torch.cuda.current_stream().cuda_stream
    rows = []
    with tempfile.TemporaryDirectory() as name:
        mma = mma_clocks(Path(name), sms, stream, 0)
        print(f"{torch.cuda.get_device_name()}: one m16n8k32 s8 mma keeps a tensor core {mma:.2f} clocks")
        source = Path(name) / "gemm_s8_stamped.cu"
        source.write_text(stamped_source())
        print(f"{'main loop':18} {'regs':>4} {'blocks':>6} {'measured':>8} {'share':>6}  account by pipe")
        for config in CONFIGS:
            clocks, resident, registers = measure(config, str(source), sms, stream)
            compiled = compile_kernel(str(source), config.defines, launcher.device_arch(0))
            count = sass.count(sass.main_loop(sass.parse(sass.disassemble(compiled.cubin))[config.entry]))
            account = {"tensor": mma} | {
                pipe: value / count.products for pipe, value in pipe_clocks(RATES[SM], count.classes, count.shared_bytes + count.copied_bytes).items()
            }  # fmt: skip
            row = {
                "loop": config.tile_name, "registers": registers, "blocks": resident, "clocks": round(clocks, 3),
                "share": round(max(account.values()) / clocks, 3), "account": {k: round(v, 2) for k, v in account.items()},
            }  # fmt: skip
            text = " ".join(f"{pipe} {value:.2f}" for pipe, value in account.items())
            if with_simulation:
                steps = steps_of(compiled.cubin, config.entry)
                of_warp = config.tile_m * config.tile_n / config.threads
                low, high = (turn / of_warp for turn in spread(steps, SM, mma, resident, config.threads // 128))
                row["simulated"] = [round(low, 2), round(high, 2)]
                text += f"  simulated {low:.2f} to {high:.2f}"
            print(
                f"{config.tile_name:18} {registers:4} {resident:6} {clocks:8.2f} {row['share']:6.2f}  {text}",
                flush=True,
            )
            rows.append(row)
    print(json.dumps({"mma_clocks": round(mma, 3), "rows": rows}))
