"""One option for every group, under limits: the multiple-choice knapsack, as a mixed-integer program for scipy's HiGHS.

Legend: g group, o option, u unit, l limit.
"""

import math
import os
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from recoup.errors import RecoupError

SCALE = 1e3  # of coefficients: HiGHS's tolerances (1e-6) are absolute
SLACK = 1e-9  # relative: sums of floats in another order may differ by this
CUTS = 100  # solutions that break a limit by less than HiGHS's tolerance, each forbidden in turn
STDERR = 2  # the file descriptor: HiGHS writes past sys.stderr
_silence = threading.Lock()


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is added up over a choice: of every group its option's share, and of every unit its price, once.

    Attributes:
        each: a number for each option of each group.
        units: price of a unit that any chosen option needs; a unit that is not here is free.
        rest: what is there whatever is chosen.
    """

    each: Sequence[Sequence[float]]
    units: Mapping[str, float] = field(default_factory=dict)
    rest: float = 0.0

    def of(self, options: Sequence[int], units: Collection[str] = ()) -> float:
        """Of a choice: the sum over groups, units and the rest."""
        parts = [row[option] for row, option in zip(self.each, options, strict=True)]
        return math.fsum([*parts, *(self.units.get(unit, 0.0) for unit in units), self.rest])


@dataclass(frozen=True, slots=True)
class Choice:
    """A solution: the number of each group's option, the units it takes, and the objective."""

    options: tuple[int, ...]
    units: tuple[str, ...]
    value: float


def choose(
    objective: Quantity,
    limits: Sequence[tuple[Quantity, float]] = (),
    *,
    runs_on: Sequence[Sequence[Collection[str]]] | None = None,
    most_units: int | None = None,
    seconds: float = 60.0,
) -> Choice | None:
    """The choice of one option a group with the least objective that keeps every limit.

        minimise    sum_go  c_go x_go + sum_u p_u y_u
        such that   sum_o   x_go = 1                                for every group
                    sum_go  a_lgo x_go + sum_u q_lu y_u <= b_l      for every limit
                    x_go <= sum of y_u over the units that run it   where an option needs one
                    sum_u   y_u <= most_units
                    x, y in {0, 1}

    A limit holds exactly (up to the rounding of the sum, 1e-9 of it), whatever the solver's own tolerance.

    Args:
        objective: what is made least.
        limits: quantities, and what each may be at most.
        runs_on: for each option of each group, the units any one of which runs it; an option that needs none has none.
        most_units: how many units there may be.
        seconds: after which the solver gives up.

    Returns:
        The choice; None if no choice keeps the limits.

    Raises:
        RecoupError: numbers that are not finite, groups or options that do not correspond, no answer in time.

    >>> damage = Quantity([[0.0, 0.1, 0.5], [0.0, 0.35, 0.4]])
    >>> cycles = Quantity([[8, 4, 2], [8, 4, 2]])
    >>> choose(damage, [(cycles, 10)]).options
    (0, 2)
    """
    sizes = [len(row) for row in objective.each]
    _check(sizes, [objective, *(quantity for quantity, _ in limits)], [bound for _, bound in limits], runs_on)
    program = _Program(sizes, runs_on, objective, limits, most_units)
    for _ in range(CUTS):
        found = program.solve(seconds)
        if found is None:
            return None
        options, units = found
        if all(_within(quantity.of(options, units), bound) for quantity, bound in limits):
            return Choice(options, units, objective.of(options, units))
        program.forbid(options)
    raise RecoupError(
        f"knapsack: {CUTS} choices break a limit by less than the solver can tell; move the limit a little"
    )


def _within(value: float, bound: float) -> bool:
    return value <= bound + SLACK * max(abs(bound), abs(value))


