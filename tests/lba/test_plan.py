"""Which form computes what: the fast one where it is exact, the wide one elsewhere."""

import math

import pytest
import torch

from recoup import lba
from recoup.formats import Float, Int
from recoup.lba import LBA, reference
from recoup.lba.cpu import Cpu
from recoup.lba.emit_integer import Whole
from recoup.lba.emit_narrow import Narrow
from recoup.lba.emit_wide import Wide
from recoup.lba.plan import Extent, plan

ONE = Extent(1.0, 0, 0)


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (LBA(), Narrow),
        (LBA(product=None), Narrow),
        (LBA(underflow=False), Narrow),
        (LBA.m10e5(), Narrow),
        (LBA.fp32(), Wide),
        (LBA.sequential14(), Wide),
        (LBA(accumulator=Float.lba(4, 7, 10, rounding="nearest")), Wide),
        (LBA(accumulator=Float(7, -10, 5, subnormals=True, rounding="zero")), Wide),
        (LBA.int16(), Wide),
    ],
    ids=repr,
)
@pytest.mark.parametrize("fma", [True, False])
def test_forms(config, form, fma):
    chosen = plan(ONE, ONE, math.inf, config, fma)
    if not fma and config.product is None:
        form = Wide  # a product and a sum that round once
    assert isinstance(chosen.form, form)


def test_whole_numbers_count_in_float32():
    assert isinstance(plan(ONE, ONE, math.inf, LBA.int16(), True, whole=True).form, Whole)
    for other in (LBA.int16("wrap"), LBA(None, Int(32), None), LBA(None, Int(12), None, scale=0.5)):
        assert isinstance(plan(ONE, ONE, math.inf, other, True, whole=True).form, Wide)


def test_limits_that_nothing_reaches_are_left_out():
    small = plan(ONE, ONE, 16.0, LBA(), True)
    assert isinstance(small.form, Narrow)
    assert not small.form.limit_product
    assert not small.form.limit_sum
    large = plan(Extent(16.0, 4, 0), ONE, 64.0, LBA(), True)
    assert isinstance(large.form, Narrow)
    assert large.form.limit_product
    assert large.form.limit_sum


def test_extremes_leave_float32():
    tiny, huge = Extent(2.0**-149, -149, -149), Extent(2.0**127, 127, 127)
    assert isinstance(plan(tiny, huge, math.inf, LBA(), True).form, Wide)
    assert isinstance(plan(tiny, tiny, math.inf, LBA(), True).form, Wide)


def test_subnormals_that_are_zero_to_the_unit_stay_in_float32():
    some = Extent(1.0, 0, -140)
    for a, b in ((some, ONE), (ONE, some), (some, some)):
        chosen = plan(a, b, math.inf, LBA(), True)
        assert isinstance(chosen.form, Narrow)
        assert chosen.a_least == (2.0**-13 if a is some else 0.0)
        assert chosen.b_least == (2.0**-13 if b is some else 0.0)
    for config in (LBA(underflow=False), LBA(product=None), LBA(product=Float(7, -130, 3, False, "zero"))):
        assert isinstance(plan(some, ONE, math.inf, config, True).form, Wide)
    x, w = torch.randn(9, 40), torch.randn(40, 9)
    x[0, ::3], w[::2, 1] = 2.0**-140, -(2.0**-149)
    assert torch.equal(lba.matmul(x, w, LBA()), reference.matmul(x, w, LBA()))


SINGLE = Float.parse("float32")
NEAREST = Float.lba(8, 23, bias=128, rounding="nearest")


@pytest.mark.parametrize(
    ("config", "rounding"),
    [
        (LBA.fp32(), "nearest"),
        (LBA(NEAREST, NEAREST), "nearest"),
        (LBA(SINGLE, SINGLE, 16, promotion=SINGLE), "nearest"),
        (LBA(NEAREST.replace(mantissa=7), NEAREST.replace(mantissa=9)), "nearest"),
        (LBA(NEAREST, NEAREST.replace(mantissa=7)), "odd"),  # ties of the sum among the products
        (LBA(SINGLE, SINGLE, 16, promotion=SINGLE.replace(mantissa=22)), "odd"),
        (LBA(SINGLE, Float.lba(4, 23, bias=10, rounding="nearest")), "odd"),  # products far below the smallest normal
        (LBA(SINGLE, Float.lba(4, 23, bias=10, rounding="nearest"), underflow=False), "nearest"),
        (LBA.fp32(gradient="recursive_of"), "odd"),
        (LBA.fp32(product=None), "odd"),
    ],
    ids=repr,
)
def test_where_the_processors_own_rounding_does(config, rounding):
    form = plan(ONE, ONE, math.inf, config, True).form
    assert isinstance(form, Wide)
    assert form.rounding == rounding


def test_extents_come_from_bits():
    x = torch.tensor([[0.0, -3.0, 2.0**-140], [1.5, -0.0, 0.25]])
    for view in (x, x.t(), x[:, ::2], torch.zeros(3), torch.tensor([math.inf, 1.0])):
        sizes = view.abs()
        found = Cpu().extent(view)
        assert found.finite == bool(sizes.isfinite().all())
        if found.finite and sizes.any():
            assert found.largest == float(sizes.max())
            low = float(sizes[sizes > 0].min())
            assert (found.high, found.low) == tuple(math.frexp(v)[1] - 1 for v in (found.largest, low))
