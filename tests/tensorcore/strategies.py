"""Units and operands for hypothesis."""

import torch
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.formats import quantize
from recoup.tensorcore import TensorCore
from recoup.tensorcore.config import OPERANDS, OUTPUTS
from recoup.tensorcore.wing import CARD

PLAIN = {name: unit for name, unit in CARD.presets.items() if unit.block is None}
"""The presets without block scales, of which test_blocks.py knows."""
KINDS = ("normal", "spread", "codes", "zeros", "subnormal", "large", "cancelling", "one large", "last bit")


@st.composite
def units(draw):
    """A preset, or any unit that is legal."""
    if draw(st.booleans()):
        found = draw(st.sampled_from(sorted(PLAIN.values(), key=repr)))
        output = draw(st.sampled_from(OUTPUTS))
        return found.replace(output=output, promotion=draw(st.sampled_from((None, found.group, 3 * found.group))))
    group = draw(st.integers(1, 40))
    operands = draw(st.sampled_from(OPERANDS)), draw(st.sampled_from(OPERANDS))
    return TensorCore(operands, group, draw(st.integers(1, 35)), draw(st.sampled_from(OUTPUTS)))


def operands(unit, shape, kind, seed):
    """a [M, K] and b [K, N] of the unit's formats."""
    M, K, N = shape
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size, form in zip(((M, K), (K, N)), unit.formats, strict=True):
        x = torch.randn(size, generator=generator)
        low, high = max(form.min_exponent, -60), min(form.max_exponent, 60)
        if kind == "spread":
            x *= 2.0 ** torch.randint(low, high, size, generator=generator)
        elif kind == "codes":
            significands = torch.randint(2 << form.mantissa, size, generator=generator) * 2.0**-form.mantissa
            exponents = torch.randint(form.min_exponent, form.max_exponent + 1, size, generator=generator)
            x = significands.copysign(x).ldexp(exponents)
        elif kind == "zeros":
            x *= torch.rand(size, generator=generator) < 0.4
        elif kind == "subnormal":
            x *= 2.0 ** (low - 1)
        elif kind == "large":
            x *= 2.0 ** (form.max_exponent - 1)
        made.append(x)
    a, b = made
    if kind == "cancelling":
        half = K // 2
        a[:, half : 2 * half], b[half : 2 * half] = -a[:, :half], b[:half].clone()
        a = a.flip(1) if seed % 2 else a
    elif kind == "one large":
        place = seed % max(1, K)
        a[:, place : place + 1] *= 64
        b[place : place + 1] *= 64
    elif kind == "last bit":  # of what the largest product leaves, or next to it
        ends = [form.max_exponent - 1 for form in unit.formats]
        lower = [end - unit.fraction // 2 for end in ends]
        place = seed % max(1, K)
        a, b = (torch.where(x.abs() < 0.7, 0.5, x.sign()) * 2.0**e for x, e in zip(made, lower, strict=True))
        a[:, place : place + 1], b[place : place + 1] = 2.0 ** ends[0], 2.0 ** ends[1]
    return quantize(a, unit.formats[0]), quantize(b, unit.formats[1])


def same(x, y):
    """Bit for bit; NaN equals NaN."""
    return bool(((x.view(torch.int32) == y.view(torch.int32)) | (x.isnan() & y.isnan())).all())


def legal(*arguments, **options):
    """Whether a unit can be made."""
    try:
        TensorCore(*arguments, **options)
    except RecoupError:
        return False
    return True
