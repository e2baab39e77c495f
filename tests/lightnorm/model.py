"""A second definition of LightNorm, shared with recoup's in nothing: Python's numbers, element by element.

Products and differences are Python floats, sums `fractions`, formats and blocks exact fractions. Finite values only.
"""

# ruff: noqa: A002 - format is the word of the field

import math
from fractions import Fraction
from functools import cache

import numpy as np

from recoup.formats import Float
from recoup.lightnorm import LightNorm

HOFFER = 0.5402083624879031  # 0.175 (1 + sqrt(pi ln 4)) in 40 decimal digits, rounded to float64


def exponent(v: float) -> int:
    return math.frexp(v)[1] - 1


def to_format(v: float, format: Float | None, single: bool) -> float:
    """v in a format; without one in float32 where ``single``."""
    if format is None:
        return float(np.float32(v)) if single else v
    if v == 0 or (not format.subnormals and abs(v) < 2.0**format.min_exponent):
        return math.copysign(0.0, v)
    quantum = Fraction(2) ** (max(exponent(v), format.min_exponent) - format.mantissa)
    units = abs(Fraction(v)) / quantum
    count = math.floor(units) if format.rounding == "zero" else round(units)
    return math.copysign(float(min(count * quantum, Fraction(format.largest_value))), v)


def to_block(values: list[float], significand: int, ends: tuple[int, int], shared: str) -> list[float]:
    """One block, toward zero; ``ends``: the least and the largest shared exponent."""
    found = sorted((exponent(v) for v in values if v), reverse=True)
    if not found:
        return values
    lone = shared == "outlier" and found.count(found[0]) == 1
    rest = (found[1] if len(found) > 1 else ends[0]) if lone else found[0]
    quantum = Fraction(2) ** (min(max(rest, ends[0]), ends[1]) - significand + 1)
    out = []
    for v in values:
        if lone and v and exponent(v) == found[0]:
            out.append(v)
            continue
        units = min(math.floor(abs(Fraction(v)) / quantum), 2**significand - 1)
        out.append(math.copysign(float(units * quantum), v))
    return out


def stored(x: np.ndarray, config: LightNorm, gradient: bool, single: bool) -> np.ndarray:
    """B(F(x)) of [N, C, P]."""
    form = config.backward if gradient else config.forward
    out = np.array([to_format(v, form, single) for v in x.ravel().tolist()]).reshape(x.shape)
    if config.block is None:
        return out
    significand = form.mantissa + 1 if form else 4 if gradient else 5
    width = 8 if form is None else next(e for e in range(2, 12) if covers(e, form))
    ends = 2 - 2 ** (width - 1), 2 ** (width - 1) - 1
    lines = out if config.axis == "place" else np.swapaxes(out, 1, 2)  # blocks lie along the last axis
    for at in np.ndindex(lines.shape[:2]):
        line = lines[at]
        for start in range(0, len(line), config.block):
            part = line[start : start + config.block]
            part[:] = to_block(part.tolist(), significand, ends, config.shared)
    return out


def covers(width: int, format: Float) -> bool:
    """Whether an IEEE exponent field of that width has the format's exponents."""
    return 2 - 2 ** (width - 1) <= format.min_exponent and format.max_exponent <= 2 ** (width - 1) - 1


@cache
def constant(m: int, scale: str) -> float:
    """C(m); the Gaussian one by Simpson's rule on another integral: m copies of the maximum's expectation."""
    if scale != "gaussian":
        return (1 if scale == "paper" else HOFFER) / math.sqrt(2 * math.log(m))
    z = np.linspace(-14, 14, 200001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    f = z * m * density * below ** (m - 1)
    h = z[1] - z[0]
    largest = h / 3 * (f[0] + f[-1] + 4 * f[1:-1:2].sum() + 2 * f[2:-1:2].sum())
    return float(1 / (2 * largest))


def exact_sum(values: list[float]) -> float:
    return float(sum(map(Fraction, values), Fraction(0)))


class Model:
    """One training step of one batch [N, C, P]; ``constants``: C(m_k), or by `constant`."""

    def __init__(self, x, gamma, beta, config, eps, single, constants=None):
        self.config, self.single, self.shape = config, single, x.shape
        N, C, P = x.shape
        K = config.chunks
        cuts = [0, *np.cumsum([len(part) for part in np.array_split(np.arange(N * P), K)]).tolist()]
        self.constants = constants or [constant(cuts[k + 1] - cuts[k], config.scale) for k in range(K)]
        x = stored(x, config, False, single)
        self.mean, self.s, self.r, self.high, self.low = [], [], [], [], []
        self.gamma = [to_format(v, config.forward, single) for v in gamma]
        shift = [to_format(v, config.forward, single) for v in beta]
        self.xhat, y = np.empty(x.shape), np.empty(x.shape)
        for c in range(C):
            line = [x[n, c, p] for n in range(N) for p in range(P)]
            parts = [line[cuts[k] : cuts[k + 1]] for k in range(K)]
            self.high.append([cuts[k] + parts[k].index(max(parts[k])) for k in range(K)])
            self.low.append([cuts[k] + parts[k].index(min(parts[k])) for k in range(K)])
            total = 0.0
            for k in range(K):
                total += self.constants[k] * (max(parts[k]) - min(parts[k]))
            self.s.append(total / K + eps)
            self.mean.append(to_format(exact_sum(line) / len(line), config.statistics, False))
            self.r.append(to_format(1 / self.s[c], config.statistics, False))
            for n in range(N):
                for p in range(P):
                    h = to_format((x[n, c, p] - self.mean[c]) * self.r[c], config.forward, single)
                    self.xhat[n, c, p] = h
                    y[n, c, p] = self.gamma[c] * h + shift[c]
        self.y = stored(y, config, False, single)

    def backward(self, grad):
        """dx, dgamma, dbeta."""
        config, (N, C, P) = self.config, self.shape
        form = config.backward
        wide = None
        if form is not None and config.statistics is not None:
            wide = Float(form.mantissa + 8, form.min_exponent, form.max_exponent, form.subnormals, form.rounding)
        g, dx = stored(grad, config, True, self.single), np.empty(grad.shape)
        dgamma, dbeta = [], []
        for c in range(C):
            line = g[:, c].ravel().tolist()
            plain = exact_sum(line)
            products = [a * b for a, b in zip(line, self.xhat[:, c].ravel().tolist(), strict=True)]
            S = to_format(exact_sum(products), wide, False)
            mean = to_format(plain / len(line), wide, False)
            dgamma.append(S)
            dbeta.append(to_format(plain, wide, False))
            slope = self.gamma[c] * self.r[c]
            out = [(v - mean) * slope for v in line]
            for k in range(config.chunks):
                amount = slope * self.constants[k] * S / config.chunks
                if self.high[c][k] != self.low[c][k]:
                    out[self.high[c][k]] -= amount
                    out[self.low[c][k]] += amount
            dx[:, c] = np.array(out).reshape(N, P)
        return stored(dx, config, True, self.single), np.array(dgamma), np.array(dbeta)
