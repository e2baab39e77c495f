import io

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from recoup.errors import RecoupError
from recoup.formats import quantize
from recoup.lightnorm import LightNorm
from recoup.lightnorm.scale import HOFFER, gaussian_range
from recoup.plots import lightnorm as plots
from recoup.plots.palette import MARKERS, Palette

VARIANTS = {"float32": None, "range $x": LightNorm.range(), "blocks": LightNorm(), "max": LightNorm(shared="max")}


def drawn(figure) -> bytes:
    """The figure as PNG."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_traffic():
    figure = plots.traffic_figure(VARIANTS)
    stored, moved = figure.axes
    widths = [bar.get_width() for bar in moved.patches]
    assert widths == [288, 224, 61.5, 48.5]
    assert texts(moved) == ["288", "224  (1.3x less)", "61.5  (4.7x less)", "48.5  (5.9x less)"]
    assert [bar.get_width() for bar in stored.patches] == [32, 32, 32, 32, 9, 8.5, 7.25, 6.5]
    assert drawn(figure).startswith(b"\x89PNG")


def test_accuracy_against_bits():
    rows = [("bn", None, [91.0, 92.0]), ("range", LightNorm.range(), [90.0]), ("blocks", LightNorm(), [89, 90, 91])]
    (axis,) = plots.accuracy_figure(rows).axes
    points = {
        round(float(line.get_xdata()[0]), 1): float(line.get_ydata()[0])
        for line in axis.lines
        if line.get_marker() in MARKERS
    }
    assert points == {9.0: 90.0, 32.0: 91.5, 32.8: 90.0}  # the second of 32 bits stands beside the first
    assert sorted(texts(axis)) == ["blocks", "bn", "range"]
    drawn(plots.accuracy_figure(rows))


@pytest.mark.parametrize("chunks", [1, 8])
def test_scale(chunks):
    figure = plots.scale_figure(chunks=chunks)
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(plots.CHUNK_SIZES)]
    gaussian, hoffer, paper = (np.asarray(line.get_ydata()) for line in curves)
    assert gaussian == pytest.approx(1, rel=3e-16)  # x times 1 / x
    assert hoffer == pytest.approx(HOFFER * paper)
    within = [ratio for m, ratio in zip(plots.CHUNK_SIZES, paper, strict=True) if 16 <= m <= 16384]
    assert min(within) == within[0] == pytest.approx(1.5, abs=0.01)
    assert max(within) == within[-1] == pytest.approx(1.8, abs=0.03)
    drawn(figure)


@pytest.mark.parametrize(("samples", "chunks"), [(8, 8), (128, 8), (512, 1)])
def test_simulation_agrees_with_the_expectation(samples, chunks):
    ranges = plots.simulated_ranges(samples, chunks)
    assert (ranges == plots.simulated_ranges(samples, chunks)).all()
    ratios = ranges / gaussian_range(samples)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / len(ratios) ** 0.5


def test_rounding():
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    config = LightNorm()
    figure = plots.rounding_figure(x, config)
    values, powers = figure.axes
    assert config.forward is not None
    assert config.forward_blocks is not None
    y = quantize(quantize(x, config.forward), config.forward_blocks)
    zeros = 100 * (y == 0).double().mean()
    assert f"zeros: 0.0 % before, {zeros:.1f} % after" in powers.get_xlabel()
    heights = [patch.get_height() for patch in values.patches if hasattr(patch, "get_height")]
    assert sum(heights) == x.numel()
    drawn(figure)


def test_rounding_along_places():
    """Blocks of pixels run on over the rows of an image."""
    x = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-9, 6).view(3, 5)
    config = LightNorm(block=15, shared="max", axis="place")
    powers = plots.rounding_figure(x, config).axes[1]
    zeros = 100 * ((x.abs() < 2.0**-4 * _power_of_two(x.abs().amax((2, 3), keepdim=True))).double().mean())
    assert f"zeros: 0.0 % before, {zeros:.1f} % after" in powers.get_xlabel()


def _power_of_two(x):
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.full((2, 3), 2.5), torch.tensor([[1.0], [0.0]])])
def test_rounding_of_little(x):
    assert drawn(plots.rounding_figure(x, LightNorm()))


def test_settings_are_neither_used_nor_changed():
    before = dict(mpl.rcParams)
    plain = drawn(plots.traffic_figure(VARIANTS))
    with mpl.rc_context({"axes.grid": False, "font.size": 30, "text.color": "red"}):
        palette = Palette(ink="#ff0000")
        assert drawn(plots.traffic_figure(VARIANTS, palette=palette)) != plain
    assert dict(mpl.rcParams) == before
    assert drawn(plots.traffic_figure(VARIANTS)) == plain


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda: plots.traffic_figure({}), "one variant or more"),
        (lambda: plots.accuracy_figure([]), "there must be a row"),
        (lambda: plots.accuracy_figure([("x", None, [])]), "one accuracy or more"),
        (lambda: plots.scale_figure(chunks=0), "1 or more"),
        (lambda: plots.rounding_figure(torch.zeros(2, 2, dtype=torch.int32), LightNorm()), "int32"),
        (lambda: plots.rounding_figure(torch.full((2, 2), torch.nan), LightNorm()), "finite"),
        (lambda: plots.rounding_figure(torch.zeros(3), LightNorm()), "finite floating point"),
    ],
)
def test_errors(draw, told):
    with pytest.raises(RecoupError, match=told):
        draw()
