"""NB-SMT's part of a report: collisions and errors layer by layer, and the array's cycles."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup.nbsmt.config import NBSMT
from recoup.plots.ratio import FEWER, times
from recoup.report import words
from recoup.report.chapters import Chapter, Limit, Table, layer_tables, measured
from recoup.report.figures import canvas, layer_ticks, legend, name_space, plot_line, styled, svg
from recoup.report.summary import compared_titles
from recoup.study.measures.nbsmt import LayerRow
from recoup.study.results import Results

COLUMNS = ("layer", "threads", "collisions %", "lossy %", "utilization %", "error")

TERMS = {
    "thread": "One of the 2 or 4 parts of a layer's reduction (its input channels) that share a multiplier.",
    "slot": "One multiplier in one cycle; every thread brings it one activation and one weight.",
    "active": "A thread whose activation and weight in a slot are both non-zero.",
    "collision": (
        "A slot with two or more active threads: the multiplier is split, and an operand may lose its 4 low bits. "
        "The rate is over all slots."
    ),
    "lossy": (
        "A thread's product that came out changed; the rate is over the active products. Operands that fit 4 bits "
        "pass a collision unchanged."
    ),
    "utilization": "Slots with an active thread, over all slots.",
    "error": (
        "Squared difference of a layer's output from the 8-bit output for the same input, over the square of the "
        "8-bit output, both summed over all images."
    ),
    "mean part": (
        "The share of the error that is one constant per output channel: what bias correction removes and BatchNorm "
        "recalibration absorbs."
    ),
    "8 bit": (
        "The baseline: 8-bit activations, signed where a layer's inputs are negative (one scale a layer), signed 8-bit "
        "weights (one scale an output channel), exact sums, one thread."
    ),
    "policy": (
        "Which slack is looked for before an operand is reduced: S zero operands, A and W activations or weights that "
        "fit 4 bits; the capital letter of Aw and aW names the operand that is reduced when neither fits."
    ),
    "gain": words.GAIN,
    "slowed": "Of the emulated layers: those that run fewer threads, by the layer map or because they are grouped.",
}


@dataclass(frozen=True, slots=True)
class Cycles:
    """Array cycles of a config for one image: of all layers, and of the emulated ones alone.

    Attributes:
        single, emulated_single: the same with one thread.
        throttled: emulated layers that run fewer threads than the config, of several those of the fastest.
    """

    title: str
    cycles: int
    single: int
    emulated: int
    emulated_single: int
    throttled: int

    @property
    def speedup(self) -> float:
        """How many times fewer cycles the network takes; layers left in float run one thread in both."""
        return self.single / self.cycles if self.cycles else 1.0

    @property
    def emulated_speedup(self) -> float:
        """The same of the emulated layers alone."""
        return self.emulated_single / self.emulated if self.emulated else 1.0


def cycles_of(results: Results, config: Any) -> Cycles | None:
    """A config's cycles, alone or in a mix; None where they were not counted."""
    hardware = results.hardware_of(config)
    asked = max((own.threads for own in hardware.of(NBSMT)), default=1)
    rows = results.rows("cycles", hardware.name)
    emulated = [row for row in rows if row.emulated]
    if not rows:
        return None
    return Cycles(
        hardware.title,
        sum(row.cycles for row in rows),
        sum(row.single for row in rows),
        sum(row.cycles for row in emulated),
        sum(row.single for row in emulated),
        sum(row.threads < asked for row in emulated),
    )


def all_cycles(results: Results) -> list[Cycles]:
    """Those of all configs, behind one thread's."""
    rows = [found for config in results.recipe.chips if (found := cycles_of(results, config)) is not None]
    if not rows:
        return []
    single, emulated = rows[0].single, rows[0].emulated_single
    return [Cycles("1 thread (8 bit)", single, single, emulated, emulated, 0), *rows]


def context(results: Results) -> Mapping[str, Any] | None:
    """Cycles; picture and rows of the layers, and on how many images those were measured."""
    cycles, layers = all_cycles(results), measured(results, "layers")
    if not cycles and not layers:
        return None
    return {
        "array": results.recipe.array,
        "cycles": cycles,
        "mixed": any(one.mixed for one in results.present),
        "figure": layer_figure(layers) if layers else None,
        "layers": layers,
        "images": min(results.recipe.profile_images, results.calibration_images),
    }


