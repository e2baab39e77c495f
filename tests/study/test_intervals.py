import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recoup.errors import RecoupError
from recoup.study.intervals import accuracy, of_test_set, over_seeds

PERCENTS = st.lists(st.floats(0, 100), min_size=2, max_size=12)


@settings(deadline=None)
@given(PERCENTS)
def test_t_interval_is_scipys(values):
    estimate = over_seeds(values)
    mean, error = sum(values) / len(values), stats.sem(values)
    half = stats.t.ppf(0.975, len(values) - 1) * error
    assert estimate.mean == pytest.approx(mean, abs=1e-9)
    assert estimate.low == pytest.approx(mean - half, abs=1e-6)
    assert estimate.high == pytest.approx(mean + half, abs=1e-6)
    assert estimate.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)), abs=1e-6)
    assert (estimate.kind, estimate.runs) == ("t", len(values))
    assert estimate.half == pytest.approx(half, abs=1e-6)


def test_t_interval_by_hand():
    estimate = over_seeds([90.0, 91.0, 92.0])  # t(0.975, 2) = 4.30265; s = 1
    assert estimate.half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 50_000), st.data())
def test_wilson_interval_is_scipys(count, data):
    hits = data.draw(st.integers(0, count))
    estimate = of_test_set(100 * hits / count, count)
    theirs = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert estimate.low == pytest.approx(100 * theirs.low, abs=1e-5)
    assert estimate.high == pytest.approx(100 * theirs.high, abs=1e-5)
    assert (estimate.kind, estimate.std, estimate.runs) == ("wilson", None, 1)


def test_which_interval():
    assert accuracy([90.0], 100).kind == "wilson"
    assert accuracy([90.0, 90.0], 100).kind == "t"
    with pytest.raises(RecoupError, match="two values"):
        over_seeds([90.0])
