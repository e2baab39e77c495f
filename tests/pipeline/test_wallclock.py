"""Balanced cuts against all cuts there are, periods and schedules against a simulation, and what is refused."""

import itertools
import random

import pytest

from recoup.errors import RecoupError
from recoup.pipeline.wallclock import Times, balance, joined, period, pipelined, simulate, synchronous, timelines


def drawn(count, seed):
    draw = random.Random(seed)
    return [Times(draw.random(), 2 * draw.random(), draw.random() / 4) for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_the_balanced_cut_is_the_best_of_all(ranks):
    for seed in range(5):
        times = drawn(8, seed)
        cuts = [
            [b - a for a, b in itertools.pairwise((0, *inner, 8))]
            for inner in itertools.combinations(range(1, 8), ranks - 1)
        ]
        best = min(max(rank.total for rank in joined(times, cut)) for cut in cuts)
        found = balance(times, ranks)
        assert len(found) == ranks
        assert min(found) >= 1
        assert max(rank.total for rank in joined(times, found)) == pytest.approx(best, rel=1e-12)


def test_a_hundred_stages_are_balanced_at_once():
    found = balance([Times(1, 1)] * 100, 8)
    assert sorted(found) == [12] * 4 + [13] * 4 or max(found) == 13


@pytest.mark.parametrize("latency", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_period_is_that_of_the_simulation(count, latency):
    for seed in range(4):
        ranks = drawn(count, seed)
        found = (pipelined(ranks, 150, latency) - pipelined(ranks, 50, latency)) / 100
        # where a hop takes about a tick, loops of several ranks add what the formula does not have
        assert found == pytest.approx(period(ranks, latency), rel=0.1 if latency > 1 else 1e-9)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_fill_and_drain_is_the_simulation_of_equal_ranks(samples):
    ranks = [Times(1.0, 2.0, 0.5)] * 3
    order = [[("f", k) for k in range(samples)] + [("b", k) for k in range(samples)] for _ in ranks]

    def needs(rank, operation):
        kind, k = operation
        if kind == "f":
            return [(rank - 1, operation)] if rank else []
        return [(rank + 1, operation)] if rank < 2 else [(rank, ("f", k))]

    lasts = {("f", k): 1.0 for k in range(samples)} | {("b", k): 2.0 for k in range(samples)}
    done = simulate(order, lambda _, operation: lasts[operation], needs)
    assert max(end for _, end in done.values()) + 0.5 == pytest.approx(synchronous(ranks, samples))


def test_one_forward_one_backward_is_shorter():
    ranks = drawn(4, 3)
    assert synchronous(ranks, 8, "1f1b") <= synchronous(ranks, 8)


def test_what_is_refused():
    with pytest.raises(RecoupError, match="ranks must be an integer from 1 to 2"):
        balance([Times(1, 1)] * 2, 3)
    with pytest.raises(RecoupError, match="forward must be seconds from 0"):
        Times(-1, 0)
    with pytest.raises(RecoupError, match=r"a cut of \[1, 1\] does not fit the times of 3 stages"):
        joined([Times(1, 1)] * 3, [1, 1])
    with pytest.raises(RecoupError, match="must be 'fill-and-drain' or '1f1b'"):
        synchronous([Times(1, 1)], 2, "gpipe")
    with pytest.raises(RecoupError, match="wait for each other"):
        simulate([["a"], ["b"]], lambda *_: 1.0, lambda rank, _: [(1 - rank, "ab"[1 - rank])])


@pytest.mark.parametrize("schedule", ["1F1B", "fill-and-drain"])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_a_timeline_of_equal_ranks_lasts_as_the_formula_says(schedule, samples):
    ranks = [Times(1.0, 2.0, 0.5)] * 3
    done = timelines(ranks, 2 * samples, samples)[schedule]
    assert max(end for _, end in done.values()) == pytest.approx(2 * synchronous(ranks, samples, schedule.lower()))


@pytest.mark.parametrize("latency", [0.0, 0.7])
def test_timelines_hold_every_operation_once_and_nobody_works_on_two(latency):
    ranks = drawn(4, 3)
    for name, done in timelines(ranks, 7, 3, latency).items():
        work = {("forward", k) for k in range(7)} | {("backward", k) for k in range(7)}
        work |= set() if name == "pipelined" else {("update", 0), ("update", 1), ("update", 2)}
        for rank in range(4):
            own = {operation: when for (r, operation), when in done.items() if r == rank}
            assert set(own) == work
            spans = sorted(own.values())
            assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(spans))
            assert all(own["backward", k][0] >= own["forward", k][1] for k in range(7))
            if rank:  # an activation is sent before it is used
                assert all(own["forward", k][0] >= done[rank - 1, ("forward", k)][1] + latency for k in range(7))
                assert all(done[rank - 1, ("backward", k)][0] >= own["backward", k][1] + latency for k in range(7))
            if name != "pipelined":  # weights of an update are seen by its samples alone
                assert own["update", 0][1] <= own["forward", 3][0] + 1e-12
                assert own["backward", 2][1] <= own["update", 0][0] + 1e-12
