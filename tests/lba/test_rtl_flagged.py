"""Units that take products with a flag of zero: equal to fractions for every pair. A sum's leading bit is constant
exactly where a sum that cancels is flushed; one binade further it would be wrong."""

from fractions import Fraction
from itertools import product as pairs
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("amaranth")

from recoup.formats import Float, Int, decode, encode
from recoup.gates import flagged
from recoup.gates.flagged import flushes_nothing
from recoup.lba import LBA
from recoup.lba.rtl import build
from recoup.lba.rtl_operations import adder, multiplier
from recoup.silicon import Measured
from tests.lba.exact import quantise
from tests.tiers import slow_but

M4E3 = Float.lba(3, 4, bias=3)
NEAREST = {"rounding": "nearest"}


def flushing(mantissa, low, high, **options):
    """A format without subnormals, whose zero is told by its exponent field."""
    return Float(mantissa, low, high, **{"subnormals": False, "rounding": "zero", **options})


def values_of(form):
    """Every value of a format without subnormals, zero once."""
    binades = range(form.min_exponent, form.max_exponent + 1)
    sizes = [2.0**e * (1 + f / 2**form.mantissa) for e, f in pairs(binades, range(2**form.mantissa))]
    sizes = [size for size in sizes if size <= form.largest_value]
    return sorted([0.0, *sizes, *(-size for size in sizes)])


def shown(module, forms, result):
    """What the netlist shows for every pair of values, by pair."""
    grid = list(pairs(*(values_of(form) for form in forms)))
    columns = torch.tensor(grid, dtype=torch.float64).T
    names = [port.name for port in module.inputs]
    inputs = {n: encode(v, f).numpy().astype(np.uint64)[None] for n, v, f in zip(names, columns, forms, strict=True)}
    (found,) = Measured.of(module).simulate(inputs).values()
    return dict(zip(grid, decode(torch.from_numpy(found[0].astype(np.int64)), result).tolist(), strict=True))


def constant(module):
    """Whether the sum's leading bit is constant, of the last adder; None: there is no flag of zero."""
    asked = []

    def recorded(*given):
        asked.append(flushes_nothing(*given))
        return asked[-1]

    with patch.object(flagged, "flushes_nothing", recorded):
        module.rtlil()
    return asked[-1] if asked else None


# terms, sums, what the sum is rounded to; their leading bits are constant
SUMS = {
    "flags, truncated": (Float.lba(2, 2, 1),) * 3,
    "flags, nearest": (Float.lba(2, 3, 1, **NEAREST),) * 3,
    "terms higher": (Float.lba(2, 2, -1), Float.lba(2, 2, 2), Float.lba(2, 2, 2)),
    "terms lower": (Float.lba(2, 2, 5), Float.lba(2, 3, 2), Float.lba(2, 3, 2)),
    "terms wider": (Float.lba(2, 4, 2), Float.lba(2, 2, 1), Float.lba(2, 2, 1)),
    "terms far lower, nearest": (Float.lba(2, 2, 7, **NEAREST), Float.lba(2, 2, 1), Float.lba(2, 2, 1, **NEAREST)),
    "zero told by the exponent": (Float.lba(2, 2, 1), *(flushing(2, -1, 2, **NEAREST),) * 2),
    "incomplete top binade": (flushing(2, -2, 1), *(flushing(2, -2, 1, largest=3.0),) * 2),
    "the last that is flushed": (flushing(2, 0, 5),) * 3,
    "no binade in common": (Float.lba(2, 2, 4), Float.lba(2, 2, -2), Float.lba(3, 2, 4)),
}


# where the sums' own bits tell whether they are zero
BEYOND = {
    "a binade further": (flushing(2, 0, 6),) * 3,
    "many binades, nearest": (Float.lba(3, 2, 4), *(Float.lba(3, 2, 3, **NEAREST),) * 2),
    "terms wider and higher": (Float.lba(3, 3, 1), *(Float.lba(3, 2, 3),) * 2),
}


