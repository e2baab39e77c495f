"""The search's chapter says what the numbers say, in text, table and pictures."""

import math
import re

import pytest

from recoup.network.answers import Flips
from recoup.report.alone import write_alone
from recoup.report.chapters.search import CHAPTER, apart, setting_text, surrogate_text, verdict
from recoup.report.search_figures import additivity_figure, front_figure, heat_figure, strip_figure
from recoup.search.results import GroupRow, PointRow, ProbeRow, SearchResults


def point(name, options, cycles, damage, reached, kind="front", on_front=True):
    seen = {"damage": damage, "low": 0.8 * damage, "high": 1.2 * damage}
    spread = {"reached": reached, "reached_low": reached - 1, "reached_high": reached + 1}
    costs = {"cycles": cycles}
    return PointRow(
        name=name, kind=kind, on_front=on_front, options=options, costs=costs, predicted=damage, **seen, **spread
    )


def paired(found, won=0):
    """As a search keeps it: images that a point loses against float and ``won`` that it wins."""
    known = []
    for one in found.points:
        less = round((found.floating - one.reached) / 100 * found.count)
        flips = Flips(less + won, won, found.count)
        told = {"lost": flips.points, "flips": ((flips.lost, flips.won),)}
        told |= dict(zip(("lost_low", "lost_high"), flips.interval, strict=True))
        known.append(one.model_copy(update=told))
    return found.model_copy(update={"points": tuple(known)})


def context_of(found):
    """The chapter's values for the page."""
    context = CHAPTER.context(found)
    assert context is not None
    return context


def study(**changes):
    groups = (
        GroupRow(name="conv1", layers=("conv1",), options=("1 thread", "4 threads"), damages=(1e-5, 0.01)),
        GroupRow(name="<conv2>", layers=("conv2", "conv3"), options=("1 thread", "4 threads"), damages=(0.0, 0.1)),
    )
    points = (
        point("point 00", (1, 1), 25.0, 0.11, 90.0),
        point("point 01", (1, 0), 60.0, 0.011, 92.9),
        point("point 02", (0, 0), 100.0, 0.0105, 93.1),
        point("1 thread", (0, 0), 100.0, 0.0105, 93.1, "uniform"),
        point("worse", (0, 1), 70.0, 0.1, 91.0, "uniform", on_front=False),
    )
    values = {
        "date": "2026-11-26T00:00:00+00:00",
        "model": "net",
        "data": "digits",
        "metric": "kl",
        "repair": "default",
        "groups": groups,
        "probes": (
            ProbeRow(label="a", predicted=0.1, measured=0.12),
            ProbeRow(label="b", predicted=0.01, measured=0.009),
        ),
        "power": 1.0,
        "error": 1.25,
        "rank": 0.97,
        "trusted": True,
        "costs": ("cycles",),
        "first": {"cycles": 100.0},
        "limits": {},
        "points": points,
        "quality": "top1",
        "floating": 93.3,
        "count": 1000,
        "seeds": 3,
        "budget": 0.5,
        "chosen": 1,
        "measurements": 21,
    }
    return SearchResults(**(values | changes))


def test_the_verdict_names_the_point_its_saving_and_what_the_images_leave_open():
    said = verdict(study()).replace("\N{NO-BREAK SPACE}", " ")
    assert said.startswith(
        "net on digits: within 0.5 points of float (93.30 %) point 01 takes 0.60 of the cycles and reaches 92.90 %; "
        "1,000 test images leave a loss of "
    )
    assert "no policy stays within 0.1 points" in verdict(study(budget=0.1, chosen=None))
    none = study(budget=0.1, chosen=None)
    assert "the best loses 0.20 (-0.14 to +0.54), at 1.00 of the cycles" in verdict(paired(none))
    assert "the best loses 0.20 (-0.74 to +1.14), at 1.00 of the cycles" in verdict(paired(none, won=10))
    assert "answers were not kept" not in verdict(paired(study()))


def test_older_results_say_the_widest_interval_that_the_accuracies_allow():
    """What 67 wrong in float and 69 on the point leave, if they are all different ones; whatever is in lost_low."""
    half = 1.959964 * math.sqrt(67 + 69 + 1 - 2**2 / 1002) / 1002 * 100
    told = f"({0.2 - half:+.2f} to {0.2 + half:+.2f})"
    none = study(budget=0.1, chosen=None)
    assert f"the best loses 0.20 {told}, at 1.00 of the cycles" in verdict(none)
    narrow = [one.model_copy(update={"flips": ()}) for one in paired(none).points]
    assert f"the best loses 0.20 {told}, at" in verdict(none.model_copy(update={"points": tuple(narrow)}))
    assert "open (the widest that the accuracies allow: answers were not kept)" in verdict(study())
    assert "none was measured" in verdict(study(floating=None, budget=None, chosen=None))


