"""Operands that structured vectors hardly ever meet: products of a difference that lie beside a step of their format.

The lowest columns of a multiplier whose product is cut to a few bits are only seen where everything above them is ones
or zeros. With x = X 2^h and mu = M in units of mu's last bit, X, M and r = R integers, such operands have

    (X 2^h -+ M) R = q 2^t + d,   q 2^t a step of F and d small.

They are found by solving for one of the three from the other two, in three ways, and keeping of many triples those
whose d is nearest to a size that is drawn.
"""

import numpy as np

from recoup.formats import Float, FloatFields
from recoup.lightnorm.portable import exp2, log2

__all__ = ["code", "meeting"]

TRIES = 240
Triple = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""X, M, R and h."""


def meeting(
    form: Float, wide: Float, shape: tuple[int, ...], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of x in ``form``, of mu and of r > 0 in ``wide``, uint64 of a shape."""
    f, s = form.mantissa, wide.mantissa
    count = int(np.prod(shape))
    best: list[np.ndarray] = []
    wanted = generator.uniform(0, s + 2, count)
    for number in range(TRIES):
        X, M, R, h = (_of_mean, _of_reciprocal, _of_step)[number % 3](f, s, count, generator)
        negative = generator.integers(0, 2, count)
        up, down = np.maximum(h, 0), np.maximum(-h, 0)
        exact = np.abs((X << up) - np.where(negative, -M, M) * (1 << down)) * R
        cut = np.maximum(_bits(exact) - (f + 1), 0)
        rest = exact & ((np.int64(1) << cut) - 1)
        near = log2(np.minimum(rest, (np.int64(1) << cut) - rest).astype(float) + 1)
        found = [np.where(exact > 0, np.abs(near - wanted), 99.0), X, M, R, h, negative]
        if best:
            found = [np.where(found[0] < best[0], new, old) for new, old in zip(found, best, strict=True)]
        best = found
    X, M, R, h, negative = (v.astype(np.int64) for v in best[1:])
    flipped = generator.integers(0, 2, count)
    low, high = np.maximum(wide.min_exponent, form.min_exponent - h - f + s), form.max_exponent - h - f + s
    high = np.maximum(np.minimum(wide.max_exponent, high), low)
    place = low + (generator.random(count) * (high - low + 1)).astype(np.int64)
    top = np.maximum(place, place + h + f - s)
    at = form.min_exponent - top + generator.integers(0, form.max_exponent - form.min_exponent + 1, count)
    codes = (
        code(X, place + h + f - s, flipped, form),
        code(M, place, flipped ^ negative, wide),
        code(R, at, np.zeros_like(R), wide),
    )
    return tuple(c.reshape(shape) for c in codes)  # type: ignore[return-value]


def _significands(bits: int, count: int, generator: np.random.Generator) -> np.ndarray:
    return generator.integers(1 << bits, 2 << bits, count)


def _of_mean(f: int, s: int, count: int, generator: np.random.Generator) -> Triple:
    """M from X, R and h: M R = X R 2^h modulo a step, the two of about the same size."""
    X, R = (_significands(bits, count, generator) for bits in (f, s))
    h = generator.integers(0, s + 4, count)
    product = (X << h) * R
    cut = np.maximum(_bits(product) - (f + 1), 0)
    laps = np.maximum((np.int64(2) << 2 * s) >> np.clip(cut, 0, 2 * s + 1), 1)
    aim = (product & ((np.int64(1) << cut) - 1)) + ((generator.integers(0, 1 << 14, count) % laps) << cut)
    M = aim // R + generator.integers(0, 2, count)
    return X, np.where(M >> s == 1, M, _significands(s, count, generator)), R, h


def _of_reciprocal(f: int, s: int, count: int, generator: np.random.Generator) -> Triple:
    """R from X, M, h and the step: R = q 2^t / (X 2^h - M)."""
    X, M, q = (_significands(bits, count, generator) for bits in (f, s, f))
    h = generator.integers(-f - s, s + 4, count)
    exact = np.abs(X * exp2(h) - M) + (X * exp2(h) == M)
    R = np.floor(q / exact * exp2(s + 1 - np.frexp(q / exact)[1])).astype(np.int64) + generator.integers(0, 2, count)
    return X, M, np.where(R >> s == 1, R, 1 << s), np.clip(h, -40, 40)


def _of_step(f: int, s: int, count: int, generator: np.random.Generator) -> Triple:
    """x far above mu: R of X and the step, X R = q 2^t + e, and M and h of e 2^h = M R."""
    X, q = (_significands(f, count, generator) for _ in range(2))
    t = np.where(q < X, s + 1, s)
    R = np.clip((q << t) // X + generator.integers(0, 2, count), 1 << s, (2 << s) - 1)
    e = np.abs(X * R - (q << t))
    needed = np.ldexp(R.astype(float), s) / np.maximum(e, 1)
    h = np.where(e > 0, np.frexp(needed)[1], s + generator.integers(0, s + 6, count))
    M = np.floor(e * exp2(h) / R).astype(np.int64) + generator.integers(0, 2, count)
    return X, np.where(M >> s == 1, M, _significands(s, count, generator)), R, np.clip(h, -40, 40)


def code(significand: np.ndarray, exponent: np.ndarray, negative: np.ndarray, form: Float) -> np.ndarray:
    """The code of a normal number; what is beyond the format's ends has their exponent."""
    fields = FloatFields(form)
    field = np.clip(exponent, form.min_exponent, form.max_exponent) + fields.bias
    found = field << fields.fraction | significand & ((1 << fields.fraction) - 1)
    if fields.flag is not None:
        found |= 1 << fields.flag
    else:
        found = np.minimum(found, fields.largest)
    return (found | negative << fields.sign).astype(np.uint64)


def _bits(values: np.ndarray) -> np.ndarray:
    """Bit lengths of integers below 2^62."""
    return np.frexp(values.astype(float))[1].astype(np.int64)
