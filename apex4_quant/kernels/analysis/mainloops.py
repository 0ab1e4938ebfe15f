"""The committed account of every GEMM's main loop, mainloop_counts.json: made by scripts/account/issue_slots, checked by a test.

A row per configuration and architecture: instructions of one turn of the main loop and one warp by class (sass.py), mma
and memory opcodes in full, registers, shared memory, spills, and `products`, the number of accumulators times groups of
128 that a turn computes: classes[x] / products is what the loop spends on each. Which NVRTC made the code is recorded,
because another one makes other code. `same_bank`: FFMA whose operands meet in one register bank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..catalogue import FAMILIES
from ..runtime.compiler import arch_of, compile_kernel, nvrtc_version
from . import sass

if TYPE_CHECKING:
    from ..gemm.s8_configs import S8Config
    from ..gemm.sm90_s8_configs import Sm90S8Config

TABLE = Path(__file__).parent / "mainloop_counts.json"
EXACT_CODES = (
    "sm90_s8_linear",
    "sm90_s8_m8n64",
    "sm90_s8_m16n64",
    "sm90_s8_m32n64",
    "sm90_s8_m32n128",
    "sm90_s8_m64n128s4",
    "sm90_s8_m64n64",
)  # names of kernels that do not fold
BY_WARPGROUPS = ("sm90_s8_m64n128s4", "sm90_s8_m64n64")  # of these, whose sums become floats by I2F
CONTROL = Path(__file__).parents[3] / "scripts" / "account" / "naive_i2f.cu"  # in a checkout only


class Row(TypedDict):
    """One kernel: what the module's docstring says of each."""

    name: str
    arch: str
    defines: dict[str, int | str]
    tile: list[int]  # M, N
    groups: str  # "wide" or "128"; "any" of 8-bit activations, whose groups cost nothing
    bits: int  # of activations
    registers: int
    shared_memory: int  # bytes a block
    spills: int
    products: float
    instructions: int
    shared_bytes: int  # read from shared memory in a turn, of a warp
    copied_bytes: int
    same_bank: int
    classes: dict[str, int]
    opcodes: dict[str, int]


class Table(TypedDict):
    """mainloop_counts.json"""

    nvrtc: str
    kernels: list[Row]


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    source: str
    entry: str
    defines: dict[str, int | str]
    tile: tuple[int, int]  # M, N of a thread block
    accumulators: int  # of a thread that multiplies
    wide_groups: bool
    shared_bytes: int
    bits: int = 4  # of activations


def kernels() -> Iterator[Kernel]:
    """Every GEMM configuration for every architecture with bfloat16 output, those that quantize, and the control kernel."""
    from ...format.layout_name import KERNEL_TILE_N
    from ..gemm import fused_linear, s8_configs, sm90_s8_configs
    from ..gemm.configs import all_configs

    for sm in FAMILIES:
        for config in all_configs(sm):
            if config.out != "bf16":
                continue  # the same main loop
            # sm90: a warpgroup holds 64 outputs; where several share the inputs, each holds all of them.
            multiplying = 2 * config.tile_n if config.family == "sm90" else config.threads
            yield Kernel(
                config.name,
                arch_of(sm),
                config.source,
                config.entry,
                dict(config.defines),
                (config.tile_m, config.tile_n),
                config.tile_m * config.tile_n // multiplying,
                config.wide_groups,
                config.shared_bytes,
            )
        for fused in fused_linear.all_configs(sm):
            if fused.dtype == "bfloat16":
                tile = (fused_linear.TILE_M, KERNEL_TILE_N)
                accumulators = fused_linear.TILE_M // 2
                yield Kernel(
                    fused.name, arch_of(sm), fused.source, fused.entry, dict(fused.defines), tile, accumulators, False,
                    fused.shared_bytes, fused.activation_bits,
                )  # fmt: skip
        yield from _eight_bit(sm, s8_configs.all_configs(sm))
        yield from _eight_bit(sm, sm90_s8_configs.all_configs(sm))
        if sm < 90:
            yield Kernel("naive_i2f", arch_of(sm), str(CONTROL), "naive_gemm", {}, (128, 128), 64, False, 3 * 17152)
    for sm in s8_configs.ARCHITECTURES:
        if sm not in FAMILIES:
            yield from _eight_bit(sm, s8_configs.all_configs(sm))


def _eight_bit(sm: int, configs: Iterable[S8Config | Sm90S8Config]) -> Iterator[Kernel]:
    for config in configs:
        if config.out == "bf16":
            tile = (config.tile_m, config.tile_n)
            # On Hopper a warpgroup holds all of a tile of few tokens, and 64 outputs of another.
            few = getattr(config, "few_tokens", False)
            multiplying = config.threads if config.name.startswith("s8_") else 128 if few else 2 * config.tile_n
            accumulators = config.tile_m * config.tile_n // multiplying
            yield Kernel(
                config.name, arch_of(sm), config.source, config.entry, dict(config.defines), tile, accumulators, False,
                config.shared_bytes, bits=8,
            )  # fmt: skip


