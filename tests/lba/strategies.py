"""Units and operands for hypothesis."""

import math

import torch
from hypothesis import strategies as st

from recoup.formats import Float, Int
from recoup.lba import FP8, LBA, quantize_operand

CHUNKS = st.sampled_from((1, 3, 16, 64, None))


@st.composite
def floats(draw, rounding=("zero",)):
    """An accumulator's format: M 2 to 10, E 3 to 6, any useful bias."""
    exponent = draw(st.integers(3, 6))
    bias = draw(st.integers(0, (1 << exponent) + 4))
    return Float.lba(exponent, draw(st.integers(2, 10)), bias, rounding=draw(st.sampled_from(rounding)))


@st.composite
def truncating(draw):
    """The paper's kind: both formats truncate."""
    return LBA(
        draw(st.none() | floats()),
        draw(floats()),
        draw(CHUNKS),
        underflow=draw(st.booleans()),
        gradient=draw(
            st.sampled_from(("identity", "recursive_of", "immediate_of", "immediate_diff", "recursive_diff"))
        ),
    )


@st.composite
def others(draw):
    """Nearest, subnormals, fixed point, promotion."""
    rounding = ("zero", "nearest")
    plain = floats(rounding)
    full = st.sampled_from([Float.parse(name) for name in ("e4m3fn", "e5m2", "float16", "bfloat16", "float32")])
    product = draw(st.none() | plain | full)
    fixed = st.builds(Int, st.integers(10, 24), overflow=st.sampled_from(("saturate", "wrap")))
    accumulator = draw(plain | full | fixed)
    scale = 2.0 ** draw(st.integers(-8, 0)) if isinstance(accumulator, Int) else 1.0
    return LBA(
        product,
        accumulator,
        draw(CHUNKS),
        underflow=draw(st.booleans()),
        gradient=draw(
            st.sampled_from(("identity", "recursive_of", "immediate_of", "immediate_diff", "recursive_diff"))
        ),
        scale=scale,
        promotion=draw(st.none() | full | plain),
    )


def specials(config):
    """Numbers at the edges of a unit's formats."""
    values = [0.0, -0.0, 1.0, 1e-40, 2.0**-149]
    for f in (config.product, config.accumulator):
        if isinstance(f, Float):
            low, top = f.smallest_normal, min(f.largest_value, 1e18)
            values += [low, float(torch.nextafter(torch.tensor(low), torch.tensor(0.0))), top, 2 * top, 3e37]
    return values


@st.composite
def operands(draw, config, most=24):
    """a [M, K] and b [K, N]: Gaussian at scales that underflow, fit or saturate, FP8 or not, with special values."""
    M, K, N = draw(st.integers(1, 6)), draw(st.integers(1, most)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 2.0 ** draw(st.integers(-8, 4))
    if isinstance(config.accumulator, Int):
        scale = min(scale, 2.0)
    a = torch.randn(M, K, generator=generator) * scale
    b = torch.randn(K, N, generator=generator)
    if draw(st.booleans()):
        b = b.relu()
    if draw(st.booleans()):
        a, b = quantize_operand(a, FP8)[0], quantize_operand(b, FP8)[0]
    if not isinstance(config.accumulator, Int):
        for x in (a, b):
            for _ in range(draw(st.integers(0, 3))):
                index = draw(st.integers(0, x.numel() - 1))
                x.view(-1)[index] = draw(st.sampled_from((1, -1))) * draw(st.sampled_from(specials(config)))
    return a, b


def fits(a, b, config):
    """Whether an integer accumulator holds every product."""
    if not isinstance(config.accumulator, Int):
        return True
    extremes = (a.double()[:, :, None] * b.double()[None]) / config.scale
    f = config.accumulator
    return bool(extremes.max() <= f.largest_value and extremes.min() >= f.smallest_value)


def as_floats(x):
    """Nested lists, for the model."""
    return [[float(v) for v in row] for row in x]


def float32(x):
    """A Fraction as the nearest float32, saturating."""
    top = torch.finfo(torch.float32).max
    return float(torch.tensor(max(-top, min(top, float(x))) if abs(x) < 1e300 else math.copysign(top, x)).float())
