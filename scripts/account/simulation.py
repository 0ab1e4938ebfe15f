"""`scripts/account/issue_slots simulate`: one scheduler that issues a main loop's real instructions in order.

Every SASS instruction carries what the compiler decided: clocks until the warp's next one may issue, and which of six
scoreboards it sets and waits for. The simulation issues one instruction a clock from the warps that a scheduler holds,
keeps pipes busy as issue_model.py says, and meets at barriers; the copies from global memory are always in time.
Latencies are public microbenchmarks' order of magnitude, and which ready warp a scheduler prefers is not documented.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from apex4_quant.kernels.analysis import sass
from apex4_quant.planning.issue_model import RATES

SHARED_LATENCY, OTHER_LATENCY, READ_LATENCY, BARRIER, BRANCH = 26, 20, 12, 25, 12  # clocks
QUEUE = 40  # clocks of shared-memory work that may be waiting
TURNS = 24
STARTS = (37, 600)  # clocks from one thread block's start to the next
POLICIES = ("same warp first", "oldest first", "round robin")
_CONTROL = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_PIPES = dict.fromkeys(("ffma", "fmul", "fadd", "imad", "half"), "fma") | {
    "tensor": "tensor", "integer": "alu", "i2f": "i2f", "shared_read": "shared", "shared_write": "shared",
    "copy": "shared",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    instruction: sass.Instruction
    stall: int  # clocks until the next instruction of this warp
    sets: int  # scoreboard cleared when the result is there; 7 is none
    releases: int  # scoreboard cleared when the operands are read; 7 is none
    waits: int  # mask of scoreboards


def steps_of(cubin: bytes, entry: str) -> list[Step]:
    """The main loop with its control bits: bits 105 to 121 of each 128-bit instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [sass.find_nvdisasm(), "-c", "-hex", file.name], capture_output=True, text=True, check=True
        )
    listing, control, address = [], {}, 0
    for line in text.stdout.splitlines():
        word, rest = _CONTROL.search(line), _CONTROL.sub("", line).rstrip()
        if found := re.match(r"\s*/\*([0-9a-f]+)\*/", rest):
            address = int(found[1], 16)
        elif word and not rest.strip():
            control[address] = int(word[1], 16) >> 41
        listing.append(rest)
    function = sass.parse("\n".join(listing))[entry]
    return [
        Step(i, (c := control[i.address]) & 15, c >> 5 & 7, c >> 8 & 7, c >> 11 & 63) for i in sass.main_loop(function)
    ]


def busy(step: Step, sm: int, mma_clocks: float) -> float:
    """Clocks that an instruction keeps its pipe."""
    rates, klass = RATES[sm], step.instruction.klass
    if klass == "tensor":
        return mma_clocks
    if _PIPES.get(klass) == "shared":
        moved = sass.count([step.instruction])
        return rates.shared * (moved.shared_bytes + moved.copied_bytes)
    return {"fma": rates.fma, "alu": rates.alu, "i2f": rates.i2f}.get(_PIPES.get(klass, ""), 0.0)


def simulate(
    steps: list[Step], sm: int, mma_clocks: float, blocks: int, warps: int, policy: str, apart: float = 37
) -> float:
    """Clocks per turn of one warp in the steady state; `blocks` thread blocks with `warps` warps each on the scheduler.

    `mma_clocks`: how long one mma instruction keeps the scheduler's tensor core.
    """
    costs = [busy(step, sm, mma_clocks) for step in steps]
    count = blocks * warps
    position, waiting = [0] * count, [False] * count
    ready = [apart * (w // warps) for w in range(count)]
    boards = [[0.0] * 6 for _ in range(count)]
    free: dict[str, float] = {}
    arrived: dict[int, list[int]] = {}
    ends: list[float] = []  # of turns, whichever warp's
    now, last = 0.0, 0
    while len(ends) < TURNS * count:
        others = [w for w in range(count) if w != last]
        order = {
            "same warp first": [last, *others],
            "oldest first": list(range(count)),
            "round robin": [(last + 1 + w) % count for w in range(count)],
        }[policy]
        for w in order:
            step = steps[position[w]]
            pipe = _PIPES.get(step.instruction.klass, "")
            if waiting[w] or ready[w] > now:
                continue
            if any(step.waits >> b & 1 and boards[w][b] > now for b in range(6)):
                continue
            if pipe and free.get(pipe, 0) > now + (QUEUE if pipe == "shared" else 0):
                continue
            break
        else:
            now += 1
            continue
        start = max(now, free.get(pipe, 0)) if pipe else now
        finished = start + costs[position[w]]
        if pipe:
            free[pipe] = finished
        if step.sets != 7:
            latency = SHARED_LATENCY if step.instruction.klass == "shared_read" else OTHER_LATENCY
            boards[w][step.sets] = max(boards[w][step.sets], finished + latency)
        if step.releases != 7:
            boards[w][step.releases] = max(boards[w][step.releases], finished + READ_LATENCY)
        ready[w] = now + max(1, step.stall)
        if step.instruction.name == "BAR":
            block = w // warps
            arrived.setdefault(block, []).append(w)
            waiting[w] = True
            if len(arrived[block]) == warps:
                for each in arrived.pop(block):
                    waiting[each], ready[each] = False, now + BARRIER
        position[w] += 1
        if position[w] == len(steps):
            position[w], ready[w] = 0, max(ready[w], now + BRANCH)
            ends.append(now)
        now, last = now + 1, w
    first = count * TURNS // 3  # the beginning is not the steady state
    return (ends[-1] - ends[first - 1]) / (len(ends) - first)


def spread(steps: list[Step], sm: int, mma_clocks: float, blocks: int, warps: int) -> tuple[float, float]:
    """The least and the most of all policies and distances between thread blocks."""
    runs = [simulate(steps, sm, mma_clocks, blocks, warps, policy, apart) for policy in POLICIES for apart in STARTS]
    return min(runs), max(runs)
