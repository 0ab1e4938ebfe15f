"""`scripts/account/issue_slots stand-in`: the sm_80 main loop, timed on Hopper with another mma.

It shows how much of the account of issue slots a real GPU reaches.

Hopper has no 4-bit tensor cores, and emulates their mma too slowly to time. But m16n8k32 with 8-bit operands takes the same
registers as m16n8k64 with 4-bit ones. Put in its place, everything else in gemm_sm80.cu and in the control stays what it
is: copies, barriers, reads of shared memory, dequantization, and the compiler's task. What is computed is meaningless;
what is measured is clocks. With `xR` the mma is issued R times, so that tensor cores are as busy beside the rest as on
other GPUs: a product (issue_model.py) takes them R times 1/2 of an instruction.

First, what decides whether anything may overlap there: warps that only multiply beside warps that only do FFMA.

One wave of thread blocks, K 65536, every thread block counts its own clocks in the main loop; the median of the launches'
means is given per product. `share` is busiest pipe / measured, the part of the account that is reached. Timed are this
main loop and this scheduler: NOT an Ampere or Ada GPU. The last line is JSON.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simulation import spread, steps_of

from apex4_quant.kernels.analysis import sass
from apex4_quant.kernels.analysis.mainloops import CONTROL
from apex4_quant.kernels.gemm.configs import SHARED_LIMITS, GemmConfig
from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.runtime.compiler import SOURCES, compile_kernel
from apex4_quant.planning.issue_model import RATES

SM = 90
K_BLOCKS = 512
LAUNCHES = 20
REPEATS = (1, 2, 3)
TILES = ((128, 256, 2, 4, 4), (128, 128, 2, 2, 4), (128, 256, 2, 4, 3), (128, 128, 2, 4, 4))
S4 = "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32"
S8 = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
STAMPS = "__device__ long long stamps[4096];\n"
START = "  __shared__ long long started;\n  if (threadIdx.x == 0) started = clock64();\n"
STOP = "if (threadIdx.x == 0) stamps[blockIdx.x + gridDim.x * blockIdx.y] = clock64() - started;\n"


@dataclass(frozen=True)
class Loop:
    name: str
    source: str
    entry: str
    defines: dict[str, int]
    tile: tuple[int, int]
    threads: int
    shared_bytes: int


def once(text: str, old: str, new: str) -> str:
    """`text` with `old`, which must stand there once, replaced: the stand-in follows its kernel or fails."""
    if text.count(old) != 1:
        sys.exit(f"{old!r} stands {text.count(old)} times in the kernel's source, expected once: adapt {__file__}")
    return text.replace(old, new)


def our_source(repeats: int) -> str:
    mma = once((SOURCES / "common" / "ptx.cuh").read_text(), "void mma_s4(", "void stand_in(")
    mma = (
        "__device__ __forceinline__ void stand_in(" + mma.partition("void stand_in(")[2].partition("\n}\n")[0] + "\n}\n"
    )
    operands = "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
    more = f"{S8} {operands}{{%0, %1, %2, %3}};" * (repeats - 1)
    mma = once(mma, f'{S4} {operands}{{%10, %11, %12, %13}};"', f'{S8} {operands}{{%10, %11, %12, %13}};{more}"')
    if repeats > 1:  # results are written before the operands are read for the last time
        mma = mma.replace('"=r"', '"=&r"')
    text = (SOURCES / "gemm" / "gemm_sm80.cu").read_text().replace("ptx::mma_s4(", "stand_in(")
    text = once(text, "constexpr int THREADS", STAMPS + mma + "constexpr int THREADS")
    text = once(text, "  ptx::wait_for_predecessor();\n", START)
    return once(text, "  ptx::let_successor_start();\n", STOP)


def control_source(repeats: int) -> str:
    text = CONTROL.read_text()
    operands = '{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "\n               "{%0, %1, %2, %3};"'
    again = operands.replace('"\n               "', "").rstrip('"')
    text = once(text, f"{S4} {operands}", f"{S8} {operands}" + f'\n"{S8} {again}"' * (repeats - 1))
    text = once(text, 'extern "C" __global__', STAMPS + 'extern "C" __global__')
    text = once(text, "  // Main loop: one group of 128 a turn.\n", START)
    return once(
        text,
        "  }\n\n#pragma unroll\n  for (int i = 0; i < FRAGMENTS_M; ++i) {\n#pragma unroll\n    for (int j = 0; j < FRAGMENTS_N; ++j) {\n#pragma unroll\n      for (int c = 0; c < 4; ++c) {\n        const int row",
        f"  }}\n  {STOP}\n#pragma unroll\n  for (int i = 0; i < FRAGMENTS_M; ++i) {{\n#pragma unroll\n    for (int j = 0; j < FRAGMENTS_N; ++j) {{\n#pragma unroll\n      for (int c = 0; c < 4; ++c) {{\n        const int row",
    )


def pipes_source(products: bool, ffma: int) -> str:
    """Of every eight warps four do eight independent mma a turn, if `products`, and four `ffma` times 16 FFMA."""
    mma = "".join(
        f'asm volatile("{S8} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};" : "+r"(c[{i}][0]), '
        f'"+r"(c[{i}][1]), "+r"(c[{i}][2]), "+r"(c[{i}][3]) : "r"(a), "r"(3 * a), "r"(5 * a), "r"(7 * a), "r"(9 * a), "r"(11 * a));'
        for i in range(8)
    )
    fma = "".join(f'asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(x[{i}]) : "f"(p), "f"(q));' for i in range(16))
    return f"""{STAMPS}extern "C" __global__ void pipes(int* out, int turns) {{
  int c[8][4] = {{}}, sum = 0;
  float x[16] = {{}};
  const int a = threadIdx.x * 77;
  const float p = a, q = 0.5f * a;
  const bool multiplies = threadIdx.x / 128 % 2 == 0;
{START}  __syncthreads();
  for (int turn = 0; turn < turns * (multiplies ? {int(products)} : {ffma}); ++turn) {{
    if (multiplies) {{ {mma} }} else {{ {fma} }}
  }}
  {STOP}
  for (int i = 0; i < 8; ++i) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3] + static_cast<int>(x[i] + x[i + 8]);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}}
