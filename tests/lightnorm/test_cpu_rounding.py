"""Float64 to a format as kernels round it, against the formats' reference: all kinds of formats, edges and any bits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numba import njit

from recoup.formats import Float
from recoup.formats import reference as formats
from recoup.lightnorm.cpu_rounding import GENERAL, NONE, TRUNCATE, Rounding, rounded, rounding_of

FORMATS = {
    "1-5-4": Float.parse("fp10_154"),
    "1-6-3": Float.parse("fp10_163"),
    "1-5-12": Float.ieee(5, 12, subnormals=False, rounding="zero"),
    "incomplete": Float.parse("fp10_154").replace(largest=40960.0),
    "nearest": Float.parse("bfloat16"),
    "nearest, flush": Float.parse("fp10_154").replace(rounding="nearest"),
    "zero, subnormals": Float.ieee(5, 4, rounding="zero", overflow="saturate"),
    "float32": Float.parse("float32"),
}


@njit
def rounded_array(values, numbers):
    rounding, out = Rounding(*numbers), np.empty_like(values)
    for i in range(values.size):
        out[i] = rounded(values[i], rounding)
    return out


def check(values, form):
    values = np.array(values, np.float64)
    found = torch.from_numpy(rounded_array(values, tuple(rounding_of(form))))
    expected = torch.from_numpy(values) if form is None else formats.quantize(torch.from_numpy(values), form)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan], expected[~nan])
    assert torch.equal(found[~nan].signbit(), expected[~nan].signbit())


@pytest.mark.parametrize("name", FORMATS)
def test_between_and_on_all_values(name):
    """Every value of a small format (of a large one the first and last), its neighbours, and the ties between."""
    form = FORMATS[name]
    all_or_ends = form.values() if form.bits <= 12 else [form.smallest_normal, form.largest_value]
    values = torch.tensor(sorted({v for v in all_or_ends if v > 0}), dtype=torch.float64)
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, ties, values[:1] / 2, values[-1:] * 2])
    near = torch.cat([near, near.nextafter(near * 2), near.nextafter(near * 0)])
    check([*near.tolist(), *(-near).tolist(), 0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7e308], form)


@given(st.lists(st.floats(width=64), min_size=1, max_size=50), st.sampled_from([None, *FORMATS.values()]))
@example([65504.0, -65504.0, 2.0**-14 - 2.0**-40], FORMATS["1-5-4"])
def test_any_number(values, form):
    check(values, form)


def test_modes():
    assert rounding_of(None).mode == NONE
    assert {name: rounding_of(form).mode for name, form in FORMATS.items()} == {
        **dict.fromkeys(("1-5-4", "1-6-3", "1-5-12", "incomplete"), TRUNCATE),
        **dict.fromkeys(("nearest", "nearest, flush", "zero, subnormals", "float32"), GENERAL),
    }