def test_a_loss_of_nats_has_the_interval_of_the_difference():
    """Of older results, which do not have it, the verdict says over how many tokens."""
    told = {"quality": "nats", "floating": 1.6, "budget": 0.01, "count": 12288, "sample": "window"}
    points = [p.model_copy(update={"reached": 1.6 + 0.004 * n}) for n, p in enumerate(reversed(study().points))]
    known = [
        p.model_copy(update={"lost": 0.004 * n, "lost_low": 0.004 * n - 0.001, "lost_high": 0.004 * n + 0.001})
        for n, p in enumerate(points)
    ]
    said = verdict(study(**told, points=tuple(known), chosen=2)).replace("\N{NO-BREAK SPACE}", " ")
    assert said.endswith("12,288 test tokens leave a loss of +0.0070 to +0.0090 nats open, all within the budget.")
    assert verdict(study(**told, points=tuple(points), chosen=2)).endswith("; over 12,288 tokens.")
    none = verdict(study(**{**told, "budget": 1e-4}, points=tuple(known[1:]), chosen=None))
    assert "the best loses 0.0040 (+0.0030 to +0.0050), at" in none
    found = study(**told, points=tuple(known), chosen=2)
    assert [row["lost"] for row in context_of(found)["rows"]][2] == "0.0080 (+0.0070 to +0.0090)"
    assert CHAPTER.totals(found)[0].columns[-1] == "lost, 95 %"
    assert "window by window" in context_of(found)["lost_on"]
    assert "bars: of the difference from float" in front_figure(found, "cycles")


def test_points_that_the_data_cannot_tell_apart_are_marked():
    assert apart(study()) == {"point 00": True, "point 01": True, "point 02": False}
    rows = context_of(study())["rows"]
    assert [row["same"] for row in rows] == [False, False, True, False, False]
    assert [row["chosen"] for row in rows] == [False, True, False, False, False]


def test_texts():
    assert "2 groups of layers with 4 options: 4 policies, answered from 21 measured networks" in setting_text(study())
    assert "[0.80, 1.25], rank correlation 0.97" in surrogate_text(study())
    assert "So it does for 3 of 3 policies of the front" in surrogate_text(study())
    assert "trust the measured points alone" in surrogate_text(study(trusted=False))
    missed = tuple(p.model_copy(update={"predicted": 5 * (p.damage or 0.0)}) for p in study().points)
    far = surrogate_text(study(points=missed))
    assert "So it does for 0 of 3" in far
    assert far.endswith("Trust the measured points alone.")
    none = {"error": None, "trusted": False}
    assert "How damages add up was not measured" in surrogate_text(study(probes=(), **none))
    odd = (ProbeRow(label="a", predicted=0.0, measured=4.0), ProbeRow(label="b", predicted=1.0, measured=1.0))
    assert surrogate_text(study(probes=odd, **none)).startswith("Of 2 whole networks 1 have damage where none was")
    assert "No band holds every probe" in (additivity_figure(study(probes=odd, **none)) or "")
    (table,) = CHAPTER.totals(paired(study()))
    assert table.rows[1] == ("point 01 *", "0.60", "1.10e-02", "1.10e-02", "92.90", "-0.04 to +0.84")
    assert table.rows[4][0] == "worse (point 01 is better)"
    assert (table.caption or "").startswith(
        "Better: costs no more and does no more damage, and one of the two is less."
    )
    (said,) = CHAPTER.totals(study(uncounted=("lstm (LSTM)",), notes=("outside the space no hardware runs fc.",)))
    assert (said.caption or "").endswith("Not counted in any cost: lstm (LSTM). Outside the space no hardware runs fc.")
    over = point("over", (0, 1), 90.0, 0.001, 93.2, "uniform", on_front=False).model_copy(update={"allowed": False})
    limited = study(points=(*study().points, over), budget=0.1, chosen=None)
    assert CHAPTER.totals(limited)[0].rows[5][0] == "over (over a limit)"
    assert "the best loses 0.20" in verdict(limited)


