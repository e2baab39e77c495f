"""A second definition of layer and RMS norm by ranges: exact fractions from end to end, nothing of recoup inside.

For configs whose formats are all there, of finite values; zeros have no sign here.
"""

# ruff: noqa: A002 - format is the word of the field

import math
from fractions import Fraction
from functools import cache

import numpy as np

from recoup.formats import Float
from recoup.lightnorm import LightNorm
from tests.lightnorm import model as of_batch_norm
from tests.lightnorm.model import covers, to_block


def exponent(v: Fraction) -> int:
    """The e of 2^e <= |v| < 2^(e + 1)."""
    e = v.numerator.bit_length() - v.denominator.bit_length()
    return e if Fraction(2) ** e <= abs(v) else e - 1


def to_format(v: Fraction, format: Float | None) -> Fraction:
    assert format is not None
    if v == 0 or (not format.subnormals and abs(v) < Fraction(2) ** format.min_exponent):
        return Fraction(0)
    quantum = Fraction(2) ** (max(exponent(v), format.min_exponent) - format.mantissa)
    units = abs(v) / quantum
    size = min((math.floor(units) if format.rounding == "zero" else round(units)) * quantum, format.largest_value)
    return Fraction(size) * (1 if v > 0 else -1)


def stored(row: list[Fraction], config: LightNorm, format: Float | None) -> list[Fraction]:
    """B(F(row))."""
    assert format is not None
    out = [float(to_format(v, format)) for v in row]
    if config.block is not None:
        width = next(e for e in range(2, 12) if covers(e, format))
        ends = 2 - 2 ** (width - 1), 2 ** (width - 1) - 1
        starts = range(0, len(out), config.block)
        parts = (to_block(out[i : i + config.block], format.mantissa + 1, ends, config.shared) for i in starts)
        out = [v for part in parts for v in part]
    return [Fraction(v) for v in out]


@cache
def constant(m: int, kind: str, scale: str) -> float:
    """C(m), or A(m) by Simpson's rule over the density of the largest of m half-normal values."""
    if kind == "layer":
        return of_batch_norm.constant(m, scale)
    z = np.linspace(0, 14, 100001)
    density = np.exp(-z * z / 2) * math.sqrt(2 / math.pi)
    below = np.array([math.erf(v / math.sqrt(2)) for v in z])
    f = z * m * density * below ** (m - 1)
    return float(3 / (z[1] - z[0]) / (f[0] + f[-1] + 4 * f[1:-1:2].sum() + 2 * f[2:-1:2].sum()))


def fractions(x: np.ndarray) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in x.tolist()]


class Model:
    """A forward and backward pass of x [S, D]; ``constants``: of the chunks, as recoup has them."""

    def __init__(self, x, gamma, beta, gain, kind, config, eps, constants):
        self.config, self.kind, D = config, kind, x.shape[1]
        F, S = config.forward, config.statistics
        self.gain = [Fraction(1)] * D if gain is None else [Fraction(v) for v in gain.tolist()]
        self.a = [k * to_format(Fraction(v), F) for k, v in zip(self.gain, gamma.tolist(), strict=True)]
        beta = [to_format(Fraction(v), F) for v in beta.tolist()]
        self.factors = [Fraction(c / config.chunks) for c in constants]
        self.parts = [part.tolist() for part in np.array_split(np.arange(D), config.chunks)]
        self.r, self.xhat, self.y, self.terms = [], [], [], []
        for given in fractions(x):
            row = stored(given, config, F)
            s, terms = Fraction(eps), []
            for c, part in zip(self.factors, self.parts, strict=True):
                values = [row[i] if kind == "layer" else abs(row[i]) for i in part]
                high, low = part[values.index(max(values))], part[values.index(min(values))]
                if kind == "layer":
                    s += c * (row[high] - row[low])
                    terms += [(high, -c), (low, c)]  # in a constant chunk they cancel
                else:
                    s += c * max(values)
                    terms += [(high, -c if row[high] > 0 else c)] if row[high] else []
            mu = to_format(sum(row, Fraction(0)) / D, S) if kind == "layer" else Fraction(0)
            r = to_format(1 / s, S)
            differences = [v - mu for v in row]
            if config.difference is not None and kind == "layer":
                differences = [to_format(v, config.difference) for v in differences]
            xhat = [to_format(v * r, F) for v in differences]
            y = [to_format(a * h + b, F) for a, h, b in zip(self.a, xhat, beta, strict=True)]
            self.r.append(r)
            self.xhat.append(xhat)
            self.terms.append(terms)
            self.y.append(stored(y, config, F))

    def backward(self, grad):
        """dx, dgamma, dbeta; each dgamma before its product with the gain."""
        form, D = self.config.backward, grad.shape[1]
        wide = form.replace(mantissa=form.mantissa + 8, largest=None)
        dy = [stored(row, self.config, form) for row in fractions(grad)]
        dx = []
        for row, xhat, r, terms in zip(dy, self.xhat, self.r, self.terms, strict=True):
            g = [a * v for a, v in zip(self.a, row, strict=True)]
            m = to_format(sum(g) / D, wide) if self.kind == "layer" else 0
            S = to_format(sum(v * h for v, h in zip(g, xhat, strict=True)), wide)
            out = [(v - m) * r for v in g]
            for i, c in terms:
                out[i] += r * c * S
            dx.append(stored([to_format(v, form) for v in out], self.config, form))
        pairs = list(zip(zip(*dy, strict=True), zip(*self.xhat, strict=True), strict=True))
        dgamma = [to_format(sum(v * h for v, h in zip(*pair, strict=True)), wide) for pair in pairs]
        return dx, dgamma, [to_format(sum(column), wide) for column, _ in pairs]
