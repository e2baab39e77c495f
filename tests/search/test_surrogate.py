"""How damages add up is found from the probes, each predicted from the others."""

import json
import math

import pytest

from recoup.search.surrogate import Probe, Surrogate, fit

DAMAGES = [[0.0, 0.01, 0.2], [0.0, 0.03, 0.04], [0.0, 0.5, 0.9]]
CHOICES = [(1, 1, 1), (2, 0, 0), (0, 2, 1), (2, 2, 2), (1, 0, 2), (0, 1, 0), (2, 1, 0), (0, 0, 1)]


@pytest.mark.parametrize("power", [1.0, 0.75, 0.5])
def test_the_law_that_made_the_probes_is_found(power):
    law = Surrogate(power, 3.0, None, None)
    probes = [Probe(str(options), options, law.predict(DAMAGES, options)) for options in CHOICES]
    found, told = fit(DAMAGES, probes)
    assert found.power == power
    assert found.factor == pytest.approx(3.0, rel=1e-12)  # a mean of logarithms
    assert found.error == pytest.approx(1.0, rel=1e-9)
    assert found.rank == pytest.approx(1.0)
    assert found.trusted
    assert all(probe.predicted == pytest.approx(probe.measured, rel=1e-9) for probe in told)


def test_the_error_is_that_of_the_probe_that_the_others_miss_most():
    probes = [Probe("a", (1, 0, 0), 0.01), Probe("b", (0, 1, 0), 0.03), Probe("c", (0, 0, 1), 2.5)]
    found, _ = fit(DAMAGES, probes)
    assert found.power == 1.0
    assert found.factor == pytest.approx(5 ** (1 / 3))
    assert found.error == pytest.approx(5.0)  # the others say a factor of 1
    assert not found.trusted
    assert "do not add up well" in str(found)
    assert "within [0.20, 5.00]" in str(found)


def test_ranks_with_ties_are_spearman_s():
    probes = [Probe(str(n), o, m) for n, (o, m) in enumerate(zip(CHOICES, (5, 5, 1, 9, 2, 2, 7, 3), strict=True))]
    found, told = fit(DAMAGES, probes)
    ranks = [_ranks([getattr(probe, side) for probe in told]) for side in ("measured", "predicted")]
    means = [sum(rank) / len(rank) for rank in ranks]
    centred = [[value - mean for value in rank] for rank, mean in zip(ranks, means, strict=True)]
    product = sum(a * b for a, b in zip(*centred, strict=True))
    assert found.rank == pytest.approx(product / math.sqrt(math.prod(sum(v * v for v in rank) for rank in centred)))


def _ranks(values):
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def test_probes_that_say_nothing():
    for probes in ([], [Probe("a", (0, 0, 0), 0.0), Probe("b", (1, 0, 0), 0.5)]):
        found, told = fit(DAMAGES, probes)
        assert found == Surrogate(1.0, 1.0, None, None)
        assert not found.trusted
        assert "was not measured" in str(found)
        assert found.predict(DAMAGES, (1, 1, 1)) == pytest.approx(0.54)
        assert len(told) == len(probes)


@pytest.mark.parametrize("missed", [Probe("sums 0", (0, 0, 0), 4.0), Probe("measured 0", (0, 0, 2), 0.0)])
@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_probe_that_no_factor_explains_makes_the_error_infinite(missed, others):
    exact = [Probe(str(o), o, Surrogate(1.0, 3.0, None, None).predict(DAMAGES, o)) for o in CHOICES[:others]]
    found, _ = fit(DAMAGES, [missed, *exact])
    assert not found.trusted
    assert found.error == (math.inf if others else None)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["error"] is None
    assert found.factor == pytest.approx(3.0 if others else 1.0)