def test_pictures_are_described_and_escape_what_the_user_wrote(tmp_path):
    found = study()
    front = front_figure(found, "cycles")
    assert 'aria-label="The front: KL from float, nats against cycles. point 00: 0.25 of cycles, 0.11;' in front
    assert "the largest is 0.1, &lt;conv2&gt; on 4 threads" in heat_figure(found)
    assert additivity_figure(found) is not None
    assert additivity_figure(study(probes=(), points=())) is None
    assert "point 01: 1 on 4 threads, 1 on 1 thread" in strip_figure(found)
    page = write_alone(tmp_path, "net on digits", "today", [found]).read_text()
    assert "<conv2>" not in page
    assert page.count("<svg") == 4


def with_tuned(**changes):
    told = {"predicted": None, "weights": "tuned/<w>.safetensors", **changes}
    tuned = point("point 00, tuned", (1, 1), 25.0, 0.9, 92.8, "tuned").model_copy(update=told)
    return study(points=(*study().points, tuned))


def marks(figure, series):
    """Places of a series' filled marks, the legend's last."""
    text = rf'<use [^>]*x="([-.0-9]+)" y="([-.0-9]+)" style="fill: var\(--series-{series}\)[^"]*linejoin: miter"'
    return [(float(x), float(y)) for x, y in re.findall(text, figure)]


def test_fine_tuned_points_are_filled_marks_of_their_own_right_of_the_point_with_their_cost():
    bare, figure = front_figure(study(), "cycles"), front_figure(with_tuned(), "cycles")
    damage, reached, _ = marks(figure, 4)
    front = marks(figure, 2)
    assert not marks(bare, 4)
    assert len(front) == len(marks(bare, 2)) == 3 + 3 + 1  # both panels and the legend, as without fine-tuned ones
    assert damage[0] - front[0][0] == pytest.approx(7, abs=1e-3)
    assert reached[0] - front[3][0] == pytest.approx(7, abs=1e-3)
    assert damage[1] < front[0][1]  # further from float
    assert reached[1] < front[3][1]  # and more accurate
    _, top, _, height = map(float, re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', figure)[0])
    assert top < damage[1] < top + height  # the axes make room for it
    assert "fine-tuned, measured" in figure
    assert "fine-tuned" not in bare
    assert "point 00, tuned: 0.25 of cycles, 0.9." in figure


def test_fine_tuned_points_are_named_with_their_weights_and_are_in_no_prediction(tmp_path):
    found = with_tuned()
    assert found.front == study().front
    row = context_of(found)["rows"][-1]
    assert (row["name"], row["kind"], row["predicted"], row["mark"]) == ("point 00, tuned", "tuned", "", "")
    assert context_of(with_tuned(on_front=False))["rows"][-1]["mark"] == "(another is better)"  # made up: none is
    dear = with_tuned(on_front=False).points[-1].model_copy(update={"costs": {"cycles": 61.0}})
    assert context_of(study(points=(*study().points, dear)))["rows"][-1]["mark"] == "(point 01 is better)"
    (table,) = CHAPTER.totals(paired(found))
    assert table.rows[-1] == ("point 00, tuned", "0.25", "", "9.00e-01", "92.80", "+0.02 to +0.98")
    assert "of their own: point 00, tuned (tuned/<w>.safetensors). Their damage" in (table.caption or "")
    assert "Fine-tuned" not in (CHAPTER.totals(study())[0].caption or "")
    assert surrogate_text(found) == surrogate_text(study())
    assert additivity_figure(found) == additivity_figure(study())
    assert "point 00, tuned: 2 on 4 threads" in strip_figure(found)
    assert "tuned: " not in strip_figure(with_tuned(options=()))  # its policy is not in the space
    page = write_alone(tmp_path, "net on digits", "today", [found]).read_text()
    assert "tuned/&lt;w&gt;.safetensors" in page
    assert "point 00, tuned takes 0.25" in verdict(found.model_copy(update={"chosen": 5}))


@pytest.mark.parametrize("floating", [None, 93.3])
def test_a_front_before_it_is_verified(floating):
    bare = [PointRow(name="p", kind="front", on_front=True, options=(0, 0), costs={"cycles": 9.0}, predicted=0.1)]
    found = study(points=tuple(bare), floating=None, quality="", budget=None, chosen=None, seeds=0)
    assert context_of(found)["rows"][0]["damage"] == ""
    assert floating is None or verdict(found)