@pytest.mark.parametrize("name", SUMS | BEYOND)
def test_every_sum_is_the_one_in_fractions(name):
    one, other, total = (SUMS | BEYOND)[name]
    module = adder(one, other, total)
    assert constant(module) == (name not in BEYOND)
    found = shown(module, (one, other), total)
    assert len(found) > 200
    for (x, y), value in found.items():
        assert value == quantise(Fraction(x) + Fraction(y), total, True), (x, y)


# operands, product, sums
M2E2 = Float.lba(2, 2, 1)
PRODUCTS = {
    "all reached": (M2E2, Float.lba(2, 3, 1), Float.lba(3, 4, 3), Float.lba(2, 4, 1)),
    "nearest": (Float.lba(3, 3, 3), Float.lba(2, 1, 0), Float.lba(4, 3, 12, **NEAREST), Float.lba(2, 3, 0)),
    "flushed and saturated": (M2E2, M2E2, Float.lba(2, 2, 0), Float.lba(2, 2, 0)),
    "all saturate": (Float.lba(2, 2, -3), Float.lba(2, 2, -3), M2E2, M2E2),
    "all saturate, below the sums": (Float.lba(2, 2, -3), Float.lba(2, 2, -3), M2E2, Float.lba(2, 2, -5)),
    "wider than exact": (Float.lba(2, 1, 1), Float.lba(2, 1, 1), Float.lba(3, 6, 3), Float.lba(2, 6, 1)),
    "incomplete top binade": (M2E2, M2E2, flushing(2, -2, 2, largest=5.0), M2E2),
    "saturated at no power of two": (M2E2, M2E2, flushing(2, -9, 1), M2E2),
    "operands without a flag": (flushing(2, -1, 2), M2E2, flushing(2, -3, 4, **NEAREST), M2E2),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_the_one_in_fractions(name):
    x, w, form, total = PRODUCTS[name]
    module = multiplier(x, w, form, total)
    assert "product_zero" in module.rtlil()
    found = shown(module, (x, w), form)
    assert any(not a or not b for a, b in found)
    for (a, b), value in found.items():
        assert value == quantise(Fraction(a) * Fraction(b), form, True), (a, b)


def test_one_binade_further_what_cancels_there_would_not_be_zero(monkeypatch):
    """The condition is exact: with 2 + 1 bits, a guard bit and the carry, seven leading zeros are counted of zero."""
    assert flushes_nothing(5, 3, False, 0)
    assert not flushes_nothing(6, 3, False, 0)
    monkeypatch.setattr(flagged, "flushes_nothing", lambda *_: True)
    form = flushing(2, 0, 6)
    found = shown(adder(form, form, form), (form, form), form)
    wrong = {(x, y) for (x, y), v in found.items() if v != quantise(Fraction(x) + Fraction(y), form, True)}
    assert wrong == {(x, -x) for x in values_of(form) if abs(x) >= 64}


@pytest.mark.parametrize("name", ["flags, truncated", "many binades, nearest"])
def test_a_term_of_zero_that_is_not_shifted_out_is_caught(monkeypatch, name):
    """By clearing it, where the distance is too short, and by bits of the distance."""
    one, other, total = (SUMS | BEYOND)[name]
    module, shifted_out = adder(one, other, total), flagged._shifted_out
    monkeypatch.setattr(flagged, "_shifted_out", lambda m, v, d, gone, n: shifted_out(m, v, d, gone & False, n))
    found = shown(module, (one, other), total)
    wrong = {(x, y) for (x, y), v in found.items() if v != quantise(Fraction(x) + Fraction(y), total, True)}
    assert wrong
    assert all(not x or not y for x, y in wrong)


def test_both_ways_of_shifting_out_and_of_saturating_are_there():
    texts = {name: adder(*forms).rtlil() for name, forms in (SUMS | BEYOND).items()}
    assert {"_aligned_far" in text for text in texts.values()} == {True, False}
    texts = {name: multiplier(*forms).rtlil() for name, forms in PRODUCTS.items()}
    assert {"rounded_clamped" in text for text in texts.values()} == {True, False}


# config, operands, whether a sum that cancels is always flushed; None: products have no flag of zero
UNITS = {
    "M7E4": (LBA(chunk=None), M4E3, True),
    "M7E4, sums from 2^-11": (LBA(chunk=None, accumulator=Float.lba(4, 7, 11)), M4E3, False),
    "M7E4 nearest": (LBA(*(Float.lba(4, 7, bias, **NEAREST) for bias in (12, 10)), None), M4E3, True),
    "M7E4 fused": (LBA(product=None, chunk=None), M4E3, False),
    "fused, narrow": (LBA(product=None, accumulator=Float.lba(2, 5, 2), chunk=None), Float.lba(2, 2, 2), True),
    "M10E5": (LBA.m10e5(chunk=None), M4E3, False),
    "fp32": (LBA(None, Float.ieee(8, 23, subnormals=False, rounding="nearest"), None), M4E3, False),
    "fp16": (LBA(None, Float.ieee(5, 10, subnormals=False), None), M4E3, False),
    "M7E4, one adder": (LBA(), M4E3, False),
    "operands with subnormals": (LBA(chunk=None), Float.parse("e4m3fn"), None),
    "integers": (LBA(chunk=None), Int(4), None),
    "operands without a fraction": (LBA(chunk=None), Float.lba(3, 0, 3), None),
    "products with subnormals": (LBA(Float(2, -1, 2), Float.lba(2, 2, 1), None), Float.lba(2, 2, 1), None),
    "sums with subnormals": (LBA(Float.lba(2, 2, 1), Float(2, -1, 2), None), Float.lba(2, 2, 1), None),
    "sums of integers": (LBA(None, Int(12), None, scale=2.0**-6), Float.lba(2, 2, 1), None),
    "exponents that no product has": (LBA(Float.lba(3, 1, 0), Float.lba(2, 1, 0), None), Float.lba(1, 1, 0), False),
    "products below all sums": (LBA(M2E2, Float.lba(2, 2, -5), None), Float.lba(2, 2, -3), True),
    "sums that are never flushed": (LBA(None, Float.lba(2, 3, 2), None), Float.lba(1, 1, 0), False),
    "sums that may be": (LBA(None, Float.lba(2, 3, 1), None), Float.lba(1, 1, 0), True),
}
QUICK = ["M7E4", "M7E4, sums from 2^-11", "fused, narrow", "exponents that no product has"]


@pytest.mark.parametrize("name", UNITS)
def test_which_units_have_it(name):
    config, operands, wanted = UNITS[name]
    assert constant(build(config, operands=operands)) == wanted


@pytest.mark.parametrize("name", slow_but(QUICK, UNITS))
def test_on_both_sides_of_the_condition_units_equal_the_emulation(name):
    config, operands, _ = UNITS[name]
    found = Measured.of(build(config, operands=operands)).verify(4096, coverage=False)
    assert not found.mismatches, found


@st.composite
def units(draw):
    """A config and operands with few binades, most of whose sums are flushed where they cancel; its outer adder."""
    rounding = st.sampled_from(("zero", "nearest"))

    def form(exponent):
        return Float.lba(exponent, draw(st.integers(1, 6)), draw(st.integers(0, 4)), rounding=draw(rounding))

    x, w = form(draw(st.integers(1, 3))), form(draw(st.integers(1, 3)))
    product = draw(st.booleans()) and form(draw(st.integers(2, 4)))
    chunk = draw(st.sampled_from((None, 4)))
    outer = draw(st.sampled_from(("shared", "own"))) if chunk else None
    return LBA(product or None, form(draw(st.integers(2, 3))), chunk), (x, w), outer


@pytest.mark.slow
@settings(max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(units())
def test_any_such_unit_equals_the_emulation(drawn):
    config, operands, outer = drawn
    found = Measured.of(build(config, operands=operands, outer=outer)).verify(4096, coverage=False)
    assert not found.mismatches, found
