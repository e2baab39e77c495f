"""Claim: a multi-operand adder costs less per product than a chain of multiply-add units, the less the more it adds.

Area per product of the tensor core's step (multipliers, alignment, adder, normalisation, accumulator) for FP8 operands
and groups of 1 to 32, in 13 and 25 bits, beside multiply-add units of the same operands: M7E4, M10E5, FP32 and int32
accumulators. Liberty files are found through RECOUP_DATA. A row at a time is kept in
benchmarks/results/silicon_tensorcore.jsonl with a digest of its design and of
the mapping.

    python benchmarks/silicon_tensorcore.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import recoup as rc
from benchmarks.log import Log
from benchmarks.measure import RESULTS, mapped, save
from recoup.data import root
from recoup.formats import Float
from recoup.silicon import Measured, build
from recoup.silicon.cells import Library
from recoup.tensorcore import TensorCore

FP8 = Float.parse("e4m3fn")
GROUPS = (1, 2, 4, 8, 16, 32)
WAYS = {"13 bits": TensorCore.hopper_fp8(), "25 bits": TensorCore.blackwell_fp8()}


def modules() -> dict[tuple[str, int], Measured]:
    """Every unit, and how many products it takes a cycle."""
    found = {(f"adder, {way}", G): build(config.replace(group=G)) for way, config in WAYS.items() for G in GROUPS}
    for name, config in (("M7E4", rc.LBA.m7e4()), ("M10E5", rc.LBA.m10e5())):
        found[name, 1] = build(config, operands=FP8)
    counterparts = found["M7E4", 1].baselines()
    for title in ("fp32, nearest", "int32, saturates"):
        found[title, 1] = Measured.of(counterparts[title])
    return found


def main() -> None:
    """Measure, print and save."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    log, liberty = Log(RESULTS / "silicon_tensorcore.jsonl"), root() / "liberty" / "sg13g2_stdcell_typ_1p20V_25C.lib"
    area = {
        key: log.measure((liberty.name, *key), lambda m=module: m.area(liberty).area, mapped(module))
        for key, module in modules().items()
    }
    print("\n| unit | products a cycle | um2 | um2 a product |\n|---|---|---|---|")
    for (name, G), found in area.items():
        print(f"| {name} | {G} | {found:,.0f} | {found / G:,.0f} |")
    tool = build(WAYS["13 bits"].replace(group=1)).area(liberty).tool
    save("silicon_tensorcore", {
        "tool": tool, "liberty": {liberty.name: Library([liberty]).digests[0]},
        "area": {f"{name}, {G}": found for (name, G), found in area.items()},
    })  # fmt: skip


if __name__ == "__main__":
    main()