"""


def loops(folder: Path) -> list[tuple[Loop, int]]:
    found = []
    for repeats in REPEATS:
        path = folder / f"gemm_sm80_x{repeats}.cu"
        path.write_text(our_source(repeats))
        for tile in TILES:
            config = GemmConfig("sm80", *tile)
            found.append(
                (
                    Loop(
                        config.name,
                        str(path),
                        config.entry,
                        config.defines,
                        tile[:2],
                        config.threads,
                        config.shared_bytes,
                    ),
                    repeats,
                )
            )
        path = folder / f"naive_x{repeats}.cu"
        path.write_text(control_source(repeats))
        found.append((Loop("naive_i2f", str(path), "naive_gemm", {}, (128, 128), 256, 3 * 17152), repeats))
    return found


def stamps(kernel: launcher.Kernel, count: int) -> list[int]:
    status, address, size = kernel._driver.cuModuleGetGlobal(kernel._module, b"stamps")
    values = (ctypes.c_longlong * count)()
    (copied,) = kernel._driver.cuMemcpyDtoH(ctypes.addressof(values), address, 8 * count)
    if status != 0 or copied != 0 or size < 8 * count:
        sys.exit("the clocks of the thread blocks could not be read")
    return list(values)


def mma_clocks(folder: Path, sms: int, stream: int, ffma: int) -> float:
    """Clocks that one 8-bit mma keeps a scheduler's tensor core, with two warps on it and two more that do `ffma` FFMA for
    every half of an mma."""
    path = folder / f"pipes_{ffma}.cu"
    path.write_text(pipes_source(True, ffma))
    kernel = launcher.kernel(str(path), "pipes", {}, 0)
    out, turns, threads = torch.empty(sms * 512, dtype=torch.int32, device="cuda"), 4096, 512
    launch = kernel.bind(sms, threads, 1, [ctypes.c_int(turns)])
    for _ in range(3):
        launch(stream, out.data_ptr())
        torch.cuda.synchronize()
    return statistics.mean(stamps(kernel, sms)) / (8 * turns * threads / 256)


def measure(loop: Loop, sms: int, stream: int) -> tuple[float, int, int]:
    """Clocks per product, thread blocks on a multiprocessor, registers."""
    registers = compile_kernel(loop.source, loop.defines, launcher.device_arch(0)).resources.registers
    resident = min(
        65536 // (-(-registers // 8) * 8 * loop.threads), SHARED_LIMITS[SM][1] // (loop.shared_bytes + 1024 + 16), 2
    )
    wave = resident * sms
    tiles_m = next(d for d in range(int(wave**0.5), 0, -1) if wave % d == 0)
    m, n = tiles_m * loop.tile[0], wave // tiles_m * loop.tile[1]
    bytes_of = lambda *shape: torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")  # noqa: E731
    a, w = bytes_of(K_BLOCKS, m, 64), bytes_of(n // 64, K_BLOCKS, 4096)
    a_scale = torch.rand(K_BLOCKS, m, device="cuda") + 0.1
    w_scale = (torch.rand(n // 64, K_BLOCKS, 64, device="cuda") + 0.1).half()
    y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    pointers = [t.data_ptr() for t in (y, a, a_scale, w, w_scale)]
    numbers: tuple[int, ...] = (m, n, K_BLOCKS, m, n)
    grid: Any = (n // loop.tile[1], tiles_m, 1)
    if loop.entry != "naive_gemm":
        pointers += [0, 0, 0]
        numbers, grid = (m, n, K_BLOCKS, 1, m, n, 1), (wave, 1, 1)
    kernel = launcher.kernel(loop.source, loop.entry, loop.defines, 0)
    launch = kernel.bind(
        grid, loop.threads, len(pointers), [ctypes.c_int(each) for each in numbers], shared_bytes=loop.shared_bytes
    )
    means = []
    for _ in range(LAUNCHES + 3):
        launch(stream, *pointers)
        torch.cuda.synchronize()
        means.append(statistics.mean(stamps(kernel, wave)))
    products = resident * loop.tile[0] * loop.tile[1] / 32 / 4 * K_BLOCKS  # of one scheduler
    return statistics.median(means[3:]) / products, resident, registers


def pipes(loop: Loop, mma: float) -> dict[str, float]:
    """Clocks per product by pipe, as issue_model.Loop.clocks has them."""
    compiled = compile_kernel(loop.source, loop.defines, launcher.device_arch(0))
    count = sass.count(sass.main_loop(sass.parse(sass.disassemble(compiled.cubin))[loop.entry]))
    products, of, rates = loop.tile[0] * loop.tile[1] / loop.threads, count.classes.get, RATES[SM]
    imad = of("imad", 0)
    spent = {
        "tensor": of("tensor", 0) * mma,
        "issue": sum(count.classes.values()),
        "fma": max(rates.fma * sum(of(name, 0) for name in ("ffma", "fmul", "fadd", "imad", "half")), 2 * imad),
        "alu": rates.alu * of("integer", 0),
        "i2f": rates.i2f * of("i2f", 0),
        "shared": rates.shared * (count.shared_bytes + count.copied_bytes),
    }
    return {pipe: clocks / products for pipe, clocks in spent.items()}


def time_stand_in(with_simulation: bool) -> None:
    """Print measured clocks per product of every loop beside its account and, if asked, what the simulation says."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("issue_slots stand-in needs a GPU of sm_90")
    sms, stream = torch.cuda.get_device_properties(0).multi_processor_count, torch.cuda.current_stream().cuda_stream
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mma, *beside = (mma_clocks(folder, sms, stream, ffma) for ffma in range(4))
        print(f"{torch.cuda.get_device_name()}: one {S8.split('.')[3]} s8 mma keeps a tensor core {mma:.2f} clocks; with 2, 4 and 6 "
              f"FFMA of other warps for each: {', '.join(f'{clocks:.2f}' for clocks in beside)}")  # fmt: skip
        print(f"{'main loop':30} {'mma':>4} {'regs':>4} {'blocks':>6} {'measured':>8} {'share':>6}  account by pipe")
        for loop, repeats in loops(folder):
            clocks, resident, registers = measure(loop, sms, stream)
            account = pipes(loop, mma)
            row = {
                "loop": loop.name,
                "repeats": repeats,
                "registers": registers,
                "blocks": resident,
                "clocks": round(clocks, 3),
            }
            row |= {
                "share": round(max(account.values()) / clocks, 3),
                "account": {k: round(v, 2) for k, v in account.items()},
            }
            text = " ".join(f"{pipe} {value:.2f}" for pipe, value in account.items())
            if with_simulation:
                compiled = compile_kernel(loop.source, loop.defines, launcher.device_arch(0))
                steps = steps_of(compiled.cubin, loop.entry)
                of_warp = loop.tile[0] * loop.tile[1] / loop.threads
                least, most = (turn / of_warp for turn in spread(steps, SM, mma, resident, loop.threads // 128))
                row["simulated"] = [round(least, 2), round(most, 2)]
                text += f"  simulated {least:.2f} to {most:.2f}"
            name = f"{loop.name}, {loop.threads // 32} warps"
            print(
                f"{name:30} {'x' + str(repeats):>4} {registers:4} {resident:6} {clocks:8.2f} {row['share']:6.2f}  {text}",
                flush=True,
            )
            rows.append(row)
    print(json.dumps({"mma_clocks": round(mma, 3), "beside_ffma": [round(each, 3) for each in beside], "rows": rows}))
