"""Proofs of hardware modules, kept in a log with what each is a proof of."""

import functools
import time

import numpy as np

from benchmarks.log import Log
from benchmarks.measure import design
from recoup.silicon import Measured, faults, vectors
from recoup.silicon.measured import fingerprint
from recoup.silicon.verify import COVERAGE
from recoup.silicon.yosys import digest

FIGURES = ("faults", "proved redundant", "mismatches", "vectors", "seconds with the netlist made", "coverage")


def drawn_of(module: Measured) -> dict[str, object]:
    """Some of the vectors it is tried with, as a fingerprint a port."""
    drawn = vectors.structured(module, 64, np.random.default_rng(0))
    return {port: fingerprint(values) for port, values in drawn.items()}


def subject(module: Measured) -> str:
    """What a proof is one of: the design, some of its vectors, and how far they are tried."""
    return digest("proof", design(module), drawn_of(module), faults.ROUNDS, COVERAGE)


def prove(log: Log, name: str, module: Measured) -> None:
    """`recoup silicon verify` of a module, in figures; anew where the design or the vectors are others."""
    of = subject(module)

    @functools.cache
    def figures() -> dict[str, float]:
        module.netlist()
        start = time.perf_counter()
        found = module.verify()
        print(found, flush=True)
        return {
            "faults": found.faults,
            "proved redundant": len(found.redundant),
            "mismatches": found.mismatches,
            "vectors": found.vectors,
            "seconds with the netlist made": time.perf_counter() - start,
            "coverage": found.coverage or 0.0,
        }

    for what in FIGURES:
        log.measure((name, what), lambda what=what: figures()[what], of)
