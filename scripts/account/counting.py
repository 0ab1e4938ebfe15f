"""`scripts/account/issue_slots count`: compile every GEMM and count the machine code of its main loop."""

from __future__ import annotations

import json

from apex4_quant.kernels.analysis import mainloops


def count(update: bool) -> bool:
    """Print the counts and how they differ from the committed table, or write the table. False if something is wrong."""
    table = mainloops.build()
    print(mainloops.as_text(table))
    broken = {
        f"{row['arch']} {row['name']}": found
        for row in table["kernels"]
        if row["name"] != "naive_i2f" and (found := mainloops.violations(row))
    }
    for kernel, reasons in broken.items():
        print(f"{kernel}: {', '.join(reasons)}")
    changed = []
    if update:
        mainloops.TABLE.write_text(mainloops.as_json(table), "utf-8")
    elif not mainloops.TABLE.is_file():
        changed = ["there is no table yet"]
    else:
        changed = mainloops.differences(mainloops.committed(), table)
        if table["nvrtc"] != mainloops.committed()["nvrtc"]:
            print(f"the table was made with NVRTC {mainloops.committed()['nvrtc']}: differences mean nothing")
    for line in changed:
        print(line)
    print(json.dumps({"kernels": len(table["kernels"]), "changed": len(changed), "broken": len(broken)}))
    return not (changed or broken)
