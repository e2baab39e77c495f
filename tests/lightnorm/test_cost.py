import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recoup import emulate_, restore_
from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.lightnorm import LightNorm
from recoup.lightnorm.cost import Operations, Widths, block_bits, traffic, widths
from tests.networks import images, small_net

BLOCKS = (4, 8, 16, 32, 64)


def counted(config: LightNorm, channels: int) -> float:
    """Bits an element moves, block by block and access by access: an independent count."""

    def place(form: Float | None, usual: int, exponent: int) -> int:
        """Bits of all channels at one place."""
        if config.block is None:
            return channels * (32 if form is None else 1 + (form.bits - 1))
        significand = usual if form is None else form.mantissa + 1
        bits = 0
        for _ in range(0, channels, config.block):
            bits += exponent
            if config.shared == "outlier":
                bits += exponent + math.ceil(math.log2(config.block))
                bits += 24 - significand if form is None else 0
        return bits + channels * (1 + significand)

    y = place(config.forward, 5, 8 if config.forward is None else 5)
    g = place(config.backward, 4, 8 if config.backward is None else 6)
    accesses = [y, y, y, g, y, g, g]  # x, x, y; dy, x, dy, dx
    return sum(accesses) / channels


@given(
    st.sampled_from((None, *BLOCKS, 1, 3)),
    st.sampled_from(("outlier", "max")),
    st.booleans(),
    st.booleans(),
    st.integers(1, 70),
)
def test_bits_against_a_count(block, shared, forward, backward, channels):
    config = LightNorm(block=block, shared=shared)
    config = config.replace(forward=config.forward if forward else None, backward=config.backward if backward else None)
    # the mean width is a quotient in float64; a count in another order rounds its last bit otherwise
    assert widths(config, channels).blocks == pytest.approx(counted(config, channels), rel=1e-15)


@pytest.mark.parametrize(
    ("block", "forward", "backward"),
    [(4, 7.25, 6.5), (8, 6.625, 5.75), (16, 6.3125, 5.375), (32, 6.15625, 5.1875)],
)
def test_published_storage(block, forward, backward):
    config = LightNorm(block=block, shared="max")
    assert block_bits(config.forward_blocks, config.forward) == forward
    assert block_bits(config.backward_blocks, config.backward) == backward


def test_the_specifications_figures():
    assert widths(LightNorm(shared="max")) == Widths(288, 224, 70, 48.5)
    assert widths(LightNorm()).blocks == 4 * 9 + 3 * 8.5  # the outlier rule: another exponent and two bits of index
    assert widths(LightNorm.fp10()) == Widths(288, 224, 70, 70)
    assert widths(LightNorm.range()) == Widths(288, 224, 224, 224)
    assert widths(LightNorm.range(), single_pass=True).conventional == 256
    assert widths(None) == Widths(288, 288, 288, 288)


def test_shares_of_the_saving():
    shares = widths(LightNorm(shared="max")).shares
    assert shares == {"range": 64 / 239.5, "format": 154 / 239.5, "blocks": 21.5 / 239.5}
    assert widths(None).shares == {"range": 0.0, "format": 0.0, "blocks": 0.0}
    assert widths(LightNorm(block=1)).shares["blocks"] < 0  # an exponent for every element costs more than FP10


def test_a_network_layer_by_layer():
    model, x = small_net(), images(3)
    plain = traffic(model, x)
    assert [row.name for row in plain.layers] == ["block1.bn1", "block1.bn2", "block2.bn1", "block2.bn2"]
    assert [(row.channels, row.elements) for row in plain.layers] == [(12, 576), (12, 576), (20, 960), (20, 960)]
    assert plain.ratio == 1
    assert plain.bits.conventional == plain.bits.blocks == 288 * 3072
    asked = traffic(model, x, LightNorm())
    emulate_(model, LightNorm())
    assert traffic(model, x) == asked == traffic(model, x, LightNorm.range())  # its own config wins
    assert asked.bits == Widths(288 * 3072, 224 * 3072, 70 * 3072, int(61.5 * 3072))
    assert asked.ratio == 288 / 61.5
    assert all(isinstance(value, int) for row in asked.layers for value in (row.conventional, row.blocks))
    restore_(model)
    assert traffic(model, x) == plain
    assert all(not module._forward_hooks for module in model.modules())


def test_ragged_blocks_pay_for_their_exponent_whole():
    model = nn.Sequential(nn.BatchNorm1d(5))
    rows = traffic(model, torch.zeros(2, 5), LightNorm(shared="max")).layers
    assert rows[0].blocks == 2 * (4 * (5 * 6 + 2 * 5) + 3 * (5 * 5 + 2 * 6))


def test_some_layers_converted_and_calls_counted():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, norm, nn.BatchNorm2d(4))
    emulate_(model, LightNorm.fp10(), {"2": None})
    made = traffic(model, torch.zeros(1, 4, 2, 2))
    assert [(row.emulated, row.blocks) for row in made.layers] == [(True, 1120), (True, 1120), (False, 4608)]
    assert made.to_dict()["bits"]["blocks"] == 2 * 1120 + 4608
    assert made.operations == Operations(2 * 48 + 80, 2 * 32 + 48, 2 * 32, 2 * 4 + 3 * 4, 4)
    assert made.conventional_operations == Operations(3 * 80, 3 * 48, 0, 36, 12)


def test_errors():
    with pytest.raises(RecoupError, match="ran no BatchNorm1d"):
        traffic(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    with pytest.raises(RecoupError, match="must be a LightNorm or None"):
        traffic(small_net(), images(1), "lightnorm")  # type: ignore[arg-type]
    with pytest.raises(RecoupError, match="1 channel or more"):
        widths(LightNorm(), 0)
