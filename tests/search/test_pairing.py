"""What networks lose on the same samples: by a model in numpy, from meters to the verified front."""

import base64
import json
import math

import numpy as np
import pytest
import torch

import recoup as rc
from recoup.errors import RecoupError
from recoup.models import chargpt
from recoup.network.answers import Answers, Flips
from recoup.network.meters import METERS, PADDING, Meter, Nats
from recoup.search import Space, front, score, verify
from recoup.search.pairing import flips, half_of_damage, loss
from recoup.study.intervals import difference
from recoup.tasks.shards import IncompleteError, Shard


def weighed(apart, labels):
    """Mean of differences weighed by labels, half its interval: numpy, of those that have labels."""
    d, c = (np.array([v for v, n in zip(part, labels, strict=True) if n]) for part in (apart, labels))
    mean = (d * c).sum() / c.sum()
    n = len(d)
    return mean, 1.959964 * math.sqrt(n / (n - 1) * ((c * (d - mean)) ** 2).sum()) / c.sum()


def found(samples, labels):
    value, half = weighed(samples, labels)
    return {
        "value": value,
        "count": sum(labels),
        "interval": [value - half, value + half],
        "samples": samples,
        "labels": labels,
    }


def test_nats_are_paired_window_by_window_and_ragged_ones_weighed():
    draw, labels = np.random.default_rng(0), [3, 1, 0, 5, 2]
    floats = [found(list(draw.random(5) * 4), labels)] * 2
    ones = [
        found([x + 0.01 * y for x, y in zip(floats[0]["samples"], draw.random(5), strict=True)], labels) for _ in "ab"
    ]
    apart = [weighed(np.subtract(one["samples"], floats[0]["samples"]), labels) for one in ones]
    alone = loss("nats", ones[:1], floats[:1], rises=False)
    assert (alone.mean, alone.half) == pytest.approx(apart[0], rel=1e-9)
    assert alone.half < 0.05 * (floats[0]["interval"][1] - floats[0]["interval"][0])
    both = loss("nats", ones, floats, rises=False)
    seeds = 12.7062 * abs(apart[0][0] - apart[1][0]) / 2  # Student's t of one degree of freedom
    assert both.mean == pytest.approx((apart[0][0] + apart[1][0]) / 2, rel=1e-9)
    assert both.half == pytest.approx(math.hypot((apart[0][1] + apart[1][1]) / 2, seeds), rel=1e-4)
    with pytest.raises(RecoupError, match="of other samples"):
        loss("nats", [found([1.0, 2.0], [1, 2])], [found([1.0, 2.0], [2, 1])], rises=False)


def test_accuracies_distances_and_measures_of_ones_own():
    top1 = [[{"value": value, "count": 200, "interval": [0, 100]}] for value in (90.0, 93.0)]
    assert loss("top1", *top1, rises=True) == difference([3.0], 200, [20 + 14])  # no answers: no image wrong in both
    assert flips(*top1) == ()
    kl = [[{"value": value, "count": 9, "interval": span}] for value, span in ((0.2, [0.1, 0.3]), (0.0, None))]
    near = loss("kl", *kl, rises=False)
    assert (near.mean, near.low, near.high) == pytest.approx((0.2, 0.1, 0.3))
    assert half_of_damage("kl", kl[0][0], kl[1][0]) == pytest.approx(0.1)
    assert half_of_damage("own", top1[0][0], top1[1][0]) == 0.0
    assert half_of_damage("top1", top1[0][0], top1[1][0]) == difference([3.0], 200, [34]).half


def answered(right, samples="of these"):
    kept = Answers.of(torch.tensor(right), samples).to_dict()
    return {"value": 100 * sum(right) / len(right), "count": len(right), "interval": [0, 100], "answers": kept}


def test_accuracies_are_paired_image_by_image():
    base = answered([True] * 90 + [False] * 10)
    one = answered([False] * 8 + [True] * 84 + [False] * 8)  # loses 8 and wins 2
    two = answered([False] * 3 + [True] * 87 + [False] * 10)  # loses 3
    assert flips([one, two], [base, base]) == (Flips(8, 2, 100), Flips(3, 0, 100))
    alone = loss("top1", [one], [base], rises=True)
    assert (alone.mean, alone.low, alone.high) == pytest.approx((6.0, *Flips(8, 2, 100).interval))
    assert half_of_damage("top1", one, base) == alone.half
    assert loss("top1", [one, two], [base, base], rises=True) == difference([6.0, 3.0], 100, [10, 3])
    for other in (answered([True] * 100, "of others"), answered([True] * 99)):
        with pytest.raises(RecoupError, match=r"search: answers to 100 samples and to \d+ .* of other samples"):
            loss("top1", [one], [other], rises=True)


def test_the_meter_keeps_what_pairs():
    torch.manual_seed(0)
    meter, label = Nats("test"), torch.tensor([[1, 2], [0, PADDING], [PADDING, PADDING]])
    meter.add(torch.randn(3, 2, 4), label, None, 0)
    assert meter.labelled == [2, 1, 0]
    value, half = weighed(meter.samples, meter.labelled)
    assert (meter.result().value, meter.result().interval[1]) == pytest.approx((value, value + half), rel=1e-9)
    assert meter.kept() == {"samples": [round(value, 9) for value in meter.samples], "labels": [2, 1, 0]}
    right = METERS["top1"]("test")
    right.add(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]), None, 0)
    right.add(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), None, 1)
    assert right.kept()["answers"] == {
        "right": base64.b64encode(bytes([0b10110000])).decode(),
        "count": 4,
        "samples": "",
    }
    assert [name for name, kind in METERS.items() if kind.kept is not Meter.kept] == ["top1", "nats"]


