"""Claim: the multiply-add unit's gates are the emulation, and this is what its accumulators cost in one library.

All 16,785,409 pairs of the M7E4 adder and all 66,049 of its FP8 multiplier are compared with the reference; then areas
of multiply-accumulate units on M4E3 operands, from one generator. Kept in
benchmarks/results/silicon_accumulators.jsonl, areas by library, each with a digest of its design and of the mapping:
another is measured anew.

    python benchmarks/silicon_accumulators.py LIBERTY...            # several files of one library are read together
    python benchmarks/silicon_accumulators.py LIBERTY... --proofs   # the exhaustive comparisons too
    python benchmarks/silicon_accumulators.py LIBERTY... --chance   # what mappings of as much effort give
"""

import argparse
import statistics
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.log import Log
from benchmarks.measure import RESULTS, design, mapped
from recoup.formats import Float
from recoup.gates.module import Module
from recoup.lba import LBA
from recoup.lba.rtl import build
from recoup.lba.rtl_operations import adder, multiplier
from recoup.silicon import Measured, yosys

OPERANDS = Float.lba(3, 4, bias=3)
NEAREST = LBA(*(Float.lba(4, 7, bias, rounding="nearest") for bias in (12, 10)), chunk=None)
UNITS: dict[str, tuple[LBA, str | None]] = {
    "M7E4 (13 bits), no chunks": (LBA(chunk=None), None),
    "M7E4 fused": (LBA(product=None, chunk=None), None),
    "M7E4 nearest": (NEAREST, None),
    "M7E4, chunk 16, shared adder": (LBA(), "shared"),
    "M7E4, chunk 16, own outer adder": (LBA(), "own"),
    "m10e5, chunk 16, shared adder": (LBA.m10e5(), "shared"),
    "m10e5, chunk 16, own outer adder": (LBA.m10e5(), "own"),
}


def proofs(log: Log) -> None:
    """Every pair of operands of the paper's operations."""
    product, total = LBA().product, LBA().accumulator
    assert product is not None
    assert isinstance(total, Float)
    for name, module in (
        ("every sum", adder(product, total, total)),
        ("every product", multiplier(OPERANDS, OPERANDS, product, total)),
    ):

        def wrong(module: Module = module) -> float:
            found = Measured.of(module).verify("exhaustive", coverage=False)
            print(found)
            return found.mismatches

        log.measure(("mismatches", name), wrong, design(module))


def chance(log: Log, liberty: list[Path], modules: dict[str, Module]) -> None:
    """Means over five mappings for area, each of which maps once more what the last one left: which is best is luck."""
    means = {}
    for name, module in modules.items():
        areas = []
        for again in range(5):
            script = yosys.LESS_AREA + ";strash;dch,-f;map,-a" * again
            with patch.object(yosys, "LESS_AREA", script), patch.object(yosys, "KEPT", 10.0):
                key = (liberty[0].name, name, "mapped again", again)
                areas.append(log.measure(key, lambda m=module: Measured.of(m).area(liberty).area, mapped(module)))
        means[name] = statistics.mean(areas)
        print(f"| {name} | {means[name]:,.1f} | M7E4 / it {next(iter(means.values())) / means[name]:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("liberty", nargs="+", type=Path)
    parser.add_argument("--proofs", action="store_true", help="compare all pairs of operands")
    parser.add_argument("--chance", action="store_true", help="map each unit in five ways and print the means")
    arguments = parser.parse_args()
    log, library = Log(RESULTS / "silicon_accumulators.jsonl"), arguments.liberty[0].name
    if arguments.proofs:
        proofs(log)
    modules = {name: build(config, operands=OPERANDS, outer=outer) for name, (config, outer) in UNITS.items()}  # type: ignore[arg-type]
    modules |= build(LBA.m7e4(), operands=OPERANDS).baselines()
    if arguments.chance:
        chance(log, arguments.liberty, modules)
        return
    print(f"| {library} | area |\n|---|---|")
    for name, module in modules.items():
        measured = Measured.of(module)
        area = log.measure((library, name), lambda m=measured: m.area(arguments.liberty).area, mapped(module))
        print(f"| {name} | {area:,.{0 if area > 1000 else 1}f} |", flush=True)


if __name__ == "__main__":
    main()
