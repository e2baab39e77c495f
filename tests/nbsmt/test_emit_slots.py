"""Values dealt slot by slot, against the order that their places say."""

import numpy as np
import pytest

from recoup.kernels import llvm
from recoup.nbsmt.emit_slots import Form, deal
from tests.nbsmt.test_operand import LEVELS, runs_here

FORMS = [
    Form(1, 1, True),
    Form(2, 1, True),
    Form(0, 1, True),
    Form(0, 1),
    Form(0, 4),
    Form(4, 1),
    Form(2, 2),
    Form(1, 4),
]
TARGETS = [llvm.host(), *(llvm.Target.named(level) for level in LEVELS if runs_here(level))]


def dealt(x: np.ndarray, form: Form, parts: int, units: int) -> np.ndarray:
    """x [pixels, bytes]: parts of streams of units, or, without streams, of units, slot by slot."""
    if form.streams:
        found = x.reshape(len(x), parts, form.streams, units, form.size).swapaxes(2, 3).reshape(len(x), -1)
    else:
        found = x.reshape(len(x), parts, units, form.size).swapaxes(1, 2).reshape(len(x), -1)
    return (found.astype(np.int16) - 128) << 5 if form.words else found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.cpu)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form(form, target):
    """Units that fill vectors and that do not; nothing is written beside the images, which have borders."""
    N, H, W = 2, 3, 2
    for most, units in ((1, 1), (3, 16), (17, 5), (2, 35), (16, 33)):
        parts = 1 if form.words and form.streams else most
        size = parts * max(form.streams, 1) * units * form.size
        x = np.random.default_rng(units).integers(0, 256, (N * H * W, size), dtype=np.uint8)
        kind = np.int16 if form.words else np.uint8
        to = np.full((N, H + 2, W + 2, size), 77, kind)
        expected, pixel = to.copy(), size * to.itemsize
        expected[:, 1:-1, 1:-1] = dealt(x, form, parts, units).reshape(N, H, W, size)
        each = units * form.size * max(form.streams, 1)
        deal(form, target)(
            first=0, last=N * H, height=H, width=W, x=x.ctypes.data, x_pixel=size, x_part=each,
            stream=units * form.size if form.streams else parts * form.size * to.itemsize,
            to=to[:, 1:, 1:].ctypes.data, to_image=to[0].nbytes, to_row=to[0, 0].nbytes, to_pixel=pixel,
            to_part=(each if form.streams else form.size) * to.itemsize,
            parts=parts, units=units, zero=128, shift=5,
        )  # fmt: skip
        assert np.array_equal(to, expected), (parts, units)