@pytest.mark.parametrize("metric", ["kl", "nats"])
def test_a_front_in_nats_has_the_loss_of_every_point(metric, tmp_path):
    torch.manual_seed(0)
    model = chargpt(characters=5, layers=1, width=8, heads=2, context=6).eval()
    x, y = (torch.randint(5, (24, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    scored, test = [(x[:8], y[:8])], [(x[8:16], y[8:16]), (x[16:], y[16:])]
    narrow = rc.LBA.biased(3, 3)
    scores = score(model, scored, Space({"re:blocks.*fc.": [None, narrow]}), metric=metric, probes=3, out=tmp_path)
    assert all(probe.half > 0 for probe in scores.probes)
    told = verify(front(scores, "bits", points=3), model, test, seeds=1, calibration=scored)
    plain = per_window(model, test)
    for point in told.points:
        hardware = {name: config for name, config in point.policy.items() if config is not None}
        rc.emulate_(model, None, hardware) if hardware else None
        if hardware:
            rc.repair_(model, scored)
        mean, half = weighed(per_window(model, test) - plain, [6] * 16)
        rc.restore_(model)
        seen = point.measured
        assert (seen.lost, (seen.lost_high - seen.lost_low) / 2) == pytest.approx((mean, half), abs=2e-8)
        assert told.lost(point) == pytest.approx(seen.lost, abs=1e-8)
        if metric == "nats":
            assert (seen.damage, seen.low, seen.high) == pytest.approx(
                (seen.lost, seen.lost_low, seen.lost_high), abs=1e-8
            )
    told.save(tmp_path)
    head = (tmp_path / "front.csv").read_text().splitlines()[0]
    assert head.endswith("reached,quality_low,quality_high,lost,lost_low,lost_high")
    kept = [json.loads(path.read_text())["value"].get("nats", {}) for path in (tmp_path / "records").iterdir()]
    assert all(("samples" in one) == (metric == "nats") for one in kept)


def test_a_front_in_top1_has_the_paired_loss_of_every_point(tmp_path):
    """Against raw logits; the same from records, and too wide rather than too narrow from those without answers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).eval()
    x, y = torch.randn(96, 6), torch.randint(5, (96,))
    scored, test = [(x[:32], y[:32])], [(x[32:72], y[32:72]), (x[72:], y[72:])]
    with torch.no_grad():
        test = [(a, torch.where(torch.arange(len(a)) % 3 > 0, model(a).argmax(1), b)) for a, b in test]
        plain = torch.cat([model(a).argmax(1) == b for a, b in test])
    scores = score(model, scored, Space({"re:.*": [None, rc.LBA.biased(2, 3)]}), metric="top1", probes=1, out=tmp_path)
    made = front(scores, "bits", points=3)
    told = verify(made, model, test, seeds=1, calibration=scored, out=tmp_path)
    changed = 0
    for point in told.points:
        hardware = {name: config for name, config in point.policy.items() if config is not None}
        if hardware:
            rc.repair_(rc.emulate_(model, None, hardware), scored)
        with torch.no_grad():
            now = torch.cat([model(a).argmax(1) == b for a, b in test])
        rc.restore_(model)
        lost, won = int((plain & ~now).sum()), int((now & ~plain).sum())
        seen = point.measured
        assert seen.flips == ((lost, won),)
        assert (seen.lost, seen.lost_low, seen.lost_high) == pytest.approx(
            (100 * (lost - won) / 64, *Flips(lost, won, 64).interval)
        )
        assert (seen.damage, seen.low, seen.high) == pytest.approx((seen.lost, seen.lost_low, seen.lost_high))
        changed += lost + won
    assert changed > 0
    again = verify(made, model, test, seeds=1, calibration=scored, out=tmp_path)
    assert again.made == 0
    assert [p.measured for p in again.points] == [p.measured for p in told.points]
    parts = tmp_path / "parts"
    with pytest.raises(IncompleteError):
        verify(made, model, test, seeds=1, calibration=scored, out=parts, shard=Shard(1, 2))
    divided = verify(made, model, test, seeds=1, calibration=scored, out=parts, shard=Shard(0, 2))
    assert [p.measured for p in divided.points] == [p.measured for p in told.points]
    without_answers(tmp_path / "records")
    bare = verify(made, model, test, seeds=1, calibration=scored, out=tmp_path)
    assert bare.made == 0
    for older, point in zip(bare.points, told.points, strict=True):
        assert older.measured.flips == ()
        assert older.measured.lost == pytest.approx(point.measured.lost)
        assert older.measured.lost_low <= point.measured.lost_low
        assert older.measured.lost_high >= point.measured.lost_high


def without_answers(folder):
    """Records as they were before answers were kept."""
    for path in folder.iterdir():
        content = json.loads(path.read_text())
        del content["value"]["top1"]["answers"]
        path.write_text(json.dumps(content))


def per_window(model, batches):
    """Nats of every window, without recoup's meters."""
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(x).mT.double(), y, reduction="none") for x, y in batches]
    return torch.cat(losses).mean(1).numpy()
