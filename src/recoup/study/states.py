"""The states of a network in which accuracy is measured: what was done to it after the hardware was switched on."""

from enum import StrEnum

from recoup.lba.config import LBA
from recoup.lightnorm.config import LightNorm


class State(StrEnum):
    """What was repaired. Every state starts anew from the float checkpoint and uses the same calibration images."""

    NONE = "float statistics"
    EIGHT_BIT = "recalibrated at 8 bit"
    AVERAGE = "recalibrated on hardware"
    PAIRED = "paired"
    BIAS = "bias correction"
    PAIRED_BIAS = "paired + bias"
    LAYER_GAIN = "gain per layer"
    GAIN = "gain per channel"
    GAIN_PAIRED = "gain + paired"
    CHUNKS = "chunk near sqrt(K)"

    @property
    def needs_norms(self) -> bool:
        """Whether the state is about BatchNorm statistics, so that a network without them has no such state."""
        return self in (State.EIGHT_BIT, State.AVERAGE, State.PAIRED, State.PAIRED_BIAS, State.GAIN_PAIRED)

    def applies(self, config: object) -> bool:
        """Whether the repair exists for a config's hardware."""
        if isinstance(config, LBA):
            return self not in (State.EIGHT_BIT, State.BIAS, State.PAIRED_BIAS)
        if isinstance(config, LightNorm):
            return self in (State.NONE, State.AVERAGE, State.PAIRED)
        return self not in (State.LAYER_GAIN, State.GAIN, State.GAIN_PAIRED, State.CHUNKS)


FLOAT, BASELINE = "float", "8-bit"  # the two configurations that are no hardware under study

NBSMT_STATES = (State.NONE, State.EIGHT_BIT, State.AVERAGE, State.PAIRED, State.BIAS)
DEFAULT = (*NBSMT_STATES, State.GAIN)

MEANING = {
    State.NONE: "The checkpoint's own BatchNorm statistics; nothing repaired.",
    State.EIGHT_BIT: (
        "BatchNorm statistics averaged over the calibration images in plain 8-bit arithmetic, then NB-SMT switched on. "
        "What this gains or loses comes from the calibration images and from 8 bits, not from NB-SMT."
    ),
    State.AVERAGE: (
        "BatchNorm statistics averaged over the calibration images with the hardware on: NB-SMT's published "
        "repair (Shomron and Weiser, 2020). LightNorm layers store what they would in training: the range's estimate."
    ),
    State.PAIRED: (
        "The same images run with the hardware off and on, and the stored statistics move by the difference: recoup's "
        "repair. It corrects what the hardware did and nothing else."
    ),
    State.BIAS: (
        "The mean error of every output channel, known in closed form, is subtracted as a bias; BatchNorm statistics "
        "stay. It also serves networks without BatchNorm."
    ),
    State.PAIRED_BIAS: "Bias correction first, then paired recalibration of what remains.",
    State.LAYER_GAIN: (
        "Every layer's accumulator output times one factor, fitted in closed form: truncation shrinks sums."
    ),
    State.GAIN: (
        "Every output channel's sum times a factor of its own, fitted in closed form on the calibration images: it "
        "undoes the shrink of truncated sums, and also serves networks without BatchNorm."
    ),
    State.GAIN_PAIRED: "A gain per channel first, then paired recalibration of what remains.",
    State.CHUNKS: "Chunks of a power of two near the square root of the sum's length: inner and outer sums are alike.",
}
