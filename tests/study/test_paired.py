"""Differences of top-1 are paired image by image: by raw logits, by known flips, and of records without answers."""

import base64
import json
import math

import pytest
import torch

from recoup.errors import RecoupError
from recoup.report.html import interval_text
from recoup.report.lines import against_float
from recoup.report.summary import summarize
from recoup.study import Results, run
from recoup.study.lab import Lab
from recoup.study.machine import cpu_threads
from recoup.study.repairs import NONE
from tests.study.examples import small_recipe

LBA = "LBA.biased(3, 3)"
ONCE = {"calibration": {"images": 32, "batch_size": 16, "seeds": [3]}, "profile_images": 0}


def asked(folder, **changes):
    configs = ["NBSMT(threads=4, policy='A', rounding='zero')", LBA]
    return small_recipe(folder, **{"configs": configs, **ONCE, **changes})


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paired")
    return folder, run(asked(folder), progress=False)


def wald(lost, won, count):
    """Half a sample added to each of four outcomes; see tests/network/test_answers.py."""
    n = count + 2
    half = 1.959964 * math.sqrt((lost + won + 1) / n - ((lost - won) / n) ** 2) / math.sqrt(n)
    return 100 * ((lost - won) / n - half), 100 * ((lost - won) / n + half)


def test_flips_are_those_of_raw_logits(studied, tmp_path):
    """Every image one by one, without recoup's meters, batches or stores."""
    _, results = studied
    recipe = asked(tmp_path)
    with cpu_threads(1), torch.no_grad():
        lab = Lab(recipe)
        lab.check()
        x_N, y_N = (torch.cat(part) for part in zip(*lab.test.batches(7), strict=True))
        right = {("float", NONE): (lab.model(x_N).argmax(1) == y_N).tolist()}
        for config in recipe.configs:
            for state in lab.hardware(config).in_order(recipe.states):
                network = lab.repaired(config, state, 3)
                right[repr(config), state] = (network(x_N).argmax(1) == y_N).tolist()
    assert len(y_N) == 40
    seen = 0
    for row in results.flips:
        one, other = right.get((row.config, row.state)), right.get((row.against, row.against_state))
        if one is None or other is None:
            continue  # the 8-bit baseline
        lost, won = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((other, one), (one, other)))
        assert (row.lost, row.won, row.count) == (lost, won, 40), row
        assert (row.low, row.high) == pytest.approx(wald(lost, won, 40)), row
        seen += lost + won > 0
    assert seen >= 4
    rows = [(row.config, row.state, row.against, row.against_state) for row in results.flips]
    assert len(rows) == len(set(rows))
    assert {against for _, _, against, _ in rows} > {"float", "8-bit"}
    assert Results.load(results.save(tmp_path)) == results
    assert unpaired_lines(results) == []


def unpaired_lines(results):
    return [(line.config, line.state) for line in summarize(results).lines if not line.paired]


def both(row):
    return (row.config, row.state), (row.against, row.against_state)


class Kept:
    """The measurements of a folder, to be edited."""

    def __init__(self, folder):
        self.path = folder / "measurements.json"
        self.content = json.loads(self.path.read_text())
        self.values = self.content["measurements"]

    def of(self, start, state):
        (key,) = [key for key in self.values if key.startswith(start) and f"| {state} |" in key]
        return self.values[key]

    def answer(self, start, state, wrong):
        """All 40 images are right but these."""
        bits = sum(1 << (39 - image) for image in range(40) if image not in wrong).to_bytes(5)
        value = self.of(start, state)
        value["answers"]["right"] = base64.b64encode(bits).decode()
        value["top1"] = 100 * (40 - len(wrong)) / 40

    def save(self):
        self.path.write_text(json.dumps(self.content))


@pytest.fixture
def known(studied, tmp_path, monkeypatch):
    """Float is wrong on 0 to 3; the multiplier on 2 to 21: it loses 18 and wins 2; the accumulator on 1 to 4: 1 and 1.
    The gain a channel of the latter wins 3 back and loses 2 others."""
    (tmp_path / "measurements.json").write_text((studied[0] / "measurements.json").read_text())
    monkeypatch.setattr(Lab, "accuracy", None)  # nothing is measured again
    kept = Kept(tmp_path)
    kept.answer("float", NONE, range(4))
    kept.answer("8-bit", NONE, range(4))
    kept.answer("NBSMT", NONE, range(2, 22))
    kept.answer("LBA", NONE, range(1, 5))
    kept.answer("LBA", "gain per channel", [4, 30, 31])
    kept.save()
    return tmp_path, kept


