"""The walk of coordinate moves equals one by hand, keeps limits, and is taken up where it was left."""

import warnings

import pytest

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.search import Space, front, refine, score, verify
from recoup.search.bench import Bench
from recoup.search.refining import BESIDE
from tests.search.cases import labelled

NARROW = [rc.LBA.biased(7, 4), rc.LBA.biased(4, 4), rc.LBA.biased(3, 3)]
LAYERS = ("block1.conv1", "block2.conv1", "classifier")


@pytest.fixture(scope="module")
def searched():
    model, batches = labelled()
    return model, batches, score(model, batches, Space(dict.fromkeys(LAYERS, NARROW)), repair="gain", probes=4)


def by_hand(searched, found, moves):
    """The walk with every network measured by a bench of its own, and prices by `rc.cost`."""
    model, batches, scores = searched
    bench = Bench(model, batches, ("kl",), batches, "gain")
    known = {}

    def policy(options):
        return {name: NARROW[o] for name, o in zip(LAYERS, options, strict=True)}

    def harm(options):
        if options not in known:
            known[options] = bench.measured(policy(options), "by hand")["kl"]["value"]
        return known[options]

    def bits(options):
        return rc.cost(model, policy(options), (3, 8, 8)).bits

    here = min((p for p in found.uniform), key=lambda p: (p.predicted, p.costs["bits"])).options
    harm(here)
    steps = []
    while True:
        near = [
            (*here[:g], o, *here[g + 1 :]) for g in range(3) for o in range(3) if NARROW[o].accumulator.bits
            < NARROW[here[g]].accumulator.bits
        ]  # fmt: skip
        saves = {one: bits(here) - bits(one) for one in near}
        group = {one: next(g for g in range(3) if one[g] != here[g]) for one in near}
        rise = {
            one: scores.damages[group[one]][one[group[one]]] - scores.damages[group[one]][here[group[one]]]
            for one in near
        }
        near = sorted(near, key=lambda one: rise[one] / saves[one])[:BESIDE][: moves - len(known)]
        if not near:
            return steps, known
        start = here
        here = min(near, key=lambda one: (harm(one) - harm(start)) / saves[one])
        steps.append(here)


@pytest.mark.parametrize("moves", [1, 6, 100])
def test_the_walk_is_the_one_by_hand(searched, moves):
    model, batches, scores = searched
    found = front(scores, "bits", points=3)
    walked = refine(found, model, batches, moves=moves)
    steps, known = by_hand(searched, found, moves)
    before = {point.options for point in found.points}
    new = [point for point in walked.points if point.kind == "refined"]
    assert walked.points[: len(found.points)] == found.points
    assert [point.options for point in new] == [step for step in steps if step not in before]
    for point in new:
        assert point.scored == point.damage == known[point.options]
        assert point.costs["bits"] == pytest.approx(rc.cost(model, point.policy, (3, 8, 8)).bits, rel=1e-12)
    assert moves < 100 or steps[-1] == (2, 2, 2)  # to the end: the cheapest


def test_limits_hold_and_the_points_are_measured_like_all_others(searched):
    model, batches, scores = searched
    limited = front(scores, "bits", limits={"bits": 0.97}, points=3)
    found = refine(limited, model, batches, start=limited.front[-1], moves=30)
    assert [point for point in found.points if point.kind == "refined"]
    assert all(point.costs["bits"] <= found.limits["bits"] for point in found.points if point.kind == "refined")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecoupWarning)
        measured = verify(found, model, labelled(seed=5)[1], seeds=1, calibration=batches)
    assert all(point.measured is not None for point in measured.points)


def test_what_is_refused(searched):
    model, batches, scores = searched
    found = front(scores, "bits", points=3)
    with pytest.raises(RecoupError, match="start must be a Point"):
        refine(found, model, batches, start=(0, 0, 0))
    with pytest.raises(RecoupError, match="moves=0 must be a whole number"):
        refine(found, model, batches, moves=0)
    with pytest.raises(RecoupError, match="data differ"):
        refine(found, model, labelled(seed=3)[1])
    with pytest.raises(RecoupError, match="metric is kl, not top1"):
        refine(found, model, batches, metric="top1")
    single = score(model, batches, Space({name: [NARROW[n]] for n, name in enumerate(LAYERS)}), repair="gain", probes=0)
    with pytest.raises(RecoupError, match="no uniform policy keeps every limit: say which point"):
        refine(front(single, "bits", points=2), model, batches)
