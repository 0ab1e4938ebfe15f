"""Machine code: the parser on small committed listings, and the committed counts against a fresh compilation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels.analysis import mainloops, sass
from apex4_quant.kernels.catalogue import ARCHITECTURES
from apex4_quant.kernels.runtime import compiler

UPDATE = "the kernels have changed: run scripts/account/issue_slots count --update"
LISTINGS = Path(__file__).parent / "sass"  # tiny.cu, compiled and disassembled


def tiny(name: str) -> sass.Function:
    return sass.parse((LISTINGS / f"{name}.sass").read_text())["tiny"]


@pytest.mark.parametrize(("name", "i2f"), [("sm80", "I2F"), ("sm86", "I2FP.F32.S32")])
def test_the_inner_loop_with_mma_is_the_main_loop(name: str, i2f: str) -> None:
    function = tiny(name)
    assert len(sass.loops(function)) == 3  # one without mma, and the outer one around the inner
    count = sass.count(sass.main_loop(function))
    assert count.opcodes == {i2f: 4, "IMMA.16864.S4.S4": 2, "LDS": 1, "LDS.128": 1, "LDSM.16.M88.4": 1}
    # Two mma of k64 make four accumulators of this thread and one group of 128.
    assert count.products == 4
    assert (count.per_product("ffma"), count.per_product("i2f"), count.per_product("fmul")) == (1, 1, 0)
    assert count.shared_bytes == 32 * (4 + 16 + 16)
    assert count.instructions == sum(count.classes.values()) == len(sass.main_loop(function))


def test_wgmma() -> None:
    count = sass.count(sass.main_loop(tiny("sm90a")))
    assert count.opcodes["QGMMA.64x8x32.F32.E4M3.E4M3"] == 1
    assert count.products == 64 * 8 / 128 * 32 / 128 == 1
    assert count.per_product("ffma") == 4 and count.classes["sync"] == 2
    assert count.shared_bytes == 32 * 4 + (64 + 8) * 32 // 4  # LDS, and both operands of the wgmma


def test_operands_that_meet_in_one_register_bank() -> None:
    lines = ("R2, R4, R6, R8", "R2, R4, R7, R8", "R3, R5.reuse, R7, -R9", "R2, R4, 2, R6", "R2, R4, c[0x0][0x28], R6")
    text = "\n".join(f"/*{16 * i:04x}*/ FFMA {operands} ;" for i, operands in enumerate(lines))
    function = sass.parse(f".text.f:\n.L_x_0:\n{text}\n/*0050*/ BRA `(.L_x_0) ;\n")["f"]
    assert sass.count(function.instructions).same_bank == 2


def test_local_memory_is_found_outside_the_loop() -> None:
    assert tiny("local").spills() > 0 == tiny("sm80").spills()
    assert "spill" not in sass.count(sass.main_loop(tiny("local"))).classes


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("IMMA.16864.S4.S4", 2),  # 16 x 8 / 32 = 4 accumulators, half a group
        ("IMMA.16832.S8.S8", 1),
        ("HMMA.16816.F32.BF16", 0.5),
        ("QGMMA.64x128x32.F32.E4M3.E4M3", 16),
        ("IGMMA.64x256x32.S8.S8", 32),
        ("FFMA", 0),
    ],
)
def test_products(opcode: str, expected: float) -> None:
    assert sass.products(opcode) == expected


@pytest.mark.parametrize(
    ("line", "klass", "predicate"),
    [
        ("/*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;", "copy", ""),
        ("/*0020*/              @!P1 LDS.U16 R1, [R2] ;", "shared_read", "@!P1"),
        ("/*0030*/               @P0 UIADD3 UR4, UR4, 0x1, URZ ;", "uniform", "@P0"),
        ("/*0040*/             @!UP1 STL.64 [R1], R2 ;", "spill", "@!UP1"),
        ("/*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;", "sync", ""),
        ("/*0060*/                   UTMALDG.3D [UR8], [UR4] ;", "tma", ""),
        ("/*0070*/                   I2FP.F32.S32 R1, R2 ;", "i2f", ""),
        ("/*0080*/                   HADD2.F32 R1, -RZ, R2.H0_H0 ;", "half", ""),
        ("/*0090*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;", "imad", ""),
        ("/*00a0*/                   NOP;", "other", ""),
    ],
)
def test_classes(line: str, klass: str, predicate: str) -> None:
    (instruction,) = sass.parse(f".text.f:\n        {line}\n")["f"].instructions
    assert (instruction.klass, instruction.predicate) == (klass, predicate)


def test_every_instruction_of_the_listings_is_read_and_known() -> None:
    for path in LISTINGS.glob("*.sass"):
        text = path.read_text()
        instructions = sass.parse(text)["tiny"].instructions
        assert len(instructions) == text.count("/*") and instructions[0].address == 0
        assert {i.name for i in instructions if i.klass == "other"} <= {"NOP", "S2R"}


def test_a_slow_path_that_jumps_back_is_no_loop() -> None:
    """As wgmma kernels have it: a barrier is tried, and the waiting stands behind the kernel's end."""
    text = """
.text.f:
        /*0000*/                   MOV R0, R1 ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   QGMMA.64x8x32.F32.E4M3.E4M3 R24, R4, gdesc[UR8], RZ, !UPT ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3) ;
"""
    function = sass.parse(text)["f"]
    assert [[i.address for i in loop] for loop in sass.loops(function)] == [[0x10, 0x20, 0x30, 0x40], [0x60, 0x70]]
    count = sass.count(sass.main_loop(function))
    assert (count.instructions, count.products, count.shared_bytes) == (4, 1, 8 * 32 // 4)  # A is in registers


def test_no_loop_with_mma() -> None:
    text = ".text.f:\n.L_x_0:\n/*0000*/ FFMA R1, R1, R1, R1 ;\n/*0010*/ BRA `(.L_x_0) ;\n"
    with pytest.raises(Apex4Error, match="f has no loop with tensor-core instructions"):
        sass.main_loop(sass.parse(text)["f"])


def test_no_nvdisasm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Apex4Error, match="nvdisasm is not installed: run pip install nvidia-cuda-nvdisasm"):
        sass.disassemble(b"")


