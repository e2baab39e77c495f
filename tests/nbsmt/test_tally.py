"""Which taps read which positions, and counting labels by it, against loops over every output position."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.nbsmt.tally import Axis, Taps, masked
from recoup.network.convolution import Geometry

axes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3))


def fits(size, kernel, stride, padding, dilation):
    return size + 2 * padding > dilation * (kernel - 1)


@settings(max_examples=100, deadline=None)
@given(axes)
def test_taps_of_every_position(arguments):
    size, kernel, stride, padding, dilation = arguments
    assume(fits(*arguments))
    axis = Axis.of(*arguments)
    outputs = range((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    assert axis.outputs == len(outputs)
    for position in range(size):
        read = [any(o * stride + tap * dilation - padding == position for o in outputs) for tap in range(kernel)]
        assert axis.serves[axis.kind[position]].bool().tolist() == read
    assert len(axis.serves) == len(set(axis.kind.tolist()))


@settings(max_examples=40, deadline=None)
@given(axes, axes, st.integers(0, 2**32 - 1))
def test_counts_equal_a_loop_over_outputs(rows, columns, seed):
    assume(fits(*rows) and fits(*columns))
    label = torch.randint(0, 3, (2, 2, rows[0], columns[0]), generator=torch.Generator().manual_seed(seed))
    geometry = Geometry(*((rows[i], columns[i]) for i in (1, 2, 3, 4)), 1)
    taps = Taps.of((rows[0], columns[0]), geometry)
    expected = torch.zeros(2, rows[1], columns[1], 3, dtype=torch.float64)
    for y in range(taps.rows.outputs):
        for x in range(taps.columns.outputs):
            for k in range(rows[1]):
                for m in range(columns[1]):
                    h, w = y * rows[2] + k * rows[4] - rows[3], x * columns[2] + m * columns[4] - columns[3]
                    if 0 <= h < rows[0] and 0 <= w < columns[0]:
                        for unit in range(2):
                            for image in range(2):
                                expected[unit, k, m, label[image, unit, h, w]] += 1
    assert torch.equal(taps.count(label.int().split(1), 2, 3, label.device), expected)


def test_a_label_is_the_partners_mask_and_the_own_class():
    classes_T1 = torch.tensor([[0], [2], [0], [1]])
    # Thread 0 has a non-zero partner at offsets 1 and 3, thread 1 at offset 2, thread 2 at 1 and 3, thread 3 at 2.
    assert masked(classes_T1, 0, 3, 0)[:, 0].tolist() == [0b101 * 3, 0b010 * 3 + 2, 0b101 * 3, 0b010 * 3 + 1]


def test_a_kernel_larger_than_its_input_is_refused():
    with pytest.raises(RecoupError, match="kernel of 3 with dilation 2 does not fit an input of 3 with padding 0"):
        Axis.of(3, 3, 1, 0, 2)
