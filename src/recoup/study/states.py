"""The states of a network in which accuracy is measured: what was done to it after the hardware was switched on."""

from enum import StrEnum


class State(StrEnum):
    """What was repaired. Every state starts anew from the float checkpoint and uses the same calibration images."""

    NONE = "float statistics"
    EIGHT_BIT = "recalibrated at 8 bit"
    AVERAGE = "recalibrated under NB-SMT"
    PAIRED = "paired"
    BIAS = "bias correction"
    PAIRED_BIAS = "paired + bias"

    @property
    def needs_norms(self) -> bool:
        """Whether the state is about BatchNorm statistics, so that a network without them has no such state."""
        return self in (State.EIGHT_BIT, State.AVERAGE, State.PAIRED, State.PAIRED_BIAS)


FLOAT, BASELINE = "float", "8-bit"  # the two configurations that are not NB-SMT

DEFAULT = (State.NONE, State.EIGHT_BIT, State.AVERAGE, State.PAIRED, State.BIAS)

MEANING = {
    State.NONE: "The checkpoint's own BatchNorm statistics; nothing repaired.",
    State.EIGHT_BIT: (
        "BatchNorm statistics averaged over the calibration images in plain 8-bit arithmetic, then NB-SMT switched on. "
        "What this gains or loses comes from the calibration images and from 8 bits, not from NB-SMT."
    ),
    State.AVERAGE: (
        "BatchNorm statistics averaged over the calibration images with NB-SMT on: the published repair "
        "(Shomron and Weiser, 2020)."
    ),
    State.PAIRED: (
        "The same images run with NB-SMT off and on, and the stored statistics move by the difference: recoup's "
        "repair. It corrects what the hardware did and nothing else."
    ),
    State.BIAS: (
        "The mean error of every output channel, known in closed form, is subtracted as a bias; BatchNorm statistics "
        "stay. It also serves networks without BatchNorm."
    ),
    State.PAIRED_BIAS: "Bias correction first, then paired recalibration of what remains.",
}