def count(kernel: Kernel) -> Row:
    """Compile, disassemble and count one kernel: its row of the table."""
    compiled = compile_kernel(kernel.source, kernel.defines, kernel.arch)
    function = sass.parse(sass.disassemble(compiled.cubin))[kernel.entry]
    loop = sass.count(sass.main_loop(function))
    resources = compiled.resources
    # Kernels for wide groups may hold their mma twice, for a group that starts and one that goes on; a turn runs one.
    products = kernel.accumulators if kernel.wide_groups else loop.products
    twice = round(loop.classes["tensor"] * (1 - products / loop.products))
    return {
        "name": kernel.name,
        "arch": kernel.arch,
        "defines": kernel.defines,
        "tile": list(kernel.tile),
        "groups": "any" if kernel.bits == 8 else "wide" if kernel.wide_groups else "128",
        "bits": kernel.bits,
        "registers": resources.registers,
        "shared_memory": kernel.shared_bytes + resources.static_shared_bytes,
        "spills": function.spills(),
        "products": products,
        "instructions": loop.instructions - twice,
        "shared_bytes": loop.shared_bytes,
        "copied_bytes": loop.copied_bytes,
        "same_bank": loop.same_bank,
        "classes": loop.classes | {"tensor": loop.classes["tensor"] - twice},
        "opcodes": loop.opcodes,
    }


def build() -> Table:
    return {"nvrtc": nvrtc_version(), "kernels": [count(kernel) for kernel in kernels()]}


def committed() -> Table:
    table: Table = json.loads(TABLE.read_text("utf-8"))
    return table


def as_json(table: Table) -> str:
    """One line a kernel, so that a change of the code is a readable change of the file."""
    rows = ",\n".join("  " + json.dumps(row) for row in table["kernels"])
    return f'{{"nvrtc": "{table["nvrtc"]}", "kernels": [\n{rows}\n]}}\n'


def as_text(table: Table) -> str:
    """Per accumulator and group of 128: the columns that the account needs."""
    columns = ("ffma", "fmul", "i2f", "half", "imad", "integer", "uniform", "shared_read", "copy", "sync", "branch")
    lines = [f"{'arch':7} {'kernel':28} {'regs':>4} {'spill':>5} " + " ".join(f"{name:>7.7}" for name in columns)]
    lines[0] += f" {'slots':>6} {'bytes':>6}"
    for row in table["kernels"]:
        each = " ".join(f"{row['classes'].get(name, 0) / row['products']:7.3f}" for name in columns)
        moved = (row["shared_bytes"] + row["copied_bytes"]) / row["products"]
        lines.append(
            f"{row['arch']:7} {row['name']:28} {row['registers']:4} {row['spills']:5} {each} "
            f"{row['instructions'] / row['products']:6.2f} {moved:6.1f}"
        )
    lines.append(
        f"NVRTC {table['nvrtc']}. Per accumulator and group of 128; slots: all instructions; bytes: shared memory."
    )
    return "\n".join(lines)


def differences(table: Table, other: Table) -> list[str]:
    """What changed from `table` to `other`, a line each."""
    old, new = ({(row["arch"], row["name"]): row for row in each["kernels"]} for each in (table, other))
    found = [f"{arch} {name}: not compiled any more" for arch, name in old.keys() - new.keys()]
    found += [f"{arch} {name}: not in the table" for arch, name in new.keys() - old.keys()]
    for key in old.keys() & new.keys():
        before, now = dict(old[key]), dict(new[key])
        parts = [f"{field} {before.get(field)} -> {now[field]}" for field in now if now[field] != before.get(field)]
        if parts:
            found.append(f"{key[0]} {key[1]}: " + "; ".join(parts))
    return sorted(found)


def violations(row: Row) -> list[str]:
    """What a row of ours breaks of the promises that hold for any compiler; [] for a good one."""
    each = {name: number / row["products"] for name, number in row["classes"].items()}
    broken = []
    if each.get("i2f", 0) > (1 if row["name"].startswith(BY_WARPGROUPS) else 0):
        broken.append("it converts with I2F")
    if row["spills"]:
        broken.append(f"{row['spills']} local-memory instructions")
    if row["bits"] == 8:
        # Folded weights: nothing is done per accumulator and group. Otherwise one FADD, or I2F, and one FFMA, and FADD for the ratios of 64
        # outputs two.
        few = row["name"].startswith(EXACT_CODES)
        allowed = {"ffma": 1, "fadd": 1 + row["tile"][1] // 32 / row["products"]} if few else {}
        for name in ("ffma", "fmul", "fadd"):
            if each.get(name, 0) > allowed.get(name, 0):
                broken.append(f"{row['classes'][name]} {name.upper()} in a turn")
        if not any(re.match(r"(IMMA\.(16832|8816)|IGMMA\.\w+)\.S8\.S8", opcode) for opcode in row["opcodes"]):
            broken.append("no mma of 8-bit integers")
        return broken
    dequantization = each.get("ffma", 0) + (int(each.get("fmul", 0)) if row["arch"] == "sm_90a" else 0)
    wanted = 1 if any(sass.is_scale_product(opcode) for opcode in row["opcodes"]) else 2
    if wanted == 1 and row["same_bank"]:  # what their 64-bit pairs of accumulators are for (gemm_sm90.cu)
        broken.append(f"{row['same_bank']} FFMA with all operands in one register bank")
    if dequantization != wanted:
        broken.append(f"{dequantization:g} FFMA (sm_90a: FMUL and FFMA) per accumulator and group instead of {wanted}")
    mma = "QGMMA." if row["arch"] == "sm_90a" else "IMMA.16864.S4.S4"
    if not any(opcode.startswith(mma) for opcode in row["opcodes"]):
        broken.append(f"no {mma.rstrip('.')}")
    return broken
