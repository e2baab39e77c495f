"""Colours of plots, and drawing in them whatever the user's matplotlib settings.

The first series are Okabe and Ito's colours; all are distinct for colour-blind readers too, as far as eleven can be,
and a figure gives every series a marker as well.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, cast

P = ParamSpec("P")

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
DASHES = ("-", "--", ":")


SERIES = (
    "#59636e",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b0508a",
    "#221188",
    "#773322",
    "#ee3355",
    "#5577ee",
    "#ee55dd",
    "#1111ee",
)
ON_DARK = (
    "#9aa5b1",
    "#56b4e9",
    "#e69f00",
    "#2dbd93",
    "#e08fc0",
    "#eedd99",
    "#cc1133",
    "#88bb44",
    "#6655bb",
    "#bb1199",
    "#8822ee",
)


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours: text, axes and their labels, grid, and series; the first series is the one others are compared with."""

    ink: str = "#1b1f24"
    muted: str = "#59636e"
    grid: str = "#dfe3e8"
    series: tuple[str, ...] = SERIES
    page: str = "#ffffff"

    def style(self) -> dict[str, Any]:
        """matplotlib's settings."""
        return {
            "font.size": 9,
            "text.color": self.ink,
            "figure.facecolor": self.page,
            "axes.facecolor": self.page,
            "savefig.facecolor": self.page,
            "axes.edgecolor": self.muted,
            "axes.labelcolor": self.muted,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "axes.formatter.useoffset": False,  # "1e-5+9.999e-1" above an axis is read by nobody
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "xtick.minor.size": 0,
            "ytick.minor.size": 0,
            "legend.frameon": False,
        }

    def look(self, index: int) -> dict[str, Any]:
        """Colour, marker and dashes of a series; when the colours come round, the markers are hollow and dashed."""
        colour, again = self.series[index % len(self.series)], index // len(self.series)
        return {
            "color": colour,
            "marker": MARKERS[index % len(self.series) % len(MARKERS)],
            "mfc": "none" if again else colour,
            "ls": DASHES[min(again, len(DASHES) - 1)],
        }


LIGHT = Palette()
DARK = Palette("#e6e9ed", "#9aa5b1", "#2f363e", ON_DARK, page="#14171b")


def styled(draw: Callable[P, Any]) -> Callable[P, Any]:
    """Draw in the style of the ``palette`` argument, whatever the user's settings, and leave those alone."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Any:
        from matplotlib import rc_context

        palette = kwargs.get("palette", LIGHT)
        assert isinstance(palette, Palette)
        with rc_context(cast("Any", palette.style())):
            return draw(*args, **kwargs)

    return drawn
