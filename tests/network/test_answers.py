"""Answers sample by sample and what flips: by lists of booleans and the four outcomes of two networks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recoup as rc
from recoup.errors import RecoupError
from recoup.network.answers import Answers, Flips, paired_interval
from recoup.storage.digest import OfSamples

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=70)


def answers(right, samples="of these"):
    return Answers.of(torch.tensor(right), samples)


def agresti_min(outcomes):
    """The interval of p(right before) - p(right now): Wald's of the four outcomes with half a sample added to each."""
    n = sum(outcomes.values()) + 2
    p = {outcome: (number + 0.5) / n for outcome, number in outcomes.items()}
    lost, won = p[True, False], p[False, True]  # before, now
    half = 1.959964 * math.sqrt((lost + won - (lost - won) ** 2) / n)
    return 100 * (lost - won - half), 100 * (lost - won + half)


@given(PAIRS)
def test_flips_are_those_of_lists(pairs):
    before, now = zip(*pairs, strict=True)
    outcomes = {(a, b): pairs.count((a, b)) for a in (False, True) for b in (False, True)}
    found = answers(list(now)).flips(answers(list(before)))
    assert found == Flips(outcomes[True, False], outcomes[False, True], len(pairs))
    assert found.changed == sum(a != b for a, b in pairs)
    assert found.points == pytest.approx(100 * (sum(before) - sum(now)) / len(pairs))
    assert answers(list(now)).right == sum(now)
    low, high = agresti_min(outcomes)
    assert found.interval == pytest.approx((max(low, -100), min(high, 100)), abs=1e-9)
    assert found.interval[0] <= found.points <= found.interval[1]


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_answers_come_back_from_text(right):
    one = answers(right)
    kept = one.to_dict()
    assert Answers.from_dict(kept) == one
    assert len(kept["right"]) == 4 * math.ceil(math.ceil(len(right) / 8) / 3)
    assert "".join(f"{int(digit, 16):04b}" for digit in one.bits)[: len(right)] == "".join("01"[x] for x in right)


@pytest.mark.parametrize(
    "changes",
    [{"right": "AA=="}, {"right": "/w==", "count": 7}, {"right": "no"}, {"right": 3}, {"count": 0}, {"samples": None}],
)
def test_damaged_answers_are_refused(changes):
    kept = answers([True] * 9).to_dict()
    with pytest.raises(RecoupError, match="answers of a measurement cannot be read"):
        Answers.from_dict(kept | changes)
    with pytest.raises(RecoupError, match="answers of a measurement cannot be read"):
        Answers.from_dict({name: value for name, value in kept.items() if name != "right"})


@pytest.mark.parametrize("other", [answers([True] * 3, "of others"), answers([True] * 4)])
def test_answers_to_other_samples_are_not_compared(other):
    with pytest.raises(RecoupError, match=r"to 3 samples and to \d cannot be compared one by one"):
        answers([True, False, True]).flips(other)


def test_answers_to_samples_that_are_not_known_are_not_compared():
    known, unknown = answers([True, False]), answers([True, False], "")
    for pair in ((known, unknown), (unknown, known), (unknown, unknown)):
        with pytest.raises(RecoupError, match="not known to which samples"):
            pair[0].flips(pair[1])


def test_the_interval_holds_the_difference_19_times_of_20():
    draw = np.random.default_rng(0)
    for count, lost, won in ((300, 0.04, 0.02), (1000, 0.01, 0.01), (2000, 0.0095, 0.0075)):
        found = draw.multinomial(count, [lost, won, 1 - lost - won], size=4000)
        held = 0
        for a, b, _ in found:
            low, high = paired_interval(a - b, a + b, count)
            held += low <= 100 * (lost - won) <= high
        assert 0.94 <= held / len(found) <= 0.98


def test_evaluate_keeps_the_answers():
    torch.manual_seed(0)
    x, y = torch.randn(50, 6), torch.randint(4, (50,))
    one, other = (torch.nn.Linear(6, 4) for _ in range(2))
    right = [(net(x).argmax(1) == y).tolist() for net in (one, other)]
    now, before = rc.evaluate(one, [(x, y)]), rc.evaluate(other, list(zip(x.split(7), y.split(7), strict=True)))
    assert now.answers is not None
    assert before.answers is not None
    expected = Flips(
        sum(b and not a for a, b in zip(*right, strict=True)), sum(a and not b for a, b in zip(*right, strict=True)), 50
    )
    assert now.answers.flips(before.answers) == expected  # however the samples are cut into batches
    assert expected.changed > 0
    for changed in ([(x.flip(0), y.flip(0))], [(x + 1, y)], [(x, (y + 1) % 4)]):
        again = rc.evaluate(one, changed)
        assert again.answers is not None
        with pytest.raises(RecoupError, match="of other samples, or in another order"):
            again.answers.flips(before.answers)


def digest(*batches):
    found = OfSamples()
    for batch in batches:
        found.add(*batch)
    return found.text


def test_digests_of_samples():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 4, 4), torch.arange(6)
    whole = digest((x, y))
    assert whole == digest((x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:], y[5:]))
    assert whole == digest((x.contiguous(memory_format=torch.channels_last), y))
    negated = torch._neg_view(-x)  # pyright: ignore[reportPrivateImportUsage]
    assert whole == digest((negated, y))  # what torch has yet to negate, or to conjugate
    z = torch.complex(x, -x)
    assert digest((z, y)) == digest((z.conj_physical().conj(), y)) != digest((z.conj(), y))
    others = [
        digest((x.double(), y)), digest((x, y.int())), digest((x.flip(0), y)), digest((x, None)),
        digest((x.view(6, 3, 16), y)), digest(({"x": x}, y)), digest(({"y": x}, y)),
    ]  # fmt: skip
    assert len({whole, *others}) == 1 + len(others)
    a, b = (torch.ones(1, 2), None), (torch.ones(1, 3), None)
    assert len({digest(a, a, b), digest(a, b, a), digest(b, a, a)}) == 3  # of several shapes their order counts
    assert digest(({"x": x, "z": y}, None)) == digest(
        ({"x": x[:2], "z": y[:2]}, None), ({"x": x[2:], "z": y[2:]}, None)
    )
