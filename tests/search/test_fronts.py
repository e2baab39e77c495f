"""Fronts equal brute force, keep their limits, and are measured on batches that nobody scored on."""

import contextlib
import csv
import functools
import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import recoup as rc
from recoup.errors import RecoupError, RecoupWarning
from recoup.nbsmt import Array
from recoup.search import Shard, Space, front, score, verify
from recoup.search.bench import Bench
from recoup.search.prices import Program
from recoup.search.results import results_of
from recoup.search.spaces import Group
from recoup.search.surrogate import Surrogate, _ranks
from recoup.search.verifying import resampled
from recoup.tasks.shards import IncompleteError
from tests.networks import images, small_net
from tests.search.cases import labelled

NARROW = [rc.LBA.biased(7, 4), rc.LBA.biased(4, 4), rc.LBA.biased(3, 3), rc.LBA.biased(2, 3)]
LAYERS = ("block1.conv1", "block2.conv1", "classifier")


@pytest.fixture(scope="module")
def scores():
    model, batches = labelled()
    return score(model, batches, Space(dict.fromkeys(LAYERS, NARROW)), repair="gain", probes=5)


def every(scores):
    return list(itertools.product(*(range(len(group.options)) for group in scores.groups)))


def price(options):
    """The cost of a choice by `rc.cost`; each once."""
    return _priced(tuple(options))


@functools.cache
def _priced(options):
    return rc.cost(small_net(), {name: NARROW[o] for name, o in zip(LAYERS, options, strict=True)}, (3, 8, 8))


@pytest.mark.slow
def test_predictions_rank_as_brute_force_does(scores):
    """Three layers, four options: no policy of the 64 costs no more than a point and does less predicted harm."""
    found = front(scores, "bits", points=9)
    assert len(found.front) > 4
    everything = [(price(options).bits, scores.predict(options)) for options in every(scores)]
    for point in found.points:
        assert point.costs["bits"] == pytest.approx(price(point.options).bits, rel=1e-12)  # summed otherwise
        assert point.predicted == scores.predict(point.options)
    for point in (p for p in found.points if p.kind == "front"):
        rivals = [harm for bits, harm in everything if bits <= point.costs["bits"] * (1 + 1e-9)]
        assert point.predicted <= min(rivals) * (1 + 1e-9)
        cheaper = [bits for bits, harm in everything if harm <= point.predicted]
        assert point.costs["bits"] <= min(cheaper) * (1 + 1e-9)
    assert {p.kind for p in found.points} == {"front", "uniform"}
    assert len(found.uniform) == 4


def test_measured_the_front_is_that_of_brute_force(scores):
    """The 64 networks measured: predictions rank them, and no policy is more than twice as good as the front's."""
    model, batches = labelled()
    test = labelled(seed=7)[1]
    found = verify(front(scores, "bits", points=16), model, test, seeds=1, calibration=batches)
    batches, test = (
        [(x.contiguous(memory_format=torch.channels_last), y) for x, y in part] for part in (batches, test)
    )
    measured = {}
    for options in every(scores):
        rc.emulate_(model, None, {name: NARROW[o] for name, o in zip(LAYERS, options, strict=True)})
        rc.repair_(model, batches, "gain")
        measured[options] = (price(options).bits, rc.evaluate(model, test, "kl").value)
        rc.restore_(model)
    for point in found.points:
        assert point.measured.damage == measured[point.options][1]
    for point in found.front:
        best = min(harm for bits, harm in measured.values() if bits <= point.costs["bits"] * (1 + 1e-9))
        assert point.measured.damage <= 2 * best
    ranks = [
        _ranks(values) for values in ([scores.predict(o) for o in measured], [harm for _, harm in measured.values()])
    ]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.9


def test_limits_units_and_several_costs(scores):
    most = front(scores, ["cycles", "traffic", "bits"], limits={"bits": 0.97}, points=3)
    assert most.limits["bits"] == pytest.approx(0.97 * price((0, 0, 0)).bits, rel=1e-12)  # summed otherwise
    assert all(point.costs["bits"] <= most.limits["bits"] for point in most.points if point.kind == "front")
    assert front(scores, "bits", limits={"bits": "24.5 bits"}).limits == {"bits": 24.5}
    single = Space(dict.fromkeys(LAYERS, NARROW), at_most={"units": 1})
    model, batches = labelled()
    one = score(model, batches, single, repair="gain", probes=0)
    assert {len(set(p.policy.values())) for p in front(one, "bits").points} == {1}


def test_a_cost_of_one_s_own(scores):
    def joules(site, config):
        return site.macs * (1.0 if config is None else config.accumulator.bits / 32)

    found = front(scores, joules)
    assert found.costs == ("joules",)
    for point in found.points:
        layers = price(point.options).layers
        assert point.costs["joules"] == pytest.approx(sum(layer.macs * layer.accumulator / 32 for layer in layers))


def test_an_array_of_the_user_s(scores):
    model, batches = labelled()
    threads = Space({"re:block.*": [rc.NBSMT(1), rc.NBSMT(4)]})
    found = front(score(model, batches, threads, probes=0), "cycles", array=Array(4, 4), points=4)
    for point in found.points:
        assert point.costs["cycles"] == rc.cost(model, point.policy, (3, 8, 8), Array(4, 4)).cycles


