"""Sums at the ends of the hardware's range, counted as one by one in Python."""

import math

import pytest
import torch

from recoup.network.saturation import Sums

INF = math.inf
LARGEST = torch.finfo(torch.float32).max


def at_ends(values, low, high):
    """The definition: a sum beyond float32's range ends there too."""
    low, high = max(low, -LARGEST), min(high, LARGEST)
    return sum(value >= high or value <= low for value in values)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.5, -0.5, 0.0], -1.0, 1.0),
        ([0.5, 1.0, 0.0], -1.0, 1.0),
        ([0.5, -1.0, 0.0], -1.0, 1.0),
        ([-1.0, -1.0, 1.0, 2.0, -3.0, 0.9999999], -1.0, 1.0),
        ([math.nan, 0.5, 1.0], -1.0, 1.0),
        ([math.nan, 0.5, 0.25], -1.0, 1.0),
        ([INF, -INF, 0.0], -INF, INF),
        ([LARGEST, 0.0, -LARGEST], -INF, INF),
        ([0.0, 3.0], 0.0, 7.0),  # no negative numbers: zero is an end
        ([], -1.0, 1.0),
    ],
)
def test_sums_at_an_end_are_counted(values, low, high):
    sums = Sums()
    batches = [values, [0.5 * (max(low, -8.0) + min(high, 8.0))], values]
    for batch in batches:
        sums.add(torch.tensor(batch, dtype=torch.float32), low, high)
    every = [value for batch in batches for value in batch]
    assert sums.count == len(every)
    assert sums.share == at_ends(every, low, high) / len(every)


def test_a_layer_that_was_not_run_has_no_sums():
    assert Sums().share == 0.0
