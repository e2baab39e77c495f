import math

import pytest

from recoup.lba import LBA
from recoup.report.summary import summarize, verdict
from recoup.study import Recipe, Results, State
from recoup.study.hardware import Hardware
from recoup.wings import wing_of
from tests.report.pages import verdicts
from tests.study.examples import BASELINE, FOUR, TWO, norm_results, results, with_accuracy


def without(results: Results, *states: str) -> Results:
    recipe = results.recipe.model_dump(mode="json") | {"states": [s for s in results.recipe.states if s not in states]}
    rows = tuple(row for row in results.accuracy if row.state not in states)
    return with_accuracy(results, rows, churn=60, recipe=Recipe.build(recipe))


def test_gains_are_taken_seed_by_seed():
    summary = summarize(results())
    line = summary.line(repr(FOUR), "paired")
    assert line is not None
    assert line.gain == pytest.approx(91.6 - 90.25)
    assert line.gain_interval is not None
    # Every seed gains the same 135 images more than it loses, and 60 more change in either direction: theirs alone.
    half = 1.959964 * math.sqrt(135 + 2 * 60 + 1 - 135**2 / 10_002) / 10_002 * 100
    assert line.gain_interval.half == pytest.approx(half, abs=1e-5)
    assert line.recovered == pytest.approx((91.6 - 90.25) / (91.7 - 90.25))
    assert line.reached.kind == "t"


def test_float_is_compared_with_every_seed_of_hardware_that_seeds_decide():
    made = norm_results()
    name = repr(made.recipe.configs[1])
    bare = next(row for row in made.accuracy if row.config == name)
    each = [bare.model_copy(update={"seed": seed, "top1": 89.5 + 0.1 * seed}) for seed in (0, 1, 2)]
    rows = tuple(row for row in made.accuracy if row is not bare)
    line = summarize(with_accuracy(made, (*rows, *each))).line(name, "paired")
    assert line is not None
    assert line.recovered == pytest.approx((91.5 - 89.6) / (91.73 - 89.6))


def test_float_and_baseline_lines():
    summary = summarize(results())
    floating, eight = summary.lines[0], summary.line(BASELINE, "recalibrated at 8 bit")
    assert (floating.title, floating.reached.kind, floating.gain, floating.recovered) == ("float", "wilson", None, None)
    assert eight is not None
    assert eight.gain == pytest.approx(-0.3)
    assert eight.recovered is None
    assert summary.resolution == pytest.approx(0.54, abs=0.01)


def test_a_single_seed_gets_the_test_sets_interval():
    summary = summarize(results(seeds=(7,)))
    line = summary.line(repr(TWO), "paired")
    assert line is not None
    assert (line.reached.kind, line.reached.std) == ("wilson", None)
    assert line.gain_interval is not None
    assert (line.gain_interval.kind, line.gain_interval.holds_zero) == ("wilson", True)  # 65 won, 60 lost


def test_verdict_in_plain_words():
    two, four = verdicts(results(layers=0))
    fall = "2 threads, S+A: 91.70 % at 8 bit falls to 91.50 %"
    assert two == f"{fall}; the loss is within noise of 10,000 images."
    assert four.endswith("falls to 90.25 %; paired recalibration brings back 93 % of the loss (91.60 %).")
    assert "in 1.8x fewer cycles" in verdicts(results(layers=4))[1]


@pytest.mark.parametrize(
    ("top1", "said"),
    [
        (
            {State.NONE: 91.68, "paired": 91.7},
            "becomes 91.68 %, within noise of 10,000 images; there is nothing to repair",
        ),
        ({State.NONE: 91.7, "paired": 91.7}, "at 8 bit stays 91.70 %; there is nothing to repair"),
        ({State.NONE: 92.5, "paired": 91.7}, "becomes 92.50 %; there is nothing to repair"),
        ({State.NONE: 90.0, "paired": 89.9}, "paired recalibration does not help (89.90 %)"),
        ({State.NONE: 90.0, "paired": 91.8}, "paired recalibration brings back all of the loss (91.80 %)"),
    ],
)
def test_verdicts_of_other_outcomes(top1, said):
    made = results(seeds=(0,), layers=0)
    rows = tuple(
        row.model_copy(update={"top1": top1[State(row.state)]})
        if row.config == repr(FOUR) and row.state in top1
        else row
        for row in made.accuracy
    )
    assert said in verdicts(with_accuracy(made, rows))[1]


def test_the_quoted_repair_is_fixed_not_picked():
    made = results(layers=0)
    assert "recalibration on the hardware brings back" in verdicts(without(made, "paired"))[1]
    bare = without(made, "paired", "recalibrated on hardware", "bias correction", "recalibrated at 8 bit")
    assert verdicts(bare)[1].endswith("falls to 90.25 %; no repair was measured.")
    only = summarize(without(made, State.NONE))
    assert verdict(only, Hardware.plain(FOUR)) == "4 threads, S+A: 91.60\N{NO-BREAK SPACE}% (paired)."


def test_a_gain_that_its_interval_does_not_support_is_noise():
    made = results(seeds=(0,), layers=0)
    values = {State.NONE: 80.0, "paired": 81.5}
    rows = tuple(
        row.model_copy(update={"count": 200} | ({"top1": values[row.state]} if row.state in values else {}))
        if row.config == repr(FOUR)
        else row.model_copy(update={"count": 200})
        for row in made.accuracy
    )
    said = verdicts(with_accuracy(made, rows, test_images=200))[1]
    assert said.endswith("falls to 80.00 %; what paired recalibration changes is within noise of 200 images (81.50 %).")


def test_lba_quotes_the_plan_of_its_card_where_measured():
    quoted = wing_of(LBA.m7e4(), "test").quoted
    assert quoted[:2] == ("gain + paired", "paired")
    assert "gain + paired" in wing_of(LBA.m7e4(), "test").default
