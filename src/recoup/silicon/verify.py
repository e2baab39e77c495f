"""Holds a mapped netlist against the letter, and the vectors against broken netlists: `Verification`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from recoup.errors import RecoupError
from recoup.gates.module import Inputs, Module
from recoup.silicon import faults, vectors
from recoup.silicon.netlist import Netlist, first_states
from recoup.silicon.words import packed, unpacked

COVERAGE = 0.995
"""The share of stuck-at faults that the vectors must show."""
_BATCH = 1 << 20


@dataclass(frozen=True, slots=True)
class Counterexample:
    """Where a netlist differs from the letter first: the port, the step, all operands up to it, both values."""

    port: str
    step: int
    operands: dict[str, list[Any]]
    expected: Any
    got: Any

    def __str__(self) -> str:
        given = ", ".join(
            f"{name}={values[0] if len(values) == 1 else values}" for name, values in self.operands.items()
        )
        return f"{self.port} in step {self.step} is {self.got}, expected {self.expected}; operands {given}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, and what came of it.

    Attributes:
        module: its title.
        vectors: compared runs times steps, those included on which faults were tried.
        exhaustive: whether these are all there are.
        mismatches: runs that differ.
        counterexample: the first of them.
        faults: stuck-at faults tried, two a gate and register; 0: none.
        missed: those that the vectors do not show, by net: redundant gates, or vectors too few.
        tool: the yosys.
        redundant: those that nothing can show once sums began from zero, proved where the vectors showed too few; they
            are not among the missed.
    """

    module: str
    vectors: int
    exhaustive: bool
    mismatches: int
    counterexample: Counterexample | None
    faults: int
    missed: tuple[str, ...]
    tool: str
    redundant: tuple[str, ...] = ()

    @property
    def coverage(self) -> float | None:
        """The share that the vectors show of the faults that anything can show; None: not measured."""
        able = self.faults - len(self.redundant)
        return (1 - len(self.missed) / able if able else 0.0) if self.faults else None

    @property
    def ok(self) -> bool:
        """No mismatch, and coverage, where measured, of 99.5 % or more."""
        return not self.mismatches and (self.coverage is None or self.coverage >= COVERAGE)

    @property
    def verdict(self) -> str:
        """In words: equal; equal, but on vectors that show too few faults; or different."""
        if self.mismatches:
            return "DIFFERS"
        return "equal" if self.ok else "equal, NOT PROVED"

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        kind = "all" if self.exhaustive else "structured"
        said = f"{self.module}: {self.vectors:,} vectors ({kind}), {self.mismatches:,} mismatches"
        if self.faults:
            able = self.faults - len(self.redundant)
            said += f"; {able - len(self.missed):,} of {able:,} faults shown ({100 * (self.coverage or 0):.2f} %)"
            if self.redundant:
                said += f", {len(self.redundant):,} more proved redundant"
        if not self.mismatches and not self.ok:
            said += f"; NOT PROVED: nothing differed, but the vectors show fewer than {COVERAGE:.1%} of the faults"
        return said + (f"\n  {self.counterexample}" if self.counterexample else "")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with ``ok``, ``coverage`` and ``verdict``."""
        return {**asdict(self), "coverage": self.coverage, "ok": self.ok, "verdict": self.verdict}


def verify(
    module: Module,
    netlist: Netlist,
    tool: str,
    amount: int | Literal["exhaustive"] = 65536,
    seed: int = 0,
    coverage: bool = True,
) -> Verification:
    """Compare a netlist with the module's ``expected``.

    Args:
        module: what it is to be.
        netlist: what yosys made of it.
        tool: the yosys.
        amount: vectors (steps of runs), or "exhaustive" for all operand pairs of a module without memory.
        seed: of the vectors and of the registers' first states.
        coverage: whether faults are tried.

    Raises:
        RecoupError: an amount that is none, too many combinations, or a letter that leaves parts of a port out.
    """
    generator = np.random.default_rng(seed)
    every = amount == "exhaustive"
    if every:
        total = vectors.count(module)
    elif isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        total = max(64, -(-amount // module.steps))
    else:
        raise RecoupError(f"verify(vectors={amount!r}): vectors must be a positive integer or 'exhaustive'")
    batch = max(64, _BATCH // module.steps)
    wrong, first = 0, None
    for start in range(0, total, batch):
        stop = min(total, start + batch)
        inputs = (
            vectors.exhaustive(module, start, stop) if every else vectors.structured(module, stop - start, generator)
        )
        count, example = compare(module, netlist, inputs, generator)
        wrong += count
        first = first or example
    tried, missed, never, runs = 0, (), (), total
    if coverage and not wrong:

        def draw(lanes: int) -> Inputs | None:
            """Vectors on which the netlist is right: one that is wrong shows nothing of its faults."""
            nonlocal wrong, first, runs
            if all_faults:
                return vectors.exhaustive(module, 0, total)
            inputs = vectors.structured(module, lanes, generator)
            runs += 0 if every else lanes  # of all operands none is new
            for start in range(0, lanes, batch):
                some = {name: values[:, start : start + batch] for name, values in inputs.items()}
                count, example = compare(module, netlist, some, generator)
                wrong += count
                first = first or example
            return None if wrong else inputs

        all_faults = every and total <= max(faults.ROUNDS)
        rounds = (total,) if all_faults else faults.ROUNDS
        tried, missed, never = faults.cover(module, netlist, draw, generator, rounds, COVERAGE)
    return Verification(module.title, runs * module.steps, every, wrong, first, tried, missed, tool, never)


def compare(
    module: Module, netlist: Netlist, inputs: Inputs, generator: np.random.Generator
) -> tuple[int, Counterexample | None]:
    """How many runs differ, and the first counterexample."""
    words = packed(module, inputs)
    lanes = inputs[module.inputs[0].name].shape[1]
    got = unpacked(module, netlist.run(words, first_states(module, netlist, inputs, generator)), lanes)
    wrong = np.zeros(lanes, bool)
    first: tuple[int, int, str, Any, Any] | None = None
    for name, expected in module.letter(inputs).items():
        at, mask = list(expected.at), expected.looked_at(module.port(name))
        seen = got[name][at]
        if seen.shape != expected.values.shape:
            shapes = f"{list(expected.values.shape)}, the netlist {list(seen.shape)}"
            raise RecoupError(f"{module.name}: expected {name!r} has shape {shapes}")
        different = seen != expected.values
        different = (different.reshape(*different.shape[:2], -1) & mask[:, None]).any(axis=2)
        if different.any():
            step, lane = (int(i) for i in np.argwhere(different)[0])
            if first is None or at[step] < first[0]:
                values = (_plain(found[step, lane], mask[step]) for found in (expected.values, seen))
                first = (at[step], lane, name, *values)
            wrong |= different.any(axis=0)
    if first is None:
        return 0, None
    step, lane, name, expected_value, got_value = first
    operands = {port: values[: step + 1, lane].tolist() for port, values in inputs.items()}
    return int(wrong.sum()), Counterexample(name, step, operands, expected_value, got_value)


def _plain(value: Any, mask: np.ndarray) -> Any:
    """A port's patterns as Python integers; None where a part is not looked at."""
    found = value.tolist() if hasattr(value, "tolist") else value
    return [v if m else None for v, m in zip(found, mask, strict=True)] if isinstance(found, list) else found
