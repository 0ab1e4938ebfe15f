"""What a compiled kernel does in its main loop: its machine code (SASS), counted by the pipe that executes it.

`disassemble` runs nvdisasm on a cubin, `main_loop` finds the loop that matters, `count` sorts its instructions. Counts are
of one turn of the loop and one warp. What a loop spends on dequantization is only comparable per *product*: one
accumulator times one group of 128 inputs. A mma instruction says itself how many of those it computes (its shape is in
its name), so `LoopCount.per_product` needs no knowledge of tiles. No torch, and no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import Apex4Error
from ...format.number_format import BLOCK

# Opcode (its name up to the first dot) to class, one class per pipe. The pipes' rates are in issue_model.py.
_CLASSES: dict[str, str] = {
    name: klass
    for klass, names in {
        "tensor": "IMMA HMMA QMMA BMMA IGMMA HGMMA QGMMA BGMMA",
        "ffma": "FFMA",
        "fmul": "FMUL",
        "fadd": "FADD",
        "i2f": "I2F I2FP",
        "half": "HADD2 HMUL2 HFMA2 HMNMX2",  # also what widens float16 to float32
        "convert": "F2F F2I F2FP F2IP I2I I2IP",
        "imad": "IMAD IMUL",
        "integer": "LOP3 IADD3 IADD SHF SHL SHR PRMT LEA MOV SEL ISETP PLOP3 CS2R IABS IMNMX VIMNMX VIADD VIADDMNMX FSETP "
        "FSEL FMNMX BMSK SGXT LOP FLO POPC P2R R2P VABSDIFF IDP LOP32I IADD32I MOV32I",
        "uniform": "R2UR S2UR ULDC UMOV",  # and every name that starts with U: the scalar pipe beside the lanes
        "special": "MUFU",
        "shared_read": "LDS LDSM",
        "shared_write": "STS STSM ATOMS REDS",
        "copy": "LDGSTS",
        "tma": "UTMALDG UTMASTG UBLKCP UBLKPF UTMAPF UTMACMDFLUSH UTMACCTL UTMAREDG",
        "global_read": "LDG LD LDC",
        "global_write": "STG ST RED ATOM ATOMG",
        "spill": "LDL STL",
        "shuffle": "SHFL VOTE VOTEU MATCH REDUX",
        "sync": "BAR SYNCS DEPBAR LDGDEPBAR ARRIVES WARPSYNC WARPGROUP WARPGROUPDEPBAR MEMBAR ERRBAR FENCE CCTL UCGABAR_ARV "
        "UCGABAR_WAIT NANOSLEEP ELECT ACQBULK USETMAXREG",
        "branch": "BRA BRX BRXU JMP CALL RET EXIT BSSY BSYNC BREAK YIELD KILL",
        "other": "NOP S2R CS2UR",
    }.items()
    for name in names.split()
}
CLASSES: tuple[str, ...] = tuple(dict.fromkeys(_CLASSES.values()))

_FUNCTION = re.compile(r"^\.text\.([\w$.]+):$")
_LABEL = re.compile(r"^(\.L_x?_?\w+):$")
_INSTRUCTION = re.compile(r"^/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*\}?$")
_TARGET = re.compile(r"\((\.L_x?_?\w+)\)")
_IMMA = re.compile(r"^[IHQ]MMA\.(16816|16832|16864|8816|8832|1688)\b")
_GMMA = re.compile(r"^[IHQ]GMMA\.(\d+)x(\d+)x(\d+)\b")
_IMMA_K = {"16816": 16, "16832": 32, "16864": 64, "8816": 16, "8832": 32, "1688": 8}


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, e.g. "IMMA.16864.S4.S4"
    operands: str
    predicate: str = ""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def klass(self) -> str:
        name = self.name
        if name in _CLASSES:
            return _CLASSES[name]
        return "uniform" if name.startswith("U") else "other"


@dataclass(frozen=True)
class Function:
    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int] = field(compare=False)  # address of the instruction that follows

    def spills(self) -> int:
        """Local-memory reads and writes anywhere in the kernel."""
        return sum(instruction.klass == "spill" for instruction in self.instructions)


@dataclass(frozen=True)
class LoopCount:
    """Of one turn of a loop and one warp. `opcodes` holds full names of mma instructions and memory reads only."""

    classes: dict[str, int]
    opcodes: dict[str, int]
    products: float  # accumulator x group of 128, per thread
    # Read from shared memory by the warp, and by wgmma on its behalf; broadcasts are not counted out.
    shared_bytes: int
    copied_bytes: int  # copied from global to shared memory by the warp
    same_bank: int  # FFMA whose three operands stand in one of the two register banks

    @property
    def instructions(self) -> int:
        return sum(self.classes.values())

    def per_product(self, klass: str) -> float:
        """Instructions of a class per accumulator and group of 128."""
        return self.classes.get(klass, 0) / self.products


def find_nvdisasm() -> Path:
    """nvdisasm from the PyPI package nvidia-cuda-nvdisasm, else from PATH. Raises Apex4Error if there is none."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("cu*/bin/nvdisasm"), reverse=True):
            return path
    found = shutil.which("nvdisasm")
    if found is None:
        raise Apex4Error("nvdisasm is not installed: run pip install nvidia-cuda-nvdisasm, or put CUDA's bin into PATH")
    return Path(found)


