"""`scripts/account/issue_slots tables`: the tables of docs/issue_slots.md, computed from the committed counts.

Clocks by pipe, the control against the paper, predictions. Nothing is measured; no GPU, torch or compiler is needed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from apex4_quant.hardware.gpus import GPUS
from apex4_quant.planning.cost_model import activation_seconds, fp16_seconds
from apex4_quant.planning.issue_model import (
    EFFICIENCY,
    EFFICIENCY_EIGHT_BIT,
    EFFICIENCY_LIMIT,
    Loop,
    best_loop,
    control,
    efficiency,
    gemm_seconds,
)

PAGE = Path(__file__).parents[2] / "docs" / "issue_slots.md"
SIDE = 4096  # M = N = K
PIPES = ("tensor", "issue", "fma", "alu", "i2f", "shared")
PUBLISHED = {"A100": "0.43-0.47", "RTX 3090": "2.0-2.5"}
GOALS = {"RTX 3090": 4.0, "A40": 2.5, "A100": 2.0}


def speedup(name: str, loop: Loop, share: float, quantized: bool = False) -> float:
    """Over FP16 at M = N = K = 4096, groups of 128."""
    gpu = GPUS[name]
    seconds = gemm_seconds(gpu, loop, SIDE, SIDE, SIDE, share)
    if quantized:
        seconds += activation_seconds(gpu, SIDE, SIDE, 128, activation_bits=loop.bits)
    return fp16_seconds(gpu, SIDE, SIDE, SIDE) / seconds


def needed(name: str, loop: Loop, goal: float, quantized: bool) -> float:
    """The efficiency at which the goal is met."""
    gpu = GPUS[name]
    allowed = fp16_seconds(gpu, SIDE, SIDE, SIDE) / goal
    if quantized:
        allowed -= activation_seconds(gpu, SIDE, SIDE, 128)
    return gemm_seconds(gpu, loop, SIDE, SIDE, SIDE, 1.0) / allowed


def clocks_table() -> list[str]:
    lines = ["| GPU | main loop | " + " | ".join(PIPES) + " | busiest |", "|---|---|" + "---|" * (len(PIPES) + 1)]
    for name in ("A100", "RTX 3090", "RTX 4090", "H200"):
        gpu = GPUS[name]
        for loop in (best_loop(gpu), control(gpu)) if gpu.sm < 90 else (best_loop(gpu),):
            clocks = loop.clocks(gpu)
            cells = " | ".join(f"{clocks[pipe]:.2f}" for pipe in PIPES)
            lines.append(f"| {name} | `{loop.name}` | {cells} | {max(clocks, key=clocks.__getitem__)} |")
    return lines


def control_table() -> list[str]:
    lines = ["| GPU | in turns, nothing else lost | x fitted efficiency | published | overlapped, same efficiency |"]
    lines.append("|---|---|---|---|---|")
    for name, published in PUBLISHED.items():
        gpu, loop = GPUS[name], control(GPUS[name])
        ideal, fitted = speedup(name, loop, 1.0), speedup(name, loop, EFFICIENCY)
        overlapped = fitted * loop.product_clocks(gpu) / max(loop.clocks(gpu).values())
        lines.append(f"| {name} | {ideal:.2f}x | {fitted:.2f}x | {published}x | {overlapped:.2f}x |")
    return lines


def predictions_table() -> list[str]:
    lines = [
        f"| GPU | goal | efficiency {EFFICIENCY:g}: GEMM, + quantization | efficiency {EFFICIENCY_LIMIT:g}: GEMM, "
        "+ quantization | needed for the goal: GEMM, + quantization |",
        "|---|---|---|---|---|",
    ]
    for name, gpu in GPUS.items():
        if gpu.sm >= 90:
            continue
        loop = best_loop(gpu)
        low, high = (
            f"{speedup(name, loop, share):.2f}x, {speedup(name, loop, share, True):.2f}x"
            for share in (EFFICIENCY, EFFICIENCY_LIMIT)
        )
        goal = GOALS.get(name)
        wanted = "" if goal is None else f"{needed(name, loop, goal, False):.2f}, {needed(name, loop, goal, True):.2f}"
        lines.append(f"| {name} | {'' if goal is None else f'{goal:g}x'} | {low} | {high} | {wanted} |")
    return lines


def hopper_table() -> list[str]:
    lines = ["| GPU | account, nothing lost: GEMM, + quantization | planner's efficiency: GEMM, + quantization |"]
    lines.append("|---|---|---|")
    for name, gpu in GPUS.items():
        if gpu.sm >= 90:
            loop = best_loop(gpu)
            cells = " | ".join(
                f"{speedup(name, loop, share):.2f}x, {speedup(name, loop, share, True):.2f}x"
                for share in (1.0, efficiency(gpu))
            )
            lines.append(f"| {name} | {cells} |")
    return lines


def eight_bit_clocks_table() -> list[str]:
    lines = ["| GPU | main loop, 8-bit activations | " + " | ".join(PIPES) + " | busiest |"]
    lines.append("|---|---|" + "---|" * (len(PIPES) + 1))
    for name in ("A100", "RTX 3090", "RTX 4090"):
        gpu = GPUS[name]
        loop = best_loop(gpu, activation_bits=8)
        clocks = loop.clocks(gpu)
        cells = " | ".join(f"{clocks[pipe]:.2f}" for pipe in PIPES)
        lines.append(f"| {name} | `{loop.name}` | {cells} | {max(clocks, key=clocks.__getitem__)} |")
    return lines


def eight_bit_predictions_table() -> list[str]:
    lines = [
        f"| GPU | W4A4 at {EFFICIENCY:g}: GEMM, + quantization | W4A8 at {EFFICIENCY_EIGHT_BIT:g}: GEMM, + quantization | "
        f"W4A8 at {EFFICIENCY_LIMIT:g}: GEMM, + quantization |",
        "|---|---|---|---|",
    ]
    for name, gpu in GPUS.items():
        if gpu.sm < 90:
            pairs = ((4, EFFICIENCY), (8, EFFICIENCY_EIGHT_BIT), (8, EFFICIENCY_LIMIT))
            loops = [(best_loop(gpu, activation_bits=bits), share) for bits, share in pairs]
            cells = " | ".join(
                f"{speedup(name, loop, share):.2f}x, {speedup(name, loop, share, True):.2f}x" for loop, share in loops
            )
            lines.append(f"| {name} | {cells} |")
    return lines


TABLES = (
    clocks_table, control_table, predictions_table, eight_bit_clocks_table, eight_bit_predictions_table, hopper_table,
)  # fmt: skip


def write_tables(update: bool) -> None:
    """Print the tables as Markdown, and put them into the page if `update`."""
    tables = ["\n".join(table()) for table in TABLES]
    print("\n\n".join(tables))
    if update:
        page = PAGE.read_text("utf-8")
        for table in tables:  # known by its header
            header = re.escape(table.partition("\n")[0])
            page, found = re.subn(rf"^{header}\n(\|.*\n)+", lambda _, new=table: new + "\n", page, flags=re.MULTILINE)
            if not found:
                sys.exit(f"{PAGE.name} has no table with this header, put it in by hand:\n{table}")
        PAGE.write_text(page, "utf-8")
