import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.study.intervals import accuracy, difference, of_test_set, over_seeds

PERCENTS = st.lists(st.floats(0, 100), min_size=2, max_size=12)


@settings(deadline=None)
@given(PERCENTS)
def test_t_interval_is_scipys(values):
    from scipy import stats  # takes a second to import

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
    from scipy import stats

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


@given(st.integers(1, 60_000), st.sampled_from([0, 100]))
def test_an_accuracy_at_either_end_lies_in_its_interval(count, percent):
    estimate = of_test_set(percent, count)
    assert 0 <= estimate.low <= percent <= estimate.high <= 100
    assert percent in (estimate.low, estimate.high)
    assert estimate.half > 0


@settings(deadline=None)
@given(st.integers(1, 20_000), st.data())
def test_intervals_are_possible_and_never_of_zero_width(count, data):
    hits = data.draw(st.lists(st.integers(0, count), min_size=1, max_size=4))
    percents = [100 * hit / count for hit in hits]
    made = accuracy(percents, count)
    assert 0 <= made.low <= made.mean <= made.high <= 100
    assert made.low < made.high
    if len(hits) > 1:  # neither the seeds nor the images alone make it wider than both together
        for alone in (over_seeds(percents), of_test_set(made.mean, count)):
            assert made.low <= max(alone.low, 0) + 1e-9
            assert made.high >= min(alone.high, 100) - 1e-9
    change = difference([one - percents[0] for one in percents], count)
    assert -100 <= change.low <= change.mean <= change.high <= 100
    assert change.low < change.high


def test_seeds_and_images_add_as_squares():
    estimate, images = accuracy([90.0, 91.0, 92.0], 1000), of_test_set(91.0, 1000)
    seeds = 4.30265 / math.sqrt(3)
    assert estimate.low == pytest.approx(91 - math.hypot(seeds, 91 - images.low), abs=1e-4)
    assert estimate.high == pytest.approx(91 + math.hypot(seeds, images.high - 91), abs=1e-4)


@pytest.mark.parametrize(("images", "noise"), [(0, True), (1, True), (4, True), (5, False), (-4, True), (-5, False)])
@pytest.mark.parametrize("count", [50, 596, 10_000])
def test_a_difference_of_few_images_may_be_none(images, noise, count):
    assert difference([100 * images / count], count).holds_zero == noise
    assert difference([100 * images / count] * 3, count).holds_zero == noise


def test_seeds_that_disagree_are_noise():
    assert difference([1.0, 2.5], 200).half == pytest.approx(9.7, abs=0.3)
    assert difference([1.0, 2.5], 200).holds_zero
