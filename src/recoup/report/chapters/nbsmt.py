"""NB-SMT's part of a report: collisions and errors layer by layer, and the array's cycles."""

from collections.abc import Mapping

from recoup.report import words
from recoup.report.chapters import Chapter, Limit
from recoup.report.summary import baseline_of
from recoup.study.results import Results

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
        "The baseline: unsigned 8-bit activations (one scale a layer), signed 8-bit weights (one scale an output "
        "channel), exact sums, one thread."
    ),
    "policy": (
        "Which slack is looked for before an operand is reduced: S zero operands, A and W activations or weights that "
        "fit 4 bits; the capital letter of Aw and aW names the operand that is reduced when neither fits."
    ),
    "gain": words.GAIN,
    "slowed": "Of the emulated layers: those that run fewer threads, by the layer map or because they are grouped.",
}


def terms(results: Results) -> Mapping[str, str]:
    """All of them, whether or not layers were profiled: titles and verdicts use them too."""
    titles = dict.fromkeys(baseline_of(config).title for config in results.recipe.configs)
    others = ", ".join(title for title in titles if title != "8 bit")
    return TERMS | {"won back": words.won_back(f"NB-SMT: 8 bit; others: {others}" if others else "8 bit")}


CHAPTER = Chapter(
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