def disassemble(cubin: bytes) -> str:
    """The text of `nvdisasm -c`. Raises Apex4Error if the tool is absent or refuses the cubin."""
    tool = find_nvdisasm()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Apex4Error(f"nvdisasm failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


def parse(text: str) -> dict[str, Function]:
    """The functions of `nvdisasm -c` output by name."""
    functions: dict[str, Function] = {}
    name: str | None = None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []

    def finish() -> None:
        if name is not None:
            functions[name] = Function(name, tuple(instructions), dict(labels))

    for line in text.splitlines():
        line = line.strip()
        if found := _FUNCTION.match(line):
            finish()
            name, instructions, labels, waiting = found[1], [], {}, []
        elif found := _LABEL.match(line):
            waiting.append(found[1])
        elif found := _INSTRUCTION.match(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            instructions.append(Instruction(address, found[3], found[4], found[2] or ""))
    finish()
    return functions


def loops(function: Function) -> list[list[Instruction]]:
    """Every natural loop: from its head to its last branch back, without what stands elsewhere.

    A branch back to an address is a loop only if every way to the branch leads through that address. Others come from the
    slow paths of barriers, which the compiler puts behind the kernel's end and lets jump back into the middle of a loop;
    these paths are entered rarely and are not counted.
    """
    code = function.instructions
    index = {instruction.address: i for i, instruction in enumerate(code)}
    targets = [index.get(function.labels.get(label, -1)) for label in map(_label_of, code)]
    starts = sorted({0, *(t for t in targets if t is not None), *(i + 1 for i, x in enumerate(code) if _leaves(x))})
    starts = [start for start in starts if start < len(code)]
    ends = [*starts[1:], len(code)]
    block_of = {start: number for number, start in enumerate(starts)}
    successors: list[list[int]] = []
    for end in ends:
        last = end - 1
        following = [] if _always_leaves(code[last]) or last + 1 == len(code) else [block_of[last + 1]]
        # A label in BSSY or WARPSYNC is where threads meet again, no jump.
        target = targets[last] if _leaves(code[last]) else None
        successors.append(following + ([] if target is None else [block_of[target]]))
    reachable, waiting = {0}, [0]
    while waiting:
        new = set(successors[waiting.pop()]) - reachable
        reachable |= new
        waiting += new
    dominators = _dominators(successors)
    # Two branches back to one head (a `continue`) are one loop.
    heads: dict[int, set[int]] = {}
    for block in sorted(reachable):  # behind the last EXIT stands a branch to itself
        for head in successors[block]:
            if head in dominators[block]:
                heads.setdefault(head, set()).add(block)
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, following in enumerate(successors):
        for each in following:
            predecessors[each].append(block)
    found = []
    for head, tails in heads.items():
        body, waiting = {head}, list(tails)
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += predecessors[block]
        last_block = max(tails)
        found.append(
            [code[i] for block in sorted(body) if block <= last_block for i in range(starts[block], ends[block])]
        )
    return found


def _label_of(instruction: Instruction) -> str:
    found = _TARGET.search(instruction.operands)
    return found[1] if found else ""


def _leaves(instruction: Instruction) -> bool:
    return instruction.name in ("BRA", "BRX", "BRXU", "JMP", "CALL", "RET", "EXIT")


def _always_leaves(instruction: Instruction) -> bool:
    """No way on to the next instruction. `BRA P0, label` has its condition among the operands."""
    conditional = instruction.predicate or re.match(r"!?U?P\d", instruction.operands) or instruction.name == "CALL"
    return _leaves(instruction) and not conditional


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """Of every block the blocks that each way from the first one leads through."""
    everything = set(range(len(successors)))
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for each in following:
            predecessors[each].append(block)
    found = [{0}] + [set(everything) for _ in successors[1:]]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            reached = [found[each] for each in predecessors[block]]
            new = (set.intersection(*reached) if reached else set(everything)) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


def main_loop(function: Function) -> list[Instruction]:
    """The innermost loop with the most mma instructions. Raises Apex4Error if no loop has any."""
    with_mma = [loop for loop in loops(function) if any(i.klass == "tensor" for i in loop)]
    inside = [{i.address for i in loop if i.klass == "tensor"} for loop in with_mma]
    # One inside another shares some of its mma and begins later.
    innermost = [
        loop
        for loop, mma in zip(with_mma, inside, strict=True)
        if not any(
            other[0].address > loop[0].address and mma & theirs for other, theirs in zip(with_mma, inside, strict=True)
        )
    ]
    if not innermost:
        raise Apex4Error(f"{function.name} has no loop with tensor-core instructions")
    return max(innermost, key=lambda loop: (sum(i.klass == "tensor" for i in loop), -len(loop)))


def is_scale_product(opcode: str) -> bool:
    """True for the tf32 wgmma that multiplies scales in gemm_sm90.cu."""
    return opcode.startswith("HGMMA.") and opcode.endswith(".TF32")


def products(opcode: str) -> float:
    """Accumulators of a thread times groups of 128 that one mma instruction computes a share of; 0 for anything else."""
    if found := _IMMA.match(opcode):
        rows = 8 if found[1].startswith("88") else 16
        return rows * 8 / 32 * _IMMA_K[found[1]] / BLOCK
    # The product of scales (gemm_sm90.cu) is no product of codes.
    if (found := _GMMA.match(opcode)) and not is_scale_product(opcode):  # a warpgroup: four warps
        m, n, k = map(int, found.groups())
        return m * n / 128 * k / BLOCK
    return 0.0


def _bytes_per_lane(opcode: str) -> int:
    """Of a memory instruction: LDS.128 is 16, LDS is 4, LDS.U16 is 2; LDSM.16.M88.4 reads 4 bytes a lane and matrix."""
    parts = opcode.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return 4 * (int(parts[-1]) if parts[-1] in ("2", "4") else 1)
    for part in parts[1:]:
        if part in ("128", "64"):
            return int(part) // 8
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
    return 4


def _wgmma_bytes(instruction: Instruction) -> int:
    """Shared memory that one wgmma reads, a warp's quarter: B always, A unless it comes from registers."""
    found = _GMMA.match(instruction.opcode)
    if not found:
        return 0
    m, n, k = map(int, found.groups())
    from_registers = re.match(r"\w+, R\d+", instruction.operands.replace(".reuse", "")) is not None
    return (
        (n + (0 if from_registers else m))
        * k
        * (4 if is_scale_product(instruction.opcode) else 2 if instruction.name == "HGMMA" else 1)
        // 4
    )


def _in_one_bank(instruction: Instruction) -> bool:
    """True for an FFMA of three registers that are all even or all odd: two banks, so it waits a clock longer."""
    registers = re.findall(r"\bR(\d+)", instruction.operands)[1:]
    return instruction.name == "FFMA" and len(registers) == 3 and len({int(number) % 2 for number in registers}) == 1


def count(instructions: Sequence[Instruction]) -> LoopCount:
    """Sort the instructions of a loop. A predicated instruction counts as one: it takes its issue slot either way."""
    classes = Counter(i.klass for i in instructions)
    named = Counter(i.opcode for i in instructions if i.klass in ("tensor", "shared_read", "copy", "i2f", "tma"))
    return LoopCount(
        classes={klass: classes[klass] for klass in CLASSES if classes[klass]},
        opcodes=dict(sorted(named.items())),
        products=sum(products(opcode) * number for opcode, number in named.items()),
        shared_bytes=sum(
            32 * _bytes_per_lane(i.opcode) if i.klass == "shared_read" else _wgmma_bytes(i) for i in instructions
        ),
        copied_bytes=sum(32 * _bytes_per_lane(i.opcode) for i in instructions if i.klass == "copy"),
        same_bank=sum(map(_in_one_bank, instructions)),
    )
