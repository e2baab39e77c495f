"""Small products, and large operands in blocks: the bits of any other way, and errors where there were errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup import lba
from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.lba import LBA, cpu, driver, reference, small
from tests.lba.strategies import operands, truncating
from tests.lba.test_cpu import STOCHASTIC, UNITS

FLOATS = [config for config in UNITS if not isinstance(config.accumulator, Int)]


@settings(max_examples=60)
@given(st.data())
def test_small_products_equal_the_driver(data):
    config = data.draw(truncating())
    a, b = data.draw(operands(config))
    b = b.t().contiguous().t() if data.draw(st.booleans()) else b
    found = small.matmul(a, b, config.code)
    expected = driver.matmul(cpu.Cpu(), a[None], b[None], config)[0]
    assert found is None or torch.equal(found, expected)
    assert torch.equal(lba.matmul(a, b, config), expected)


@pytest.mark.parametrize("config", UNITS, ids=repr)
def test_what_is_small(config):
    a, b = torch.ones(5, 40), torch.ones(40, 33)
    simple = not isinstance(config.accumulator, Int) and not config.stochastic
    assert (small.matmul(a, b, config.code) is not None) == simple
    assert small.matmul(a, b * torch.inf, config.code) is None
    assert small.matmul(a, b * torch.nan, config.code) is None
    assert small.matmul(a, b * 0, config.code) is None
    assert small.matmul(a, b * 2.0**-140, config.code) is None
    assert small.matmul(a.t().contiguous().t(), b, config.code) is None
    assert small.matmul(a, b[:, ::2], config.code) is None
    assert small.matmul(torch.ones(300, 300), torch.ones(300, 300), config.code) is None


def test_operands_are_read_at_every_call():
    a, b = torch.rand(4, 20), torch.rand(20, 32)
    before = lba.matmul(a, b, LBA())
    b.data.mul_(0.5)
    assert torch.equal(lba.matmul(a, b, LBA()), reference.matmul(a, b, LBA()))
    assert not torch.equal(lba.matmul(a, b, LBA()), before)
    b.data[3, 4] = torch.nan
    with pytest.raises(RecoupError, match=r"^lba\.matmul: operand b \[1, 20, 32\] holds 1 NaN or infinite values"):
        lba.matmul(a, b, LBA())


SHAPES = [((70, 40), (40, 3), False), ((70, 40), (40, 17), True), ((3, 40), (40, 90), True), ((2, 40), (40, 90), False)]


@pytest.mark.parametrize("config", [*FLOATS, STOCHASTIC.replace(chunk=None)], ids=repr)
@pytest.mark.parametrize(("left", "right", "in_columns"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_of_a_large_operand(config, left, right, in_columns, threads, monkeypatch):
    """Magnitudes differ from block to block, and with them the plans."""
    monkeypatch.setattr(cpu.Cpu, "resident", 2800)
    monkeypatch.setattr(driver, "MINIMUM_WORK", 1)
    generator = torch.Generator().manual_seed(left[0])
    a, b = torch.randn(left, generator=generator), torch.randn(right, generator=generator)
    if left[0] > right[1]:
        a *= 2.0 ** torch.linspace(-20, 10, left[0])[:, None].round()
    else:
        b *= 2.0 ** torch.linspace(-20, 10, right[1]).round()
    b = b.t().contiguous().t() if in_columns else b
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = driver.in_blocks(cpu.Cpu(), a[None], b[None], config, 5)
    finally:
        torch.set_num_threads(before)
    assert (found is None) == (left[0] < right[1] and not in_columns)
    assert found is None or torch.equal(found[0], reference.matmul(a, b, config, 5))


def test_blocks_leave_to_others_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(cpu.Cpu, "resident", 2800)
    a, b = torch.ones(1, 70, 40), torch.ones(1, 40, 3)
    a[0, 60, 5] = torch.inf
    assert driver.in_blocks(cpu.Cpu(), a, b, LBA(), 0) is None
    with pytest.raises(RecoupError, match=r"operand a \[1, 70, 40\] holds 1 NaN or infinite values"):
        driver.matmul(cpu.Cpu(), a, b, LBA())
    y = driver.matmul(cpu.Cpu(), a, b, LBA(nonfinite="propagate"))
    assert y.isnan().any(2)[0].nonzero().tolist() == [[60]]
    assert driver.in_blocks(cpu.Cpu(), torch.ones(1, 70, 40), b * torch.nan, LBA(), 0) is None
