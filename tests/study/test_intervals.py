import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.network.answers import Flips
from recoup.study.intervals import accuracy, difference, most_changed, of_test_set, over_seeds

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
    points = [one - percents[0] for one in percents]
    most = [most_changed(one, percents[0], count) for one in percents]
    spans = []
    for changed in ([abs(hit - hits[0]) for hit in hits], most):
        change = difference(points, count, changed)
        assert -100 <= change.low <= change.mean <= change.high <= 100
        assert change.low < change.high
        spans.append(change.half)
    assert spans[0] <= spans[1] + 1e-9


def test_seeds_and_images_add_as_squares():
    estimate, images = accuracy([90.0, 91.0, 92.0], 1000), of_test_set(91.0, 1000)
    seeds = 4.30265 / math.sqrt(3)
    assert estimate.low == pytest.approx(91 - math.hypot(seeds, 91 - images.low), abs=1e-4)
    assert estimate.high == pytest.approx(91 + math.hypot(seeds, images.high - 91), abs=1e-4)


@pytest.mark.parametrize(("images", "noise"), [(0, True), (1, True), (4, True), (5, False), (-4, True), (-5, False)])
@pytest.mark.parametrize("count", [50, 596, 10_000])
def test_a_difference_of_few_images_may_be_none(images, noise, count):
    """Even where no other changed."""
    assert difference([100 * images / count], count, [abs(images)]).holds_zero == noise
    assert difference([100 * images / count] * 3, count, [abs(images)] * 3).holds_zero == noise


def test_seeds_that_disagree_are_noise():
    found = difference([1.0, 2.5], 200, [2, 5])
    assert found.half == pytest.approx(9.7, abs=0.3)
    assert found.holds_zero


@given(st.integers(1, 300), st.data())
def test_a_difference_is_paired(count, data):
    """By Flips of the same images, over seeds by hand."""
    lost, won = (data.draw(st.lists(st.integers(0, count // 2), min_size=2, max_size=2)) for _ in "ab")
    both = [Flips(*seen, count) for seen in zip(lost, won, strict=True)]
    for one in both:
        found = difference([one.points], count, [one.changed])
        assert (found.mean, found.low, found.high) == pytest.approx((one.points, *one.interval), abs=1e-6)
    found = difference([one.points for one in both], count, [one.changed for one in both])
    k, m, n = sum(lost + [-x for x in won]) / 2, sum(lost + won) / 2, count + 2
    half = 1.959964 * math.sqrt(m + 1 - k * k / n)
    seeds, mean = 12.7062 * abs(both[0].points - both[1].points) / 2, 100 * k / count
    low = mean - math.hypot(seeds, mean - 100 * (k - half) / n)
    assert found.low == pytest.approx(max(low, -100), rel=1e-4, abs=1e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_no_more_can_change_than_the_accuracies_allow(pairs):
    one, other = (100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    most = most_changed(one, other, len(pairs))
    assert sum(a != b for a, b in pairs) <= most + 1e-6
    # Some answers with these accuracies reach it: the right ones of the two, as far apart as they can be.
    right = [round(x * len(pairs) / 100) for x in (one, other)]
    apart = [(n < right[0], n >= len(pairs) - right[1]) for n in range(len(pairs))]
    assert sum(a != b for a, b in apart) == pytest.approx(most)


@pytest.mark.parametrize("changed", [9, 1001])
def test_changes_that_a_difference_cannot_have(changed):
    with pytest.raises(RecoupError, match=r"a difference of 1 points on 1,000 images: [\d,]+ of them cannot"):
        difference([1.0], 1000, [changed])
