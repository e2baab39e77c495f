"""Claim: processing elements, arrays, multiply-add units and LightNorm units of few bits equal the emulation, and their
vectors show 99.5 % of the stuck-at faults that anything can show, of all but the last, which is not truncated.

The units of the presets, arrays of 2 x 2 elements, and LightNorm units of six to eight bits. LightNorm's own presets
are in silicon_lightnorm.py. A proof at a time is kept in benchmarks/results/silicon_proofs.jsonl with a digest of its
design and vectors, another is made anew.

    python benchmarks/silicon_proofs.py [NAME...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import recoup as rc
from benchmarks.log import Log
from benchmarks.measure import RESULTS, save
from benchmarks.proofs import FIGURES, prove
from recoup.formats import Float
from recoup.lightnorm import LightNorm
from recoup.silicon import Measured, build

TRUNCATED = {"subnormals": False, "rounding": "zero"}
M4E3 = Float.lba(3, 4, bias=3)


def norm(exponent: int, mantissa: int, kind: dict, **options: object) -> LightNorm:
    """A config whose formats are small."""
    form = Float.ieee(exponent, mantissa, **kind)
    return LightNorm(forward=form, backward=form, **options)  # type: ignore[arg-type]


UNITS = {
    **{f"NB-SMT, {T} threads": lambda T=T: build(rc.NBSMT(threads=T)) for T in (1, 2, 4)},
    **{f"NB-SMT, {T} threads, array of 2 x 2": lambda T=T: build(rc.NBSMT(threads=T), array=(2, 2)) for T in (1, 2, 4)},
    "hopper-fp8, adder": lambda: build(rc.TensorCore.hopper_fp8()),
    "blackwell-fp8, adder": lambda: build(rc.TensorCore.blackwell_fp8()),
    "M7E4": lambda: build(rc.LBA.m7e4(), operands=M4E3),
    "M7E4, no chunks": lambda: build(rc.LBA(chunk=None), operands=M4E3),
    "M10E5": lambda: build(rc.LBA.m10e5(), operands=M4E3),
    "LightNorm, M2E3": lambda: build(norm(3, 2, TRUNCATED, block=None)),
    "LightNorm, M2E5": lambda: build(norm(5, 2, TRUNCATED, block=None)),
    "LightNorm, M3E4": lambda: build(norm(4, 3, TRUNCATED, block=None)),
    "LightNorm, M3E3 nearest with subnormals, blocks of 2": lambda: build(norm(3, 3, {"rounding": "nearest"}, block=2)),
}


def main() -> None:
    """Prove, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(UNITS)}")
    names = parser.parse_args().names or list(UNITS)
    log = Log(RESULTS / "silicon_proofs.jsonl")
    for name in names:
        prove(log, name, Measured.of(UNITS[name]()))
    save(
        "silicon_proofs",
        {n: {what: log.values[n, what] for what in FIGURES} for n in UNITS if (n, FIGURES[0]) in log.values},
    )


if __name__ == "__main__":
    main()
