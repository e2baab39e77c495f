"""Which form computes what: the fast one where it is exact, the wide one elsewhere."""

import math

import pytest
import torch

from recoup.formats import Float, Int
from recoup.lba import LBA
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
        (LBA.hopper(), Wide),
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