def test_a_study_with_known_flips(known):
    results = run(asked(known[0]), progress=False)
    four, lba = map(repr, results.recipe.configs)
    found = {(row.config, row.state, row.against, row.against_state): (row.lost, row.won) for row in results.flips}
    assert found[four, NONE, "float", NONE] == found[four, NONE, "8-bit", NONE] == (18, 2)
    assert found[lba, NONE, "float", NONE] == (1, 1)
    assert found[lba, "gain per channel", lba, NONE] == (2, 3)
    assert found[lba, "gain per channel", "float", NONE] == (3, 4)
    loss = against_float(results, lba, NONE)
    assert loss is not None
    assert (loss.mean, loss.low, loss.high) == pytest.approx((0.0, *wald(1, 1, 40)))
    line = summarize(results).line(lba, "gain per channel")
    assert line is not None
    assert line.gain_interval is not None
    low, high = wald(2, 3, 40)
    assert (line.gain, line.gain_interval.low, line.gain_interval.high) == pytest.approx((2.5, -high, -low))
    lost = summarize(results).line(four, NONE)
    assert lost is not None
    assert lost.loss is not None
    assert (lost.loss.mean, lost.loss.low, lost.loss.high) == pytest.approx((40.0, *wald(18, 2, 40)))
    assert "image by image and have intervals of their own" in interval_text(results, summarize(results))


def paired(results, config):
    """The rows in which a configuration without repair stands on either side."""
    return [
        row for row in results.flips if (config, NONE) in ((row.config, row.state), (row.against, row.against_state))
    ]


def test_measurements_without_answers_have_the_widest_interval_and_a_note(known):
    folder, kept = known
    del kept.of("LBA", NONE)["answers"]
    kept.save()
    results = run(asked(folder), progress=False)
    four, lba = map(repr, results.recipe.configs)
    assert not paired(results, lba)
    assert [row for row in results.flips if (row.config, row.state) == (four, NONE)]
    loss = against_float(results, lba, NONE)
    assert loss is not None  # four wrong in each: at most eight that differ
    assert (loss.mean, loss.low, loss.high) == pytest.approx((0.0, *wald(4, 4, 40)))
    assert sum("1 of " in note and "kept no answers image by image" in note for note in results.notes) == 1
    unpaired = unpaired_lines(results)
    assert (lba, NONE) in unpaired
    assert (four, NONE) not in unpaired
    assert f"Answers of {len(unpaired)} of " in interval_text(results, summarize(results))


def test_results_of_an_older_recoup_have_the_widest_intervals(known):
    results = run(asked(known[0]), progress=False)
    content = results.to_dict()
    del content["flips"]
    (known[0] / "results.json").write_text(json.dumps(content))
    old = Results.load(known[0])
    four, lba = map(repr, old.recipe.configs)
    loss, gain = against_float(old, four, NONE), summarize(old).line(lba, "gain per channel")
    assert loss is not None
    assert (loss.mean, loss.low, loss.high) == pytest.approx((40.0, *wald(20, 4, 40)))  # 20 wrong, 4 wrong
    assert gain is not None
    assert gain.gain_interval is not None
    low, high = wald(3, 4, 40)
    assert (gain.gain_interval.low, gain.gain_interval.high) == pytest.approx((-high, -low))
    paired = against_float(results, four, NONE)
    assert paired is not None
    assert (loss.low, loss.high) < (paired.low, paired.high) < (loss.high, math.inf)
    assert "were not kept image by image, by an older recoup" in interval_text(old, summarize(old))


def test_damaged_answers_are_named(known):
    folder, kept = known
    kept.of("NBSMT", NONE)["answers"]["right"] = "AA=="
    kept.save()
    with pytest.raises(RecoupError, match=r"study: measurement .NBSMT.* answers of a measurement cannot be read \(1 "):
        run(asked(folder), progress=False)


@pytest.mark.parametrize("damaged", [{}, None, [], "AA==", {"right": "AA==", "count": 8, "samples": 5}])
def test_answers_of_another_form_are_named(known, damaged):
    folder, kept = known
    kept.of("NBSMT", NONE)["answers"] = damaged
    kept.save()
    with pytest.raises(RecoupError, match=r"study: measurement .NBSMT.* answers of a measurement cannot be read"):
        run(asked(folder), progress=False)


def test_answers_to_images_that_are_not_known_are_not_paired(known):
    folder, kept = known
    for value in kept.values.values():
        if "answers" in value:
            value["answers"]["samples"] = ""
    kept.save()
    results = run(asked(folder), progress=False)
    assert not results.flips
    assert unpaired_lines(results)


def test_answers_to_other_images_are_not_paired_and_it_is_said(known):
    folder, kept = known
    kept.of("NBSMT", NONE)["answers"]["samples"] = "of others"
    kept.save()
    results = run(asked(folder), progress=False)
    four, lba = map(repr, results.recipe.configs)
    assert not paired(results, four)
    assert [row for row in results.flips if (row.config, row.state) == (lba, NONE)]
    assert sum("The test images, or their order, changed" in note for note in results.notes) == 1
    assert (four, NONE) in unpaired_lines(results)


def test_another_order_of_the_same_images_is_another_test(studied, tmp_path):
    """The digest tells them apart, so a folder whose files changed is not paired with what was measured before."""
    kept = Kept(studied[0])
    digests = {value["answers"]["samples"] for value in kept.values.values() if "answers" in value}
    assert len(digests) == 1
    lab = Lab(asked(tmp_path, test={"limit": 40, "batch_size": 20, "seed": 1}))
    found, _ = lab.accuracy(None, NONE, 3)
    assert found["answers"]["samples"] not in digests
    again, _ = Lab(asked(tmp_path, test={"limit": 40, "batch_size": 7})).accuracy(None, NONE, 3)
    assert again["answers"]["samples"] in digests  # batches have no part in it
