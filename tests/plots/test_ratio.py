"""Savings in words: none is printed as 1.0 times less."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recoup.plots.ratio import FEWER, times


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (1.84, "1.8x fewer"),
        (1.1, "1.1x fewer"),
        (1.0949, "1.09x fewer"),
        (1.03, "1.03x fewer"),
        (1.004, "as many"),
        (1.0, "as many"),
        (0.97, "1.03x more"),
        (0.25, "4.0x more"),
    ],
)
def test_words(ratio: float, said: str):
    assert times(ratio, FEWER) == said


@given(st.floats(1e-3, 1e3))
def test_what_is_saved_is_within_five_percent_of_what_is_said_and_never_nothing(ratio: float):
    said = times(ratio)
    if said == "as much":
        assert max(ratio, 1 / ratio) == pytest.approx(1, abs=0.0051)
        return
    number, _, word = said.partition("x ")
    assert float(number) > 1
    assert float(number) == pytest.approx(max(ratio, 1 / ratio), rel=0.05)
    assert word == ("less" if ratio > 1 else "more")