def _check(sizes: list[int], quantities: list[Quantity], bounds: list[float], runs_on: Any) -> None:
    if not sizes or not all(sizes):
        raise RecoupError("knapsack: there must be a group or more, each with an option or more")
    for quantity in quantities:
        if [len(row) for row in quantity.each] != sizes:
            raise RecoupError(f"knapsack: quantities must have options {sizes}; got {[len(r) for r in quantity.each]}")
        numbers = [*(value for row in quantity.each for value in row), *quantity.units.values(), quantity.rest]
        if not all(math.isfinite(value) for value in numbers):
            raise RecoupError("knapsack: every number must be finite")
    if any(math.isnan(bound) for bound in bounds):
        raise RecoupError("knapsack: a limit is NaN")
    if runs_on is not None and [len(row) for row in runs_on] != sizes:
        raise RecoupError(f"knapsack: runs_on must have options {sizes}; got {[len(row) for row in runs_on]}")


class _Program:
    """The rows and columns: options group by group, then units."""

    def __init__(
        self,
        sizes: list[int],
        runs_on: Sequence[Sequence[Collection[str]]] | None,
        objective: Quantity,
        limits: Sequence[tuple[Quantity, float]],
        most_units: int | None,
    ) -> None:
        self.sizes = sizes
        self.starts = [0, *np.cumsum(sizes).tolist()]
        needs = [units for row in runs_on or () for units in row]
        self.units = sorted({unit for units in needs for unit in units})
        place = {unit: self.starts[-1] + index for index, unit in enumerate(self.units)}
        self.columns = self.starts[-1] + len(self.units)
        self.costs = self._scaled(self._row(objective))[0]
        self.rows: list[tuple[np.ndarray, float, float]] = []
        for first, end in pairwise(self.starts):
            row = np.zeros(self.columns)
            row[first:end] = 1
            self.rows.append((row, 1, 1))
        for quantity, bound in limits:
            if bound < math.inf:
                row, scale = self._scaled(self._row(quantity))
                self.rows.append((row, -math.inf, (bound - quantity.rest) * scale))
        for column, units in enumerate(needs):
            if units:
                row = np.zeros(self.columns)
                row[column] = 1
                row[[place[unit] for unit in units]] = -1
                self.rows.append((row, -math.inf, 0))
        if most_units is not None:
            row = np.zeros(self.columns)
            row[self.starts[-1] :] = 1
            self.rows.append((row, -math.inf, most_units))

    def _row(self, quantity: Quantity) -> np.ndarray:
        prices = [quantity.units.get(unit, 0.0) for unit in self.units]
        return np.array([*(value for row in quantity.each for value in row), *prices], dtype=float)

    @staticmethod
    def _scaled(row: np.ndarray) -> tuple[np.ndarray, float]:
        scale = SCALE / (np.abs(row).max() or 1.0)
        return row * scale, scale

    def forbid(self, options: Sequence[int]) -> None:
        """A row that this choice breaks, and no other."""
        row = np.zeros(self.columns)
        row[[start + option for start, option in zip(self.starts, options, strict=False)]] = 1
        self.rows.append((row, -math.inf, len(options) - 1))

    def solve(self, seconds: float) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
        """Options and units of an optimum; None if there is no choice."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # takes a second to import

        matrix, low, high = (np.array(part) for part in zip(*self.rows, strict=True))
        with _quiet():
            result = milp(
                self.costs,
                integrality=np.ones(self.columns),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, low, high),  # type: ignore[arg-type]
                options={"mip_rel_gap": 0.0, "time_limit": seconds},
            )
        if result.status == 2:
            return None
        if result.status != 0 or result.x is None:
            raise RecoupError(f"knapsack: no answer in {seconds:g} s ({result.message})")
        parts = [result.x[first:end] for first, end in pairwise(self.starts)]
        units = result.x[self.starts[-1] :]
        return tuple(int(part.argmax()) for part in parts), tuple(
            unit for unit, taken in zip(self.units, units, strict=True) if taken > 0.5
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what HiGHS prints on the C standard error when it solves many programs; Python's own is flushed first."""
    with _silence:
        try:
            sys.stderr.flush()
            kept = os.dup(STDERR)
        except (OSError, ValueError, AttributeError):  # closed, or replaced: there is nothing to keep quiet
            yield
            return
        try:
            with open(os.devnull, "wb") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), STDERR)
            yield
        finally:
            os.dup2(kept, STDERR)
            os.close(kept)
