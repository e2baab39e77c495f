"""The ends of magnitudes against NumPy, over layouts, lengths and the edges of float32."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recoup.kernels.magnitudes import LANES, magnitudes

EDGES = (0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))


def expected(x: torch.Tensor) -> tuple[int, int]:
    bits = x.contiguous().numpy().view(np.uint32).ravel() & 0x7FFFFFFF
    return int(bits.max(initial=0)), int(bits[bits > 0].min(initial=0xFFFFFFFF)) if bits.any() else 0


@given(st.lists(st.floats(width=32) | st.sampled_from(EDGES), max_size=3 * LANES))
def test_lists_of_any_length(values):
    x = torch.tensor(values, dtype=torch.float32)
    assert magnitudes(x) == expected(x)


@pytest.mark.parametrize("place", [0, 1, LANES - 1, LANES, 2 * LANES - 1, 2 * LANES, 2 * LANES + 5])
@pytest.mark.parametrize("value", EDGES)
def test_every_lane_and_the_rest_count(place, value):
    x = torch.full((2 * LANES + 6,), 1.5)
    x[place] = value
    assert magnitudes(x) == expected(x)


def test_layouts():
    x = torch.randn(3, 40, 50)
    for view in (x, x.mT, x[:, ::3], x[..., 1:7], x.permute(2, 0, 1), x[0, 0, :0], torch.zeros(70)):
        assert magnitudes(view) == expected(view)
    assert magnitudes(torch.zeros(70)) == (0, 0)
