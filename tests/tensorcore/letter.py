"""The unit by the letter, in fractions: a model of its own, which shares nothing with the package but the config.

Every number is a `Fraction`; exponents are found by comparing with powers of two, and T q is rounded by a search for
the neighbours in the accumulator's format.
"""

import math
from fractions import Fraction

from recoup.tensorcore import TensorCore

SMALLEST = {"e4m3fn": -6, "e5m2": -14, "e2m1fn": 0, "float16": -14, "bfloat16": -126, "tf32": -126, "float32": -126}
OUTPUT = {"float32": ("float32", 23, Fraction(2) ** 128), "e8m13": ("float32", 13, Fraction(2) ** 128)}


def power(exponent):
    return Fraction(2) ** exponent


def exponent_of(x, name):
    """As the unit sees it."""
    if x == 0:
        return -126
    e = SMALLEST[name]
    while abs(x) >= power(e + 1):
        e += 1
    return e


def toward_zero(x):
    return math.floor(x) if x >= 0 else -math.floor(-x)


def rounded(x, fraction, smallest, top, nearest):
    """x in a float format with gradual underflow; infinity from ``top`` on."""
    if x == 0:
        return 0.0
    e = smallest
    while abs(x) >= power(e + 1):
        e += 1
    place = power(e - fraction)
    count = abs(x) / place
    whole = math.floor(count)
    if nearest:
        rest = count - whole
        whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    magnitude = whole * place
    if magnitude >= top:
        return math.inf if x > 0 else -math.inf
    return float(magnitude if x > 0 else -magnitude) + 0.0


def step(c, a, b, config: TensorCore):
    first, second = config.pair
    accumulator = "float16" if config.output == "float16" else "float32"
    terms = [(Fraction(c), exponent_of(Fraction(c), accumulator))]
    for x, y in ((Fraction(x), Fraction(y)) for x, y in zip(a, b, strict=True)):
        terms.append((x * y, exponent_of(x, first) + exponent_of(y, second)))
    q = power(max(e for _, e in terms) - config.fraction)
    total = sum(toward_zero(x / q) for x, _ in terms) * q
    if config.output == "float16":
        return rounded(total, 10, -14, Fraction(65520), nearest=True)
    _, fraction, top = OUTPUT[config.output]
    return rounded(total, fraction, -126, top, nearest=False)


def dot(a, b, config: TensorCore):
    """One output, without promotion and non-finite numbers."""
    c = 0.0
    for k in range(0, len(a), config.group):
        if math.isinf(c):
            return c
        c = step(c, a[k : k + config.group], b[k : k + config.group], config)
    return c