def test_verified_points_have_intervals_and_a_budget_takes_the_cheapest(scores, tmp_path):
    model, batches = labelled()
    test = labelled(seed=7)[1]
    found = verify(front(scores, "bits", points=4), model, test, seeds=2, calibration=batches, out=tmp_path)
    assert found.made == 2 * (1 + len({p.options for p in found.points}))
    assert found.floating.reached == 100.0
    for point in found.points:
        seen = point.measured
        assert seen.low < seen.damage < seen.high
        assert seen.quality_low <= seen.reached <= seen.quality_high
        assert len(seen.values) == 2
    lost = {point.options: 100.0 - point.measured.reached for point in found.front}
    budget = sorted(lost.values())[len(lost) // 2]
    chosen = found.within(budget)
    assert lost[chosen.options] <= budget
    assert all(p.costs["bits"] >= chosen.costs["bits"] for p in found.front if lost[p.options] <= budget)
    assert verify(front(scores, "bits", points=4), model, test, seeds=2, calibration=batches, out=tmp_path).made == 0
    found.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    assert len(rows) == len(found.points)
    assert rc.Policy.load(tmp_path / "policy-00.yaml") == found.points[0].policy
    assert float(rows[0]["damage"]) == found.points[0].measured.damage


def test_shards_verify_together(scores, tmp_path):
    model, batches = labelled()
    test, few = labelled(seed=7)[1], front(scores, "bits", points=2)
    asked = {"seeds": 1, "calibration": batches, "out": tmp_path}
    with pytest.raises(IncompleteError):
        verify(few, model, test, shard=Shard(1, 2), **asked)
    assert verify(few, model, test, shard=Shard(0, 2), **asked).points == verify(few, model, test, **asked).points


def test_draws_are_with_replacement_and_the_same_for_a_seed():
    batches = [(x, None) for x in images(10).split(4)]
    drawn = resampled(batches, 3)
    assert [len(x) for x in drawn] == [4, 4, 2]
    rows = {row.numpy().tobytes() for row in images(10)}
    assert all(row.numpy().tobytes() in rows for x in drawn for row in x)
    assert torch.equal(torch.cat(resampled(batches, 3)), torch.cat(drawn))
    named = resampled([{"x": torch.arange(4), "labels": torch.arange(4)}], 0)
    assert named[0].keys() == {"x"}
    with pytest.raises(RecoupError, match="several shapes"):
        resampled([torch.zeros(2, 3), torch.zeros(2, 4)], 0)


@pytest.mark.parametrize(
    ("cost", "options", "told"),
    [
        ("joules", {}, "cost 'joules': must be one of cycles, traffic, bits"),
        ("energy", {}, "cost 'energy': layer 'block1.conv1' has none on M7E4 .*: energy needs a Liberty file"),
        ("area", {}, "cost 'area': layer 'block1.conv1' has none on M7E4 .*: operands=None are float32"),
        ([], {}, "name a cost"),
        ("bits", {"points": 1}, "points=1"),
        ("bits", {"limits": {"cycles": 1.0}}, "limit on 'cycles': counted are bits"),
        ("bits", {"limits": {"bits": math.nan}}, "limit bits=nan"),
        ("bits", {"limits": {"bits": -1}}, "limit bits=-1"),
        ("bits", {"limits": {"bits": "3 apples"}}, "a number with a unit of bits"),
        (
            "bits",
            {"limits": {"bits": "2 bits"}},
            "no policy keeps every limit; alone, the cheapest has bits .* where 2 is",
        ),
        (lambda *_: "much", {}, "is 'much': 0 or more"),
        (lambda *_: 1 / 0, {}, "cost <lambda> of layer 'block1.conv1' on M7E4 .* failed: ZeroDivisionError"),
    ],
)
def test_bad_requests(scores, cost, options, told):
    with pytest.raises(RecoupError, match=told):
        front(scores, cost, **options)


def test_bad_verifications(scores):
    model, batches = labelled()
    found = front(scores, "bits", points=2)
    for told, arguments, options in (
        ("weights are not those", (small_net(1), labelled(seed=7)[1]), {}),
        ("the test batches are those that were scored on", (model, batches), {}),
        *(
            ("seeds must be one draw or more", (model, labelled(seed=7)[1]), {"seeds": seeds})
            for seeds in ([], 0, True, "3", 1.5, None, [1, 1], [True], [0.5])
        ),
        ("the scores' metric is kl, not mse", (model, labelled(seed=7)[1]), {"metric": "mse"}),
    ):
        with pytest.raises(RecoupError, match=told):
            verify(found, *arguments, **options)
    for budget in (-0.1, math.nan, "1", True):
        with pytest.raises(RecoupError, match="budget="):
            found.within(budget)
    with pytest.raises(RecoupError, match="verify the front first"):
        found.within(1.0)


def mean_margin(model, batches):
    """A metric that rises: how far the largest logit lies above the mean one."""
    with torch.no_grad():
        return float(torch.cat([(y := model(x)).amax(1) - y.mean(1) for x, _ in batches]).mean())


def mean_entropy_like(model, batches):
    return -mean_margin(model, batches)


def test_the_sign_of_a_metric_of_one_s_own_is_that_of_the_scores():
    model, batches = labelled()
    test, one = labelled(seed=7)[1], Space({"classifier": [None, NARROW[3]]})
    told = []
    for metric, rises in ((mean_margin, True), (mean_entropy_like, False)):
        scores = score(model, batches, one, metric=metric, rises=rises, probes=0, repair="none")
        assert (scores.rises, scores.to_dict()["rises"]) == (rises, rises)
        found = verify(front(scores, "bits", points=2), model, test, seeds=1, metric=metric)
        told.append([point.measured.damage for point in found.points])
    assert told[0] == told[1]
    assert score(model, batches, one, metric="top1", probes=0).rises


def test_warnings_of_the_verification_are_kept(monkeypatch):
    model, batches = labelled()
    few = front(score(model, batches, Space({"classifier": [None, NARROW[3]]}), probes=0), "bits", points=2)
    original = Bench._measured

    def warned(self):
        warnings.warn("a note of the measurement", RecoupWarning, stacklevel=2)
        return original(self)

    monkeypatch.setattr(Bench, "_measured", warned)
    found = verify(few, model, labelled(seed=7)[1], seeds=1)
    outside, note = found.notes
    assert outside.startswith("Outside the space no hardware runs stem")
    assert note == "a note of the measurement"
    about = {"model": "net", "data": "digits", "repair": "default", "budget": None, "date": "2026-11-26"}
    assert results_of(found, **about).notes == found.notes
    assert few.notes == (outside,)


def test_uniform_policies_over_a_limit_are_only_compared_with(scores):
    model, batches = labelled()
    found = front(scores, "bits", limits={"bits": 0.95}, points=3)
    over = [point for point in found.uniform if point.costs["bits"] > found.limits["bits"]]
    assert over
    assert [point.allowed for point in over] == [False] * len(over)
    told = verify(found, model, labelled(seed=7)[1], seeds=1, calibration=batches)
    assert all(point.costs["bits"] <= told.limits["bits"] for point in told.front)
    for budget in (0.0, 1.0, 100.0):
        with contextlib.suppress(RecoupError):
            assert told.within(budget).allowed
    about = {"model": "net", "data": "digits", "repair": "gain", "budget": 0.0, "date": "2026-11-26"}
    rows = results_of(told, **about)
    assert [row.allowed for row in rows.points] == [point.allowed for point in told.points]
    assert all(row.allowed for row in rows.front)
    assert rows.chosen is None or rows.points[rows.chosen].allowed


def test_uniform_policies_of_too_many_units(scores):
    """Half of the layers have the second option, the others their first: two kinds of hardware where one is legal."""
    layers = {LAYERS[0]: NARROW[:2], LAYERS[1]: NARROW[:1]}
    model, batches = labelled()
    found = front(score(model, batches, Space(layers, at_most={"units": 1}), probes=0), "bits", points=2)
    assert {point.options: point.allowed for point in found.uniform} == {(0, 0): True, (1, 0): False}
    assert all(len(set(point.policy.values())) == 1 for point in found.front)


@pytest.mark.parametrize("row", [[0.0, 1e-11, 5.0], [1e-13, 1e-11, 5.0], [0.0, 3e-9, 5.0], [2.0, 2 + 1e-11, 5.0]])
def test_damages_that_the_solver_cannot_tell_apart(scores, row):
    def price(site, config):
        return {NARROW[0]: 8, NARROW[1]: 4, NARROW[2]: 2, None: 0}[config]

    groups = tuple(Group(f"layer {n}", (f"layer {n}",), tuple(NARROW[:3])) for n in range(8))
    sites = tuple(replace(scores.sizes.sites[0], name=group.name) for group in groups)
    damages = tuple(tuple(row) for _ in groups)
    sizes = replace(scores.sizes, sites=sites)
    plain = Surrogate(1.0, 1.0, None, None)
    found = front(replace(scores, groups=groups, damages=damages, sizes=sizes, surrogate=plain), price, points=9)
    least = 8 * row[0]
    for point in found.front:
        expensive = sum(option == 2 for option in point.options)
        assert 0 <= point.predicted - expensive * (5.0 - row[0]) - least < 8 * 4e-9 * 5
    assert min(point.costs["price"] for point in found.front) == 16
    assert any(point.predicted == least for point in found.front)


def test_a_point_that_may_not_be_the_cheapest_is_said(scores, monkeypatch):
    """The second knapsack of a point, the one with a limit on damage, gives up."""

    original = Program.choose

    def refusing(program, objective, bounds=()):
        if bounds and objective in program.priced.quantities.values():
            raise RecoupError("knapsack: no answer in 60 s")
        return original(program, objective, bounds)

    monkeypatch.setattr(Program, "choose", refusing)
    with pytest.warns(RecoupWarning, match="may not be the cheapest with it: knapsack: no answer in 60 s"):
        assert front(scores, "bits", points=2).front