def test_not_a_cubin() -> None:
    try:
        sass.find_nvdisasm()
    except Apex4Error as error:
        pytest.skip(str(error))
    with pytest.raises(Apex4Error, match="nvdisasm failed"):
        sass.disassemble(b"no cubin")


# ---- the committed counts ------------------------------------------------------------------------------------------------


def test_the_committed_counts_keep_the_promises() -> None:
    table = mainloops.committed()
    ours = [row for row in table["kernels"] if row["name"] != "naive_i2f"]
    assert {row["arch"] for row in ours if row["bits"] == 4} == {"sm_80", "sm_86", "sm_89", "sm_90a"}
    eight = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
    assert {row["arch"] for row in ours if row["bits"] == 8} == eight
    assert {f"{row['arch']} {row['name']}": found for row in ours if (found := mainloops.violations(row))} == {}
    control = [row for row in table["kernels"] if row["name"] == "naive_i2f"]
    for row in control:
        assert [row["classes"][name] / row["products"] for name in ("i2f", "fmul", "ffma")] == [1, 1, 1]
        assert "it converts with I2F" in mainloops.violations(row)
    assert mainloops.as_text(table).count("\n") == len(table["kernels"]) + 1
    assert json.loads(mainloops.as_json(table)) == table


def test_the_table_has_every_configuration() -> None:
    wanted = {(kernel.arch, kernel.name): kernel.defines for kernel in mainloops.kernels()}
    assert {(row["arch"], row["name"]): row["defines"] for row in mainloops.committed()["kernels"]} == wanted, UPDATE


def test_products_are_what_the_tiles_say() -> None:
    """From the names of the mma instructions, and from tile and threads: a turn is one block of 128, on sm_90 a few."""
    for kernel in mainloops.kernels():
        (row,) = (r for r in mainloops.committed()["kernels"] if (r["arch"], r["name"]) == (kernel.arch, kernel.name))
        blocks = row["products"] / kernel.accumulators
        assert blocks in ((1, 2, 4) if kernel.arch == "sm_90a" else (1,)), f"{kernel.arch} {kernel.name}"


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_counts_are_those_of_the_kernels(sm: int) -> None:
    """A kernel change must update the table. Another NVRTC makes other code, so that only the promises are checked."""
    try:
        installed = compiler.nvrtc_version()
        sass.find_nvdisasm()
    except Apex4Error as error:
        pytest.skip(str(error))
    kernels = [kernel for kernel in mainloops.kernels() if kernel.arch == compiler.arch_of(sm)]
    table = {"nvrtc": installed, "kernels": [mainloops.count(kernel) for kernel in kernels]}
    for row in table["kernels"]:
        if row["name"] != "naive_i2f":
            assert mainloops.violations(row) == [], f"{row['arch']} {row['name']}"
    committed = mainloops.committed()
    if committed["nvrtc"] != installed:
        pytest.skip(
            f"the table was made with NVRTC {committed['nvrtc']} and {installed} is installed: 0 I2F, 0 spills, two FFMA "
            "and the mma instruction were checked, the other counts were not"
        )
    rows = [row for row in committed["kernels"] if row["arch"] == compiler.arch_of(sm)]
    assert mainloops.differences(committed | {"kernels": rows}, table) == [], UPDATE


def test_differences_are_named() -> None:
    table = mainloops.committed()
    first, *others = table["kernels"]
    changed = table | {"kernels": [first | {"registers": 1}, *others[1:]]}
    found = mainloops.differences(table, changed)
    assert len(found) == 2 and any("not compiled any more" in line for line in found)
    assert any(line.endswith(f"registers {first['registers']} -> 1") for line in found)
    assert any("not in the table" in line for line in mainloops.differences(changed, table))


def test_a_broken_promise_of_an_eight_bit_loop_is_named() -> None:
    row = next(row for row in mainloops.committed()["kernels"] if row["bits"] == 8)
    assert mainloops.violations(row) == []
    broken = mainloops.violations(
        row | {"classes": row["classes"] | {"ffma": 128, "i2f": 1}, "spills": 1, "opcodes": {}}
    )
    assert broken == [
        "it converts with I2F", "1 local-memory instructions", "128 FFMA in a turn", "no mma of 8-bit integers"
    ]  # fmt: skip


def test_a_broken_promise_is_named() -> None:
    row = next(row for row in mainloops.committed()["kernels"] if row["arch"] == "sm_80")
    classes = row["classes"] | {"i2f": 1, "ffma": row["classes"]["ffma"] + row["products"]}
    broken = mainloops.violations(row | {"classes": classes, "spills": 3, "opcodes": {}})
    assert broken == [
        "it converts with I2F",
        "3 local-memory instructions",
        "3 FFMA (sm_90a: FMUL and FFMA) per accumulator and group instead of 2",
        "no IMMA.16864.S4.S4",
    ]
    hopper = next(row for row in mainloops.committed()["kernels"] if row["name"].startswith("sm90_m128"))
    assert mainloops.violations(hopper) == []
    assert mainloops.violations(hopper | {"same_bank": 2}) == ["2 FFMA with all operands in one register bank"]
