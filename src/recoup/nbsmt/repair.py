"""What wins the accuracy back from NB-SMT, or spends speed on it.

In the order in which they belong: `reorder_` (which channels share a multiplier; free at run time), `throttle_` (fewer
threads where it hurts), then `correct_bias_` or, for networks with batch norm, `recoup.recalibrate_`.
"""

from dataclasses import replace

from recoup import recalibrate
from recoup.nbsmt.bias import correct_bias_
from recoup.nbsmt.reorder import reorder_
from recoup.nbsmt.throttle import Throttling, plan_throttling, throttle_
from recoup.network.wing import Repair
from recoup.recalibrate import PAIRED, recalibrate_

__all__ = [
    "AVERAGE",
    "BIAS",
    "EIGHT_BIT",
    "PAIRED_BIAS",
    "ROWS_BIAS",
    "Throttling",
    "correct_bias_",
    "plan_throttling",
    "reorder_",
    "throttle_",
]

BIAS = Repair(
    "bias correction",
    "bias",
    "The mean error of every output channel, known in closed form, is subtracted as a bias; BatchNorm statistics "
    "stay. It also serves networks without BatchNorm.",
    "bias correction",
    correct_bias_,
    short="bias",
    records=True,
)
ROWS_BIAS = replace(
    BIAS,
    name="bias correction, rows alike",
    meaning="The same with every position's error relative to its size (a token's, a place's): a few tokens of a "
    "transformer are far larger than the others and would decide the correction alone.",
    sentence="bias correction that counts rows alike",
    apply=lambda model, batches: correct_bias_(model, batches, weigh="rows"),
    short="bias rows",
)
EIGHT_BIT = Repair(
    "recalibrated at 8 bit",
    "statistics",
    "BatchNorm statistics averaged over the calibration images in plain 8-bit arithmetic, then NB-SMT switched on. "
    "What this gains or loses comes from the calibration images and from 8 bits, not from NB-SMT.",
    "recalibration at 8 bit",
    lambda model, batches: recalibrate_(model, batches, "average"),
    needs_norms=True,
    on_baseline=True,
    records=True,
)
AVERAGE = replace(
    recalibrate.AVERAGE,
    meaning="BatchNorm statistics averaged over the calibration images with the hardware on: NB-SMT's published "
    "repair (Shomron and Weiser, 2020).",
)
PAIRED_BIAS = Repair.combined(
    "paired + bias",
    "Bias correction first, then paired recalibration of what remains.",
    "bias correction and paired recalibration",
    (BIAS, PAIRED),
)
