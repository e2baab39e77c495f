import io
import math

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from recoup.errors import RecoupError
from recoup.pipeline.wallclock import Times, timelines
from recoup.plots import pipeline as plots
from recoup.plots.palette import DARK, LIGHT, MARKERS, Palette

NAN = math.nan
LOSSES = {"SGDM": [[2.0, 1.0, 0.5], [1.0, 0.5, 0.1]], "PB $x": [[3.0, NAN, NAN], [2.0, 1.5, 1.2]]}
ACCURACIES = {"SGDM": [[50.0, 80.0, 90.0], [60.0, 90.0, 94.0]], "PB $x": [[40.0, NAN, NAN], [50.0, 60.0, 70.0]]}
SWEEP = {"PB": {30: [0.2, 0.4], 60: [0.8, NAN], 90: [NAN, NAN]}, "SC": {30: [0.1, 0.1], 60: [0.2, 0.3], 90: [0.4, 0.2]}}


def drawn(figure) -> bytes:
    """The figure as PNG."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def labelled(axis) -> dict[str, tuple[list[float], list[float]]]:
    """The lines with a label: x and y."""
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def band(axis, index) -> set[tuple[float, float]]:
    """The corners of a band."""
    return {tuple(corner) for corner in axis.collections[index].get_paths()[0].vertices.round(6)}


def test_curves_are_means_of_the_runs_that_go_on_and_bands_their_span():
    figure = plots.curves_figure([10, 20, 30], LOSSES, ACCURACIES)
    loss, accuracy = figure.axes
    found = labelled(loss)
    assert found["SGDM"] == ([10, 20, 30], pytest.approx([1.5, 0.75, 0.3]))
    assert found[r"PB \$x"] == ([10, 20, 30], pytest.approx([2.5, 1.5, 1.2]))
    assert {(10, 1), (10, 2), (20, 0.5), (20, 1), (30, 0.1), (30, 0.5)} <= band(loss, 0)
    assert band(loss, 1) == {(10, 2), (10, 3), (20, 1.5), (30, 1.2)}
    assert labelled(accuracy)["SGDM"][1] == pytest.approx([55, 85, 92])
    assert loss.get_yscale() == "log"
    assert accuracy.get_ylim()[1] == 95
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SGDM", r"PB \$x"]
    assert drawn(figure).startswith(b"\x89PNG")


def test_a_method_whose_runs_all_diverged_leaves_a_gap():
    gone = {"SGDM": [[1.0, 0.5]], "PB": [[NAN, NAN]]}
    loss, _ = plots.curves_figure([1, 2], gone, gone).axes
    assert labelled(loss)["PB"] == ([], [])
    drawn(plots.curves_figure([1, 2], {"PB": [[NAN, NAN]]}, {"PB": [[NAN, NAN]]}))


@pytest.mark.parametrize("log", [False, True])
def test_sweep(log):
    figure = plots.delay_figure(SWEEP, reference=("SGDM", [0.05, 0.15]), log=log)
    (axis,) = figure.axes
    found = labelled(axis)
    assert found["PB"][1] == pytest.approx([0.3, 0.8])
    assert found["SC"][1] == pytest.approx([0.1, 0.25, 0.3])
    assert found["SC"][0] == pytest.approx([30, 60, 90], abs=2 * plots.SPREAD * 30)
    assert found["SGDM"][1] == pytest.approx([0.1, 0.1])
    hollow = [line for line in axis.lines if line.get_mfc() == LIGHT.page and line.get_marker() in MARKERS]
    assert [list(line.get_ydata()) for line in hollow] == [[0.8]]
    (cross,) = [line for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert cross.get_xdata()[0] == pytest.approx(90, abs=2 * plots.SPREAD * 30)
    assert cross.get_ydata()[0] == axis.get_ylim()[1 if log else 0]
    assert "every run diverged" in axis.get_xlabel()
    assert drawn(figure)


def test_a_sweep_without_losses_says_nothing_of_them():
    (axis,) = plots.delay_figure({"SC": {30: [90.0, 91.0]}}).axes
    assert axis.get_xlabel() == "largest delay, updates"
    assert not any(line.get_marker() == "x" and len(line.get_xdata()) for line in axis.lines)


def test_half_lives():
    conditions, delays = {"GDM": {100.0: 69.0, 10.0: 7.0}}, {"GDM": {4: 1997.0, 1: 694.0}}
    figure = plots.half_life_figure(conditions, delays, delay=1, condition=1e3)
    left, right = figure.axes
    assert labelled(left)["GDM"] == ([10, 100], [7, 69])
    assert labelled(right)["GDM"] == ([1, 4], [694, 1997])
    assert {axis.get_yscale() for axis in figure.axes} | {axis.get_xscale() for axis in figure.axes} == {"log"}
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["At delay 1", "At condition number 1000"]
    assert drawn(figure)


def test_series_differ_in_more_than_colour():
    palette = Palette()
    looks = [palette.look(index) for index in range(10)]
    assert len({(look["marker"], look["mfc"] == "none", look["ls"]) for look in looks}) == 10


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float(
        np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    )


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_colours_stand_out_from_the_page(palette):
    for colour in (palette.ink, palette.muted, *palette.series):
        light, dark = sorted((luminance(colour), luminance(palette.page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.1, 1.4.11: graphical objects


def test_settings_are_neither_used_nor_changed():
    before = dict(mpl.rcParams)
    plain = drawn(plots.curves_figure([1, 2, 3], LOSSES, ACCURACIES))
    with mpl.rc_context({"axes.grid": False, "font.size": 30, "text.color": "red"}):
        figure = plots.curves_figure([1, 2, 3], LOSSES, ACCURACIES)
        dark = plots.curves_figure([1, 2, 3], LOSSES, ACCURACIES, palette=DARK)
    assert drawn(figure) == plain
    assert drawn(dark) != plain
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda: plots.curves_figure([1], {}, {}), "there must be a method"),
        (lambda: plots.curves_figure([1], {"a": [[1.0]]}, {"b": [[1.0]]}), r"losses of \['a'\], accuracies of \['b'\]"),
        (lambda: plots.curves_figure([1], {"a": []}, {"a": [[1.0]]}), "a: loss curves of lengths"),
        (lambda: plots.curves_figure([1], {"a": [[1.0]]}, {"a": [[1.0, 2.0]]}), r"accuracy curves of lengths \[2\]"),
        (lambda: plots.delay_figure({}), "name a mitigation or more"),
        (lambda: plots.delay_figure({"PB": {30: []}}), "runs at every delay"),
        (lambda: plots.half_life_figure({}, {}, delay=1, condition=10), "one or more"),
        (lambda: plots.half_life_figure({"a": {1: NAN}}, {"a": {1: 1.0}}, delay=1, condition=10), "above 0 and finite"),
        (lambda: plots.half_life_figure({"a": {1: 1.0}}, {"b": {1: 1.0}}, delay=1, condition=10), "must be the same"),
        (lambda: plots.half_life_figure({"a": {1: 1.0}}, {"a": {0: 1.0}}, delay=1, condition=10), "1 or more"),
    ],
)
def test_errors(draw, told):
    with pytest.raises(RecoupError, match=told):
        draw()


def test_a_timeline_has_a_bar_for_every_operation_in_milliseconds():
    done = timelines([Times(0.001, 0.002, 0.0005)] * 2, 3, 2)
    figure = plots.timeline_figure(done, title="of $two")
    assert [axis.get_title(loc="left").split(":")[0] for axis in figure.axes] == list(done)
    for axis, operations in zip(figure.axes, done.values(), strict=True):
        spans = sorted(tuple(c.get_paths()[0].get_extents().intervalx.round(9)) for c in axis.collections)
        assert spans == sorted((round(a * 1e3, 9), round(b * 1e3, 9)) for a, b in operations.values())
    busy = sum(b - a for a, b in done["1F1B"].values()) / (2 * max(b for _, b in done["1F1B"].values()))
    assert figure.axes[1].get_title(loc="left") == f"1F1B: {busy:.0%} busy"
    assert drawn(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("timelines", [{}, {"1F1B": {}}])
def test_a_timeline_of_nothing_is_refused(timelines):
    with pytest.raises(RecoupError, match="every schedule must have an operation"):
        plots.timeline_figure(timelines)
