"""Plots of what LightNorm stores, moves, estimates and rounds, as matplotlib figures for any back end.

No function touches pyplot or leaves a matplotlib setting changed. Series differ in colour (Okabe and Ito's palette,
distinct for colour-blind readers) and in marker or hatching.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from recoup.errors import RecoupError
from recoup.lightnorm.config import LightNorm, Scale
from recoup.lightnorm.cost import WORD, block_bits, widths
from recoup.lightnorm.scale import constant, gaussian_range
from recoup.lightnorm.separate import blocked, rounded
from recoup.plots.palette import LIGHT, MARKERS, Palette, styled
from recoup.plots.ratio import times

WIDTH = 9.2  # inches
SCALES: tuple[Scale, ...] = ("gaussian", "hoffer", "paper")
CHUNK_SIZES = tuple(2**e for e in range(2, 18))
DRAWS, LARGEST_DRAW, SEED = 400, 2**11, 0  # Monte Carlo: channels a size, largest chunk
BINS = 81


def _canvas(columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options)[0])


@styled
def traffic_figure(variants: Mapping[str, LightNorm | None], *, palette: Palette = LIGHT) -> Any:
    """Stored bits of an element, and bits an element moves in a training step, a bar each a variant.

    Args:
        variants: label -> config; None: float32 batch norm. Whole blocks; see `recoup.lightnorm.cost`.
        palette: colours.

    Returns:
        A matplotlib Figure with two panels that share their rows.

    Raises:
        RecoupError: no variant.
    """
    if not variants:
        raise RecoupError("lightnorm traffic_figure: name one variant or more")
    figure, (stored, moved) = _canvas(2, 0.42 * len(variants) + 1.25, sharey=True)
    for y, config in enumerate(variants.values()):
        _stored_bars(stored, y, _stored(config), palette)
        each = widths(config)
        moved.barh(y, each.blocks, height=0.6, color=palette.series[1 if config else 0])
        saved = f"  ({times(each.ratio)})" if config else ""
        moved.text(each.blocks + 3, y, f"{each.blocks:.4g}{saved}", va="center")
    stored.set_yticks(range(len(variants)), [_plain(name) for name in variants])
    stored.set_ylim(len(variants) - 0.5, -0.5)
    stored.set_xlim(0, WORD * 1.15)
    moved.set_xlim(0, max(widths(config).blocks for config in variants.values()) * 1.2)
    stored.set_title("Stored bits an element")
    moved.set_title("Bits an element moves in a training step")
    for axis in (stored, moved):
        axis.grid(visible=False, axis="y")
    handles, labels = stored.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower left", ncols=2)
    return figure


def _stored(config: LightNorm | None) -> tuple[float, float]:
    if config is None:
        return WORD, WORD
    return block_bits(config.forward_blocks, config.forward), block_bits(config.backward_blocks, config.backward)


def _stored_bars(axis: Any, y: int, bits: tuple[float, float], palette: Palette) -> None:
    kinds = (("activations", palette.series[1], "", -0.17), ("gradients", palette.series[2], "//", 0.17))
    for (label, colour, hatch, offset), value in zip(kinds, bits, strict=True):
        look = {"facecolor": colour, "hatch": hatch, "edgecolor": palette.grid, "linewidth": 0}
        axis.barh(y + offset, value, height=0.32, label=label, **look)
        axis.text(value + 0.4, y + offset, f"{value:.4g}", va="center", fontsize=7.5)


@styled
def accuracy_figure(rows: Sequence[tuple[str, LightNorm | None, Sequence[float]]], *, palette: Palette = LIGHT) -> Any:
    """Accuracy against the stored bits of an activation: mean and span of the runs.

    Args:
        rows: label, config (None: float32 batch norm) and accuracies of its runs in percent.
        palette: colours.

    Returns:
        A matplotlib Figure.

    Raises:
        RecoupError: no row, or one without accuracies.
    """
    if not rows or not all(len(values) for _, _, values in rows):
        raise RecoupError("lightnorm accuracy_figure: every row needs one accuracy or more, and there must be a row")
    figure, (axis,) = _canvas(1, 3.6)
    placed: dict[float, int] = {}
    reach: dict[float, list[float]] = {}
    for _, config, values in rows:
        reach.setdefault(_stored(config)[0], []).extend(values)
    for index, (label, config, values) in enumerate(sorted(rows, key=lambda row: _stored(row[1])[0])):
        bits, mean = _stored(config)[0], float(np.mean(values))
        everyone, beside = reach[bits], placed.get(bits, 0)
        placed[bits] = beside + 1
        kind = _kind(config)
        spread = [[mean - min(values)], [max(values) - mean]]
        look = {"color": palette.series[kind], "marker": MARKERS[kind], "ms": 6, "capsize": 2.5, "lw": 1.2}
        x = bits * 1.025**beside  # of the same width, side by side
        axis.errorbar(x, mean, yerr=spread, **look)
        side = 1 if index % 2 else -1  # neighbours in bits are often neighbours in accuracy too
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom" if side > 0 else "top", "fontsize": 8}
        axis.annotate(_plain(label), (x, max(everyone) if side > 0 else min(everyone)), (0, 5 * side), **place)
    axis.set_xscale("log", base=2)
    ticks = sorted({8, 16, WORD})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlim(min(5.5, min(_stored(c)[0] for _, c, _ in rows) * 0.9), WORD * 1.25)
    axis.margins(y=0.2)
    axis.set_xlabel("stored bits of an activation (log scale)")
    axis.set_title("Top-1 accuracy, %: mean and span of the runs")
    return figure


def _kind(config: LightNorm | None) -> int:
    if config is None:
        return 0
    return 1 if config.forward is None else 2 if config.block is None else 3


@styled
def scale_figure(*, chunks: int = 8, palette: Palette = LIGHT) -> Any:
    """s / sigma of Gaussian data by n, for each of the three constants.

    Lines are the exact expectation E[s] / sigma = C(m) E[range of m], m = n / K (eps = 0); points with whiskers the
    mean and the 5th to 95th percentile of 400 simulated channels, with a fixed seed.

    Args:
        chunks: K.
        palette: colours.

    Returns:
        A matplotlib Figure.

    Raises:
        RecoupError: chunks below 1.
    """
    if chunks < 1:
        raise RecoupError(f"lightnorm scale_figure(chunks={chunks}): chunks must be 1 or more")
    figure, (axis,) = _canvas(1, 3.6)
    draws = {m: simulated_ranges(m, chunks) for m in CHUNK_SIZES[:: 3 if chunks > 1 else 2] if m <= LARGEST_DRAW}
    for index, scale in enumerate(SCALES, 1):
        colour = palette.series[index]
        n = [m * chunks for m in CHUNK_SIZES]
        axis.plot(n, [expected_ratio(m, scale) for m in CHUNK_SIZES], color=colour, lw=1.4)
        for m, ranges in draws.items():
            ratios = constant(m, scale) * ranges
            mean, low, high = ratios.mean(), *np.percentile(ratios, (5, 95))
            shift = 1.06 ** (index - 2)  # side by side
            spread = [[mean - low], [high - mean]]
            look = {"color": colour, "marker": MARKERS[index], "ms": 4.5, "capsize": 2, "lw": 1}
            axis.errorbar(m * chunks * shift, mean, yerr=spread, **look)
        place = {"textcoords": "offset points", "va": "center", "color": colour, "fontsize": 9}
        axis.annotate(
            scale, (n[1], expected_ratio(CHUNK_SIZES[1], scale)), (10, 9 if scale == "gaussian" else -9), **place
        )
    axis.axhline(1, color=palette.muted, lw=0.8, ls="--", zorder=0.9)
    axis.set_xscale("log", base=2)
    axis.set_xlim(CHUNK_SIZES[0] * chunks / 1.4, CHUNK_SIZES[-1] * chunks * 1.4)
    axis.set_xlabel(f"n, elements of a channel in {chunks} chunk{'s' * (chunks > 1)}")
    axis.set_title("Estimate of the standard deviation, s / sigma, on Gaussian data")
    return figure


def expected_ratio(samples: int, scale: Scale) -> float:
    """E[s] / sigma of Gaussian data in chunks of m = ``samples``, eps = 0: exact.

    >>> expected_ratio(128, "gaussian")
    1.0
    """
    return constant(samples, scale) * gaussian_range(samples)


def simulated_ranges(samples: int, chunks: int) -> np.ndarray:
    """The mean over chunks of the range of m Gaussian samples, 400 channels; float64 [400], the same in every run."""
    x = np.random.default_rng((SEED, samples, chunks)).standard_normal((DRAWS, chunks, samples))
    return np.ptp(x, axis=2).mean(1)


@styled
def rounding_figure(x: Tensor, config: LightNorm, *, palette: Palette = LIGHT) -> Any:
    """A feature map before and after LightNorm's rounding B(F(x)): values, and magnitudes by powers of two.

    Args:
        x: finite float32 or float64 [N, C, ...].
        config: formats and blocks.
        palette: colours.

    Returns:
        A matplotlib Figure with two panels.

    Raises:
        RecoupError: not floating point with two dimensions or more; NaN or infinite values; no value.
    """
    if not x.is_floating_point() or x.dim() < 2 or not x.numel() or not bool(x.isfinite().all()):
        what = f"{x.dtype} {list(x.shape)}"
        raise RecoupError(f"lightnorm rounding_figure: needs finite floating point [N, C, ...] with values; got {what}")
    before = x.detach().cpu()
    places = before.flatten(2) if before.dim() > 2 else before.unsqueeze(2)
    after = blocked(rounded(places, config.forward), config.forward_blocks)
    figure, (values, powers) = _canvas(2, 3.4)
    old, new = (t.double().numpy().ravel() for t in (before, after))
    reach = float(np.abs(old).max()) or 1.0
    ends = (old.min(), old.max()) if old.min() < old.max() else (-reach, reach)
    _histograms(values, old, new, np.linspace(*ends, BINS), palette)
    values.set_title("Values")
    values.set_xlabel("value")
    sizes = [np.log2(np.abs(v[v != 0])) for v in (old, new)]
    low = max(min((s.min() for s in sizes if s.size), default=-1.0), np.log2(reach) - 24)
    edges = np.arange(np.floor(low), np.ceil(np.log2(reach)) + 1.01, 0.25)
    _histograms(powers, sizes[0], sizes[1], edges, palette)
    zeros = [100 * float((v == 0).mean()) for v in (old, new)]
    powers.set_title("Magnitudes that are not zero")
    powers.set_xlabel(f"log2 |value|   (zeros: {zeros[0]:.1f} % before, {zeros[1]:.1f} % after)")
    handles, labels = values.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, borderaxespad=0.2)
    return figure


def _histograms(axis: Any, old: np.ndarray, new: np.ndarray, edges: np.ndarray, palette: Palette) -> None:
    axis.hist(old, edges, color=palette.series[0], alpha=0.35, label="before")
    axis.hist(new, edges, histtype="step", color=palette.series[2], lw=1.2, label="after rounding")
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("elements")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar sign would begin a formula