@styled
def layer_figure(layers: list[tuple[str, list[LayerRow]]]) -> str:
    """Relative error (log scale) and collision rate of every layer, by the config's title."""
    names = list(dict.fromkeys(row.name for _, rows in layers for row in rows))
    figure, axes = canvas(2, 4.3 + name_space(names), [1.25, 1])
    said = []
    for index, (name, rows) in enumerate(layers):
        places = [names.index(row.name) for row in rows]
        plot_line(axes[0], places, [row.error or math.nan for row in rows], index, name)
        plot_line(axes[1], places, [100 * row.collisions for row in rows], index, name)
        worst = max(rows, key=lambda row: row.error)
        said.append(f"{name}: largest error {worst.error:.2g} in {worst.name}")
    if any(row.error for _, rows in layers for row in rows):
        axes[0].set_yscale("log")
    axes[0].set_title("Error against 8 bit (relative mean square, log scale)")
    axes[1].set_title("Slots with a collision, %")
    axes[1].set_ylim(0, 105)
    legend(figure, axes[0])
    layer_ticks(axes, names)
    return svg(figure, "layers", f"Relative error and collision rate of {len(names)} layers. {'; '.join(said)}.")


def layers(results: Results) -> list[Table]:
    """A terminal table a config."""
    return layer_tables(results, "layers", COLUMNS, _cells)


def _cells(row: LayerRow) -> tuple[str, ...]:
    rates = (f"{100 * rate:.1f}" for rate in (row.collisions, row.lossy, row.utilization))
    return (row.name, str(row.threads), *rates, f"{row.error:.1e}")


def totals(results: Results) -> list[Table]:
    """One terminal table of cycles, a row a config."""
    array, cycles = results.recipe.array, all_cycles(results)
    if not cycles:
        return []
    single, *others = cycles
    rows = [(row.title, f"{row.cycles:,}", f"{row.speedup:.2f}x", f"{row.emulated_speedup:.2f}x") for row in others]
    text = f"Cycles an image, array of {array.rows} x {array.columns}"
    columns = ("hardware", "cycles", "fewer by", "emulated layers")
    return [Table(text, columns, ((single.title, f"{single.cycles:,}"), *rows))]


def saving(results: Results, config: Any) -> str:
    """How many times fewer cycles than with one thread."""
    cycles = cycles_of(results, config)
    return "" if cycles is None else f" in {times(cycles.speedup, FEWER)} cycles"


def terms(results: Results) -> Mapping[str, str]:
    """All of them, whether or not layers were profiled: titles and verdicts use them too."""
    titles = compared_titles(results)
    others = ", ".join(title for title in titles if title != "8 bit")
    if "8 bit" not in titles:  # mixes alone: nothing is compared with 8 bit but the layers' errors
        return TERMS | {"8 bit": TERMS["8 bit"].removeprefix("The baseline: "), "won back": words.won_back(others)}
    return TERMS | {"won back": words.won_back(f"NB-SMT: 8 bit; others: {others}" if others else "8 bit")}


CHAPTER = Chapter(
    template=Path(__file__).with_name("nbsmt.html.j2"),
    context=context,
    layers=layers,
    totals=totals,
    saving=saving,
    terms=terms,
    modelled=(
        "Every product and sum of the emulated layers, bit for bit: zero detection, collisions, 4-bit reduction and "
        "its rounding, exact 32-bit accumulation.",
        "8-bit quantisation of activations and weights, with scales from the calibration images.",
    ),
    costs=("Cycles of an output-stationary systolic array: tiling, skew, drain and threads; tiles overlap.",),
    limits={
        "outside": Limit(
            "Layers outside the emulation, by default the first and the last",
            "their accuracy is that of float, their cycles are those of 8-bit arithmetic with one thread",
        ),
        "memory": Limit(clause="cycles assume that operands arrive in time"),
    },
)
