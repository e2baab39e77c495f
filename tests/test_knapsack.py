"""The knapsack equals brute force over all choices and units, and says nothing on the C standard error."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.knapsack import Quantity, choose

VALUES = st.integers(0, 9).map(lambda value: value / 4)  # exact in binary: sums do not round


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    names = draw(st.lists(st.sampled_from("abc"), unique=True, max_size=3))

    def quantity():
        each = [[draw(VALUES) for _ in range(size)] for size in sizes]
        return Quantity(each, {name: draw(VALUES) for name in names if draw(st.booleans())}, draw(VALUES))

    limits = [(quantity(), draw(st.integers(0, 30)) / 4) for _ in range(draw(st.integers(0, 2)))]
    needs = st.frozensets(st.sampled_from(names), max_size=2) if names else st.just(frozenset())
    runs_on = [[draw(needs) for _ in range(size)] for size in sizes]
    return quantity(), limits, runs_on, draw(st.none() | st.integers(0, 3))


def brute_force(objective, limits, runs_on, most):
    """The least objective over every choice and every set of units; None where there is none."""
    names = sorted({unit for row in runs_on for units in row for unit in units})
    best = math.inf
    for options in itertools.product(*(range(len(row)) for row in objective.each)):
        for count in range(len(names) + 1 if most is None else min(most, len(names)) + 1):
            for units in itertools.combinations(names, count):
                needs = [row[option] for row, option in zip(runs_on, options, strict=True)]
                able = all(not need or need & set(units) for need in needs)
                if able and all(quantity.of(options, units) <= bound for quantity, bound in limits):
                    best = min(best, objective.of(options, units))
    return None if best == math.inf else best


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_equals_brute_force(problem):
    objective, limits, runs_on, most = problem
    found = choose(objective, limits, runs_on=runs_on, most_units=most)
    assert (None if found is None else found.value) == brute_force(objective, limits, runs_on, most)
    if found is not None:
        assert objective.of(found.options, found.units) == found.value
        assert all(quantity.of(found.options, found.units) <= bound for quantity, bound in limits)
        chosen = [row[option] for row, option in zip(runs_on, found.options, strict=True)]
        assert all(not need or need & set(found.units) for need in chosen)
        assert most is None or len(found.units) <= most


def test_small_differences_decide():
    """HiGHS's own gaps (1e-4 relative, 1e-6 absolute) would take either."""
    damage = Quantity([[1e-6, 1.00001e-6], [3e-2, 3.0000001e-2]])
    assert choose(damage).options == (0, 0)
    swapped = Quantity([row[::-1] for row in damage.each])
    assert choose(swapped).options == (1, 1)


def test_a_limit_holds_exactly():
    """A choice that breaks it by less than the solver's tolerance is not taken."""
    cycles = Quantity([[1_000_000_000, 1_000_000_001]])
    assert choose(Quantity([[1.0, 0.0]]), [(cycles, 1_000_000_001)]).options == (1,)
    sums = Quantity([[1.0, 1.0 + 1e-8]])
    assert choose(Quantity([[1.0, 0.0]]), [(sums, 1.0)]).options == (0,)
    assert choose(Quantity([[1.0]]), [(sums.__class__([[2.0]]), 1.0)]) is None


def test_a_unit_is_paid_once_and_a_wider_one_runs_narrower_options():
    needs = [[{"four"}, {"four", "two"}]] * 3
    area = Quantity([[0, 0]] * 3, {"four": 30, "two": 20})
    speed = Quantity([[1, 2]] * 3)
    assert choose(speed, [(area, 30)], runs_on=needs).units == ("four",)
    assert choose(speed, [(area, 29)], runs_on=needs).options == (1, 1, 1)
    assert choose(speed, [(area, 19)], runs_on=needs) is None


def test_it_is_quiet(capfd):
    damage = Quantity([[((7 * g + 3 * o) % 11) / 10 for o in range(5)] for g in range(12)])
    cycles = Quantity([[(5 * g + 4 * o) % 13 + 1 for o in range(5)] for g in range(12)])
    for bound in range(20, 100, 10):
        choose(damage, [(cycles, bound)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("objective", "limits", "options", "told"),
    [
        (Quantity([]), [], {}, "a group or more"),
        (Quantity([[1.0], []]), [], {}, "an option or more"),
        (Quantity([[math.nan]]), [], {}, "finite"),
        (Quantity([[1.0]], {"u": math.inf}), [], {}, "finite"),
        (Quantity([[1.0]]), [(Quantity([[1.0, 2.0]]), 1)], {}, r"must have options \[1\]"),
        (Quantity([[1.0]]), [(Quantity([[1.0]]), math.nan)], {}, "NaN"),
        (Quantity([[1.0]]), [], {"runs_on": [[(), ()]]}, "runs_on"),
    ],
)
def test_bad_input(objective, limits, options, told):
    with pytest.raises(RecoupError, match=told):
        choose(objective, limits, **options)
